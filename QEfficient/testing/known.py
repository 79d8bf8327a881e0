# SPDX-License-Identifier: BSD-3-Clause
"""What PEFT itself does differently, measured over all of its methods: explained, not held against the adapter."""

from typing import Any

from QEfficient.export.lift import moves_base

_PROMPT = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"}
_ROUTED = {"XLORA", "POLY", "LILY", "SHADOW"}
_MIXED = {"LORA", "ROAD"}


def explain(question: str, config: Any, *, tied: bool = False) -> str | None:
    """Return why PEFT answers a question differently for this configuration, or None if it should not.

    Args:
        question: ``"merge"``, ``"disabled"``, ``"padding"``, ``"second"`` (a second adapter beside it) or ``"mixed"``.
        config: The adapter's ``PeftConfig``.
        tied: Embedding and output projection of the base are one tensor.
    """
    reasons = _KNOWN[question](str(config.peft_type.value), config, tied)
    return next((reason for applies, reason in reasons if applies), None)


def is_prompt(config: Any) -> bool:
    """Whether the adapter is made of virtual tokens."""
    return str(config.peft_type.value) in _PROMPT


def takes_from_base(config: Any) -> str | None:
    """Return why loading changes the base's weights, or None if it does not."""
    reason = moves_base(vars(config))
    return f"{reason}: PEFT changes the base's weights whenever it loads the adapter" if reason else None


def keeps_apart(config: Any) -> str | None:
    """Return why PyTorch holds no other adapter rightly beside this one, or None: the base that they share is changed."""
    return next((reason for applies, reason in _changes(config) if applies), None)


def _has(config: Any, field: str) -> bool:
    return bool(getattr(config, field, None))


def _targets_tied(config: Any, tied: bool) -> bool:
    targets = getattr(config, "target_modules", None) or ()
    names = [targets] if isinstance(targets, str) else list(targets)
    return tied and any(
        n.rsplit(".", 1)[-1] in ("embed_tokens", "wte", "lm_head", "embed_in", "embed_out") for n in names
    )


def _merge(method: str, config: Any, tied: bool) -> list[tuple[bool, str]]:
    return [
        (method in _PROMPT, "virtual tokens cannot be merged into weights"),
        (method in _ROUTED or method == "ADAPTION_PROMPT", f"{method} depends on its input, so PEFT cannot merge it"),
        (method == "OSF", "PEFT cannot take OSF out of the weights again"),
        (_has(config, "lora_bias") or method == "BEFT", "PEFT cannot merge a bias into a layer that has none"),
        (_has(config, "alora_invocation_tokens"), "aLoRA depends on its input, so PEFT cannot merge it"),
        (_has(config, "arrow_config"), "Arrow routes by input, so PEFT cannot merge it"),
        (_has(config, "layer_replication"), "PEFT merges every copy of a replicated layer into the one original"),
        (_targets_tied(config, tied), "PEFT adds the change of one tied weight to both; serve it unmerged"),
    ]


def _disabled(method: str, config: Any, tied: bool) -> list[tuple[bool, str]]:
    return [
        (_has(config, "layer_replication"), "replicated layers stay when the adapter is disabled"),
        (takes_from_base(config) is not None, str(takes_from_base(config))),
        (getattr(config, "bias", "none") not in ("none", None), "trained biases are the base's own and stay"),
    ]


def _padding(method: str, config: Any, tied: bool) -> list[tuple[bool, str]]:
    return [
        (method in _PROMPT, "PEFT numbers positions from the row's start, padding included, behind virtual tokens"),
        (method == "LILY", "LILY's router averages over all tokens of the batch, padding included"),
        (method == "ADAPTION_PROMPT", "ADAPTION_PROMPT computes its own attention without positions of padded rows"),
    ]


def _changes(config: Any) -> list[tuple[bool, str]]:
    return [
        (_has(config, "layer_replication"), "a second adapter replicates the layers again"),
        (takes_from_base(config) is not None, "a second adapter takes its factors off the base's weights again"),
        (getattr(config, "bias", "none") not in ("none", None), "PEFT takes one adapter with trained biases at a time"),
    ]


def _second(method: str, config: Any, tied: bool) -> list[tuple[bool, str]]:
    alone = {"ADALORA", "XLORA", "ADAPTION_PROMPT", "SHADOW"}
    return [*_changes(config), (method in alone, f"PEFT takes one {method} adapter at a time")]


def _mixed(method: str, config: Any, tied: bool) -> list[tuple[bool, str]]:
    return [(method not in _MIXED, f"PEFT mixes adapters in one batch for LoRA and RoAd, not {method}")]


_KNOWN = {"merge": _merge, "disabled": _disabled, "padding": _padding, "second": _second, "mixed": _mixed}
