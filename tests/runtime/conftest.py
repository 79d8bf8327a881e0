# SPDX-License-Identifier: BSD-3-Clause
"""A tiny Llama with two LoRA adapters of different rank and scaling, exported and compiled once."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from QEfficient.compile.program import compile_graph
from QEfficient.contract import Manifest
from QEfficient.export.torch_to_onnx import export_graph
from QEfficient.runtime.session import OrtSession

VOCAB = 97
TARGETS = ["q_proj", "v_proj", "down_proj"]


@dataclass(frozen=True)
class Tiny:
    """A PEFT model in PyTorch, what it became, and its adapters as a session takes them."""

    model: PeftModel
    graph: Path
    program: Path
    adapters: dict[str, dict[str, np.ndarray]]

    def logits(self, rows: Sequence[np.ndarray], adapter: str = "base") -> np.ndarray:
        """Return PyTorch's logits behind the last token of each row, ``(B, V)``.

        Rows are padded on the right: what comes later does not change a causal model's earlier logits.
        """
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for b, row in enumerate(rows):
            ids[b, : len(row)] = torch.from_numpy(row)
        if adapter != "base":
            self.model.set_adapter(adapter)
        with torch.no_grad(), self.model.disable_adapter() if adapter == "base" else nullcontext():
            logits = self.model(ids).logits
        return np.stack([logits[b, len(row) - 1].numpy() for b, row in enumerate(rows)])


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are faster on one thread, much so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Build, export and compile the model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    base = LlamaForCausalLM(config).eval()
    base.generation_config.pad_token_id = base.generation_config.eos_token_id = base.generation_config.bos_token_id = (
        None
    )
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False), "one")
    model.add_adapter("two", LoraConfig(r=2, lora_alpha=1, target_modules=TARGETS, init_lora_weights=False))
    model.eval()
    graph = export_graph(model, tmp_path_factory.mktemp("graphs") / "tiny", adapter_name="one")
    names = [a.name for a in Manifest.read(graph).adapter]
    adapters = {}
    for name, scaling in (("one", 2.0), ("two", 0.5)):
        tensors = {k: v.numpy().copy() for k, v in get_peft_model_state_dict(model, adapter_name=name).items()}
        adapters[name] = tensors | {n: np.array(scaling, np.float32) for n in names if n.endswith(".scaling")}
    return Tiny(model, graph, compile_graph(graph), adapters)


@pytest.fixture(params=["graph", "program"])
def session(tiny: Tiny, request: pytest.FixtureRequest) -> OrtSession:
    """Open the graph, and the program."""
    return OrtSession(getattr(tiny, request.param), threads=1)
