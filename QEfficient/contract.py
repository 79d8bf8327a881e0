# SPDX-License-Identifier: BSD-3-Clause
"""The contract of a graph folder: its files, its inputs and outputs, and the manifest that records them.

``export`` writes it, ``compile`` and ``runtime`` read it. Knows no PyTorch and no ONNX.

A graph folder (and a program folder, which keeps the same contract) holds::

    model.onnx            the graph; its large initializers are external data
    weights.*             what the external data points to: links to the checkpoint, or written files
    manifest.json         this module's Manifest
    neutral.safetensors   adapter inputs of "base" that are not zero (only for methods that need it)
    adapters/NAME.safetensors   the adapters exported with the graph, ready to be bound
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from QEfficient.errors import ArtifactError

MODEL_FILE = "model.onnx"
MANIFEST_FILE = "manifest.json"
NEUTRAL_FILE = "neutral.safetensors"
ADAPTERS_DIR = "adapters"
FORMAT_VERSION = 1

INPUT_IDS = "input_ids"
POSITION_IDS = "position_ids"
LOGITS = "logits"
RETAINED = "_RetainedState"

PRECISIONS = ("fp32", "bf16", "int8", "int4")
"""How a program may hold the base's weights: its option ``precision``."""

BASE = "base"
"""The name that selects no adapter."""

ONE_ROW_CHUNKS = "one_row_chunks"
"""Manifest option of a program: a call of several tokens behind earlier ones takes one row. A session splits such calls."""

ONE_TOKEN = "one_token"
"""Manifest option of a graph or program: a call takes one token of each row, and every row has one, since each token changes
a recurrent state. A session splits calls. A row whose position is 0 begins with an empty state."""

ALL_TARGETS = "all_targets"
"""Manifest option of a graph: an adapter has to bring every input. None of them is without effect by its own value, since
targets share tensors (a bank of vectors, say) that an adapter without some of the targets fills."""

MIXED = "mixed"
"""Manifest option of a program: rows of one call may run with different adapters, cut into pieces along their rank. Its value
lists, for each kind of modules, the adapter's inputs; ``ADAPTER_MASK`` says which row each place of a piece is for."""

KERNELS = "kernels"
"""Manifest option of a program: it uses operators of our own, compiled from the sources with this digest. A session compiles them for its
machine, or finds them in the cache."""

ADAPTER_MASK = "adapter_mask"
"""Input of a mixed program, ``(batch_size, places, pieces)`` float32: 1 where a place of a piece is a row's, else 0; the pieces are
those of all kinds of modules, in the order of ``MIXED``. With one adapter for all rows: ``(1, 1, rank)``, ones."""


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One state tensor of the graph, ``past_key.0`` for example.

    Attributes:
        name: Input name; the output is ``name + RETAINED``.
        shape: Dimensions; the strings ``"batch_size"`` and ``"ctx_len"`` are filled in by the session.
        dtype: NumPy name of the element type.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """One adapter tensor that the graph takes as an input.

    Attributes:
        name: Input name, as in the adapter's own file; a scaling is ``<module>.scaling`` with shape ``()``.
        shape: Dimensions; the string ``"rank"`` is dynamic and the same for every tensor of one call.
        dtype: NumPy name of the element type.
        perm: How a program wants the axes ordered; a session transposes once, when it loads the adapter. Empty: as they are.
        scaled_by: Name of the scaling that a session multiplies into this tensor when it loads the adapter; empty: none.
        bound: Whether the graph has this input; false for a scaling that a program has folded into a tensor.
        joined: Name of the program's input that this tensor is a part of, parts following one another along the rank; empty: it
            is an input itself.
        columns: For a part of a joined input with its ranks on a diagonal: its first column and the columns of the whole.
        held: NumPy name of the element type of the program's input, where it is another than the file's; empty: ``dtype``. ``"int8"`` has a
            scale for each rank, in a tail of the other axis (:mod:`QEfficient.kernels.ranks`).

    Name and shape always are those of the adapter's own file, so that one adapter fits a graph and its programs alike.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"
    perm: tuple[int, ...] = ()
    scaled_by: str = ""
    bound: bool = True
    joined: str = ""
    columns: tuple[int, ...] = ()
    held: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a graph is, and what it needs.

    Attributes:
        hash: Identity of everything that shapes the graph.
        base: The base's configuration (``config``), ``name_or_path``, ``architecture`` and weight identity (``weights``).
        peft_config: The ``PeftConfig`` whose structure was traced, as a dict; empty when exported without adapter.
        states: Cache and other state, in graph order.
        adapter: Adapter inputs, in graph order.
        logits: ``"last"``: ``(B, 1, V)`` of each row's last real token; ``"all"``: ``(B, S, V)``.
        vocab_size: ``V``.
        max_positions: Longest context that the base's configuration allows; 0 if it names none.
        files: Size in bytes and xxh3-128 digest of every file of the folder: ``{name: {"bytes": n, "xxh3": hex}}``.
        versions: Versions of the libraries that took part.
        options: Options of the export or compile that shaped the result.
        absent: Shards of the checkpoint that the graph was exported without: it cannot be run or compiled.
    """

    hash: str
    base: dict[str, Any]
    peft_config: dict[str, Any]
    states: tuple[StateSpec, ...]
    adapter: tuple[AdapterSpec, ...]
    logits: str
    vocab_size: int
    max_positions: int
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    absent: tuple[str, ...] = ()

    @property
    def is_program(self) -> bool:
        """Whether it is of a program; otherwise it is of a graph."""
        return "target" in self.options

    def require_weights(self, folder: Path) -> None:
        """Refuse a graph that was exported without its weights.

        Raises:
            ArtifactError: Names the first shard that is missing.
        """
        if self.absent:
            more = f" (and {len(self.absent) - 1} more)" if len(self.absent) > 1 else ""
            raise ArtifactError(
                f"{folder} has no weights: it was exported from the checkpoint's index alone, without {self.absent[0]}{more}. "
                f"Put the shards into {self.base.get('name_or_path') or 'the base'} and export again, without --without-weights."
            )

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` into ``folder``."""
        content = {"format": FORMAT_VERSION, **dataclasses.asdict(self)}
        (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a graph or program folder.

        Raises:
            ArtifactError: The folder holds no manifest, or one that this version cannot read.
        """
        path = Path(folder) / MANIFEST_FILE
        if not path.is_file():
            raise ArtifactError(
                f"{folder} is not an exported graph: it has no {MANIFEST_FILE}. Run `qefficient export`."
            )
        try:
            content = json.loads(path.read_text())
        except ValueError as e:
            raise ArtifactError(f"{path} is not valid JSON ({e}); export again.") from e
        version = content.pop("format", None)
        if version != FORMAT_VERSION:
            raise ArtifactError(f"{path} has format {version}, this version reads {FORMAT_VERSION}; export again.")
        content["states"] = tuple(StateSpec(s["name"], tuple(s["shape"]), s["dtype"]) for s in content["states"])
        content["adapter"] = tuple(
            AdapterSpec(
                **{
                    **a,
                    "shape": tuple(a["shape"]),
                    "perm": tuple(a.get("perm", ())),
                    "columns": tuple(a.get("columns", ())),
                }
            )
            for a in content["adapter"]
        )
        content["absent"] = tuple(content.get("absent", ()))
        return cls(**content)
