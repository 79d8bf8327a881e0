# SPDX-License-Identifier: BSD-3-Clause
"""A model that onnxruntime-genai's builder made, with one adapter baked in, run by ONNX Runtime as its folder says.

Only the graph's inputs and outputs are taken from the folder: that is all that its builder decides. Each row runs by
itself, without padding, so that what is wrong is the model and not a batch.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from QEfficient.errors import ArtifactError
from QEfficient.testing.candidate import Candidate, Tensors
from QEfficient.testing.compare import Logits
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import Stage
from QEfficient.testing.workload import Tokens

CONFIG = "genai_config.json"
ASKED = frozenset({"prefill", "chunked", "decode", "ragged", "distribution", "effect", "features", "greedy"})
"""Checks that make sense without a base, without other adapters, and without this project's folder."""


@dataclass(slots=True)
class _Layout:
    """Names and sizes of ``genai_config.json``."""

    file: Path
    names: dict[str, str]
    layers: int
    cache_shape: tuple[int, int]

    @classmethod
    def read(cls, folder: Path) -> "_Layout":
        """Read the folder's configuration.

        Raises:
            ArtifactError: The folder holds none, or one of another kind of model.
        """
        try:
            decoder = json.loads((folder / CONFIG).read_text())["model"]["decoder"]
            names = {**decoder["inputs"], **decoder["outputs"]}
            shape = (int(decoder["num_key_value_heads"]), int(decoder["head_size"]))
            return cls(folder / decoder["filename"], names, int(decoder["num_hidden_layers"]), shape)
        except (OSError, ValueError, KeyError, TypeError) as e:
            text = f"{str(folder)!r} holds no decoder of onnxruntime-genai ({CONFIG}: {type(e).__name__}: {e})"
            raise ArtifactError(f"{text}. Give the folder that its builder wrote.") from e

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yield each cache tensor's name as input and as output."""
        for kind in ("key", "value"):
            for layer in range(self.layers):
                yield self.names[f"past_{kind}_names"] % layer, self.names[f"present_{kind}_names"] % layer


@dataclass(slots=True)
class GenaiSession:
    """Runs the model; keeps keys and values of each row."""

    layout: _Layout
    session: Any
    _rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path) -> "GenaiSession":
        """Open the folder's model.

        Raises:
            ArtifactError: There is no model, or ONNX Runtime cannot load it.
        """
        layout = _Layout.read(folder)
        try:
            return cls(layout, onnxruntime.InferenceSession(str(layout.file), providers=["CPUExecutionProvider"]))
        except Exception as e:
            raise ArtifactError(f"ONNX Runtime cannot load {str(layout.file)!r}: {e}") from e

    def allocate(self, batch_size: int, ctx_len: int) -> None:
        """Make room for so many rows; the cache grows as it is filled."""
        self._rows = [self._empty() for _ in range(batch_size)]

    def reset(self) -> None:
        """Start new sequences."""
        self._rows = [self._empty() for _ in self._rows]

    def load_adapter(self, name: str, tensors: Tensors) -> None:
        """Do nothing: the adapter is in the model."""

    def set_adapter(self, name: str) -> None:
        """Do nothing: the adapter is in the model."""

    def run(self, input_ids: Tokens, position_ids: Tokens) -> Logits:
        """Advance every row; return the logits of each row's last token, ``(B, 1, V)``."""
        pairs = zip(input_ids, position_ids, strict=True)
        return np.stack([self._row(i, ids[at >= 0], int(at.max())) for i, (ids, at) in enumerate(pairs)])

    def _row(self, row: int, ids: Tokens, last: int) -> Logits:
        start = last + 1 - len(ids)  # a row that is through repeats its last token
        names, pairs = self.layout.names, list(self.layout.pairs())
        feed = {past: self._rows[row][past][:, :, :start] for past, _ in pairs}
        feed[names["input_ids"]] = ids[None]
        feed[names["attention_mask"]] = np.ones((1, last + 1), dtype=np.int64)
        if "position_ids" in names:
            feed[names["position_ids"]] = np.arange(start, last + 1)[None]
        logits, *states = self.session.run([names["logits"], *(present for _, present in pairs)], feed)
        self._rows[row] = {past: state for (past, _), state in zip(pairs, states, strict=True)}
        found: Logits = logits[0, -1:].astype(np.float32)
        return found

    def _empty(self) -> dict[str, Any]:
        heads, size = self.layout.cache_shape
        types = {i.name: i.type for i in self.session.get_inputs()}
        half = {"tensor(float16)": np.float16}
        return {p: np.zeros((1, heads, 0, size), half.get(types[p], np.float32)) for p, _ in self.layout.pairs()}


@contextmanager
def opened_genai(folder: Path, reference: Reference, name: str) -> Iterator[Candidate]:
    """Yield the model, ready to be compared with one adapter in PyTorch."""
    session = GenaiSession.open(folder)
    yield Candidate(Stage.GRAPH, folder, session, reference, {}, {name: {}}, (name,), has_base=False)
