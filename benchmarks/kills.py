# SPDX-License-Identifier: BSD-3-Clause
"""``kill -9`` at random moments of an export, then several exports at once: is the cache always whole, and right?

One process imports everything and traces a tiny model; each of its forks saves that graph into one cache and is killed at
a random moment. Tracing touches no file, so most kills (``--whole`` says how many do not) fall in the part that does. After every
kill each folder that a reader could open must be whole. In the end the cache has to serve a graph that computes
PyTorch's logits. Prints one JSON line; exit code 1 if anything was wrong.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 -- after the path is set

from QEfficient.export.torch_to_onnx import export_graph, is_whole, prepare_graph, save_graph  # noqa: E402
from QEfficient.runtime.session import OrtSession  # noqa: E402
from scripts.coverage.case import difference, reference  # noqa: E402
from scripts.coverage.shrink import tiny_model  # noqa: E402

TOLERANCE = 1e-4


def forked(work: Callable[[], object]) -> int:
    """Run ``work`` in a fork and return its process id; the fork exits with 0 if it succeeded."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return process


def visible(cache: Path) -> list[Path]:
    """Return the folders that a reader could take for graphs."""
    return [p for p in cache.iterdir() if p.is_dir() and not p.name.startswith(".tmp-")]


def run(cache: Path, kills: int, whole: int, together: int, seed: int = 0) -> dict[str, float]:
    """Kill exports and run some at once; return counts.

    Args:
        cache: An empty folder.
        kills: Exports to kill while they write.
        whole: Exports to kill anywhere, tracing included.
        together: Exports to run at once afterwards.
        seed: Of the random moments.
    """
    torch.set_num_threads(1)
    draw, model = random.Random(seed), tiny_model("llama")
    began = time.monotonic()
    prepared = prepare_graph(model, cache / "graph")
    traced_s = time.monotonic() - began
    saved_s = []
    for _ in range(3):
        began = time.monotonic()
        os.waitpid(forked(lambda: save_graph(prepared)), 0)
        saved_s.append(time.monotonic() - began)
        _remove(prepared.folder)
    counts = {"kills": 0, "ended before": 0, "damaged": 0, "left aside": 0}
    while counts["kills"] < kills + whole:
        if draw.random() < 0.5 and prepared.folder.is_dir():  # from an empty cache, and from a filled one
            _remove(prepared.folder)
        if counts["kills"] < kills:
            process, longest = forked(lambda: save_graph(prepared)), min(saved_s)
        else:
            process, longest = forked(lambda: export_graph(model, cache / "graph")), traced_s
        time.sleep(draw.uniform(0, longest))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        counts["kills" if os.WIFSIGNALED(status) else "ended before"] += 1
        counts["damaged"] += sum(not is_whole(folder) for folder in visible(cache))
    counts["left aside"] = sum(p.name.startswith(".tmp-") for p in cache.iterdir())
    if prepared.folder.is_dir():
        _remove(prepared.folder)
    others = [forked(lambda: save_graph(prepared)) for _ in range(together)]
    failed = sum(os.waitpid(process, 0)[1] != 0 for process in others)
    folder = export_graph(model, cache / "graph")
    error = difference(OrtSession(folder, threads=1), "base", reference(model), "chunks")
    return {**counts, "together": together, "together failed": failed, "folders": len(visible(cache)), "error": error}


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def right(found: dict[str, float]) -> bool:
    """Return whether nothing went wrong."""
    clean = found["damaged"] == found["together failed"] == 0
    return clean and found["folders"] == 1 and found["error"] < TOLERANCE


def main() -> int:
    """Run with the numbers asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=190, help="exports killed while they write (default: 190)")
    parser.add_argument("--whole", type=int, default=10, help="exports killed anywhere (default: 10)")
    parser.add_argument("--together", type=int, default=8, help="exports at once (default: 8)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        found = run(Path(cache), options.kills, options.whole, options.together)
    print(json.dumps({"benchmark": "kills", "results": found}))
    return 0 if right(found) else 1


if __name__ == "__main__":
    sys.exit(main())
