# SPDX-License-Identifier: BSD-3-Clause
"""How long switching adapters takes, how it depends on how many are resident, and what loading one costs.

The graph and the adapter of benchmarks/decode.py are used. Resident adapters are mapped from one laid-out file (the pages are shared,
so 1000 of them fit into memory) or, for the sums of memory, small ones of rank 1 that each own their tensors. A switch is timed alone,
and as part of a token: a token behind a switch against a token without one, in turns. The last line is JSON.

    python benchmarks/switch.py --work DIR
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from machine import machine
from safetensors.numpy import load_file as read_safetensors
from safetensors.numpy import save_file

from QEfficient.compile.program import compile_graph
from QEfficient.contract import Manifest
from QEfficient.options import option, parse
from QEfficient.runtime import laid_out
from QEfficient.runtime.session import OrtSession

ALPHA, RANK = 32, 16


@dataclass(slots=True, kw_only=True)
class Options:
    """Measure switching between adapters and loading them."""

    work: Path = option(help="Folder that benchmarks/decode.py has filled.")
    precision: str = option("int4", "Precision of the program.")
    resident: list[int] = option([1, 10, 1000], "Resident adapters. Repeatable.")
    turns: int = option(30, "Turns; figures are medians over them.")
    threads: int = option(2, "Threads.")


def open_session(work: Path, precision: str, threads: int) -> tuple[OrtSession, Path]:
    """Open the program; return it and the file of its adapter, scalings included."""
    graph = next(work.glob("graph-*"))
    session = OrtSession(compile_graph(graph, precision=precision), threads=threads)
    source = work / "switch.safetensors"
    tensors = read_safetensors(work / "adapter" / "adapter_model.safetensors")
    for spec in Manifest.read(graph).adapter:
        if spec.name.endswith(".scaling"):
            tensors[spec.name] = np.array(ALPHA / RANK, np.float32)
    if not source.is_file():
        save_file(tensors, source)
    session.allocate(1, 128)
    return session, source


def milliseconds(call: Any) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def measure_loading(options: Options, session: OrtSession, source: Path) -> dict[str, float]:
    """Time reading the file into memory, loading by mapping (every page touched), and loading by laying out, in turns."""
    read = lambda: read_safetensors(source)  # noqa: E731
    laid_out.load_file(session, "a0", source, read)
    times: dict[str, list[float]] = {"read": [], "map": [], "map_and_touch": [], "lay_out": []}
    for _ in range(options.turns):
        times["read"].append(milliseconds(source.read_bytes))
        times["map"].append(milliseconds(lambda: laid_out.load_file(session, "a1", source, read)))
        touch = milliseconds(lambda: [t.reshape(-1)[::1024].sum() for t in session.placed_adapter("a1").values()])
        times["map_and_touch"].append(times["map"][-1] + touch)
        times["lay_out"].append(milliseconds(lambda: session.load_adapter("a2", read())))
    ratio = np.median(np.array(times["map_and_touch"]) / times["read"])
    plain = np.median(np.array(times["lay_out"]) / times["read"])
    medians = {f"{name}_ms": round(float(np.median(t)), 3) for name, t in times.items()}
    return {**medians, "map_x_read": round(float(ratio), 2), "lay_out_x_read": round(float(plain), 2)}


def measure_switching(options: Options, session: OrtSession, source: Path, count: int) -> dict[str, float]:
    """Time switches among ``count`` resident adapters: the call, its first use, and a token behind it."""
    for n in range(len(session.adapters), count):
        laid_out.load_file(session, f"a{n}", source, _not_read)
    token, position = np.array([[5]]), np.array([[0]])
    rng = np.random.default_rng(0)
    calls, first, behind, without = [], [], [], []
    for _ in range(options.turns):
        one, two = (f"a{n}" for n in (rng.permutation(count)[:2] if count > 1 else (0, 0)))
        for name in (one, two):
            first.append(milliseconds(lambda name=name: session.set_adapter(name) or session.run(token, position)))
        for name in (one, two, one):  # both have a binding now
            calls.append(milliseconds(lambda name=name: session.set_adapter(name)))
            behind.append(calls[-1] + milliseconds(lambda: session.run(token, position)))
            without.append(milliseconds(lambda: session.run(token, position)))
    extra = np.median(np.array(behind) - without)
    return {
        "resident": count,
        "set_adapter_ms": round(float(np.median(calls)), 4),
        "set_adapter_p99_ms": round(float(np.percentile(calls, 99)), 4),
        "token_ms": round(float(np.median(without)), 2),
        "extra_of_token_behind_switch_ms": round(float(extra), 3),
        "extra_when_first_used_ms": round(float(np.median(first[2:]) - np.median(without)), 3),
    }


def measure_memory(session: OrtSession, counts: list[int]) -> list[dict[str, float]]:
    """Load small adapters of their own (rank 1) and compare what the process grew by with the sum of their tensors."""
    specs = session.manifest.adapter
    small = {s.name: np.ones([1 if isinstance(d, str) else d for d in s.shape], s.dtype) for s in specs}
    process: psutil.Process = psutil.Process()
    rows: list[dict[str, float]] = []
    before, base = process.memory_info().rss, session.memory_bytes()["adapters"]
    for count in counts:
        for n in range(len(session.adapters), count):
            session.load_adapter(f"s{n}", {k: t.copy() for k, t in small.items()})
        grown, said = process.memory_info().rss - before, session.memory_bytes()["adapters"] - base
        rows.append({"resident": count, "tensors_mb": round(said / 1e6, 1), "grown_mb": round(grown / 1e6, 1)})
    for name in session.adapters:
        session.unload_adapter(name)
    return rows


def _not_read() -> Any:
    """Fail: a laid-out file is there, so the source is not read."""
    raise AssertionError("the laid-out file was not used")


def main() -> None:
    """Run the benchmark."""
    options = parse(Options, sys.argv[1:], prog="benchmarks/switch.py")
    session, source = open_session(options.work, options.precision, options.threads)
    memory = measure_memory(session, options.resident)
    loading = measure_loading(options, session, source)
    print(f"loading {source.stat().st_size / 1e6:.0f} MB:", loading)
    rows = [measure_switching(options, session, source, n) for n in options.resident]
    for row in (*rows, *memory):
        print(row)
    print(json.dumps({"loading": loading, "switching": rows, "memory": memory, **machine(options)}))


if __name__ == "__main__":
    main()
