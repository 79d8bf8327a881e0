# SPDX-License-Identifier: BSD-3-Clause
"""``kill -9`` at random moments of an export, then several exports at once: is the cache always whole, and right?

One process imports everything; its forks export a tiny base with a LoRA from their folders into one cache, each killed at a random
moment between its beginning and its end. Most of an export is tracing, which touches no file, so further forks (``--writing``) save
a graph that is traced already. After every kill each folder that a reader could open must be whole and hold the
graph that an undisturbed export makes, and an adapter beside it must be the adapter. In the end nothing may be left aside, and
the cache has to serve PyTorch's logits. Prints one JSON line; exit code 1 if anything was wrong.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 -- after the path is set
import torch  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from QEfficient.contract import ADAPTERS_DIR, MODEL_FILE  # noqa: E402
from QEfficient.export.torch_to_onnx import is_whole, prepare_graph, save_graph  # noqa: E402
from QEfficient.peft.adapters import fit, read_exported  # noqa: E402
from QEfficient.peft.unloaded import export_adapters  # noqa: E402
from QEfficient.runtime.session import OrtSession  # noqa: E402
from scripts.coverage.shrink import tiny_model  # noqa: E402

TOLERANCE = 1e-4
ASIDE = ".tmp-"


@dataclass(frozen=True, slots=True)
class Case:
    """A base and an adapter on disk, and what an undisturbed export of them wrote."""

    base: Path
    adapter: Path
    cache: Path
    graph: bytes
    exported: bytes
    seconds: float

    def export(self) -> Path:
        """Export into the cache."""
        return export_adapters(self.base, {"a": self.adapter}, self.cache / "graph")

    def wrong(self) -> int:
        """Return how many things that a reader could open are not what an undisturbed export writes."""
        count = 0
        for folder in visible(self.cache):
            beside = folder / ADAPTERS_DIR / "a.safetensors"
            count += not is_whole(folder) or (folder / MODEL_FILE).read_bytes() != self.graph
            count += beside.exists() and beside.read_bytes() != self.exported
        return count


def make_case(folder: Path) -> Case:
    """Write base and adapter, and export them undisturbed, three times: the shortest tells how long it takes."""
    model = tiny_model("llama")
    model.save_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for path, parameter in adapted.named_parameters():
        if "lora_B" in path:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(str(folder / "adapter"))
    seconds = float("inf")
    for name in ("first", "second", "third"):
        began = time.monotonic()
        made = export_adapters(folder / "base", {"a": folder / "adapter"}, folder / name)
        seconds = min(seconds, time.monotonic() - began)
    (folder / "cache").mkdir()
    exported = (made / ADAPTERS_DIR / "a.safetensors").read_bytes()
    return Case(
        folder / "base", folder / "adapter", folder / "cache", (made / MODEL_FILE).read_bytes(), exported, seconds
    )


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
    return [p for p in cache.iterdir() if p.is_dir() and not p.name.startswith(ASIDE)]


def run(case: Case, whole: int, writing: int, together: int, seed: int = 0) -> dict[str, float]:
    """Kill exports, run some at once, and return counts.

    Args:
        case: What to export.
        whole: Exports to kill anywhere.
        writing: Exports to kill while they write.
        together: Exports to run at once afterwards.
        seed: Of the random moments.
    """
    draw = random.Random(seed)
    prepared = prepare_graph(AutoModelForCausalLM.from_pretrained(case.base).eval(), case.cache / "bare")
    began = time.monotonic()
    os.waitpid(forked(lambda: save_graph(prepared)), 0)
    saved_s = time.monotonic() - began
    shutil.rmtree(prepared.folder)
    counts: dict[str, float] = {"kills": 0, "ended before": 0, "wrong": 0, "not whole": 0}
    for work, wanted, longest in (
        (case.export, whole, case.seconds),
        (lambda: save_graph(prepared), whole + writing, saved_s),
    ):
        while counts["kills"] < wanted:
            if draw.random() < 0.5:  # from an empty cache, and from a filled one
                for folder in visible(case.cache):
                    shutil.rmtree(folder)
            process = forked(work)
            time.sleep(draw.uniform(0, longest))
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            counts["kills" if os.WIFSIGNALED(status) else "ended before"] += 1
            if work == case.export:
                counts["wrong"] += case.wrong()
            counts["not whole"] += sum(not is_whole(folder) for folder in visible(case.cache))
        for folder in visible(case.cache):
            shutil.rmtree(folder)
    others = [forked(case.export) for _ in range(together)]
    failed = sum(os.waitpid(process, 0)[1] != 0 for process in others)
    folder = case.export()
    counts["wrong"] += case.wrong()
    left = sum(p.name.startswith(ASIDE) for place in (case.cache, folder / ADAPTERS_DIR) for p in place.iterdir())
    ends = {"together": together, "together failed": failed, "left aside": left, "folders": len(visible(case.cache))}
    return {**counts, **ends, "error": difference(case, folder)}


def difference(case: Case, folder: Path) -> float:
    """Return the largest difference of the graph's logits from PyTorch's with the adapter, in their range."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(case.base), str(case.adapter)).eval()
    row = np.arange(3, 12)[None]
    with torch.no_grad():
        want = model(input_ids=torch.tensor(row)).logits[0, -1].numpy()
    session = OrtSession(folder, threads=1)
    adapter = read_exported(folder / ADAPTERS_DIR / "a.safetensors")
    session.load_adapter("a", fit(adapter, session.manifest))
    session.set_adapter("a")
    session.allocate(1, 16)
    got = session.run(row, np.arange(row.shape[1])[None])[0, -1]
    return float(np.abs(got - want).max() / np.ptp(want))


def right(found: dict[str, float]) -> bool:
    """Return whether nothing went wrong."""
    clean = found["wrong"] == found["not whole"] == found["together failed"] == found["left aside"] == 0
    return clean and found["folders"] == 1 and found["error"] < TOLERANCE


def main() -> int:
    """Run with the numbers asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", type=int, default=200, help="exports killed anywhere (default: 200)")
    parser.add_argument("--writing", type=int, default=200, help="exports killed while they write (default: 200)")
    parser.add_argument("--together", type=int, default=8, help="exports at once (default: 8)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = run(make_case(Path(folder)), options.whole, options.writing, options.together)
    print(json.dumps({"benchmark": "kills", "results": found}))
    return 0 if right(found) else 1


if __name__ == "__main__":
    sys.exit(main())
