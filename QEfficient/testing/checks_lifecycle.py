# SPDX-License-Identifier: BSD-3-Clause
"""Checks of what is done to an adapter in PyTorch: merged, saved, deleted, mixed, padded. Each leaves the model as it was.

One short row is enough: a wrong weight shows at every token. What PEFT itself does differently is skipped with the reason.
"""

import contextlib
import inspect
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from peft import PeftModel, get_peft_model_state_dict

from QEfficient.contract import BASE
from QEfficient.peft.adapters import read_tensors
from QEfficient.testing.check import Check, Facts, Finding, failed, passed, skipped
from QEfficient.testing.compare import FLOAT32_NOISE, LOGITS_TOLERANCE, Logits, apart
from QEfficient.testing.known import explain, keeps_apart
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import Outcome
from QEfficient.testing.text import listed, number

_SECOND = "qefficient_second"
_FILE = "adapter_model.safetensors"


def known(question: str, reference: Reference, subject: str) -> str | None:
    """Return what PEFT is known to do differently with this adapter."""
    tied = bool(getattr(reference.model.config, "tie_word_embeddings", False))
    return explain(question, reference.model.peft_config[subject], tied=tied)


def _ask_merge(reference: Reference, subject: str) -> Finding:
    if why := known("merge", reference, subject):
        return skipped(f"PEFT's own limit: {why}.")
    model, row = reference.model, reference.short
    with reference.selected(subject):
        before = reference.logits(subject, row)
        with _weights_kept(model) as room:
            if not room:
                return skipped("Merging changes the weights, and there is no memory for a copy of them to restore.")
            try:
                model.merge_adapter()
            except (NotImplementedError, ValueError, AttributeError) as e:
                return skipped(f"PEFT cannot merge {subject!r}: {_first_line(e)}.")
            merged = reference.logits(None, row)
            model.unmerge_adapter()
            after = reference.logits(None, row)
    there, back = apart(merged, before), apart(after, before)
    facts: Facts = {"merged": number(there, "of range"), "unmerged again": number(back, "of range")}
    tolerance = _merge_tolerance(reference, subject)
    if there <= tolerance and back <= tolerance:
        return passed(
            "Merged into the weights the adapter gives the same logits, and unmerging returns.", max(there, back), facts
        )
    if there > tolerance:
        text = (
            f"Merged into the weights, the logits differ by {number(there)} of their range from the unmerged adapter's"
        )
        if bypassed := _bypassed(reference, subject, before, tolerance):
            why = f"the base reads the weight of {listed(bypassed, 2)} itself, so the adapter there counts only when merged"
            return Finding(
                Outcome.WARN, f"{text}. PEFT's own limit: {why}. Leave it out of target_modules.", there, facts
            )
        return failed(f"{text}. Deploy it unmerged, or look for weights that several modules share.", there, facts)
    text = f"Unmerging leaves {number(back)} of the logits' range behind. Reload the base instead of unmerging."
    return failed(text, back, facts)


def _bypassed(reference: Reference, subject: str, before: Logits, tolerance: float) -> list[str]:
    """Return the adapted modules that the base never calls, if merging all the others gives the unmerged logits."""
    layers = {
        n: m for n, m in reference.model.named_modules() if hasattr(m, "base_layer") and hasattr(m, "get_delta_weight")
    }
    called: set[str] = set()
    hooks = [m.register_forward_pre_hook(lambda *_, n=n: called.add(n)) for n, m in layers.items()]
    try:
        reference.logits(subject, reference.short)
    finally:
        for hook in hooks:
            hook.remove()
    left = sorted({n.rsplit(".", 1)[-1] for n in layers if n not in called})
    if not left:
        return []
    with reference.selected(subject), _weights_kept(reference.model):
        for name in called:
            layers[name].merge(adapter_names=[subject])
        merged = reference.logits(None, reference.short)
    return left if apart(merged, before) <= tolerance else []


def _merge_tolerance(reference: Reference, subject: str) -> float:
    """Rotations are inverted when merged, so that PEFT's own tests allow them a hundred times more."""
    rotates = {"ADALORA", "OFT", "BOFT", "PSOFT", "HRA"}
    method = str(reference.model.peft_config[subject].peft_type.value)
    return 1e-2 if method in rotates else LOGITS_TOLERANCE


@contextlib.contextmanager
def _weights_kept(model: Any) -> Iterator[bool]:
    """Keep a copy of every weight that merging may touch and put it back, bit by bit; yield whether there is memory for that."""
    adapted = [m for m in model.modules() if hasattr(m, "merge") and hasattr(m, "unmerge")]
    tensors = [t for m in adapted for t in (*m.parameters(), *m.buffers())]
    weights = list({id(t): t for t in tensors or (*model.parameters(), *model.buffers())}.values())
    if sum(p.nbytes for p in weights) * 1.2 > psutil.virtual_memory().available:
        yield False
        return
    kept = [p.detach().clone() for p in weights]
    try:
        yield True
    finally:
        if any(getattr(m, "merged", False) is True for m in model.modules()):
            model.unmerge_adapter()
        with torch.no_grad():
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)


def _ask_reload(reference: Reference, subject: str) -> Finding:
    model = reference.model
    before = reference.logits(subject, reference.short)
    with tempfile.TemporaryDirectory(prefix="qefficient-") as aside, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(aside, selected_adapters=[subject], save_embedding_layers=False)
        folder = Path(aside) / subject if (Path(aside) / subject).is_dir() else Path(aside)
        file = read_tensors(reference.paths[subject] / _FILE)
        wrong = _differing(read_tensors(folder / _FILE), file)
        if wrong:
            text = f"Saved again, {len(wrong)} tensors are not those of the file, first {wrong[0]}"
            if set(wrong) <= _never_loaded(reference, subject, file):
                text = f"PEFT's own fault: it does not load {len(wrong)} tensors that it has saved under these names, first {wrong[0]}"
                advice = "In PyTorch the adapter works without them. Leave these modules out of target_modules and train again"
                return Finding(Outcome.WARN, f"{text}. {advice}.", len(wrong))
            return failed(f"{text}: PEFT did not load them. Check the names in the file.", len(wrong))
        if why := known("second", reference, subject):
            return Finding(Outcome.PASS, f"Saved again, the file is the same; not loaded beside itself: {why}.", 0.0)
        try:
            model.load_adapter(str(folder), adapter_name=_SECOND)
            again = reference.logits(_SECOND, reference.short)
        finally:
            _forget(model)
    error = apart(again, before)
    if error <= FLOAT32_NOISE:
        return passed("Saved and loaded again, the adapter gives the same logits.", error)
    return failed(
        f"Saved and loaded again, the logits differ by {number(error)} of their range. Part of the adapter is not saved.",
        error,
    )


def _never_loaded(reference: Reference, subject: str, file: Mapping[str, npt.NDArray[Any]]) -> set[str]:
    """Return names of tensors that PEFT leaves as they were when it loads the adapter once more."""
    if known("second", reference, subject):
        return set()
    model = reference.model
    try:
        model.load_adapter(str(reference.paths[subject]), adapter_name=_SECOND)
        loaded = get_peft_model_state_dict(model, adapter_name=_SECOND, save_embedding_layers=False)
    finally:
        _forget(model)
    return set(_differing({name: tensor.float().numpy() for name, tensor in loaded.items()}, file))


def _differing(saved: Mapping[str, npt.NDArray[Any]], file: Mapping[str, npt.NDArray[Any]]) -> list[str]:
    """Return names of tensors that are not, in value, those of the original file; extra ones of the base are left out."""
    return sorted(k for k in saved if k in file and not np.array_equal(saved[k], file[k], equal_nan=True))


def _forget(model: Any) -> None:
    if _SECOND in model.peft_config:
        model.delete_adapter(_SECOND)


def _ask_delete(reference: Reference, subject: str) -> Finding:
    model = reference.model
    if why := known("second", reference, subject):
        return skipped(f"PEFT's own limit: {why}.")
    before, base = reference.logits(subject, reference.short), reference.logits(BASE, reference.short)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model.load_adapter(str(reference.paths[subject]), adapter_name=_SECOND)
            reference.logits(_SECOND, reference.short)
        finally:
            _forget(model)
    if _SECOND in model.peft_config:
        text = "delete_adapter() leaves the adapter attached"
        return failed(f"{text}. Load adapters into a fresh model instead of deleting them.")
    moved = apart(reference.logits(subject, reference.short), before)
    base_moved = apart(reference.logits(BASE, reference.short), base)
    if max(moved, base_moved) == 0:
        return passed("Loading and deleting a second adapter leaves the first and the base as they were.", 0)
    who = subject if moved >= base_moved else BASE
    text = f"After another adapter was loaded and deleted, {who!r} has moved by {number(max(moved, base_moved))} of its range"
    return failed(f"{text}. Load adapters into a fresh model instead of deleting them.", max(moved, base_moved))


def _ask_several(reference: Reference, subject: str) -> Finding:
    others = [n for n in reference.paths if n != subject]
    if why := keeps_apart(reference.model.peft_config[subject]):
        return skipped(f"PEFT's own limit: {why}; it is tested apart from other adapters.")
    if not others:
        return skipped("There is only one adapter.")
    moved = apart(reference.logits(subject, reference.short), reference.alone[subject])
    if moved == 0:
        return passed(f"Beside {len(others)} others it gives the bits that it gave when it had just been attached.", 0)
    text = f"Since other adapters were attached the logits have moved by {number(moved)} of their range"
    return failed(
        f"{text}. The adapters share something (trained embeddings, biases, modules_to_save); test them apart.", moved
    )


def _ask_mixed(reference: Reference, subject: str) -> Finding:
    if why := known("mixed", reference, subject):
        return skipped(f"PEFT's own limit: {why}.")
    usable = [n for n in reference.paths if not known("mixed", reference, n) and not _is_variant(reference.model, n)]
    if subject not in usable:
        return skipped("PEFT's own limit: it does not mix variants of LoRA (DoRA and others) in one batch.")
    names = [subject, BASE, *[n for n in usable if n != subject][:2]]
    length = min(len(reference.short), 8)
    rows = [row[:length] for row in reference.workload.rows]
    rows = [rows[i % len(rows)] for i in range(len(names))]
    said = ["__base__" if n == BASE else n for n in names]
    try:
        with reference.selected(subject), _hooks_kept(reference.model), torch.no_grad():
            ids = torch.from_numpy(np.stack(rows))
            got = reference.model(input_ids=ids, adapter_names=said, use_cache=False).logits.float().numpy()
    except (ValueError, TypeError, NotImplementedError, KeyError) as e:
        return skipped(f"PEFT does not mix these adapters in a batch: {_first_line(e)}.")
    errors = {n: apart(got[i], reference.logits(n, rows[i])) for i, n in enumerate(names)}
    worst = max(errors, key=lambda n: errors[n])
    if errors[worst] <= LOGITS_TOLERANCE:
        return passed(f"In one batch with {len(names) - 1} others each row gives what it gives alone.", errors[worst])
    if max(apart(g, reference.logits(subject, row)) for g, row in zip(got, rows, strict=True)) <= LOGITS_TOLERANCE:
        text = f"PEFT's own limit: it ignores adapter_names with this base, every row of a batch gets {subject!r}"
        return Finding(Outcome.WARN, f"{text}. Run the adapters in batches of their own.", errors[worst])
    text = f"In a batch of {', '.join(names)}, the row of {worst!r} differs by {number(errors[worst])} of its range from the row alone"
    return failed(f"{text}. Run the adapters in batches of their own.", errors[worst])


def _is_variant(model: Any, name: str) -> bool:
    return any(name in (getattr(m, "lora_variant", None) or ()) for m in model.modules())


@contextlib.contextmanager
def _hooks_kept(model: Any) -> Iterator[None]:
    """Take away the hooks that PEFT leaves behind when a mixed batch fails."""
    before = {id(h) for m in model.modules() for h in m._forward_pre_hooks.values()}
    try:
        yield
    finally:
        for module in model.modules():
            for key in [k for k, h in module._forward_pre_hooks.items() if id(h) not in before]:
                del module._forward_pre_hooks[key]


def _ask_deterministic(reference: Reference, subject: str) -> Finding:
    first, second = reference.logits(subject, reference.short), reference.logits(subject, reference.short)
    if np.array_equal(first, second, equal_nan=True):
        return passed("The same tokens give the same bits twice.", 0)
    text = f"The same tokens give logits that differ by {number(apart(second, first))} of their range"
    return failed(
        f"{text}. Something is random or trains on: dropout, a sampler, a router's noise. Call eval().",
        apart(second, first),
    )


def _ask_padding(reference: Reference, subject: str) -> Finding:
    if subject != BASE and isinstance(reference.model, PeftModel) and (why := known("padding", reference, subject)):
        return skipped(f"PEFT's own limit: {why}.")
    rows = [reference.workload.rows[0][:12], reference.short[:5]]
    alone = [reference.logits(subject, row) for row in rows]
    errors = {}
    for side in ("right", "left"):
        got = reference.padded(subject, rows, side)
        errors[side] = max(apart(got[i], alone[i]) for i in range(len(rows)))
    side = max(errors, key=lambda s: errors[s])
    if errors[side] <= LOGITS_TOLERANCE:
        return passed("Padding on either side changes nothing at the tokens that are attended to.", errors[side])
    if subject != BASE and _padding_moves_base(reference, rows, side):
        return Finding(
            Outcome.WARN, f"Padding on the {side} moves the logits; that of the base does too.", errors[side]
        )
    text = f"Padding on the {side} moves the logits by {number(errors[side])} of their range"
    if errors["right"] <= LOGITS_TOLERANCE and not _takes_positions(reference.model):
        why = "the base takes no position_ids, so it counts the padding in front of a row"
        return Finding(Outcome.WARN, f"{text}: {why}. Pad on the right.", errors[side])
    return failed(
        f"{text}. Batches of different lengths give other answers: use one row, or the other side.", errors[side]
    )


def _takes_positions(model: Any) -> bool:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "position_ids" in inspect.signature(type(base).forward).parameters


def _padding_moves_base(reference: Reference, rows: list[Any], side: str) -> bool:
    got = reference.padded(BASE, rows, side)
    return max(apart(g, reference.logits(BASE, row)) for g, row in zip(got, rows, strict=True)) > LOGITS_TOLERANCE


def _ask_half(reference: Reference, subject: str) -> Finding:
    want, base = reference.logits(subject, reference.short), reference.logits(BASE, reference.short)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            got, plain = reference.logits(subject, reference.short), reference.logits(BASE, reference.short)
    except RuntimeError as e:
        return skipped(f"PEFT does not run in bfloat16 here: {_first_line(e)}.")
    error, noise, effect = apart(got, want), apart(plain, base), apart(want, base)
    facts: Facts = {
        "error": number(error, "of range"),
        "base's error": number(noise, "of range"),
        "effect": number(effect, "of range"),
    }
    if not np.isfinite(got).all() and np.isfinite(want).all():
        return failed("In bfloat16 the logits are not finite, in float32 they are. Serve it in float32.", error, facts)
    ratio = error / max(noise, 1e-4)
    if ratio <= 10:
        return passed(
            f"In bfloat16 it is {number(error)} of the range off, the base alone {number(noise)}.", ratio, facts
        )
    text = f"In bfloat16 it is {number(error)} of the range off, {ratio:.0f} times as much as the base: its values are too large for that precision"
    return Finding(Outcome.WARN, f"{text}. Compare answers in the precision that you serve.", ratio, facts)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


_ROUNDING = (
    "Adding in another order stays below 1e-05 of the logits' range; 1e-04 is far below anything an adapter does."
)
CHECKS: tuple[Check[Reference], ...] = (
    Check("deterministic", "Same tokens, same bits", "Nothing random belongs in inference, and one machine repeats its additions.", _ask_deterministic, 0, "of range", of_base=True),
    Check("padding", "Padding changes nothing", _ROUNDING, _ask_padding, LOGITS_TOLERANCE, "of range, padded", of_base=True),
    Check("several", "Others attached change nothing", "An inactive adapter takes no part in the forward pass, so the bits must be equal.", _ask_several, 0, "of range moved"),
    Check("mixed", "A mixed batch is each row alone", _ROUNDING, _ask_mixed, LOGITS_TOLERANCE, "of range, mixed"),
    Check("merge", "Merging and unmerging", f"{_ROUNDING} For methods that rotate weights 1e-02, as in PEFT's own tests.", _ask_merge, LOGITS_TOLERANCE, "of range, merged"),
    Check("reload", "Saving and loading", "Tensors are copied, so they are equal; logits may differ by rounding, 1e-05 of their range.", _ask_reload, FLOAT32_NOISE, "of range, reloaded"),
    Check("delete", "Deleting leaves no trace", "The same weights repeat the same additions, so the bits must be equal.", _ask_delete, 0, "of range moved"),
    Check("half", "Bfloat16 within its bound", "Judged three ways: float32, the base in bfloat16 and the adapter in bfloat16; 10 times the base's own error is more than an adapter of usual size adds.", _ask_half, 10, "times the base's error"),
)  # fmt: skip
"""Asked of each adapter, and of the base where it applies; those that change the model come last."""
