# SPDX-License-Identifier: BSD-3-Clause
"""Neutral tensors: what an adapter's inputs must hold for the graph to compute the bare base.

PEFT initialises most adapters so that they change nothing. A fresh adapter on the bare base therefore has the values: a
one for IA3, the norms of the base's weights for DoRA. Tensors with a rank need none: zeros do, for every rank.
"""

import copy
from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from QEfficient.export.lift import Lifted, inner_model, lift
from QEfficient.export.torch_to_onnx import Neutral
from QEfficient.peft.adapters import to_numpy
from QEfficient.peft.tasks import choose_task, task_of


def neutral_of(model: PeftModel, name: str) -> Neutral:
    """Return the neutral value of every input of adapter ``name`` that has no rank and is not zero.

    A fresh adapter is tried first, then one that is zero all over (some methods start with a small effect). Better than
    one that is nothing as a whole is one whose targets are nothing apart: an adapter may bring some of the targets, and
    with them the tensors that all targets share. The model is not changed; the base's weights are shared with it, not
    copied. If neither leaves the base as it is (PEFT changes the base itself: replicated layers, say), the fresh
    adapter's values are returned: ``qefficient test`` will tell.
    """
    lifted = lift(model, name)
    if lifted.rank_axes.keys() == lifted.adapter.keys():
        return Neutral({})
    bare = _bare_copy(model)
    ids = torch.arange(3, 6)[None]
    with torch.no_grad():
        want = bare(input_ids=ids).logits
        fresh_model = get_peft_model(bare, _fresh(model.peft_config[name]), adapter_name=name).eval()
        choose_task(fresh_model, name, task_of(model, name))
        fresh = lift(fresh_model, name)

        values = {n: to_numpy(t).copy() for n, t in fresh.adapter.items() if n not in fresh.rank_axes}
        tried = []
        for zeroed in (False, True):
            if zeroed:
                values = {n: v for n, v in values.items() if not np.issubdtype(v.dtype, np.floating)}
                for tensor in _floating(fresh.adapter.values()):
                    tensor.zero_()
            whole = _close(fresh_model(input_ids=ids).logits, want)
            for tensor in _shared(fresh):
                tensor.normal_(generator=torch.Generator().manual_seed(0))
            apart = whole and _close(fresh_model(input_ids=ids).logits, want)
            tried.append((apart, whole, values))
            if apart:
                break
    apart, whole, values = max(tried, key=lambda one: one[:2])  # of equals the first
    found = {n: value for n, value in values.items() if n in lifted.adapter and value.any()}
    return Neutral(found, apart=(apart or not whole) and not _chosen_by_key(fresh_model, name, fresh))


def _floating(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [t for t in tensors if t.dtype.is_floating_point]


def _shared(lifted: Lifted) -> list[torch.Tensor]:
    """Return the adapter's tensors that stand in several modules."""
    places = Counter([*lifted.sites.values(), *lifted.entries, *lifted.shared.values()])
    return _floating(t for n, t in lifted.adapter.items() if places[n] > 1)


def _chosen_by_key(model: PeftModel, name: str, lifted: Lifted) -> bool:
    """Return whether modules choose among shared tensors by keys of their own: these depend on which targets there are."""
    inside = (by_adapter for module in model.modules() for by_adapter in vars(module).values())
    keys = {d[name] for d in inside if isinstance(d, dict) and isinstance(d.get(name), str)}
    return len(keys) > 1 and bool(_shared(lifted))


def _fresh(config: PeftConfig) -> PeftConfig:
    """Return a copy of ``config`` whose adapter starts without an effect."""
    made = copy.deepcopy(config)
    made.inference_mode = False
    for field in ("init_weights", "init_lora_weights"):
        if hasattr(made, field):
            setattr(made, field, True)
    return made


def _close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((got - want).abs().max() <= 1e-5 * (want.max() - want.min()))


def _bare_copy(model: PeftModel) -> nn.Module:
    """Return the base inside ``model`` without any wrapper, its weights shared."""
    inner = inner_model(model)
    shared = {id(t): t for t in (*inner.parameters(), *inner.buffers())}
    bare: nn.Module = copy.deepcopy(inner, dict(shared))
    for parent in list(bare.modules()):
        for key, child in list(parent.named_children()):
            parent._modules[key] = _unwrapped(child)
    return bare


def _unwrapped(module: nn.Module) -> nn.Module:
    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        elif type(module).__module__.startswith("peft.") and isinstance(getattr(module, "model", None), nn.Module):
            module = module.model  # type: ignore[assignment]
        else:
            return module
