# SPDX-License-Identifier: BSD-3-Clause
"""How many sound models ``qefficient test`` accuses: every row of the coverage table that passes.

::

    python -m benchmarks.sound                  # what the present code has not tested yet
    python -m benchmarks.sound --only llama t5  # these, whatever is known

Each row is the coverage table's tiny model (docs/coverage.md) with two random adapters, saved as folders and sent through
files, PyTorch, graph and program. Rows collect in ``build/sound.jsonl``, each with the digest of the code that tested it;
what is there already is not run again. Prints what is accused, what could not be tested, and one JSON line.
"""

import argparse
import functools
import json
import logging
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import xxhash
from peft import PeftConfig, get_peft_model
from transformers import PreTrainedModel

from QEfficient import testing
from QEfficient.peft.loading import load_base
from QEfficient.testing.report import Outcome
from scripts.coverage.case import lora
from scripts.coverage.methods import METHODS, other_fields
from scripts.coverage.pool import run_all
from scripts.coverage.shrink import tiny_model
from scripts.coverage.tables import read_results

ROOT = Path(__file__).resolve().parents[1]
_SECONDS: tuple[Mapping[str, Any], ...] = ({"r": 2, "lora_alpha": 32}, {"lora_alpha": 32})


def test_row(kind: str, name: str, excluded: tuple[str, ...]) -> dict[str, Any]:
    """Test a row of the coverage table; return the outcome, JSON-ready."""
    if kind == "methods":
        config = METHODS[name]
        base = "mixtral" if getattr(config(), "target_parameters", None) else "llama"
        return test(lambda: tiny_model(base), config, other_fields(config()))
    left_out: dict[str, Any] = {"exclude_modules": list(excluded)} if excluded else {}
    return test(lambda: tiny_model(name), functools.partial(lora, **left_out), _SECONDS)


def test(base: Callable[[], PreTrainedModel], config: Callable[..., PeftConfig], seconds: Any) -> dict[str, Any]:
    """Save a base and two adapters, and test them at every stage."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        os.environ["QEFF_HOME"] = str(root / "home")
        base().save_pretrained(root / "base")
        adapters = {"one": _save(root, "one", config())}
        for fields in (*seconds, {}):
            try:
                adapters["two"] = _save(root, "two", config(**fields))
            except Exception:  # PEFT does not take these fields together
                continue
            break
        report = testing.run(root / "base", adapters, measure_speed=False, greedy_tokens=8)
    said = {
        o: [f"{r.subject} {r.name}: {r.message}" for r in report.with_outcome(o)] for o in (Outcome.FAIL, Outcome.WARN)
    }
    return {
        "outcome": "accused" if said[Outcome.FAIL] else "pass",
        "checks": sum(r.outcome is not Outcome.SKIP for r in report.results),
        "accusations": said[Outcome.FAIL],
        "warnings": said[Outcome.WARN],
    }


def _save(root: Path, name: str, config: PeftConfig) -> Path:
    """Write an adapter whose every trained number was moved at random."""
    model = get_peft_model(load_base(root / "base"), config)
    generator = torch.Generator().manual_seed(len(name) + ord(name[0]))
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype.is_floating_point:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(root / name))
    return root / name


def rows() -> dict[str, Callable[[], dict[str, Any]]]:
    """Return every row of the coverage table that passes, as what tests it."""
    table = json.loads((ROOT / "docs" / "coverage.json").read_text())
    return {
        f"{kind}/{name}": functools.partial(test_row, kind, name, tuple(row.get("exclude_modules", ())))
        for kind in ("architectures", "methods")
        for name, row in sorted(table[kind].items())
        if row["outcome"] == "pass"
    }


def code_digest() -> str:
    """Return a digest of the code that a row depends on."""
    hasher = xxhash.xxh3_64()
    for path in sorted((ROOT / "QEfficient").rglob("*.py")):
        if path.relative_to(ROOT / "QEfficient").parts[0] not in ("serve", "finetune", "cloud"):
            hasher.update(path.read_bytes())
    return hasher.hexdigest()


def main() -> None:
    """Test what is asked for; print what is accused, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="rows at once (default: 1)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds of processor time for a row (default: 600)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows to test, whatever is known")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "sound.jsonl", help="where results collect")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    every, known, code = rows(), read_results(options.results), code_digest()
    if options.only:
        chosen = {
            f"{k}/{o}": every[f"{k}/{o}"]
            for o in options.only
            for k in ("architectures", "methods")
            if f"{k}/{o}" in every
        }
    else:
        chosen = {n: w for n, w in every.items() if known.get(n, {}).get("code") != code}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, found in run_all(chosen.items(), options.jobs, options.timeout, Path(scratch)):
            with options.results.open("a") as f:
                f.write(json.dumps({"name": name, "code": code, **found}) + "\n")
            print(f"{name}: {found['outcome']} {found['seconds']} s {found.get('reason', '')}", flush=True)
    print(summary(every, read_results(options.results), code))


def summary(every: Mapping[str, Any], results: dict[str, dict[str, Any]], code: str) -> str:
    """Return what is accused or could not be tested, and one JSON line."""
    own = {n: results[n] for n in every if n in results}
    lines = [f"accused: {n}: {a}" for n, r in own.items() for a in r.get("accusations", ())]
    lines += [f"not tested: {n}: {r['reason']}" for n, r in own.items() if r["outcome"] == "error"]
    counts = {
        kind: {
            "rows": sum(n.startswith(kind) for n in every),
            "tested": sum(n.startswith(kind) and r["outcome"] != "error" for n, r in own.items()),
            "accused": sum(n.startswith(kind) and r["outcome"] == "accused" for n, r in own.items()),
        }
        for kind in ("architectures", "methods")
    }
    older = sum(r["code"] != code for r in own.values())
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return "\n".join(
        [*lines, json.dumps({**counts, "older_code": older, "machine": machine, "torch": torch.__version__})]
    )


if __name__ == "__main__":
    main()
