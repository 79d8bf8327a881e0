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
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.simplefilter("ignore")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.coverage.case import run_architecture, run_varied  # noqa: E402 -- after the path is set
from scripts.coverage.methods import METHODS, run_method  # noqa: E402
from scripts.coverage.pool import run_all  # noqa: E402
from scripts.coverage.shrink import model_types  # noqa: E402
from scripts.coverage.tables import code_digest, known_results, write_docs  # noqa: E402


def main() -> int:
    """Run the cases that are asked for; return 1 if a graph was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cases at once (default: all cores)")
    parser.add_argument("--timeout", type=float, default=180, help="seconds for one case (default: 180)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="model types and methods to run")
    parser.add_argument("--kind", choices=("architectures", "methods"), help="run one half only")
    parser.add_argument("--again", nargs="*", metavar="OUTCOME", help="run again what ended so (default: all)")
    parser.add_argument("--vary", type=int, metavar="N", help="run N other configurations of each architecture instead")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "coverage.jsonl", help="where results collect")
    args = parser.parse_args()
    logging.disable(logging.WARNING)

    cases = {}
    if args.kind != "methods":
        cases |= {f"architectures/{t}": functools.partial(run_architecture, t) for t in model_types()}
    if args.kind != "architectures":
        cases |= {f"methods/{m}": functools.partial(run_method, m) for m in METHODS}
    known, code = known_results(args.results, ROOT / "docs"), code_digest(ROOT)
    if args.only:
        cases = {n: w for only in args.only for n, w in cases.items() if n.split("/")[1] == only}
    elif args.again is not None:
        cases = {
            n: w for n, w in cases.items() if n not in known or not args.again or known[n]["outcome"] in args.again
        }
    else:
        cases = {n: w for n, w in cases.items() if known.get(n, {}).get("code") != code}
    if args.vary:
        return _vary(list(cases), args)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for done, (name, found) in enumerate(run_all(cases.items(), args.jobs, args.timeout, Path(scratch)), 1):
            with args.results.open("a") as f:
                f.write(json.dumps({"name": name, "code": code, **found}) + "\n")
            detail = found.get("reason") or f"{found['error']:.1e}"
            print(f"{done}/{len(cases)} {name}: {found['outcome']} {found['seconds']} s, {detail}", flush=True)  # noqa: T201
    return write_docs(known_results(args.results, ROOT / "docs"), ROOT / "docs", code)


def _vary(names: list[str], args: argparse.Namespace) -> int:
    """Run held-out configurations of architectures; print what they gave, and write nothing."""
    kinds = [n.split("/")[1] for n in names if n.startswith("architectures/")]
    cases = {f"{t} #{n}": functools.partial(run_varied, t, n) for t in kinds for n in range(1, args.vary + 1)}
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name, found in run_all(cases.items(), args.jobs, args.timeout, Path(scratch)):
            wrong += found["outcome"] == "wrong"
            print(json.dumps({"name": name, **found}), flush=True)  # noqa: T201
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
