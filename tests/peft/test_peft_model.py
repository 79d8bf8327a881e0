# SPDX-License-Identifier: BSD-3-Clause
"""QEffAutoPeftModelForCausalLM from construction to generation."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from QEfficient import QEffAutoPeftModelForCausalLM
from QEfficient.contract import Manifest
from QEfficient.errors import AdapterMismatchError, AdapterNotFoundError, ArtifactError, ConfigError, NotCompiledError
from QEfficient.export import torch_to_onnx
from tests.tiny import STYLES, VOCAB, lora, make_base, make_peft, perturb, save_adapter, save_base

BASES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2", "phi3"]
ADAPTERS = {
    "attention": LoraConfig(
        target_modules=["q_proj", "v_proj"], r=4, lora_alpha=8, task_type="CAUSAL_LM", lora_dropout=0.1
    ),
    "all-linear": LoraConfig(target_modules="all-linear", r=8, lora_alpha=4, task_type="CAUSAL_LM", use_rslora=True),
}


def create_peft_model(base: str, adapter: PeftConfig, name: str = "adapter_0") -> tuple[PeftModel, PeftConfig]:
    """Return a tiny base with one adapter whose tensors all have an effect, and the adapter's configuration."""
    # PEFT writes the modules that it found into the configuration: each model gets a copy.
    return make_peft(make_base(base), config=copy.deepcopy(adapter), name=name), adapter


def prompts(rows: int = 4, length: int = 17) -> dict[str, torch.Tensor]:
    """Return left-padded prompts of different lengths."""
    torch.manual_seed(7)
    ids = torch.randint(3, VOCAB, (rows, length))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 3 * row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> QEffAutoPeftModelForCausalLM:
    """A compiled tiny Llama with two adapters of different rank, targets and scaling."""
    model = make_peft(make_base("llama"), config=lora(), name="a")
    model.add_adapter("b", lora(r=2, lora_alpha=32, target_modules=["q_proj", "up_proj"]))
    perturb(model, "b", seed=2)
    model.set_adapter("a")
    made = QEffAutoPeftModelForCausalLM(model)
    made.export(tmp_path_factory.mktemp("export") / "graph")
    made.compile(prefill_seq_len=8, ctx_len=128)
    return made


# -- construction


def test_only_a_peft_model_is_accepted() -> None:
    """A plain model is a TypeError that says what to do."""
    with pytest.raises(TypeError, match=r"expected a PeftModelForCausalLM, got LlamaForCausalLM.*get_peft_model"):
        QEffAutoPeftModelForCausalLM(make_base("llama"))  # type: ignore[arg-type]


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_adapter_weights_have_the_names_of_the_file(adapter: PeftConfig, tmp_path: Path) -> None:
    """``adapter_weights`` holds, for each adapter, exactly what PEFT would save."""
    from safetensors.numpy import load_file

    model, _ = create_peft_model("llama", adapter)
    made = QEffAutoPeftModelForCausalLM(model)
    model.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "adapter_0" / "adapter_model.safetensors")
    assert made.adapter_weights.keys() == {"adapter_0"}
    assert made.adapter_weights["adapter_0"].keys() == saved.keys()
    for name, array in saved.items():
        np.testing.assert_array_equal(made.adapter_weights["adapter_0"][name], array)


def test_from_pretrained_loads_base_and_adapter(tmp_path: Path) -> None:
    """An adapter folder is enough: the base is the one that it names."""
    base = save_base(tmp_path / "base")
    made = QEffAutoPeftModelForCausalLM.from_pretrained(save_adapter(base, tmp_path / "sql"), "sql")
    assert made.active_adapter == "sql"
    assert list(made.adapter_weights) == ["sql"]
    assert torch.equal(made.model.base_model.model.lm_head.weight, make_base("llama").lm_head.weight)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        ("no folder", AdapterNotFoundError, "does not exist"),
        ("a file", AdapterNotFoundError, "is a file; an adapter is a folder: give '.*adapter'$"),
        ("no config", AdapterNotFoundError, "has no adapter_config.json"),
        ("no base", ConfigError, "names no base model"),
        ("base gone", ConfigError, "base folder .* does not exist"),
        ("truncated", ArtifactError, "damaged or not a safetensors file"),
        ("other shapes", AdapterMismatchError, "does not fit the base: size mismatch"),
    ],
)
def test_from_pretrained_refuses(damage: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    """Whatever is wrong with an adapter folder is said in one sentence, as our own error."""
    base = save_base(tmp_path / "base")
    folder = save_adapter(base, tmp_path / "adapter")
    config = folder / "adapter_config.json"
    if damage == "no folder":
        folder = tmp_path / "nowhere"
    elif damage == "a file":
        folder = config
    elif damage == "no config":
        config.unlink()
    elif damage == "no base":
        config.write_text(config.read_text().replace(f'"{base}"', "null"))
    elif damage == "base gone":
        base.rename(tmp_path / "moved")
    elif damage == "truncated":
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        wide = STYLES["llama"].__class__(**{**STYLES["llama"].to_dict(), "hidden_size": 128})
        save_base(tmp_path / "base", wide)
    with pytest.raises(error, match=message):
        QEffAutoPeftModelForCausalLM.from_pretrained(folder, "a")


def test_name_of_a_module_is_refused(tmp_path: Path) -> None:
    """An adapter called like a part of the base would be saved under wrong names by PEFT."""
    base = save_base(tmp_path / "base")
    folder = save_adapter(base, tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"cannot be called 'mlp' \(model\.layers\.0\.mlp"):
        QEffAutoPeftModelForCausalLM.from_pretrained(folder, "mlp")
    with pytest.raises(ConfigError, match="'base' means no adapter"):
        QEffAutoPeftModelForCausalLM.from_pretrained(folder, "base")


# -- export


@pytest.mark.parametrize(("base", "adapter"), [*((b, "all-linear") for b in BASES), ("llama", "attention")])
def test_export_makes_adapter_tensors_inputs(base: str, adapter: str, tmp_path: Path) -> None:
    """Every adapter tensor is an input of the graph, with an output that retains it, and no initializer."""
    made = QEffAutoPeftModelForCausalLM(create_peft_model(base, ADAPTERS[adapter])[0])
    path = made.export(tmp_path / "graph")
    assert path == made.onnx_path
    assert path.parent == tmp_path / f"graph-{made.export_hash}"
    graph = onnx.load(path, load_external_data=False).graph
    inputs, outputs = {i.name for i in graph.input}, {o.name for o in graph.output}
    tensors = set(made.adapter_weights["adapter_0"])
    assert tensors <= inputs
    assert {f"{name}_RetainedState" for name in tensors} <= outputs
    assert not any("lora" in i.name for i in graph.initializer)
    assert {n.domain for n in graph.node} == {""}


def test_repeated_export_does_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second export returns the first one's path without tracing; so does another object of the same model."""
    calls: list[int] = []
    trace = torch_to_onnx.trace

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return trace(*args, **kwargs)

    monkeypatch.setattr(torch_to_onnx, "trace", counted)
    made = QEffAutoPeftModelForCausalLM(create_peft_model("llama", ADAPTERS["attention"])[0])
    first = made.export(tmp_path / "graph")
    assert made.export(tmp_path / "graph") == first
    again = QEffAutoPeftModelForCausalLM(create_peft_model("llama", ADAPTERS["attention"], name="other")[0])
    assert again.export(tmp_path / "graph") == first
    assert len(calls) == 1


def test_changed_base_exports_anew(tmp_path: Path) -> None:
    """Two bases of one configuration never share a graph, not even when one object's weights are written over."""
    model, _ = create_peft_model("llama", ADAPTERS["attention"])
    made = QEffAutoPeftModelForCausalLM(model)
    first = made.export(tmp_path / "graph")
    with torch.no_grad():
        model.base_model.model.model.norm.weight.mul_(2)
    assert made.export(tmp_path / "graph") != first


def test_export_leaves_the_model_alone(tmp_path: Path) -> None:
    """Logits of the PyTorch model are the same bits before and after its export."""
    model, _ = create_peft_model("llama", ADAPTERS["all-linear"])
    ids = torch.arange(3, 12)[None]
    before = model(input_ids=ids).logits
    QEffAutoPeftModelForCausalLM(model).export(tmp_path / "graph")
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.config._attn_implementation == "sdpa"


# -- adapters of an exported graph


def test_adapter_that_differs_in_rank_targets_and_scaling_fits(compiled: QEffAutoPeftModelForCausalLM) -> None:
    """Rank, a subset of targets, scaling and dropout are data: another adapter of the method needs no export."""
    compiled.set_adapter("b")
    assert compiled.active_adapter == "b"
    compiled.set_adapter("a")


def test_incompatible_adapter_is_refused(tmp_path: Path) -> None:
    """An adapter with tensors that the graph lacks, or of another method, stays out, and the one in use stays in use."""
    model, _ = create_peft_model("llama", ADAPTERS["attention"], "a")
    made = QEffAutoPeftModelForCausalLM(model)
    made.export(tmp_path / "graph")
    model.add_adapter("more", lora(target_modules=["q_proj", "gate_proj"]))
    model.add_adapter("dora", lora(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(AdapterMismatchError, match=r"'more' does not fit.*layers\.0\.mlp\.gate_proj.*Export again"):
        made.set_adapter("more")
    with pytest.raises(ValueError, match=r"use_dora is True, exported with None"):
        made.set_adapter("dora")
    assert made.active_adapter == "a"


def test_unknown_adapter_is_named_with_what_there_is(compiled: QEffAutoPeftModelForCausalLM) -> None:
    """A wrong name tells the right ones."""
    with pytest.raises(AdapterNotFoundError, match=r"no adapter 'c'; there are: a, b"):
        compiled.set_adapter("c")


def test_load_and_unload_adapter(tmp_path: Path) -> None:
    """A loaded adapter is there and another one stays active; a rejected one leaves no trace."""
    base = save_base(tmp_path / "base")
    made = QEffAutoPeftModelForCausalLM.from_pretrained(save_adapter(base, tmp_path / "a"), "a")
    made.load_adapter(save_adapter(base, tmp_path / "b", seed=2), "b")
    assert (made.active_adapter, sorted(made.adapter_weights)) == ("a", ["a", "b"])
    other = save_base(tmp_path / "wide", STYLES["llama"].__class__(**{**STYLES["llama"].to_dict(), "hidden_size": 128}))
    with pytest.raises(AdapterMismatchError, match=r"'c' .* does not fit the base"):
        made.load_adapter(save_adapter(other, tmp_path / "c"), "c")
    assert sorted(made.adapter_weights) == ["a", "b"]
    with pytest.raises(ConfigError, match="'b'; unload it first"):
        made.load_adapter(tmp_path / "b", "b")
    with pytest.raises(ConfigError, match="'a' is in use"):
        made.unload_adapter("a")
    made.unload_adapter("b")
    assert sorted(made.adapter_weights) == ["a"]


# -- compile and generate


def test_generate_before_compile_says_so() -> None:
    """Running what was not compiled is an error that names the missing call."""
    made = QEffAutoPeftModelForCausalLM(create_peft_model("llama", ADAPTERS["attention"])[0])
    with pytest.raises(NotCompiledError, match=r"call compile\(\) first"):
        made.generate(torch.ones(1, 3, dtype=torch.int64), max_new_tokens=2)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("base", BASES)
def test_generate_equals_pytorch(base: str, batch_size: int) -> None:
    """Greedy tokens of rows of different lengths equal PyTorch + PEFT, with prompts longer than the prefill chunk."""
    model, _ = create_peft_model(base, ADAPTERS["all-linear"])
    made = QEffAutoPeftModelForCausalLM(model)
    made.compile(batch_size=batch_size, prefill_seq_len=5, ctx_len=64)
    assert made.qpc_path is not None
    assert (made.qpc_path.parent / "qconfig.json").is_file()
    inputs = prompts(batch_size)
    got = made.generate(**inputs, max_new_tokens=24)
    assert got.tolist() == model.generate(**inputs, max_new_tokens=24, do_sample=False).tolist()


def test_switching_and_disabling(compiled: QEffAutoPeftModelForCausalLM) -> None:
    """A, B, A again and the base each give PyTorch's tokens, through one program."""
    inputs, model = prompts(), compiled.model
    program = compiled.qpc_path
    for name in ("a", "b", "a"):
        compiled.set_adapter(name)
        model.set_adapter(name)
        want = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        assert compiled.generate(**inputs, max_new_tokens=64).tolist() == want.tolist()
    with compiled.disable_adapter(), model.disable_adapter():
        assert compiled.active_adapter == "base"
        want = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        assert compiled.generate(**inputs, max_new_tokens=64).tolist() == want.tolist()
    assert compiled.active_adapter == "a"
    assert compiled.qpc_path == program


def test_missing_attention_mask_and_right_padding(compiled: QEffAutoPeftModelForCausalLM) -> None:
    """Without a mask every token counts; padding on the right gives what padding on the left gives."""
    ids = prompts(1)["input_ids"]
    plain = compiled.generate(ids, max_new_tokens=8)
    assert plain.tolist() == compiled.model.generate(input_ids=ids, max_new_tokens=8, do_sample=False).tolist()
    left = compiled.generate(**prompts(), max_new_tokens=8)[:, -8:]
    inputs = prompts()
    for row, mask in enumerate(inputs["attention_mask"]):
        inputs["input_ids"][row] = inputs["input_ids"][row].roll(int(mask.sum()) - len(mask))
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    assert compiled.generate(**inputs, max_new_tokens=8)[:, -8:].tolist() == left.tolist()


def test_stopping_eos_and_streamer(compiled: QEffAutoPeftModelForCausalLM) -> None:
    """EOS, a stopping criterion and a streamer act as they do in transformers."""
    ids = prompts(1)["input_ids"]
    tokens = compiled.generate(ids, max_new_tokens=12)[0, ids.shape[1] :].tolist()
    eos = tokens[4]
    stopped = compiled.generate(ids, max_new_tokens=12, eos_token_id=eos)[0, ids.shape[1] :].tolist()
    assert stopped == tokens[: tokens.index(eos) + 1]

    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= ids.shape[1] + 3)

    criteria = StoppingCriteriaList([AfterThree()])
    assert (
        compiled.generate(ids, max_new_tokens=12, stopping_criteria=criteria)[0, ids.shape[1] :].tolist() == tokens[:3]
    )

    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Collect()
    compiled.generate(ids, max_new_tokens=5, streamer=streamer)
    assert streamer.seen == ids[0].tolist() + tokens[:5]
    assert streamer.ended


def test_logits_processors_reach_transformers(compiled: QEffAutoPeftModelForCausalLM) -> None:
    """A logits processor decides the tokens, as in transformers."""

    class Only(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return torch.full_like(scores, -1e9).index_fill_(1, torch.tensor([42]), 0.0)

    out = compiled.generate(prompts(1)["input_ids"], max_new_tokens=3, logits_processor=[Only()])
    assert out[0, -3:].tolist() == [42, 42, 42]


def test_context_that_does_not_fit_is_refused(compiled: QEffAutoPeftModelForCausalLM) -> None:
    """A request beyond the compiled context gives the numbers before any work."""
    with pytest.raises(ConfigError, match=r"need 216 positions, the longest context is 128"):
        compiled.generate(prompts(1)["input_ids"], max_new_tokens=200)


def test_compile_options_are_checked(compiled: QEffAutoPeftModelForCausalLM) -> None:
    """A context beyond the base's own, and an unknown target, are refused."""
    with pytest.raises(ConfigError, match="ctx_len"):
        compiled.compile(ctx_len=100_000)
    with pytest.raises(ConfigError, match="onnxruntime"):
        compiled.compile(target="onxruntime")


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_precisions_run(compiled: QEffAutoPeftModelForCausalLM, precision: str, tmp_path: Path) -> None:
    """A program of integer weights is another program, and still writes mostly what float32 writes."""
    inputs = prompts()
    want = compiled.generate(**inputs, max_new_tokens=1)[:, -1]
    exact = compiled.qpc_path
    try:
        assert compiled.compile(prefill_seq_len=8, ctx_len=128, precision=precision, block_size=16) != exact
        got = compiled.generate(**inputs, max_new_tokens=1)[:, -1]
        assert int((got == want).sum()) >= (4 if precision == "int8" else 2)
    finally:
        compiled.compile(prefill_seq_len=8, ctx_len=128)


def test_other_methods_run_too(tmp_path: Path) -> None:
    """IA3 is exported by the same mechanism, and equals PyTorch."""
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = get_peft_model(make_base("llama"), config, adapter_name="x")
    perturb(model, "x", seed=3, scale=0.5)
    made = QEffAutoPeftModelForCausalLM(model)
    made.export(tmp_path / "graph")
    made.compile(ctx_len=64)
    inputs = prompts()
    assert (
        made.generate(**inputs, max_new_tokens=16).tolist()
        == model.eval().generate(**inputs, max_new_tokens=16).tolist()
    )
    assert made.export_hash is not None
    names = {a.name for a in Manifest.read(tmp_path / f"graph-{made.export_hash}").adapter}
    assert {n for n in names if "ia3_l" in n} == set(made.adapter_weights["x"])
