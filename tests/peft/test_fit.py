# SPDX-License-Identifier: BSD-3-Clause
"""What fits a graph, method by method: exactly what its tensors allow, and then it computes PyTorch's logits."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    PeftConfig,
    PromptTuningConfig,
    VeraConfig,
)

from QEfficient import QEffAutoPeftModelForCausalLM
from QEfficient.contract import Manifest
from QEfficient.errors import AdapterMismatchError
from QEfficient.peft.adapters import Adapter, fit, neutral_tensors
from QEfficient.runtime.session import OrtSession
from tests.tiny import lora, make_base, make_peft

T = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
OFT = {**T, "r": 0, "use_cayley_neumann": False}
PROMPT = {"task_type": "CAUSAL_LM"}
CASES: dict[str, tuple[PeftConfig, PeftConfig, PeftConfig, str]] = {
    # method: exported with, another that fits, one that does not, and what is said of it
    "ia3": (
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"]),
        r"it has '.*layers\.0\.mlp\.up_proj\.ia3_l', which is not an input",
    ),
    "loha": (
        LoHaConfig(**T, r=4),
        LoHaConfig(**T, r=4, alpha=3, module_dropout=0.1),
        LoHaConfig(**T, r=8),
        r"hada_w1_a has shape \[64, 8\], the graph takes \[64, 4\]",
    ),
    "lokr": (LoKrConfig(**T, r=4), LoKrConfig(**T, r=4, rank_dropout=0.1), lora(), "peft_type is 'LORA', .* 'LOKR'"),
    "vera": (
        VeraConfig(**T, r=8),
        VeraConfig(**T, r=8, vera_dropout=0.1, projection_prng_key=7, d_initial=0.3),
        VeraConfig(**T, r=4),
        r"vera_lambda_d has shape \[4\], the graph takes \[8\]",
    ),
    "oft": (
        OFTConfig(**OFT, oft_block_size=16),
        OFTConfig(**OFT, oft_block_size=16, module_dropout=0.1),
        OFTConfig(**OFT, oft_block_size=8),
        "oft_block_size is 8, exported with 16",
    ),
    "prompt": (
        PromptTuningConfig(**PROMPT, num_virtual_tokens=3),
        PromptTuningConfig(**PROMPT, num_virtual_tokens=5),
        lora(),
        "peft_type is 'LORA', exported with None",
    ),
}


SLOW = {"loha", "lokr", "oft"}  # by the same code as the others; kept out of the default run for its length


@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.slow] if m in SLOW else []) for m in CASES])
def test_fits_as_its_tensors_do(method: str, tmp_path: Path) -> None:
    """Another adapter whose tensors fit runs on the graph as in PyTorch; the first difference of one that does not is named."""
    first, fits, not_fits, message = (copy.deepcopy(part) for part in CASES[method])
    made = QEffAutoPeftModelForCausalLM(make_peft(make_base("llama"), config=first, name="x"))
    folder = made.export(tmp_path / "graph").parent
    manifest, neutral = Manifest.read(folder), neutral_tensors(folder)
    other = make_peft(make_base("llama"), config=fits, name="y", seed=4)
    session = OrtSession(folder, threads=1)
    session.load_adapter("y", fit(Adapter.from_model(other, "y"), manifest, neutral))
    session.set_adapter("y")
    session.allocate(1, 16)
    ids = np.array([[3, 14, 15, 92, 6]])
    with torch.no_grad():
        want = other(input_ids=torch.tensor(ids)).logits[0, -1].numpy()
    got = session.run(ids, np.arange(5)[None])[0, -1]
    assert np.abs(got - want).max() < 1e-4 * np.ptp(want)
    with pytest.raises(AdapterMismatchError, match=f"'z' does not fit the graph: .*{message}"):
        fit(Adapter.from_model(make_peft(make_base("llama"), config=not_fits, name="z"), "z"), manifest, neutral)
