# SPDX-License-Identifier: BSD-3-Clause
"""Faults that were written after the checks, without looking at them, to see what is caught that nobody had in mind.

What a check was added for afterwards is marked ``mended``; figures of both kinds are in docs/faults.md. ``checks`` of a fault that
nothing can tell from a sound adapter is empty.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from QEfficient.testing.reference import Reference
from tests.testing.faults import scale_weight
from tests.testing.planted_adapters import Fault, config, one, tensors
from tests.testing.planted_graphs import GraphFault, SessionFault, Wrapped, exported
from tests.testing.planted_pytorch import ModelFault, adapted

_A, _B = r"lora_A\.weight", r"lora_B\.weight"


@dataclass(frozen=True)
class ExportFault:
    """A graph that was exported from a model that is not quite the one it is tested against."""

    name: str
    checks: tuple[str, ...]
    alter: Callable[[Any], Any]


def _row_zero(tensor: np.ndarray) -> np.ndarray:
    tensor[tensor.shape[0] // 2] = 0
    return tensor


def _layers_offset(loaded: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    count = 1 + max(int(m[1]) for k in loaded if (m := re.search(r"layers\.(\d+)\.", k)))
    return {re.sub(r"layers\.(\d+)\.", lambda m: f"layers.{(int(m[1]) + 1) % count}.", k): v for k, v in loaded.items()}


def _other_seed(loaded: dict[str, np.ndarray]) -> None:
    random = np.random.default_rng(9)
    for key, value in loaded.items():
        if "lora_" in key:
            loaded[key] = (value.std() * random.normal(size=value.shape)).astype(value.dtype)


def _other_end(folder: Path) -> None:
    """Let the adapter's tokenizer end a text with another token than the base's."""
    recorded = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    for place, token in ((folder, "<other>"), (Path(recorded), "<end>")):
        (place / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))


def _named_base(folder: Path) -> None:
    """Record as base a folder whose model is of another kind."""
    other = folder.parent / "another-base"
    other.mkdir(exist_ok=True)
    shape = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "vocab_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 96,
    }
    (other / "config.json").write_text(
        json.dumps({"model_type": "mistral", "architectures": ["MistralForCausalLM"], **shape})
    )
    config(base_model_name_or_path=str(other))(folder)


def _index_file(folder: Path) -> None:
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))


HELD_OUT_ADAPTER_FAULTS = (
    Fault("alpha saved as a string", ("adapter.files", "adapter.scaling", "adapter.shapes"), config(lora_alpha="8"), lora=True),
    Fault("alpha null", ("adapter.files", "adapter.scaling", "adapter.shapes"), config(lora_alpha=None), lora=True),
    Fault("r a fraction", ("adapter.files", "adapter.shapes"), config(r=4.5), lora=True),
    Fault("target_modules empty", ("adapter.shapes",), config(target_modules=[]), lora=True),
    Fault("one row of B zero", ("adapter.rows",), one(_B, _row_zero), lora=True),
    Fault("one B all the same number", ("adapter.rows",), one(_B, lambda t: np.full_like(t, 0.05)), lora=True),
    Fault("one A saved as integers", ("adapter.rows",), one(_A, lambda t: (10 * t).astype(np.int32)), lora=True),
    Fault("one B with its rows repeated", ("adapter.rows",), one(_B, lambda t: np.repeat(t[:1], len(t), axis=0)), lora=True),
    Fault("recorded base of another architecture", ("adapter.base",), _named_base),
    Fault("another end-of-text token", ("adapter.tokenizer",), _other_end),
    Fault("dangling index file", ("adapter.files", "adapter.leftovers"), _index_file),
    Fault("name of a tensor misspelt", ("adapter.coverage",), tensors(lambda t: {k.replace("0.self_attn.q_proj", "0.self_atn.q_proj"): v for k, v in t.items()}), lora=True),
    Fault("rsLoRA switched on", (), config(use_rslora=True), lora=True),
    Fault("sign of one B flipped", (), one(_B, np.negative), lora=True),
    Fault("layers offset by one", (), tensors(_layers_offset), lora=True),
    Fault("adapter of another seed", (), tensors(_other_seed), lora=True),
)  # fmt: skip
"""Faults of an adapter's folder. The last four are other adapters, as sound as the first: a report given as baseline tells them apart."""


def _scalings(reference: Reference) -> None:
    for layer in adapted(reference):
        layer.scaling["one"] *= 1.5


def _left_merged(reference: Reference) -> None:
    reference.model.set_adapter("one")
    reference.model.merge_adapter()


def _shared_storage(reference: Reference) -> None:
    layer = adapted(reference)[0]
    layer.lora_B["one"].weight = layer.lora_B["two"].weight = nn.Parameter(
        layer.lora_B["one"].weight.data[:, :2].repeat(1, 1)
    )
    layer.lora_A["one"].weight = nn.Parameter(layer.lora_A["one"].weight.data[:2].clone())


def _hooked(reference: Reference) -> None:
    adapted(reference)[0].register_forward_hook(lambda m, i, o: o * 1.001)


def _grows(reference: Reference) -> None:
    layer = adapted(reference)[0]
    layer.register_forward_hook(
        lambda m, i, o: m.base_layer.weight.data.mul_(1.0001) and None if False else _grow(m, o)
    )


def _grow(module: nn.Module, out: torch.Tensor) -> torch.Tensor:
    module.base_layer.weight.data.mul_(1.0005)
    return out


def _left_aligned(reference: Reference) -> None:
    forward = reference.model.forward
    reference.model.forward = lambda *a, position_ids=None, **k: forward(*a, **k)


HELD_OUT_MODEL_FAULTS = (
    ModelFault("scaling changed after loading", ("pytorch.several", "pytorch.reload"), _scalings),
    ModelFault("left merged", ("pytorch.disabled", "pytorch.merge", "pytorch.several"), _left_merged),
    ModelFault("two adapters share a tensor", ("pytorch.several", "pytorch.reload", "pytorch.gradients"), _shared_storage),
    ModelFault("a hook left in a layer", ("pytorch.disabled", "pytorch.several"), _hooked),
    ModelFault("every call changes a weight", ("pytorch.deterministic", "pytorch.disabled"), _grows),
    ModelFault("positions given are ignored", ("pytorch.padding",), _left_aligned),
)  # fmt: skip
"""Faults of a loaded model."""


def _embedding_row(folder: Path) -> None:
    scale_weight(folder, "embed_tokens.weight", elements=slice(64 * 77, 64 * 78))


def _one_sign(loaded: dict[str, np.ndarray]) -> None:
    key = next(k for k in sorted(loaded) if "lora_B" in k)
    loaded[key] = -loaded[key]


def _drop_one(loaded: dict[str, np.ndarray]) -> None:
    del loaded[next(k for k in sorted(loaded) if "lora_B" in k)]


HELD_OUT_GRAPH_FAULTS = (
    GraphFault("stale embedding row", ("graph.integrity",), _embedding_row),
    GraphFault("exported adapter of another seed", ("graph.tensors",), exported(_other_seed)),
    GraphFault("exported sign of one B flipped", ("graph.tensors",), exported(_one_sign)),
    GraphFault("exported row of one B zero", ("graph.tensors",), exported(lambda t: t.update({(k := next(k for k in sorted(t) if "lora_B" in k)): _row_zero(t[k])}))),
    GraphFault("one exported tensor missing", ("graph.tensors",), exported(_drop_one)),
    GraphFault("manifest says another longest context", ("graph.integrity", "graph.long"), lambda g: _edit_manifest(g)),
)  # fmt: skip
"""Faults of an exported folder."""


def _edit_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(re.sub(r'("max_positions": )\d+', r"\g<1>64", path.read_text()))


def _layers(model: Any) -> Any:
    found = next(m for n, m in model.named_modules() if n.endswith("model.layers"))
    return found


def _twin(model: Any) -> None:
    layers = _layers(model)
    bases = [{n: p for n, p in layer.named_parameters() if "lora_" not in n} for layer in (layers[0], layers[1])]
    for name, parameter in bases[1].items():
        parameter.data.copy_(bases[0][name].data)


def _parameters(model: Any, ending: str) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if n.endswith(ending)]


def _each(
    ending: str, change: Callable[[torch.Tensor], torch.Tensor], only: int | None = None
) -> Callable[[Any], None]:
    def alter(model: Any) -> None:
        found = _parameters(model, ending)
        for p in found if only is None else found[only : only + 1]:
            p.data.copy_(change(p.data.clone()))

    return alter


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    noisy = tensor * (1 + 0.004 * torch.sin(torch.arange(tensor.numel())).reshape(tensor.shape))
    return noisy.bfloat16().float()


def _rotary(model: Any) -> None:
    module = next(m for n, m in model.named_modules() if n.endswith("rotary_emb"))
    module.inv_freq.data.mul_(1.02)


def _epsilon(model: Any) -> None:
    for module in model.modules():
        for name in ("variance_epsilon", "eps"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 1e-3)


def _activation(model: Any) -> None:
    for layer in _layers(model):
        layer.mlp.act_fn = nn.ReLU()


def _attention_scale(model: Any) -> None:
    for layer in _layers(model):
        layer.self_attn.scaling *= 1.05


def _row_swap(tensor: torch.Tensor) -> torch.Tensor:
    tensor[[5, 9]] = tensor[[9, 5]]
    return tensor


def _heads_swapped(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor[tensor.shape[0] // 2 :], tensor[: tensor.shape[0] // 2]])


_LOGITS = tuple(f"graph.{c}" for c in ("prefill", "chunked", "decode", "ragged", "layers"))
EXPORT_FAULTS = (
    ExportFault("a layer is a copy of another", _LOGITS, _twin),
    ExportFault("norm weights rounded to bfloat16", _LOGITS, _each("input_layernorm.weight", _rounded)),
    ExportFault("a square weight transposed", _LOGITS, _each("o_proj.base_layer.weight", lambda t: t.T if t.shape[0] == t.shape[1] else t.flip(1), 0)),
    ExportFault("rotary frequencies off by 2 %", _LOGITS, _rotary),
    ExportFault("another epsilon in norms", _LOGITS, _epsilon),
    ExportFault("another activation", _LOGITS, _activation),
    ExportFault("attention scaled by 1.05", _LOGITS, _attention_scale),
    ExportFault("heads of one projection swapped", _LOGITS, _each("q_proj.base_layer.weight", _heads_swapped, 0)),
    ExportFault("two rows of the output projection swapped", _LOGITS, _each("lm_head.weight", _row_swap)),
)  # fmt: skip
"""Graphs exported from another model."""


def _wrapped(
    name: str, checks: str, run: Callable[[Any, Any, Any], Any] | None = None, **methods: Callable[..., Any]
) -> SessionFault:
    return SessionFault(name, tuple(f"graph.{c}" for c in checks.split()), lambda s: Wrapped(s, run, **methods))


def _previous(s: Any, ids: Any, at: Any) -> Any:
    """Return what the call before said."""
    new = s._session.run(ids, at)
    old, s.memory["old"] = s.memory.get("old"), new
    return old if old is not None and old.shape == new.shape else new


def _blind(s: Any, ids: Any, at: Any) -> Any:
    """Decode without the token before."""
    if ids.shape[1] == 1:
        for state in s._session._states.values():
            for row in range(len(state)):
                state[row, :, max(int(at[row, 0]) - 1, 0)] = 0
    return s._session.run(ids, at)


def _prefill_only(s: Any, ids: Any, at: Any) -> Any:
    """Leave the adapter out while decoding."""
    name = s._session.active_adapter
    if ids.shape[1] == 1:
        s._session.set_adapter("base")
    try:
        return s._session.run(ids, at)
    finally:
        s._session.set_adapter(name)


def _banned(s: Any, ids: Any, at: Any) -> Any:
    logits = s._session.run(ids, at).copy()
    logits[..., 2] = -1e9
    return logits


def _rows_rolled(s: Any, ids: Any, at: Any) -> Any:
    logits = s._session.run(ids, at)
    for state in s._session._states.values():
        state[...] = np.roll(state, 1, axis=0)
    return logits


def _int8_cache(s: Any, ids: Any, at: Any) -> Any:
    logits = s._session.run(ids, at)
    for state in s._session._states.values():
        scale = max(float(np.abs(state).max()) / 127, 1e-9)
        state[...] = np.round(state / scale) * scale
    return logits


def _restart(s: Any, ids: Any, at: Any) -> Any:
    """Number the positions of every chunk from 0."""
    first = at[:, :1] if ids.shape[1] > 1 else 0
    return s._session.run(ids, np.where(at >= 0, at - first, at))


def _late_wrong(s: Any, ids: Any, at: Any) -> Any:
    logits = s._session.run(ids, at)
    return logits[..., ::-1].copy() if int(at.max()) >= 90 else logits


def _no_reset(s: Any) -> None:
    """Keep what the sequence before left behind."""


HELD_OUT_SESSION_FAULTS = (
    _wrapped("logits of the call before", "decode ragged greedy", _previous),
    _wrapped("token before not attended", "decode ragged layers", _blind),
    _wrapped("adapter only while reading the prompt", "decode ragged greedy effect", _prefill_only),
    _wrapped("end-of-text token banned", "prefill chunked decode ragged", _banned),
    _wrapped("cache rows rolled", "ragged slots greedy_batch neighbours", _rows_rolled),
    _wrapped("cache in int8", "decode layers", _int8_cache),
    _wrapped("every chunk starts at position 0", "chunked ragged", _restart),
    _wrapped("wrong from position 90 on", "greedy greedy_batch long", _late_wrong),
)  # fmt: skip
"""Faults of running."""
