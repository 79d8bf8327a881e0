# SPDX-License-Identifier: BSD-3-Clause
"""Measure what can be exported: every architecture with LoRA, every PEFT method on Llama.

``python scripts/coverage`` runs what has not been run with the present code and writes ``docs/coverage.json`` and
``docs/coverage.md``. Each row keeps the digest of the code that it was measured with, and the tables say how many are older.
"""

import argparse
import functools
import json
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.simplefilter("ignore")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.coverage.case import run_architecture, run_varied  # noqa: E402 -- after the path is set
from scripts.coverage.methods import METHODS, REFUSED, run_method  # noqa: E402
from scripts.coverage.pool import run_all  # noqa: E402
from scripts.coverage.shrink import model_types  # noqa: E402
from scripts.coverage.tables import code_digest, known_results, write_docs  # noqa: E402


def main() -> int:
    """Run the cases that are asked for; return 1 if a graph was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cases at once (default: all cores)")
    parser.add_argument(
        "--timeout", type=float, default=600, help="seconds of processor time for one case (default: 600)"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="model types and methods to run, whatever is known")
    parser.add_argument("--kind", choices=("architectures", "methods"), help="run one half only")
    parser.add_argument("--again", nargs="*", metavar="OUTCOME", help="run again what ended so (default: all)")
    parser.add_argument(
        "--vary", type=int, metavar="N", help="run N other configurations of each architecture that passes instead"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "coverage.jsonl", help="where results collect")
    args = parser.parse_args()
    logging.disable(logging.WARNING)

    known, code = known_results(args.results, ROOT / "docs"), code_digest(ROOT)
    cases = _chosen(_cases(args, known), known, code, args)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for done, (name, found) in enumerate(run_all(cases.items(), args.jobs, args.timeout, Path(scratch)), 1):
            with args.results.open("a") as f:
                f.write(json.dumps({"name": name, "code": code, **found}) + "\n")
            detail = found.get("reason") or f"{found['error']:.1e}"
            print(f"{done}/{len(cases)} {name}: {found['outcome']} {found['seconds']} s, {detail}", flush=True)  # noqa: T201
    return write_docs(known_results(args.results, ROOT / "docs"), ROOT / "docs", code)


def _cases(args: argparse.Namespace, known: dict[str, dict[str, Any]]) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the cases of the kind that is asked for, by name: what passed before comes before what did not."""
    passed = [t for t in model_types() if known.get(f"architectures/{t}", {}).get("outcome") == "pass"]
    if args.vary:
        seeds = range(1, args.vary + 1)
        return {f"held-out/{t} {n}": functools.partial(run_varied, t, n) for n in seeds for t in passed}
    cases: dict[str, Callable[[], dict[str, Any]]] = {}
    if args.kind != "architectures":
        cases |= {f"methods/{m}": functools.partial(run_method, m) for m in (*METHODS, *REFUSED)}
    if args.kind != "methods":
        types = dict.fromkeys([*passed, *model_types()])
        cases |= {f"architectures/{t}": functools.partial(run_architecture, t) for t in types}
    return cases


def _chosen(
    cases: dict[str, Callable[[], dict[str, Any]]],
    known: dict[str, dict[str, Any]],
    code: str,
    args: argparse.Namespace,
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the cases to run: those that are named, those that ended so, or those that the present code has not run."""
    if args.only:
        end = r"( \d+)?"  # of a held-out configuration
        return {n: w for o in args.only for n, w in cases.items() if re.fullmatch(re.escape(o) + end, n.split("/")[1])}
    if args.again is not None:
        return {n: w for n, w in cases.items() if n not in known or not args.again or known[n]["outcome"] in args.again}
    return {n: w for n, w in cases.items() if known.get(n, {}).get("code") != code}


if __name__ == "__main__":
    sys.exit(main())
