# SPDX-License-Identifier: BSD-3-Clause
"""Exported tiny models, and a way to look at what single passes make of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import Gemma2Config

from QEfficient.compile.adapters import lowered_specs
from QEfficient.compile.attention import attends
from QEfficient.compile.weightfile import store_weights
from QEfficient.contract import KERNELS, MODEL_FILE, ONE_ROW_CHUNKS, Manifest
from QEfficient.export.torch_to_onnx import export_graph
from QEfficient.kernels.library import DOMAIN, sources
from QEfficient.runtime.prefill import prefill
from QEfficient.runtime.session import OrtSession
from QEfficient.store import link_or_copy
from tests.tiny import SHAPE, STYLES, VOCAB, lora, make_base, make_peft

# Bounds low enough to change every score.
SOFTCAPPED = Gemma2Config(**SHAPE, head_dim=16, sliding_window=5, attn_logit_softcapping=0.5)
TARGETS = {"gpt2": ["c_attn", "c_fc"], "phi3": ["qkv_proj", "down_proj"]}


@dataclass(frozen=True)
class Exported:
    """A tiny PEFT model and its graph."""

    model: PeftModel
    graph: Path

    @property
    def adapter(self) -> dict[str, np.ndarray]:
        """The adapter as a session takes it."""
        tensors = {k: v.numpy().copy() for k, v in get_peft_model_state_dict(self.model).items()}
        names = (a.name for a in Manifest.read(self.graph).adapter if a.name.endswith(".scaling"))
        return tensors | {n: np.array(2, np.float32) for n in names}

    def load(self) -> ir.Model:
        """Read the graph."""
        return ir.load(self.graph / MODEL_FILE)

    def session(self, model: ir.Model, folder: Path) -> OrtSession:
        """Open ``model``, a rewrite of the graph, with the adapter selected."""
        folder.mkdir()
        manifest = Manifest.read(self.graph)
        for name in manifest.files:
            if name != MODEL_FILE:
                link_or_copy(self.graph / name, folder / name)
        store_weights(model, folder)
        ir.save(model, folder / MODEL_FILE)
        own = {KERNELS: sources()} if any(n.domain == DOMAIN for n in model.graph) else {}
        specs = lowered_specs(model, manifest.adapter)
        replace(manifest, adapter=specs, files={}, options={ONE_ROW_CHUNKS: attends(model), **own}).write(folder)
        session = OrtSession(folder, threads=1)
        session.load_adapter("a", self.adapter)
        session.set_adapter("a")
        return session


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """Return a function that exports a style of model, once for each type of its weights."""
    made: dict[tuple[str, torch.dtype], Exported] = {}

    def export(style: str, dtype: torch.dtype = torch.float32) -> Exported:
        if (style, dtype) not in made:
            torch.manual_seed(0)
            targets = TARGETS.get(style, ["q_proj", "v_proj", "down_proj"])
            config = lora(target_modules=targets, fan_in_fan_out=style == "gpt2")
            base = make_base(SOFTCAPPED if style == "softcapped" else STYLES[style]).to(dtype)
            model = make_peft(base, config=config)
            folder = tmp_path_factory.mktemp(style) / "graph"
            made[style, dtype] = Exported(model, export_graph(model, folder, adapter_name="default"))
        return made[style, dtype]

    return export


@pytest.fixture(scope="session")
def trace() -> Callable[[OrtSession], list[np.ndarray]]:
    """Return a function that runs a session through prompts, chunks and single tokens, and gives all logits."""

    def run(session: OrtSession) -> list[np.ndarray]:
        logits: list[Any] = []
        for seed, (lengths, chunk_len) in enumerate([((1,), 4), ((13,), 5), ((8, 8), 8), ((3, 17, 1, 10), 4)]):
            rng = np.random.default_rng(seed)
            session.allocate(len(lengths), 24)
            logits.append(prefill(session, [rng.integers(0, VOCAB, n) for n in lengths], chunk_len=chunk_len))
            for ahead in range(4):
                positions = np.array(lengths)[:, None] + ahead
                logits.append(session.run(rng.integers(0, VOCAB, (len(lengths), 1)), positions)[:, 0])
        return logits

    return run
