# SPDX-License-Identifier: BSD-3-Clause
"""PEFT methods through one mechanism: all tensors are inputs, a second adapter runs on the same graph, base is base."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    ArrowConfig,
    C3AConfig,
    FourierFTConfig,
    FrodConfig,
    IA3Config,
    LilyConfig,
    LNTuningConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PolyConfig,
    ShadowConfig,
    ShiraConfig,
    TinyLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    XLoraConfig,
    get_peft_model,
)

from QEfficient import QEffAutoPeftModelForCausalLM
from QEfficient.contract import ALL_TARGETS, AdapterSpec, Manifest
from QEfficient.errors import AdapterMismatchError, UnsupportedError
from QEfficient.export.lift import lift, refuse
from QEfficient.peft.adapters import Adapter, fit, neutral_tensors
from QEfficient.peft.neutral import neutral_of
from QEfficient.peft.tasks import choose_task, tasks_of
from QEfficient.runtime.prefill import prefill
from QEfficient.runtime.session import OrtSession
from tests.tiny import VOCAB, lora, make_base

TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, PeftConfig] = {
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=8),
    "oft": OFTConfig(task_type="CAUSAL_LM", target_modules=TARGETS, oft_block_size=16, r=0, use_cayley_neumann=False),
    "vblora": VBLoRAConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, num_vectors=8, vector_length=8, topk=2
    ),
    "fourierft": FourierFTConfig(task_type="CAUSAL_LM", target_modules=TARGETS, n_frequency=32),
    "shira": ShiraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2),
    "ln_tuning": LNTuningConfig(task_type="CAUSAL_LM"),
    "poly": PolyConfig(task_type="CAUSAL_LM", target_modules=TARGETS, r=4, n_tasks=3, n_skills=2),
    "shadow": ShadowConfig(task_type="CAUSAL_LM", r=4),
    "c3a": C3AConfig(task_type="CAUSAL_LM", target_modules=TARGETS, block_size=16),
    "frod": FrodConfig(task_type="CAUSAL_LM", target_modules=TARGETS),
    "adaption_prompt": AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1),
}


def trained(config: PeftConfig, seed: int, folder: Path) -> PeftModel:
    """Return a model with an adapter whose every trainable tensor was moved, saved and loaded again."""
    model = get_peft_model(make_base("llama"), copy.deepcopy(config), adapter_name="a")
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(folder))
    loaded = PeftModel.from_pretrained(make_base("llama"), str(folder / "a"), adapter_name="a").eval()
    if tasks := tasks_of(config):
        choose_task(loaded, "a", seed % tasks)
    return loaded


@pytest.mark.parametrize("method", CONFIGS)
def test_method_equals_pytorch(method: str, tmp_path: Path) -> None:
    """Every tensor of an adapter can be swapped."""
    swap_on_one_program(CONFIGS[method], tmp_path)


def swap_on_one_program(config: PeftConfig, tmp_path: Path) -> None:
    """Two adapters of one configuration, and the base, each give PyTorch's logits on one program; no tensor is baked in."""
    first, second = (trained(config, seed, tmp_path / str(seed)) for seed in (1, 2))
    made = QEffAutoPeftModelForCausalLM(first)
    folder = made.export(tmp_path / "graph").parent
    # What PEFT saves besides an adapter's tensors: base weights, and sizes, which are the shapes of others.
    assert {n for n in made.adapter_weights["a"] if "base_layer" not in n and "_size" not in n} <= {
        a.name for a in Manifest.read(folder).adapter
    }
    session = OrtSession(made.compile(ctx_len=32))
    manifest, neutral = Manifest.read(folder), neutral_tensors(folder)
    session.load_adapter("first", fit(Adapter.from_model(first, "a"), manifest, neutral))
    session.load_adapter("second", fit(Adapter.from_model(second, "a"), manifest, neutral))
    torch.manual_seed(0)
    rows = [torch.randint(3, VOCAB, (length,)) for length in (11, 5)]
    seen = []
    for name, model in (("first", first), ("second", second), ("base", make_base("llama"))):
        with torch.no_grad():
            want = np.stack([model(input_ids=row[None]).logits[0, -1].numpy() for row in rows])
        session.set_adapter(name)
        session.allocate(2, 32)
        got = prefill(session, [row.numpy() for row in rows], chunk_len=4)
        # float32 sums in another order, through a few hundred operations: seen 1e-6 of the range, 5e-6 for FourierFT
        assert np.abs(got - want).max() < 1e-4 * np.ptp(want)
        seen.append(want)
    assert np.abs(seen[0] - seen[1]).max() > 1e-3
    assert np.abs(seen[0] - seen[2]).max() > 1e-3


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LilyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4), "LILY .* averages over all tokens"),
        (lora(alora_invocation_tokens=[5, 6]), "aLoRA .* looks for in the prompt"),
    ],
    ids=["lily", "alora"],
)
def test_method_is_refused_with_the_reason(config: PeftConfig, reason: str, tmp_path: Path) -> None:
    """What would be wrong, or has no place in the graph, is refused before any work."""
    made = QEffAutoPeftModelForCausalLM(get_peft_model(make_base("llama"), copy.deepcopy(config), adapter_name="a"))
    with pytest.raises(UnsupportedError, match=reason):
        made.export(tmp_path / "graph")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lora(arrow_config=ArrowConfig()), "Arrow .* other adapters"),
        (XLoraConfig(hidden_size=64, adapters={}), "XLORA .* runs the model twice"),
    ],
    ids=["arrow", "xlora"],
)
def test_mixtures_of_adapters_are_refused(config: PeftConfig, reason: str) -> None:
    """A configuration that says that an adapter is made of others is refused by itself."""
    with pytest.raises(UnsupportedError, match=reason):
        refuse(config)


def test_inactive_adapter_is_read_too() -> None:
    """PEFT takes the modules of an inactive adaption prompt out of the model; its tensors are found all the same."""
    config = CONFIGS["adaption_prompt"]
    model = get_peft_model(make_base("llama"), copy.deepcopy(config), adapter_name="a")
    model.add_adapter("b", copy.deepcopy(config))
    read = {name: Adapter.from_model(model, name).tensors for name in ("a", "b")}
    assert read["a"].keys() == read["b"].keys() != set()
    assert model.active_adapter == "a"


@pytest.mark.parametrize("method", ["adaption_prompt", "shadow", "ia3", "ln_tuning"])
def test_base_keeps_its_names(method: str) -> None:
    """Whatever PEFT wraps a base in, its tensors have their names in the checkpoint, so that they are linked."""
    bare = make_base("llama")
    model = get_peft_model(make_base("llama"), copy.deepcopy(CONFIGS[method]), adapter_name="a")
    own = {n for n, _ in (*bare.named_parameters(), *bare.named_buffers())}
    assert set(lift(model, "a").base) == own


def test_a_number_that_is_no_input_must_be_equal(tmp_path: Path) -> None:
    """SHADOW's alpha is a number inside its forward: an adapter with another one does not fit the graph."""
    config = ShadowConfig(task_type="CAUSAL_LM", r=4, shadow_alpha=0.1).to_dict()
    manifest = Manifest("", {}, config, (), (), "last", VOCAB, 0, {}, {})
    other = Adapter("other", ShadowConfig(task_type="CAUSAL_LM", r=4, shadow_alpha=0.3), {}, {})
    with pytest.raises(AdapterMismatchError, match=r"shadow_alpha is 0.3, exported with 0.1"):
        fit(other, manifest)


@pytest.mark.parametrize(
    ("config", "apart"),
    [
        (VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=8), True),
        (TinyLoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS), False),
        (
            VBLoRAConfig(task_type="CAUSAL_LM", target_modules=TARGETS, r=4, num_vectors=8, vector_length=8, topk=2),
            False,
        ),
    ],
    ids=["vera", "tinylora", "vblora"],
)
def test_missing_target_beside_shared_tensors(config: PeftConfig, apart: bool) -> None:
    """What targets share must not give an effect to a target that an adapter lacks; where it always does, that is said."""
    model = get_peft_model(make_base("llama"), copy.deepcopy(config), adapter_name="a")
    assert neutral_of(model, "a").apart == apart


def test_adapter_that_lacks_a_needed_target_is_refused() -> None:
    """A graph none of whose targets can be nothing by itself takes adapters with all of them."""
    config = lora(target_modules=TARGETS)
    spec = AdapterSpec("bank", (2,))
    made = Manifest("", {}, config.to_dict(), (), (spec,), "last", VOCAB, 0, {}, {}, {ALL_TARGETS: True})
    with pytest.raises(AdapterMismatchError, match="lacks 'bank'"):
        fit(Adapter("some", config, {}, {}), made)
    assert fit(Adapter("all", config, {"bank": np.ones(2, np.float32)}, {}), made)["bank"].tolist() == [1, 1]
