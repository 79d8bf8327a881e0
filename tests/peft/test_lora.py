# SPDX-License-Identifier: BSD-3-Clause
"""``QEffAutoLoraModelForCausalLM``: prompts with different adapters, in one batch."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from QEfficient.errors import AdapterMismatchError, AdapterNotFoundError, ConfigError, NotCompiledError
from QEfficient.peft.lora import QEffAutoLoraModelForCausalLM
from tests.tiny import lora, save_adapter, save_base


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Write a base and adapters: of other ranks, scalings and targets, and one of another structure."""
    work = tmp_path_factory.mktemp("lora")
    base = save_base(work / "base")
    kinds = {
        "wide": lora(r=8, use_rslora=True),
        "narrow": lora(r=2, lora_alpha=1),
        "few": lora(r=3, target_modules=["q_proj", "v_proj"]),
        "dora": lora(use_dora=True),
    }
    return base, {n: save_adapter(base, work / n, seed=i, config=c) for i, (n, c) in enumerate(kinds.items())}


@pytest.fixture(scope="module")
def model(folders):
    """Load and compile two of them, for two slots."""
    base, adapters = folders
    made = QEffAutoLoraModelForCausalLM.from_pretrained(base)
    for name in ("wide", "narrow"):
        made.load_adapter(adapters[name], name)
    made.compile(batch_size=2, ctx_len=32, prefill_seq_len=4)
    yield made
    made.close()


def expected(folders, prompt, name, count):
    """Return what PEFT gives one prompt alone, greedily."""
    base, adapters = folders
    peft = AutoModelForCausalLM.from_pretrained(base)
    if name != "base":
        peft = PeftModel.from_pretrained(peft, str(adapters[name])).eval()
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, peft(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


def test_any_number_of_prompts_in_their_order(folders, model):
    """Five prompts on two slots, and an adapter loaded after compiling: PEFT's tokens, in order, none dropped."""
    program = model.qpc_path
    model.load_adapter(folders[1]["few"], "few")
    names = ["few", "base", "wide", "narrow", "few"]
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 128, n).tolist() for n in (3, 9, 1, 6, 5)]
    got = model.generate(prompts, names, max_new_tokens=6, eos_ids=frozenset())
    assert got == [expected(folders, p, n, 6) for p, n in zip(prompts, names, strict=True)]
    assert model.generate(prompts[:1], names[:1], max_new_tokens=6, eos_ids=frozenset()) == got[:1]
    model.unload_adapter("few")
    assert (model.adapters, model.engine.adapters, model.qpc_path) == (("wide", "narrow"), ("wide", "narrow"), program)


def test_a_rejected_adapter_leaves_no_trace(folders, model):
    """DoRA's structure is not that of the compiled graph."""
    with pytest.raises(AdapterMismatchError, match="use_dora"):
        model.load_adapter(folders[1]["dora"], "dora")
    assert (model.adapters, model.engine.adapters) == (("wide", "narrow"), ("wide", "narrow"))


def test_wrong_calls_run_nothing(folders, model):
    """Lengths that differ, an unknown name, a prompt too long; and calls before compile."""
    before = model.engine.stats().requests.total()
    with pytest.raises(ConfigError, match="2 prompts need"):
        model.generate([[1], [2]], ["wide"])
    with pytest.raises(AdapterNotFoundError, match="did you mean 'wide'"):
        model.generate([[1], [2]], ["base", "wid"])
    with pytest.raises(ConfigError, match="does not fit"):
        model.generate([[1], [2] * 40], ["base", "wide"], max_new_tokens=4)
    assert model.engine.stats().requests.total() == before
    fresh = QEffAutoLoraModelForCausalLM.from_pretrained(folders[0])
    with pytest.raises(NotCompiledError):
        fresh.generate([[1]])
    with pytest.raises(ConfigError, match="load an adapter first"):
        fresh.compile()
