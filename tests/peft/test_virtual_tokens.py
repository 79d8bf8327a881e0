# SPDX-License-Identifier: BSD-3-Clause
"""Prompt learning: virtual tokens are the first entries of the cache, on the bare base's graph."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from QEfficient import QEffAutoPeftModelForCausalLM
from QEfficient.contract import Manifest
from QEfficient.errors import AdapterMismatchError, ConfigError
from QEfficient.peft.adapters import Adapter, fit, read_exported
from QEfficient.runtime.engine import Engine
from QEfficient.runtime.prefill import prefill
from QEfficient.runtime.requests import Request
from QEfficient.runtime.session import OrtSession
from tests.tiny import VOCAB, make_base, make_peft

KINDS = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}


def trained(kind: str, tokens: int, seed: int) -> PeftModel:
    """Return a tiny Llama with random virtual tokens."""
    config: PeftConfig = KINDS[kind](task_type="CAUSAL_LM", num_virtual_tokens=tokens)
    model = get_peft_model(make_base("llama"), config, adapter_name="a").eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.prompt_encoder.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_virtual_tokens_equal_pytorch(kind: str, tmp_path: Path) -> None:
    """Two adapters with different numbers of virtual tokens, and the base, give PyTorch's logits on one program."""
    models = {"first": trained(kind, 4, 1), "second": trained(kind, 7, 2)}
    made = QEffAutoPeftModelForCausalLM(models["first"])
    folder = made.export(tmp_path / "graph").parent
    manifest = Manifest.read(folder)
    assert manifest.adapter == ()
    session = OrtSession(made.compile(ctx_len=64))
    exported = fit(read_exported(folder / "adapters" / "a.safetensors"), manifest)
    session.load_adapter("first", exported)
    session.load_adapter("second", fit(Adapter.from_model(models["second"], "a"), manifest))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCAB, (length,), generator=generator) for length in (11, 5)]
    seen = []
    for name in ("first", "second", "base"):
        model = models.get(name, make_base("llama"))
        with torch.no_grad():
            want = np.stack([model(input_ids=row[None], use_cache=False).logits[0, -1].numpy() for row in rows])
        session.set_adapter(name)
        session.allocate(2, 24)
        got = prefill(session, [row.numpy() for row in rows], chunk_len=4)
        assert np.abs(got - want).max() < 1e-4 * np.ptp(want)
        seen.append(want)
    assert min(np.abs(seen[i] - seen[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-2


def test_generate_with_virtual_tokens(tmp_path: Path) -> None:
    """Greedy generation gives the tokens that PyTorch's own greedy loop gives, through the public class."""
    model = trained("prompt", 4, 1)
    made = QEffAutoPeftModelForCausalLM(model)
    made.export(tmp_path / "graph")
    made.compile(ctx_len=64)
    ids = torch.tensor([[5, 9, 17, 3]])
    want = ids
    with torch.no_grad():
        for _ in range(6):
            want = torch.cat([want, model(input_ids=want, use_cache=False).logits[:, -1].argmax(-1)[:, None]], 1)
    assert made.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None).tolist() == want.tolist()


def test_rows_keep_what_they_began_with_and_must_fit(tmp_path: Path) -> None:
    """A context that virtual tokens leave no room for, and entries of another base, are refused with the sizes."""
    model = trained("prefix", 4, 1)
    folder = QEffAutoPeftModelForCausalLM(model).export(tmp_path / "graph").parent
    tensors = fit(Adapter.from_model(model, "a"), Manifest.read(folder))
    session = OrtSession(folder)
    session.allocate(1, 3)
    session.load_adapter("a", tensors)
    session.set_adapter("a")
    with pytest.raises(ConfigError, match="row 0 needs 5 positions, 4 of them for virtual tokens, the cache holds 3"):
        session.run(np.array([[5]]), np.array([[0]]))
    wrong = {name: array[:, :, :8] if name == "past_value.1" else array for name, array in tensors.items()}
    with pytest.raises(AdapterMismatchError, match=r"begins 'past_value.1' with \(2, 4, 8\)"):
        session.load_adapter("b", wrong)
    assert session.adapters == ("a",)


def test_virtual_tokens_in_an_engine(tmp_path: Path) -> None:
    """Rows with 4 and 7 virtual tokens, with LoRA and with none share a batch, and prefixes with what stands before them."""
    models = {
        "first": trained("prompt", 4, 1),
        "second": trained("prefix", 7, 2),
        "lora": make_peft(make_base("llama")),
    }
    made = QEffAutoPeftModelForCausalLM(models["lora"])
    manifest = Manifest.read(made.export(tmp_path / "graph").parent)
    engine = Engine(made.compile(ctx_len=48, mixed=True), slots=3, ctx_len=48, chunk_len=5, threads=1)
    engine.load_adapter("lora", made.tensors_of("default"))
    for name in ("first", "second"):
        engine.load_adapter(name, fit(Adapter.from_model(models[name], "a"), manifest))
    prompts = torch.randint(3, VOCAB, (6, 14), generator=torch.Generator().manual_seed(0))
    prompts[4:, :12] = prompts[0, :12]  # begins like the first, which has the same adapter
    names = ["first", "second", "base", "lora", "first", "first"]
    with engine:
        streams = [
            engine.submit(Request(prompt_ids=p.tolist(), adapter=n, max_new_tokens=5))
            for p, n in zip(prompts, names, strict=True)
        ]
        got = [[token.id for token in stream] for stream in streams]
        assert engine.stats().reused["first"] == 24
        with pytest.raises(
            ConfigError, match="7 virtual tokens of the adapter, 14 prompt tokens and 28 new ones are 49"
        ):
            engine.submit(Request(prompt_ids=prompts[0].tolist(), adapter="second", max_new_tokens=28))
    for prompt, name, answer in zip(prompts, names, got, strict=True):
        ids, model = prompt[None], models.get(name, make_base("llama"))
        with torch.no_grad():
            for _ in range(5):
                ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)[:, None]], 1)
        assert answer == ids[0, 14:].tolist(), name
