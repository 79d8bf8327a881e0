# SPDX-License-Identifier: BSD-3-Clause
"""Checks of what people do with a loaded adapter next: generate, train on, combine. Each leaves the model as it was."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from QEfficient.contract import BASE
from QEfficient.export.skeleton import uncounted_token
from QEfficient.peft.tasks import tasks_of
from QEfficient.testing.check import Check, Facts, Finding, failed, passed, skipped
from QEfficient.testing.compare import LOGITS_TOLERANCE, Logits, apart
from QEfficient.testing.known import takes_from_base
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import Outcome
from QEfficient.testing.text import counted, listed, number
from QEfficient.testing.workload import Tokens

_NEW = 4
_COMBINED = "qefficient_combined"
_PLAIN = ("use_dora", "lora_bias", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters",
          "trainable_token_indices", "layer_replication", "alora_invocation_tokens", "arrow_config", "corda_config",
          "eva_config", "loftq_config", "use_kasa", "kasa_config", "velora_config", "monteclora_config")  # fmt: skip
_SCALES = ("use_rslora", "rank_pattern", "alpha_pattern")
"""Variants that change sizes and factors only: every tensor takes part all the same."""


def _ask_generate(reference: Reference, subject: str) -> Finding:
    row = reference.short
    holds_tasks = subject != BASE and tasks_of(reference.model.peft_config[subject])
    more: dict[str, Any] = {"task_ids": torch.zeros(1, dtype=torch.int64)} if holds_tasks else {}
    if (uncounted := uncounted_token(reference.model)) is not None:
        more["position_ids"] = torch.arange(len(row))[None] + uncounted + 1
    new, scores = _generated(reference, subject, row, **more)
    if not len(new):
        return failed("generate() returns no new token.")
    logits = reference.logits(subject, np.concatenate([row, new[:-1]]))[-len(new) :].astype(np.float64)
    lead = (logits.max(axis=1) - logits[np.arange(len(new)), new]) / np.maximum(np.ptp(logits, axis=1), 1e-30)
    worst = float(lead.max())
    if worst <= 2 * LOGITS_TOLERANCE:
        if (
            uncounted is not None
            and subject == BASE
            and not np.array_equal(_generated(reference, subject, row)[0], new)
        ):
            text = (
                f"generate() of transformers numbers tokens from 0, the forward pass of this base from {uncounted + 1}"
            )
            return Finding(Outcome.WARN, f"{text}: give generate() position_ids, or its tokens are others.", worst)
        error = apart(scores, logits)
        if not error <= LOGITS_TOLERANCE:
            text = f"The {len(new)} tokens of generate() are those of the forward pass, the logits behind them differ by {number(error)} of the range"
            return Finding(
                Outcome.WARN, f"{text}: what it keeps in its cache is not what the forward pass sees.", error
            )
        return passed(f"The {len(new)} tokens of generate() are those of the forward pass.", worst)
    at = int(lead.argmax())
    text = f"Token {at} of generate() is {new[at]}, the forward pass puts {int(logits[at].argmax())} above it by {number(worst)} of the range"
    plain = reference.logits(BASE, np.concatenate([row, new[:-1]]))[-len(new) :] if subject != BASE else logits
    if subject != BASE and (plain.argmax(axis=1) == new).all():
        text += "; its tokens are the base's"
    if _cache_differs(reference, row):
        why = "transformers generates other tokens of the bare base with its cache than without one, which is no fault of an adapter"
        return Finding(
            Outcome.WARN, f"{text}: {why}. Generate with use_cache=False, or from the exported graph.", worst
        )
    return failed(f"{text}. Does what generates use the adapted model? Does the adapter work with a cache?", worst)


def _cache_differs(reference: Reference, row: Tokens) -> bool:
    """Whether the bare base's own cache changes what is generated."""
    kept, anew = (_generated(reference, BASE, row, use_cache=kept)[0] for kept in (True, False))
    return not np.array_equal(kept, anew)


def _generated(reference: Reference, subject: str, row: Tokens, **more: Any) -> tuple[Tokens, Logits]:
    """Return the new tokens and the logits ``(tokens, V)`` that they were chosen by."""
    with reference.selected(subject) as model, _plain_settings(model), torch.no_grad():
        made = model.generate(
            input_ids=torch.from_numpy(row)[None],
            attention_mask=torch.ones((1, len(row)), dtype=torch.int64),
            max_new_tokens=_NEW,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            **more,
        )
    tokens: Tokens = made.sequences[0].numpy()[len(row) :]
    return tokens, np.concatenate([one.float().numpy() for one in made.logits])


@contextlib.contextmanager
def _plain_settings(model: Any) -> Iterator[None]:
    """Take away what the base's own settings do to the choice of tokens: penalties and forced tokens are no fault of an adapter."""
    settings = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=settings.eos_token_id)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for holder in model.modules():
            if hasattr(holder, "generation_config"):
                holder.generation_config = settings


def _ask_gradients(reference: Reference, subject: str) -> Finding:
    named = list(reference.model.named_parameters())
    before = [p.requires_grad for _, p in named]
    others = set(reference.paths) - {subject}
    parts = {n: set(n.split(".")) for n, _ in named}
    own = [(n, p) for n, p in named if subject in parts[n] and p.is_floating_point()]
    foreign = [(n, p) for n, p in named if others & parts[n] and p.is_floating_point()]
    unfrozen = [(n, p) for n, p in named if p.requires_grad and not parts[n] & {subject, *others}]
    if not own:
        return skipped("Its parameters do not carry its name, so they cannot be told from others.")
    try:
        with reference.selected(subject) as model, torch.enable_grad():
            for _, p in named:
                p.requires_grad_(False)
            asked = own + foreign + unfrozen
            for _, p in asked:
                p.requires_grad_(True)
            out = model(input_ids=torch.from_numpy(reference.short)[None], use_cache=False)
            loss = out.logits.float().log_softmax(-1)[..., 0].mean()
            grads = dict(
                zip(
                    [n for n, _ in asked],
                    torch.autograd.grad(loss, [p for _, p in asked], allow_unused=True),
                    strict=True,
                )
            )
    except RuntimeError as e:
        return skipped(f"PEFT does not train it here: {str(e).splitlines()[0].rstrip('.')}.")
    finally:
        for (_, p), needed in zip(named, before, strict=True):
            p.requires_grad_(needed)
    own_names, foreign_names, base_names = ([n for n, _ in some] for some in (own, foreign, unfrozen))
    trains_biases = getattr(reference.model.peft_config[subject], "bias", "none") not in ("none", None)
    if leaked := [] if trains_biases else _reached(base_names, grads):
        text = f"A gradient also reaches {counted(len(leaked), 'parameter')} of the base, first {leaked[0]}"
        return failed(f"{text}: training on would change the base under every adapter. Freeze it.", len(leaked))
    return _judge_gradients(own_names, _reached(foreign_names, grads), grads, reference, subject)


def _reached(names: list[str], grads: dict[str, Any]) -> list[str]:
    return [n for n in names if grads[n] is not None and bool(grads[n].any())]


def _judge_gradients(
    own: list[str], leaked: list[str], grads: dict[str, Any], reference: Reference, name: str
) -> Finding:
    without = [n for n in own if grads[n] is None]
    damaged = [n for n in own if grads[n] is not None and not bool(torch.isfinite(grads[n]).all())]
    facts: Facts = {"parameters": len(own), "without gradient": listed(without, 4) if without else "none"}
    if leaked:
        text = f"A gradient also reaches {len(leaked)} parameters of other adapters, first {leaked[0]}"
        return failed(
            f"{text}: training this one would change them. Load it into a model of its own.", len(leaked), facts
        )
    if damaged:
        return failed(f"The gradient of {damaged[0]} is not finite. Look for damaged weights.", len(damaged), facts)
    if len(without) == len(own):
        return failed("No gradient reaches the adapter: it takes no part in the forward pass.", len(own), facts)
    plain = _is_plain(reference, name, besides=_SCALES)
    if without and plain:
        text = f"{counted(len(without), 'tensor')} of {len(own)} get no gradient, first {without[0]}"
        return Finding(Outcome.WARN, f"{text}: that module is not used by this base.", len(without), facts)
    return passed(f"Gradients reach its {len(own) - len(without)} parameters and no other adapter's.", 0, facts)


def _ask_weighted(reference: Reference, subject: str) -> Finding:
    model = reference.model
    if str(model.peft_config[subject].peft_type.value) != "LORA":
        return skipped("PEFT combines adapters by weight for LoRA.")
    if why := takes_from_base(model.peft_config[subject]):
        return skipped(f"PEFT's own limit: {why}, so for the combination too.")
    usable = [n for n in reference.paths if _is_plain(reference, n)]
    if subject not in usable:
        return skipped("PEFT's own limit: combined adapters lose variants, patterns and modules_to_save.")
    names = [subject, *[n for n in usable if n != subject][:1]]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_weighted_adapter(names, [1.0] * len(names), _COMBINED, combination_type="cat")
        got = reference.logits(_COMBINED, reference.short)
        want = _together(reference, names)
    except (ValueError, NotImplementedError, TypeError, KeyError) as e:
        return skipped(f"PEFT does not combine it: {str(e).splitlines()[0].rstrip('.')}.")
    finally:
        if _COMBINED in model.peft_config:
            model.delete_adapter(_COMBINED)
        reference.logits(subject, reference.short[:1])
    error = apart(got, want)
    if error <= LOGITS_TOLERANCE:
        return passed(f"{' + '.join(names)}, combined into one adapter, gives what they give together.", error)
    text = f"{' + '.join(names)}, combined by add_weighted_adapter, differs by {number(error)} of the range from both at once"
    return failed(f"{text}. Are rank and scaling in the configuration those of the tensors?", error)


def _is_plain(reference: Reference, name: str, besides: tuple[str, ...] = ()) -> bool:
    """Whether an adapter is LoRA without variants, but for those named in ``besides``."""
    config = reference.model.peft_config[name]
    plain = str(config.peft_type.value) == "LORA" and not any(
        getattr(config, f, None) for f in _PLAIN if f not in besides
    )
    return plain and getattr(config, "bias", "none") in ("none", None)


def _together(reference: Reference, names: list[str]) -> Logits:
    with reference.selected(names[0]) as model:
        model.base_model.set_adapter(names)
        return reference.logits(None, reference.short)


CHECKS: tuple[Check[Reference], ...] = (
    Check("generate", "generate() uses the adapter", "What generates is another path than the forward pass: it may use the base, or a cache that the method does not work with.", _ask_generate, 2 * LOGITS_TOLERANCE, "of range", of_base=True),
    Check("gradients", "Gradients reach this adapter alone", "Training on must change this adapter and no other; a tensor without gradient is not used.", _ask_gradients, 0, "parameters"),
    Check("weighted", "Weighted combination", "Concatenated factors add up to what both adapters give together, up to rounding.", _ask_weighted, LOGITS_TOLERANCE, "of range"),
)  # fmt: skip
"""Asked of each adapter."""
