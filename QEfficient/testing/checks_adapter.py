# SPDX-License-Identifier: BSD-3-Clause
"""Checks of an adapter's files against the base's structure. No model runs: the base exists only as shapes."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from QEfficient.errors import AdapterMismatchError
from QEfficient.options import suggest
from QEfficient.store import digest_file
from QEfficient.testing import (
    checks_config,
    checks_fields,
    checks_identity,
    checks_rows,
    checks_tokenizer,
    checks_values,
)
from QEfficient.testing.adapter_files import AdapterFiles, module_of, refuse_other_shapes
from QEfficient.testing.check import Check, Facts, Finding, failed, passed
from QEfficient.testing.report import Outcome
from QEfficient.testing.text import counted, listed, size

_SAFE = {"adapter_config.json", "adapter_model.safetensors"}
_UNSAFE = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py")
_TRAINING = ("optimizer", "scheduler", "rng_state", "scaler", "training_args", "trainer_state", "global_step", "zero_")


def _ask_files(files: AdapterFiles, subject: str) -> Finding:
    found = [p for p in (files.path / n for n in sorted(_SAFE)) if p.is_file()]
    facts: Facts = {p.name: f"{size(p.stat().st_size)}, xxh3 {digest_file(p)}" for p in found}
    types = _types(files.path / "adapter_model.safetensors")
    facts |= {"method": files.method, "tensors": len(files.tensors), "types": ", ".join(types)}
    if not files.tensors:
        return failed("The adapter's file holds no tensor at all. Save the adapter again.", facts=facts)
    return passed(f"Configuration and {counted(len(files.tensors), 'tensor')} can be read completely.", facts=facts)


def _types(path: Path) -> list[str]:
    """Return the types in the file: what is read from it has been made float32."""
    with safe_open(str(path), framework="np") as f:
        return sorted({str(f.get_slice(key).get_dtype()) for key in f.keys()})


def _ask_leftovers(files: AdapterFiles, subject: str) -> Finding:
    names = sorted(p.name for p in files.path.iterdir() if p.name not in _SAFE)
    training = [n for n in names if n.startswith(_TRAINING)]
    unsafe = [n for n in names if n.endswith(_UNSAFE) and n not in training]
    indexes = [n for n in names if n.endswith(".index.json")]
    left = [*training, *unsafe, *indexes]
    if not left:
        return passed("Nothing lies in the folder that does not belong to an adapter.", 0)
    said = []
    if training:
        said.append(f"{listed(training)} of a trainer's checkpoint: this may not be the final adapter")
    if unsafe:
        said.append(f"{listed(unsafe)} can run code when loaded")
    if indexes:
        said.append(f"{listed(indexes)} names parts of an adapter that is one file: PEFT does not read it")
    total = sum((files.path / n).stat().st_size for n in set(left) if (files.path / n).is_file())
    text = (
        f"The folder also holds {'; and '.join(said)}. Deploy only {' and '.join(sorted(_SAFE))} ({size(total)} less)."
    )
    return Finding(Outcome.WARN, text, len(left), {"files": listed(left, 8)})


def _ask_shapes(files: AdapterFiles, subject: str) -> Finding:
    try:
        refuse_other_shapes(subject, files)
    except AdapterMismatchError as e:
        text = str(e).partition(": ")[2]
        return failed(text[:1].upper() + text[1:], 1)
    return passed("Every tensor has the shape that base and configuration ask for.", 0)


def _ask_coverage(files: AdapterFiles, subject: str) -> Finding:
    missing = sorted(set(files.expected) - set(files.tensors))
    unused = sorted(set(files.tensors) - set(files.expected) - set(files.optional))
    total = len(files.expected)
    facts: Facts = {"modules": len({module_of(k) for k in files.expected}), "tensors": total}
    if not missing and not unused:
        text = f"All {total} tensors land in a module of the base, and every targeted module has its tensors."
        return passed(text, 0, facts)
    facts |= {"without tensors": listed(missing, 8), "without module": listed(unused, 8)}
    said = []
    if missing:
        said.append(
            f"{len(missing)} of {total} tensors are missing, first {missing[0]}: {_filled_with(files, missing[0])}"
        )
    if unused:
        hint = suggest(unused[0], files.expected).removeprefix("; ")
        said.append(
            f"{counted(len(unused), 'tensor')} of the file belong to no module, first {unused[0]}{f' ({hint})' if hint else ''}: PEFT drops them"
        )
    text = (
        "; ".join(said) + ". Check the names in the file, target_modules, and that this is the base it was trained on."
    )
    return failed(text, len(missing) + len(unused), facts)


def _filled_with(files: AdapterFiles, key: str) -> str:
    saved = getattr(files.config, "modules_to_save", None) or []
    name = next((n for n in saved if f".{n}." in f"{key}."), None)
    if name is not None:
        return f"modules_to_save lists {name!r}, so PEFT runs with the base's untrained copy"
    return "PEFT fills them with fresh ones that do nothing"


def _ask_duplicate(digests: Mapping[str, str], subject: str) -> Finding:
    twin = next((n for n, d in digests.items() if n != subject and d == digests[subject]), None)
    if twin is None:
        return passed("No other adapter of this test has the same file.", 0)
    text = f"Its file is byte for byte that of {twin!r}. One of the two names points at the wrong folder, or one is superfluous."
    return Finding(Outcome.WARN, text, 1)


CHECKS: tuple[Check[AdapterFiles], ...] = (
    Check("files", "Files are whole", "A truncated or empty file may load without an error.", _ask_files),
    Check(
        "leftovers",
        "Nothing else in the folder",
        "A trainer's checkpoint is often deployed by mistake; pickles run code when they are loaded.",
        _ask_leftovers,
        tolerance=0,
        unit="files",
    ),
    Check(
        "shapes",
        "Shapes fit base and configuration",
        "A tensor of another rank or width cannot be loaded; PEFT's error does not say which of the two is wrong.",
        _ask_shapes,
        tolerance=0,
        unit="misshapen",
    ),
    Check(
        "coverage",
        "Adapter reaches its modules",
        "No tensor may be left over and no module left out: PEFT only warns, and the model runs as if it had no adapter.",
        _ask_coverage,
        tolerance=0,
        unit="misplaced tensors",
    ),
    *checks_fields.CHECKS,
    *checks_config.CHECKS,
    *checks_values.CHECKS,
    *checks_rows.CHECKS,
    *checks_identity.CHECKS,
    *checks_tokenizer.CHECKS,
)
"""Asked of each adapter, in this order."""

SET_CHECKS: tuple[Check[Mapping[str, str]], ...] = (
    Check(
        "duplicate",
        "Adapters differ",
        "Two names for one file is how a deployment serves the wrong adapter; files are compared by digest.",
        _ask_duplicate,
        tolerance=0,
        unit="equal files",
    ),
)
"""Asked of each adapter once all have been read, given the digest of each one's file."""
