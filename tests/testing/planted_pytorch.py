# SPDX-License-Identifier: BSD-3-Clause
"""Faults planted into a loaded model: what a wrong PEFT, a wrong base or a wrong habit of using them does.

Each takes a reference with the adapters ``one`` and ``two`` attached, and damages it for good.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from QEfficient.testing.reference import Reference


@dataclass(frozen=True)
class ModelFault:
    """A planted fault and the names of the checks, any of which names it rightly."""

    name: str
    checks: tuple[str, ...]
    plant: Callable[[Reference], Any]


def adapted(reference: Reference) -> list[nn.Module]:
    """Return the layers that have adapters."""
    return [m for m in reference.model.modules() if hasattr(m, "base_layer") and hasattr(m, "merge")]


def _weight(reference: Reference, factor: float, module: int = 3) -> None:
    adapted(reference)[module].base_layer.weight.data *= factor


def _parameters(reference: Reference, name: str) -> list[nn.Parameter]:
    return [p for n, p in reference.model.named_parameters() if f".{name}." in f"{n}."]


def _changed(
    reference: Reference, name: str, change: Callable[[torch.Tensor], torch.Tensor], only: int | None = None
) -> None:
    found = [p for p in _parameters(reference, name) if p.any()]
    for p in found if only is None else found[only : only + 1]:
        p.data = change(p.data)


def _patched(reference: Reference, method: str, make: Callable[[Any], Any]) -> None:
    """Replace a method of one adapted layer."""
    layer = adapted(reference)[2]
    setattr(layer, method, make(getattr(layer, method)))


def _twice(merge: Any) -> Any:
    def doubled(*args: Any, **kwargs: Any) -> None:
        merge(*args, **kwargs)
        layer = merge.__self__
        layer.base_layer.weight.data += layer.get_delta_weight(layer.merged_adapters[-1])

    return doubled


def _never(unmerge: Any) -> Any:
    def kept() -> None:
        unmerge.__self__.merged_adapters.clear()

    return kept


def _nothing(merge: Any) -> Any:
    return lambda adapter_names=None, **k: merge.__self__.merged_adapters.extend(
        adapter_names or merge.__self__.active_adapters
    )


def _train(reference: Reference) -> None:
    for module in adapted(reference):
        for name in module.lora_dropout:
            module.lora_dropout[name] = nn.Dropout(0.3)
    reference.model.train()


def _noise(reference: Reference) -> None:
    layer = adapted(reference)[1]
    forward = layer.forward
    layer.forward = lambda x, *a, **k: forward(x, *a, **k) + 1e-3 * torch.randn(1)  # type: ignore[method-assign]


def _no_mask(reference: Reference) -> None:
    forward = reference.model.forward
    reference.model.forward = lambda *a, attention_mask=None, **k: forward(
        *a, attention_mask=None if attention_mask is None else torch.ones_like(attention_mask), **k
    )


def _rows_mixed(reference: Reference) -> None:
    for layer in adapted(reference):
        forward = layer._mixed_batch_forward
        layer._mixed_batch_forward = lambda x, *a, adapter_names, forward=forward, **k: forward(
            x, *a, adapter_names=adapter_names[::-1], **k
        )


def _deletes_more(reference: Reference) -> None:
    delete = reference.model.delete_adapter

    def and_more(name: str) -> None:
        delete(name)
        _changed(reference, "one", lambda t: 1.01 * t, 0)

    reference.model.delete_adapter = and_more


def _loads_into_base(reference: Reference) -> None:
    load = reference.model.load_adapter

    def and_base(*args: Any, **kwargs: Any) -> Any:
        _weight(reference, 1.01)
        return load(*args, **kwargs)

    reference.model.load_adapter = and_base


def _saves_less(reference: Reference) -> None:
    save = reference.model.save_pretrained

    def other(*args: Any, **kwargs: Any) -> None:
        _changed(reference, "one", lambda t: t + 1e-3, 0)
        save(*args, **kwargs)

    reference.model.save_pretrained = other


def _too_large(reference: Reference) -> None:
    for layer in adapted(reference):
        layer.lora_A["one"].weight.data *= 3e3
        layer.lora_B["one"].weight.data *= 3e3


def _always_on(reference: Reference) -> None:
    for layer in adapted(reference):
        layer.enable_adapters = lambda enabled: None  # type: ignore[attr-defined]
    reference.model.base_model.disable_adapter_layers = lambda: None


def _switch_ignored(reference: Reference) -> None:
    reference.model.set_adapter("two")
    reference.model.set_adapter = lambda name: None


def _half_weights(reference: Reference) -> None:
    combine = reference.model.add_weighted_adapter
    reference.model.add_weighted_adapter = lambda names, weights, *a, **k: combine(
        names, [0.5 * w for w in weights], *a, **k
    )


def _unfrozen(reference: Reference) -> None:
    adapted(reference)[1].base_layer.weight.requires_grad_(True)


def _cut_off(reference: Reference) -> None:
    factor = adapted(reference)[1].lora_B["one"]
    factor.forward = lambda x: nn.functional.linear(x, factor.weight.detach())


def _generates_base(reference: Reference) -> None:
    generate = reference.model.generate

    def without(*args: Any, **kwargs: Any) -> Any:
        with reference.model.disable_adapter():
            return generate(*args, **kwargs)

    reference.model.generate = without


MODEL_FAULTS = (
    ModelFault("base weight changed", ("pytorch.disabled",), lambda r: _weight(r, 1.05)),
    ModelFault("base weight is NaN", ("pytorch.finite", "pytorch.effect"), lambda r: _weight(r, float("nan"))),
    ModelFault("adapter's tensors zeroed after loading", ("pytorch.effect",), lambda r: _changed(r, "one", torch.zeros_like)),
    ModelFault("adapter cannot be disabled", ("pytorch.disabled",), _always_on),
    ModelFault("adapter never selected", ("pytorch.several",), _switch_ignored),
    ModelFault("later adapter moved the first", ("pytorch.several",), lambda r: _changed(r, "one", lambda t: 1.001 * t, 0)),
    ModelFault("merge adds twice", ("pytorch.merge",), lambda r: _patched(r, "merge", _twice)),
    ModelFault("merge leaves a module out", ("pytorch.merge",), lambda r: _patched(r, "merge", _nothing)),
    ModelFault("unmerge does nothing", ("pytorch.merge",), lambda r: _patched(r, "unmerge", _never)),
    ModelFault("dropout left on", ("pytorch.deterministic",), _train),
    ModelFault("a random layer", ("pytorch.deterministic",), _noise),
    ModelFault("padding attended", ("pytorch.padding",), _no_mask),
    ModelFault("rows of a mixed batch swapped", ("pytorch.mixed",), _rows_mixed),
    ModelFault("deleting changes another adapter", ("pytorch.delete",), _deletes_more),
    ModelFault("loading changes the base", ("pytorch.delete",), _loads_into_base),
    ModelFault("saving writes other tensors", ("pytorch.reload",), _saves_less),
    ModelFault("one tensor not loaded", ("pytorch.reload",), lambda r: _changed(r, "one", lambda t: t.roll(1), 0)),
    ModelFault("values too large for bfloat16", ("pytorch.half", "pytorch.finite", "pytorch.effect", "pytorch.reload"), _too_large),
    ModelFault("combination weighs by half", ("pytorch.weighted",), _half_weights),
    ModelFault("base left trainable", ("pytorch.gradients",), _unfrozen),
    ModelFault("one factor cut off from training", ("pytorch.gradients",), _cut_off),
    ModelFault("generate() leaves the adapter out", ("pytorch.generate",), _generates_base),
)  # fmt: skip
"""Faults of a loaded model."""
