# SPDX-License-Identifier: BSD-3-Clause
"""Measure what can be exported: every architecture with LoRA, every PEFT method on Llama.

``python scripts/coverage`` runs what has not been run yet and writes ``docs/coverage.json`` and ``docs/coverage.md``.
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

from scripts.coverage.case import run_architecture  # noqa: E402 -- after the path is set
from scripts.coverage.methods import METHODS, run_method  # noqa: E402
from scripts.coverage.pool import run_all  # noqa: E402
from scripts.coverage.shrink import model_types  # noqa: E402
from scripts.coverage.tables import read_results, write_docs  # noqa: E402


def main() -> int:
    """Run the cases that are asked for; return 1 if a graph was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cases at once (default: all cores)")
    parser.add_argument("--timeout", type=float, default=180, help="seconds for one case (default: 180)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="model types and methods to run")
    parser.add_argument("--kind", choices=("architectures", "methods"), help="run one half only")
    parser.add_argument("--again", nargs="*", metavar="OUTCOME", help="run again what ended so (default: all)")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "coverage.jsonl", help="where results collect")
    args = parser.parse_args()
    logging.disable(logging.WARNING)

    cases = {}
    if args.kind != "methods":
        cases |= {f"architectures/{t}": functools.partial(run_architecture, t) for t in model_types()}
    if args.kind != "architectures":
        cases |= {f"methods/{m}": functools.partial(run_method, m) for m in METHODS}
    if args.only:
        cases = {n: w for only in args.only for n, w in cases.items() if n.split("/")[1] == only}
    elif args.again is not None:
        known = read_results(args.results)
        again = {n for n, r in known.items() if not args.again or r["outcome"] in args.again}
        cases = {name: work for name, work in cases.items() if name not in known or name in again}
    else:
        cases = {name: work for name, work in cases.items() if name not in read_results(args.results)}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for done, (name, found) in enumerate(run_all(cases.items(), args.jobs, args.timeout, Path(scratch)), 1):
            with args.results.open("a") as f:
                f.write(json.dumps({"name": name, **found}) + "\n")
            detail = found.get("reason") or f"{found['error']:.1e}"
            print(f"{done}/{len(cases)} {name}: {found['outcome']} {found['seconds']} s, {detail}", flush=True)  # noqa: T201
    return write_docs(read_results(args.results), ROOT / "docs")


if __name__ == "__main__":
    sys.exit(main())
