# SPDX-License-Identifier: BSD-3-Clause
"""Lifting: telling the adapter's tensors from the base's, and naming both.

Every tensor of a model becomes an input of the traced function, so that nothing is baked into the graph. Afterwards
the base's tensors turn into initializers, and the adapter's stay inputs. No PEFT method is named here; only LoRA's
dynamic rank is.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners._buffer_dict import BufferDict
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from QEfficient.errors import UnsupportedError

PEFT_PREFIX = "base_model.model."

TASKS = "qeff_tasks"
"""Attribute of a ``PeftModel``: the task chosen for each adapter that holds several."""

# Which dimension of which LoRA tensor is the rank. It is dynamic, so that one graph serves adapters of every rank.
RANK_AXIS = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}

# Fields of a PeftConfig that leave no trace in the graph: they act in training, or through tensors and scalings.
# Everything else does, so a field unknown to us costs a second export at worst, never a wrong graph. So does no dropout.
NOT_IN_GRAPH = frozenset(
    "alpha alpha_pattern auto_mapping base_model_name_or_path corda_config eva_config exclude_modules fan_in_fan_out inference_mode "
    "init_lora_weights init_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_ga_config "
    "modules_to_save r rank_pattern revision runtime_config target_modules task_type "
    "peft_version use_rslora ensure_weight_tying "
    # IA3: which side of a module is scaled shows in its tensor's shape
    "feedforward_modules init_ia3_weights "
    # projections that are drawn from a key are inputs, saved or not
    "d_initial projection_prng_key save_projection "
    # AdaLoRA's schedule
    "beta1 beta2 deltaT init_r orth_reg_weight target_r tfinal tinit total_step".split()
)

# Fields that say how the base is changed, where loading changes it.
_SHAPES_BASE = frozenset(
    "init_lora_weights corda_config loftq_config lora_ga_config r rank_pattern lora_alpha alpha_pattern use_rslora target_modules "
    "exclude_modules layers_to_transform layers_pattern".split()
)

# Methods whose forward can be traced and would then compute something else than in PyTorch, and why.
_DIFFERS = {
    "LILY": "its router averages over all tokens of a batch, padding and other rows included",
    "XLORA": "it runs the model twice, and mixes adapters by what it sees of the whole prompt",
}


@dataclass(slots=True)
class Lifted:
    """The tensors of a model, by the names they get in the graph.

    Attributes:
        base: Base tensors by the base's own names.
        adapter: Adapter tensors by their names in the adapter's file (what no file holds: by module path).
        scalings: The scaling of each adapted module, by input name.
        sites: Parameter or buffer path in the module tree -> name in ``base`` or ``adapter``.
        entries: Name in ``adapter`` or ``scalings`` -> module path and attribute of a dict that holds it, by adapter.
        shared: Module path and attribute of the same dict elsewhere, ``path.attribute`` -> name.
        rank_axes: Adapter tensors with a dynamic rank, and which dimension it is.
    """

    base: dict[str, torch.Tensor] = field(default_factory=dict)
    adapter: dict[str, torch.Tensor] = field(default_factory=dict)
    scalings: dict[str, float] = field(default_factory=dict)
    sites: dict[str, str] = field(default_factory=dict)
    entries: dict[str, tuple[str, str]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    rank_axes: dict[str, int] = field(default_factory=dict)


def refuse(config: PeftConfig) -> None:
    """Refuse a PEFT method that cannot become inputs of a graph.

    Raises:
        UnsupportedError: With the reason.
    """
    method = str(plain(config.peft_type))
    reason = _DIFFERS.get(method)
    if getattr(config, "alora_invocation_tokens", None):
        method, reason = "aLoRA", "it begins to act behind a token that it looks for in the prompt"
    elif getattr(config, "arrow_config", None):
        method, reason = "Arrow", "it is a mixture of the model's other adapters"
    if reason is not None:
        raise UnsupportedError(
            f"adapters of the method {method} cannot be exported: {reason}; PEFT cannot merge them either"
        )


def inner_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a ``PeftModel``, or ``model`` itself."""
    if not isinstance(model, PeftModel):
        return model
    base = model.base_model
    return base if isinstance(base, PreTrainedModel) else base.model  # type: ignore[return-value]


def beside(model: nn.Module) -> dict[str, nn.Module]:
    """Return modules with parameters that PEFT keeps beside the transformers model, by name: networks of their own."""
    inner = inner_model(model)
    if not isinstance(model, PeftModel) or model.base_model is inner:
        return {}
    children = model.base_model.named_children()
    return {name: m for name, m in children if m is not inner and next(m.parameters(), None) is not None}


def _together(model: nn.Module) -> nn.Module:
    """Return one module that shares the parts of the transformers model and of what stands beside it."""
    inner, more = inner_model(model), beside(model)
    if not more:
        return inner
    made = nn.Module()
    made._parameters, made._buffers = inner._parameters, inner._buffers
    made._modules = {**inner._modules, **more}
    return made


def tasks_of(config: PeftConfig) -> int:
    """Return how many tasks an adapter holds one by one; 0 for a method that knows no tasks."""
    return next((n for f in ("num_tasks", "n_tasks") if (n := getattr(config, f, 0))), 0)


def task_of(model: nn.Module, adapter_name: str) -> int:
    """Return the task chosen for an adapter, the first one if none was."""
    return int(getattr(model, TASKS, {}).get(adapter_name, 0))


def shapes_graph(config: PeftConfig) -> bool:
    """Return whether a method changes what a model computes, not only what stands in its cache at first.

    Virtual tokens come before every token and see none, so their keys and values depend on adapter and base alone: they
    are the first entries of the cache, and the graph is the bare base's.
    """
    return not config.is_prompt_learning


def lift(model: nn.Module, adapter_name: str | None) -> Lifted:
    """Name every tensor of ``model``.

    Args:
        model: A transformers model, or a ``PeftModel`` around one.
        adapter_name: The adapter whose tensors become inputs; ``None`` for a plain base.
    """
    lifted = Lifted()
    saved = _saved_names(model, adapter_name) if adapter_name is not None else {}
    names: dict[Any, str] = {}
    inner = _together(model)
    adapters = set(model.peft_config) if isinstance(model, PeftModel) else set()
    tensors = [*inner.named_parameters(remove_duplicate=False), *inner.named_buffers(remove_duplicate=False)]
    for path, tensor in tensors:
        key = _identity(tensor)
        if key in names:
            lifted.sites[path] = names[key]
            continue
        owner = adapter_of(inner, path, adapters)
        if key in saved:
            name, group = saved[key], lifted.adapter
        elif owner == adapter_name and owner is not None:
            name, group = _without(path, owner), lifted.adapter
        elif owner is not None:
            continue  # another adapter's
        else:
            name, group = base_name(path, inner), lifted.base
        names[key] = lifted.sites[path] = name
        group[name] = tensor
    if adapter_name is not None:
        _lift_entries(inner, adapter_name, saved, lifted)
        _choose_rows(inner, task_of(model, adapter_name), lifted)
        lifted.rank_axes = _rank_axes(lifted.adapter)
        for path, name in lifted.sites.items():
            if name in lifted.rank_axes and _is_stacked(inner, path):
                del lifted.rank_axes[name]
    return lifted


def adapter_of(inner: nn.Module, path: str, adapters: Collection[str]) -> str | None:
    """Return the adapter that owns the tensor at ``path``: the key of a container that PEFT keeps by adapter.

    The parent's type decides, not the name alone: an adapter may be called ``mlp``.
    """
    parts = path.split(".")
    for position, part in enumerate(parts):
        if part in adapters:
            parent = inner.get_submodule(".".join(parts[:position]))
            if isinstance(parent, nn.ModuleDict | nn.ParameterDict | BufferDict):
                return part
    return None


def base_name(path: str, inner: nn.Module) -> str:
    """Return the base's own name of a tensor that PEFT has wrapped: its name in the checkpoint.

    PEFT's wrappers keep what they wrap as ``base_layer`` or ``original_module``; one of whole modules, as ``model``.
    """
    *parts, last = path.split(".")
    kept = []
    for position, part in enumerate(parts):
        if part in {"base_layer", "original_module"} and position:
            continue
        if part == "model" and position:
            parent = inner.get_submodule(".".join(parts[:position]))
            if type(parent).__module__.startswith("peft."):
                continue
        kept.append(part)
    return ".".join([*kept, last])


def moves_base(peft_config: Mapping[str, Any]) -> str | None:
    """Return the field of a PeftConfig for which PEFT changes the base's weights whenever it loads the adapter, with its value."""
    kind = str(peft_config.get("init_lora_weights"))
    if kind.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        return f"init_lora_weights is {kind!r}"
    return "kasa_config is set" if peft_config.get("kasa_config") else None


def graph_fields(peft_config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a PeftConfig (as a dict) that can shape the graph, JSON-ready, without empty ones."""
    own = _SHAPES_BASE if moves_base(peft_config) else ()
    fields = {k: v for k, v in peft_config.items() if k in own or (k not in NOT_IN_GRAPH and "dropout" not in k)}
    return {k: plain(v) for k, v in sorted(fields.items()) if v not in (None, False, [], {}, set())}


def plain(value: Any) -> Any:
    """Return ``value`` with sets sorted and enums as text, ready for JSON."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(getattr(value, "value", value))


def _saved_names(model: nn.Module, adapter_name: str) -> dict[Any, str]:
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {_identity(tensor): name for name, tensor in state.items()}


def _identity(tensor: torch.Tensor) -> Any:
    """Return what two views of one tensor share, and two different tensors do not, on any device."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape)


def _without(path: str, adapter_name: str) -> str:
    return PEFT_PREFIX + ".".join(part for part in path.split(".") if part != adapter_name)


def _lift_entries(inner: nn.Module, adapter_name: str, saved: dict[Any, str], lifted: Lifted) -> None:
    """Lift what modules keep outside of their parameters and buffers: dicts of tensors, and of scalings, by adapter."""
    seen: dict[Any, str] = {}
    for path, module in inner.named_modules():
        for attribute, by_adapter in vars(module).items():
            if (
                attribute.startswith("_")
                or not isinstance(by_adapter, dict | BufferDict)
                or adapter_name not in by_adapter
            ):
                continue
            value, name = by_adapter[adapter_name], f"{PEFT_PREFIX}{path}.{attribute}"
            if isinstance(value, torch.Tensor):
                if attribute.endswith("_size"):
                    continue  # what shapes the graph is no input of it
                key = _identity(value)
                if key in seen:
                    lifted.shared[f"{path}.{attribute}"] = seen[key]
                    continue
                name = seen[key] = saved.get(key, name)
                lifted.adapter[name] = value
            elif attribute == "scaling" and isinstance(value, int | float):
                lifted.scalings[name] = float(value)
            else:
                continue
            lifted.entries[name] = (path, attribute)


def _choose_rows(inner: nn.Module, task: int, lifted: Lifted) -> None:
    """Of parameters that keep a row for each task, lift the row of the chosen task: the graph runs one task."""
    for path, name in lifted.sites.items():
        count = getattr(inner.get_submodule(path.rpartition(".")[0]), "n_tasks", None)
        tensor = lifted.adapter.get(name)
        if isinstance(count, int) and tensor is not None and tensor.shape[0] == count:
            lifted.adapter[name] = tensor[task : task + 1]


def _is_stacked(inner: nn.Module, path: str) -> bool:
    """Return whether a LoRA factor holds those of several experts in one dimension: it then is not the rank alone."""
    return getattr(inner.get_submodule(path[: path.index(".lora_")]), "num_experts", 1) > 1


def _rank_axes(adapter: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return the rank's dimension of every LoRA factor; nothing if other tensors' shapes may depend on the rank too."""
    axes: dict[str, int] = {}
    for name in adapter:
        parts = [part for part in name.removesuffix(".weight").split(".") if part.startswith("lora_")]
        if not parts:
            continue
        known = parts[-1] in RANK_AXIS and (name.endswith(".weight") or "embedding" in parts[-1])
        if known:
            axes[name] = RANK_AXIS[parts[-1]]
        elif not name.endswith((".bias", "lora_magnitude_vector")):
            return {}
    return axes
