# SPDX-License-Identifier: BSD-3-Clause
"""A second set of faults written without looking at the checks, of kinds that the first sets lack; figures are in docs/faults.md.

``checks`` names what a user would look at first; what nothing can tell from a sound adapter has none.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from QEfficient.testing.reference import Reference
from tests.testing.planted_adapters import Fault, config, every, one, tensors
from tests.testing.planted_graphs import GraphFault, SessionFault, Wrapped, exported
from tests.testing.planted_held_out import ExportFault
from tests.testing.planted_pytorch import ModelFault, adapted

_A, _B = r"lora_A\.weight", r"lora_B\.weight"
Tensors = dict[str, np.ndarray]


def _key(loaded: Tensors, pattern: str) -> str:
    return next(k for k in sorted(loaded) if re.search(pattern, k))


def _deeper(loaded: Tensors) -> None:
    """Give the adapter a layer that the base does not have."""
    for key in [k for k in loaded if re.search(r"\.(layers|h)\.1\.", k)]:
        loaded[re.sub(r"\.(layers|h)\.1\.", r".\1.2.", key)] = 1.1 * loaded[key]


def _cased(loaded: Tensors) -> None:
    """Add a module's tensors a second time, in another spelling."""
    for key in [k for k in loaded if ".layers.0." in k and "q_proj" in k]:
        loaded[key.replace("q_proj", "Q_proj")] = 0.5 * loaded[key]


def _head_larger(folder: Path) -> None:
    """Save an output projection with one token more than the base has."""
    config(modules_to_save=["lm_head"])(folder)
    large = np.random.default_rng(0).normal(size=(129, 64)).astype(np.float32)
    tensors(lambda t: t.update({"base_model.model.lm_head.weight": large}))(folder)


def _rank_one(tensor: np.ndarray) -> np.ndarray:
    """Make every row a multiple of the first."""
    return np.outer(np.arange(1, len(tensor) + 1), tensor[0]).astype(tensor.dtype)


def _misspelt(folder: Path) -> None:
    """Write ``lora_aplha`` for ``lora_alpha``: the default is used instead."""
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    content["lora_aplha"] = content.pop("lora_alpha")
    path.write_text(json.dumps(content))


def _wrong_type(folder: Path) -> None:
    """Let the header say that a float32 tensor is bfloat16."""
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"F32"', b'"F16"', 1))


def _missing_shard(folder: Path) -> None:
    """Split into two shards, of which one is not there."""
    path = folder / "adapter_model.safetensors"
    path.rename(folder / "adapter_model-00001-of-00002.safetensors")
    (folder / "adapter_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "adapter_model-00001-of-00002.safetensors", "b": "adapter_model-00002-of-00002.safetensors"}})
    )  # fmt: skip


def _tokenizer(vocabulary: dict[str, int], added: list[dict[str, Any]]) -> str:
    return json.dumps({"version": "1.0", "added_tokens": added, "model": {"type": "WordLevel", "unk_token": "<unk>", "vocab": vocabulary}})  # fmt: skip


def _words() -> dict[str, int]:
    return {"<unk>": 0, **{f"w{i}": i for i in range(1, 128)}}


def _recorded(folder: Path) -> Path:
    return Path(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])


def _renumbered(folder: Path) -> None:
    """Number two tokens of the adapter's tokenizer the other way round."""
    words = _words()
    (_recorded(folder) / "tokenizer.json").write_text(_tokenizer(words, []))
    (folder / "tokenizer.json").write_text(_tokenizer({**words, "w7": 9, "w9": 7}, []))


def _reused(folder: Path) -> None:
    """Give an added token the number of a token that the base has."""
    words = _words()
    (_recorded(folder) / "tokenizer.json").write_text(_tokenizer(words, []))
    token = {"id": 9, "content": "<tool>", "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}  # fmt: skip
    (folder / "tokenizer.json").write_text(_tokenizer({k: v for k, v in words.items() if v != 9}, [token]))


def _other_template(folder: Path) -> None:
    """Frame a chat otherwise than the base's template does, which the adapter was not trained with."""
    (_recorded(folder) / "chat_template.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")  # fmt: skip


def _deeper_base(folder: Path) -> None:
    """Record a base with the same widths and more layers."""
    config_file = json.loads((_recorded(folder) / "config.json").read_text())
    other = folder.parent / "deeper-base"
    other.mkdir(exist_ok=True)
    (other / "config.json").write_text(json.dumps({**config_file, "num_hidden_layers": 6}))
    config(base_model_name_or_path=str(other))(folder)


def _exchanged(loaded: Tensors) -> None:
    """Exchange the tensors of two modules of one layer that have the same shapes."""
    for factor in ("lora_A", "lora_B"):
        k, v = _key(loaded, rf"\.0\..*k_proj.*{factor}"), _key(loaded, rf"\.0\..*v_proj.*{factor}")
        loaded[k], loaded[v] = loaded[v], loaded[k]


def _ranks_shuffled(tensor: np.ndarray) -> np.ndarray:
    return np.roll(tensor, 1, axis=0)


def _coarse(tensor: np.ndarray) -> np.ndarray:
    """Round to 16 steps, as a careless 4-bit conversion and back does."""
    step = np.abs(tensor).max() / 8
    return (np.round(tensor / step) * step).astype(tensor.dtype)


SECOND_ADAPTER_FAULTS = (
    Fault("a layer more than the base has", ("adapter.coverage",), tensors(_deeper)),
    Fault("a module twice, spelt otherwise", ("adapter.coverage",), tensors(_cased), lora=True),
    Fault("output projection of a larger vocabulary", ("adapter.shapes", "adapter.tokenizer"), _head_larger),
    Fault("excludes what was trained", ("adapter.coverage",), config(exclude_modules=["v_proj", "c_attn"]), lora=True),
    Fault("rank of one module edited", ("adapter.shapes",), config(rank_pattern={r"layers\.0\.self_attn\.q_proj": 2}), lora=True),
    Fault("alpha of one module ten thousandfold", ("adapter.scaling",), config(alpha_pattern={"q_proj": 80000}), lora=True),
    Fault("targets only layer 0 by expression", ("adapter.coverage", "adapter.shapes"), config(target_modules=r".*layers\.0\..*_proj"), lora=True),
    Fault("method of another kind", ("adapter.files", "adapter.shapes", "adapter.coverage"), config(peft_type="LOHA"), lora=True),
    Fault("initialised by PiSSA when loaded", ("adapter.loading",), config(init_lora_weights="pissa"), lora=True),
    Fault("alpha's field misspelt", ("adapter.fields",), _misspelt, lora=True),
    Fault("dropout of 1.5", ("adapter.files", "adapter.shapes", "adapter.config"), config(lora_dropout=1.5), lora=True),
    Fault("header says float16 for float32", ("adapter.files",), _wrong_type),
    Fault("a shard missing", ("adapter.files",), _missing_shard),
    Fault("every B shrunk a billionfold", ("adapter.effect", "adapter.scaling"), every(_B, lambda t: 1e-9 * t), lora=True),
    Fault("one A of rank one", ("adapter.rows",), one(_A, _rank_one), lora=True),
    Fault("tokenizer numbers two tokens otherwise", ("adapter.tokenizer",), _renumbered),
    Fault("added token takes a token's number", ("adapter.tokenizer",), _reused),
    Fault("another chat template", ("adapter.template",), _other_template),
    Fault("recorded base is deeper", ("adapter.base",), _deeper_base),
    Fault("trained tokens beyond the vocabulary", ("adapter.coverage", "adapter.tokenizer", "adapter.shapes"), config(trainable_token_indices={"embed_tokens": [500]}), lora=True),
    Fault("layers replicated", ("adapter.coverage", "adapter.loading"), config(layer_replication=[[0, 2], [0, 2]]), lora=True),
    Fault("biases trained, none saved", ("adapter.coverage",), config(lora_bias=True), lora=True),
    Fault("two modules' tensors exchanged", (), tensors(_exchanged), lora=True),
    Fault("ranks of one A shuffled", (), one(_A, _ranks_shuffled), lora=True),
    Fault("rounded to 16 steps", ("adapter.rows",), every(r"lora_[AB]\.weight", _coarse), lora=True),
)  # fmt: skip
"""Faults of an adapter's folder; the last three are other adapters, as sound as the first to all that is in the folder."""


def _half_loaded(reference: Reference) -> None:
    for name, p in reference.model.named_parameters():
        if ".one." in name:
            p.data = p.data.half().float()


def _both_active(reference: Reference) -> None:
    choose = reference.model.set_adapter
    reference.model.set_adapter = lambda name: (choose(name), reference.model.base_model.set_adapter(["one", "two"]))[0]


def _unscaled_merge(reference: Reference) -> None:
    for layer in adapted(reference):
        delta = layer.get_delta_weight
        layer.get_delta_weight = lambda name, layer=layer, delta=delta: delta(name) / layer.scaling[name]


def _rounding_merge(reference: Reference) -> None:
    for layer in adapted(reference):
        merge = layer.merge

        def rounded(*args: Any, layer: Any = layer, merge: Any = merge, **kwargs: Any) -> None:
            merge(*args, **kwargs)
            layer.base_layer.weight.data = layer.base_layer.weight.data.bfloat16().float()

        layer.merge = rounded


def _unmerge_short(reference: Reference) -> None:
    layer = adapted(reference)[2]
    unmerge = layer.unmerge

    def short() -> None:
        unmerge()
        layer.base_layer.weight.data *= 1.002

    layer.unmerge = short


def _not_deleted(reference: Reference) -> None:
    reference.model.delete_adapter = lambda name: None


def _leaks_rows(reference: Reference) -> None:
    """Let every row of a batch see a little of the first."""
    layer = adapted(reference)[1]
    forward = layer.forward
    layer.forward = lambda x, *a, **k: (y := forward(x, *a, **k)) + 0.01 * (y[:1] if len(y) > 1 else 0)


def _one_stays(reference: Reference) -> None:
    """Keep one layer's adapter on while the others are disabled."""
    layer = adapted(reference)[4]
    object.__setattr__(layer, "enable_adapters", lambda enabled: None)
    layer._disable_adapters = False


def _frozen(reference: Reference) -> None:
    """Leave every A out of training, whatever is asked for."""
    for layer in adapted(reference):
        weight = layer.lora_A["one"].weight
        layer.lora_A["one"].forward = lambda x, weight=weight: nn.functional.linear(x, weight.detach())


def _samples(reference: Reference) -> None:
    settings = reference.model.generation_config
    settings.do_sample, settings.temperature = True, 5.0


def _wrong_alpha(reference: Reference) -> None:
    """Save another alpha than the one that is used."""
    save = reference.model.save_pretrained

    def other(folder: Any, *args: Any, **kwargs: Any) -> None:
        save(folder, *args, **kwargs)
        for path in Path(folder).rglob("adapter_config.json"):
            content = json.loads(path.read_text())
            content["lora_alpha"] = 2 * content["lora_alpha"]
            path.write_text(json.dumps(content))

    reference.model.save_pretrained = other


def _base_rows(reference: Reference) -> None:
    """Give the base's rows of a mixed batch the first adapter."""
    for layer in adapted(reference):
        forward = layer._mixed_batch_forward
        layer._mixed_batch_forward = lambda x, *a, adapter_names, forward=forward, **k: forward(
            x, *a, adapter_names=["one" if n == "__base__" else n for n in adapter_names], **k
        )


def _weights_turned(reference: Reference) -> None:
    combine = reference.model.add_weighted_adapter
    reference.model.add_weighted_adapter = lambda names, weights, *a, **k: combine(names, [*weights][::-1] if len(set(weights)) > 1 else [2 * w for w in weights], *a, **k)  # fmt: skip


def _forgets(reference: Reference) -> None:
    """Let generation see only the newest token's keys and values."""
    generate = reference.model.generate
    reference.model.generate = lambda *a, **k: generate(*a, **{**k, "use_cache": False, "repetition_penalty": 5.0})


def _no_return(reference: Reference) -> None:
    """Disabling the adapter is for good."""
    enable = reference.model.base_model.enable_adapter_layers
    reference.model.base_model.enable_adapter_layers = lambda: None if reference else enable()


SECOND_MODEL_FAULTS = (
    ModelFault("adapter rounded to float16 by loading", ("pytorch.reload",), _half_loaded),
    ModelFault("selecting one activates both", ("pytorch.several",), _both_active),
    ModelFault("merge leaves the scaling out", ("pytorch.merge",), _unscaled_merge),
    ModelFault("merge rounds to bfloat16", ("pytorch.merge",), _rounding_merge),
    ModelFault("unmerge returns not quite the base", ("pytorch.merge",), _unmerge_short),
    ModelFault("deleting does nothing", ("pytorch.delete",), _not_deleted),
    ModelFault("rows of a batch leak", ("pytorch.mixed", "pytorch.padding"), _leaks_rows),
    ModelFault("one layer stays on when disabled", ("pytorch.disabled",), _one_stays),
    ModelFault("A is never trained", ("pytorch.gradients",), _frozen),
    ModelFault("generation samples", ("pytorch.generate",), _samples),
    ModelFault("saves another alpha", ("pytorch.reload",), _wrong_alpha),
    ModelFault("base's rows get an adapter", ("pytorch.mixed",), _base_rows),
    ModelFault("weights of a combination exchanged", ("pytorch.weighted",), _weights_turned),
    ModelFault("generation penalises what was said", ("pytorch.generate",), _forgets),
    ModelFault("disabled for good", ("pytorch.disabled", "pytorch.effect", "pytorch.several"), _no_return),
)  # fmt: skip
"""Faults of a loaded model."""


def _factors_exchanged(loaded: Tensors) -> None:
    """Exchange the tensors of two modules of the same shapes, as a wrong sort of names does."""
    keys = [k for k in sorted(loaded) if "lora_B" in k]
    first = keys[0]
    second = next(k for k in keys[1:] if loaded[k].shape == loaded[first].shape)
    loaded[first], loaded[second] = loaded[second], loaded[first]


def _low_bit(folder: Path) -> None:
    """Turn one low bit in the middle of the weights."""
    path = next(folder.glob("weights*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 & ~3] ^= 1
    path.write_bytes(content)


def _scaling_zero(loaded: Tensors) -> None:
    key = next(k for k in sorted(loaded) if k.endswith(".scaling"))
    loaded[key] = np.zeros_like(loaded[key])


def _constant(folder: Path) -> None:
    """Change a small constant of the graph itself."""
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in (a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"):
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.raw_data) == 4:
            tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) * np.float32(1.1)).tobytes()
            break
    else:
        raise StopIteration
    onnx.save(model, path)


def _manifest(pattern: str, replacement: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        path = folder / "manifest.json"
        before = path.read_text()
        path.write_text(re.sub(pattern, replacement, before, count=1))
        if path.read_text() == before:
            raise StopIteration

    return plant


SECOND_GRAPH_FAULTS = (
    GraphFault("exported modules exchanged", ("graph.tensors",), exported(_factors_exchanged)),
    GraphFault("one scaling zero", ("graph.tensors",), exported(_scaling_zero)),
    GraphFault("exported adapter lost", ("graph.tensors",), lambda g: (g / "adapters" / "one.safetensors").unlink()),
    GraphFault("one low bit of the weights", ("graph.integrity",), _low_bit),
    GraphFault("a constant of the graph", ("graph.integrity", "graph.prefill"), _constant),
    GraphFault("manifest says a smaller vocabulary", ("graph.integrity", "graph.prefill"), _manifest(r'(\n "vocab_size": )\d+', r"\g<1>100")),
    GraphFault("weights lost", ("graph.integrity",), lambda g: next(g.glob("weights*.safetensors")).unlink()),
)  # fmt: skip
"""Faults of an exported folder."""

LOGITS = tuple(f"graph.{c}" for c in ("prefill", "chunked", "decode", "ragged", "layers"))


def parameters(model: Any, pattern: str) -> list[nn.Parameter]:
    """Return the parameters whose names match; StopIteration if there are none, so that nothing counts as planted."""
    found = [p for n, p in model.named_parameters() if re.search(pattern, n)]
    return found or [next(iter(()))]


def each(pattern: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    """Return what changes every parameter whose name matches."""

    def alter(model: Any) -> None:
        for p in parameters(model, pattern):
            p.data.copy_(change(p.data.clone()))

    return alter


def _kv_heads(tensor: torch.Tensor) -> torch.Tensor:
    """Exchange the first two heads of keys and values."""
    half = tensor.shape[0] // 2
    return torch.cat([tensor[half:], tensor[:half]])


def _column_zero(tensor: torch.Tensor) -> torch.Tensor:
    tensor[:, tensor.shape[1] // 3] = 0
    return tensor


def _merged_too(model: Any) -> None:
    """Merge an adapter into the base and keep it beside."""
    for layer in [m for m in model.modules() if hasattr(m, "base_layer") and hasattr(m, "get_delta_weight")]:
        layer.base_layer.weight.data += layer.get_delta_weight("one").detach()


def _other_scaling(model: Any) -> None:
    """Scale as rsLoRA does, after the adapters were attached."""
    for layer in [m for m in model.modules() if isinstance(getattr(m, "scaling", None), dict) and "one" in m.scaling]:
        layer.scaling["one"] *= 2.0


def _last_layer_gone(model: Any) -> None:
    for p in parameters(model, r"layers\.1\.(self_attn\.o_proj|mlp\.down_proj).*base_layer\.weight"):
        p.data.zero_()


def _gate_and_up(model: Any) -> None:
    gate, up = (parameters(model, rf"layers\.0\.mlp\.{n}_proj.base_layer\.weight")[0] for n in ("gate", "up"))
    kept = gate.data.clone()
    gate.data.copy_(up.data)
    up.data.copy_(kept)


SECOND_EXPORT_FAULTS = (
    ExportFault("heads of keys and values exchanged", LOGITS, each(r"layers\.0\.self_attn\.(k|v)_proj\.base_layer\.weight", _kv_heads)),
    ExportFault("one column pruned", LOGITS, each(r"layers\.0\.mlp\.down_proj\.base_layer\.weight", _column_zero)),
    ExportFault("base rounded to float16", LOGITS, each(r"base_layer\.weight", lambda t: t.half().float())),
    ExportFault("adapter merged and kept", LOGITS, _merged_too),
    ExportFault("scaling as of rsLoRA", ("graph.tensors",), _other_scaling),
    ExportFault("last layer does nothing", LOGITS, _last_layer_gone),
    ExportFault("gate and up exchanged", LOGITS, _gate_and_up),
    ExportFault("norm's offset of one", LOGITS, each(r"post_attention_layernorm\.weight", lambda t: t + 0.05)),
)  # fmt: skip
"""Graphs exported from another model."""


def _wrapped(name: str, checks: str, run: Callable[[Any, Any, Any], Any] | None = None, **methods: Any) -> SessionFault:
    return SessionFault(name, tuple(f"graph.{c}" for c in checks.split()), lambda s: Wrapped(s, run, **methods))


def _clamped(s: Any, ids: Any, at: Any) -> Any:
    logits = s._session.run(ids, at)
    return np.minimum(logits, 0.9 * logits.max())


def _warmer(s: Any, ids: Any, at: Any) -> Any:
    logits = s._session.run(ids, at)
    return logits * np.float32(1.05) if ids.shape[1] == 1 else logits


def _second_chunk(s: Any, ids: Any, at: Any) -> Any:
    later = ids.shape[1] > 1 and at[:, :1] > 0
    return s._session.run(ids, np.where((at > 0) & later, at - 1, at))


def _padding_written(s: Any, ids: Any, at: Any) -> Any:
    """Let padding be written over the first position."""
    logits = s._session.run(ids, at)
    short = (at < 0).any(axis=1)
    for state in s._session._states.values():
        state[short, :, 0] = 0.5 * state[short, :, 0]
    return logits


def _rows_alike(s: Any, ids: Any, at: Any) -> Any:
    """Give the last row the tokens of the first."""
    if len(ids) > 1:
        ids = ids.copy()
        ids[-1, : (at[-1] >= 0).sum()] = ids[0, : (at[-1] >= 0).sum()]
    return s._session.run(ids, at)


def _end_of_cache(s: Any, ids: Any, at: Any) -> Any:
    """Fail at the last position of the cache alone."""
    logits = s._session.run(ids, at)
    return logits * np.float32(np.nan) if int(at.max()) == s._session.ctx_len - 1 else logits


def _int4_keys(s: Any, ids: Any, at: Any) -> Any:
    logits = s._session.run(ids, at)
    for name, state in s._session._states.items():
        if "past_key" in name and name.endswith(".0"):
            step = max(float(np.abs(state).max()) / 7, 1e-9)
            state[...] = np.round(state / step) * step
    return logits


def _noise(s: Any, ids: Any, at: Any) -> Any:
    logits = s._session.run(ids, at)
    random = s.memory.setdefault("random", np.random.default_rng(0))
    return logits + random.normal(scale=1e-3 * float(np.ptp(logits)), size=logits.shape).astype(np.float32)


def _one_short(s: Any, ids: Any, at: Any) -> Any:
    """Answer for the token before the last of a prompt."""
    if ids.shape[1] == 1 or s._session.manifest.logits != "last":
        return s._session.run(ids, at)
    s._session.run(ids, at)
    shorter = at.copy()
    for row in shorter:
        real = int((row >= 0).sum())
        row[max(real - 1, 1) :] = -1
    return s._session.run(ids, shorter)


def _tail_of_vocabulary(s: Any, ids: Any, at: Any) -> Any:
    logits = s._session.run(ids, at).copy()
    logits[..., -8:] = 0
    return logits


def _first_row_only(s: Any, ids: Any, at: Any) -> Any:
    """Run every row but the first with the base."""
    logits = s._session.run(ids, at)
    name = s._session.active_adapter
    if len(ids) == 1 or name == "base":
        return logits
    s._session.set_adapter("base")
    base = s._session.run(ids, at)
    s._session.set_adapter(name)
    return np.concatenate([logits[:1], base[1:]])


def _third_ignored(s: Any, name: str) -> None:
    s.memory["n"] = s.memory.get("n", 0) + 1
    if s.memory["n"] % 3:
        s._session.set_adapter(name)


def _part_switched(s: Any, name: str) -> None:
    """Keep one module's tensors of the adapter before."""
    s._session.set_adapter(name)
    held, old = s._session._adapters, s.memory.get("old", name)
    if old != name and "base" not in (old, name):
        part = next(k for k in held[name] if "lora_B" in k).rsplit(".lora_B", 1)[0]
        stale = {k: held[old][k] for k in held[name] if k.startswith(part)}
        held[name] = {**held[name], **stale}
        s._session._bindings.pop(name, None)
    s.memory["old"] = name


def _reset_half(s: Any) -> None:
    """Forget the sequence and leave one adapter's answer: the base's comes next."""
    s._session.reset()
    s._session.set_adapter("base")


def _odd_positions(s: Any, ids: Any, at: Any) -> Any:
    logits = s._session.run(ids, at)
    if ids.shape[1] == 1 and int(at.max()) % 2:
        logits = np.roll(logits, 1, axis=0) if len(logits) > 1 else logits * np.float32(0.98)
    return logits


SECOND_SESSION_FAULTS = (
    _wrapped("largest logits clipped", "prefill chunked decode ragged", _clamped),
    _wrapped("a temperature while decoding", "decode ragged layers", _warmer),
    _wrapped("later chunks one position early", "chunked long", _second_chunk),
    _wrapped("padding written into the cache", "ragged neighbours greedy_batch slots", _padding_written),
    _wrapped("last row gets the first's tokens", "ragged neighbours greedy_batch slots", _rows_alike),
    _wrapped("not a number at the cache's end", "long", _end_of_cache),
    _wrapped("keys of one layer in int4", "decode layers", _int4_keys),
    _wrapped("noise in every call", "prefill chunked decode ragged switching", _noise),
    _wrapped("answer for the token before", "prefill chunked ragged greedy", _one_short),
    _wrapped("end of the vocabulary zero", "prefill chunked decode ragged", _tail_of_vocabulary),
    _wrapped("adapter for the first row alone", "ragged neighbours greedy_batch slots", _first_row_only),
    _wrapped("every third switch ignored", "switching effect prefill", set_adapter=_third_ignored),
    _wrapped("one module stays after a switch", "switching effect prefill", set_adapter=_part_switched),
    _wrapped("reset forgets the adapter", "prefill effect switching decode", reset=_reset_half),
    _wrapped("odd positions wrong while decoding", "decode greedy ragged greedy_batch", _odd_positions),
)  # fmt: skip
"""Faults of running."""
