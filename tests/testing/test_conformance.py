# SPDX-License-Identifier: BSD-3-Clause
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from peft import VeraConfig
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig

from QEfficient import testing
from QEfficient.errors import AdapterMismatchError, ArtifactError, ConfigError
from QEfficient.peft.loading import read_base_config
from QEfficient.testing import Budgets
from QEfficient.testing.checks_efficiency import checks, parse_share
from QEfficient.testing.efficiency import of_loading
from QEfficient.testing.floor import Machine
from QEfficient.testing.graphs import Graph
from QEfficient.testing.loading import Loading
from QEfficient.testing.ratios import interval
from QEfficient.testing.report import Measurement, Outcome, Report, Stage
from tests.testing.conftest import Folders
from tests.tiny import SHAPE, lora, save_adapter, save_base


def adapters(folders: Folders) -> dict[str, Path]:
    """Name the two adapters."""
    return {"one": folders.one, "two": folders.two}


@pytest.fixture(scope="module")
def report(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Run everything once, speed included."""
    seen: list[tuple[str, str]] = []
    out = tmp_path_factory.mktemp("report")
    found = testing.run(
        folders.base, adapters(folders), report_dir=out, greedy_tokens=64, progress=lambda *a: seen.append(a)
    )
    assert ("graph.prefill", "one") in seen
    assert (out / "report.html").is_file()
    return found


def test_healthy_adapters_pass(report: Report):
    """Two sound adapters pass every check of every stage, with no warning."""
    found = [r for r in report.results if r.outcome is not Outcome.PASS]
    nothing_beside = {"adapter.tokenizer", "adapter.template", "adapter.record"}  # skipped: no such file lies beside
    assert {r.outcome for r in found} == {Outcome.SKIP}
    assert [r.message for r in found if r.name not in nothing_beside] == []
    assert report.verdict is Outcome.PASS
    assert {r.stage for r in report.results} == {Stage.ADAPTER, Stage.PYTORCH, Stage.GRAPH, Stage.PROGRAM}


def test_64_tokens_of_4_ragged_rows_are_compared(report: Report):
    """Greedy tokens are compared for base and adapters, alone and in a batch of four, graph and program."""
    found = [r for r in report.results if r.name.endswith("greedy_batch")]
    assert len(found) == 6
    assert all(r.facts["tokens"] == 4 * 64 and r.facts["equal"] == 4 * 64 for r in found)


def test_both_engines_are_measured(report: Report):
    """Base and adapters have the same metrics for PyTorch and the program, all positive, and memory by part."""
    for subject in ("base", "one", "two"):
        for engine in ("pytorch", "program"):
            for metric in (
                "prefill_tokens_per_second",
                "first_token_ms",
                "decode_tokens_per_second",
                "token_latency_p99_ms",
            ):
                value = report.value(engine, subject, metric)
                assert value is not None
                assert value > 0
    weights = [report.value(e, "one", "memory_bytes.weights") for e in ("pytorch", "program")]
    assert weights[1] == pytest.approx(weights[0], rel=0.5)
    assert report.value("pytorch", "one", "memory_bytes.adapters") > 0
    assert all(report.value(engine, "one", "memory_bytes.rest") >= 0 for engine in ("pytorch", "program"))


GROWS = """
import mmap
from QEfficient.testing.loading import Loading

def fresh(size):
    memory = mmap.mmap(-1, size)
    for at in range(0, size, mmap.PAGESIZE):
        memory[at] = 1
    return memory

with Loading() as loading:
    first = fresh(32 << 20)
between = fresh(32 << 20)
with loading:
    second = fresh(16 << 20)
print(loading.seconds, loading.grown)
"""


def test_loading_counts_what_the_process_grew_by():
    """Seconds and memory of several blocks are added; what happens between them is not. In a process that does nothing else."""
    done = subprocess.run([sys.executable, "-c", GROWS], capture_output=True, text=True, check=True)
    seconds, grown = map(float, done.stdout.split())
    assert seconds > 0
    assert grown == pytest.approx(48 << 20, rel=0.1)


def test_what_loading_grew_by_less_its_parts_is_the_rest():
    """An engine's weights are known; what it took besides is its own."""
    loading = Loading()
    loading.seconds, loading.grown = 2.0, 48 << 20
    found = of_loading({"program": loading}, [Measurement("program", "one", "memory_bytes.weights", 16 << 20)], "one")
    assert {m.metric: m.value for m in found} == {"load_seconds": 2.0, "memory_bytes.rest": 32 << 20}


@pytest.mark.parametrize("fault", ["swapped", "alpha"])
def test_graph_that_drifted_from_its_adapters_fails(folders: Folders, graph: Graph, tmp_path: Path, fault: str):
    """Swapped adapters, and an alpha edited after the export, fail with the reason."""
    if fault == "swapped":
        given, says = {"one": folders.two, "two": folders.one}, "the two were swapped"
    else:
        copy = folders.copy(tmp_path)
        config = copy.one / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
        given, says = {"one": copy.one, "two": copy.two}, "scales the adapter by 2, its configuration now says 4"
    found = testing.run(folders.base, given, graph=graph.folder, only=["graph.*"], greedy_tokens=4)
    assert found.verdict is Outcome.FAIL
    assert says in next(r for r in found.results if r.name == "graph.tensors" and r.subject == "one").message
    failed = {r.name for r in found.with_outcome(Outcome.FAIL, "one")}
    assert {"graph.tensors", "graph.prefill", "graph.effect"} <= failed
    assert found.with_outcome(Outcome.FAIL, "base") == []


def test_graph_of_other_structure_is_exported_apart(folders: Folders, tmp_path: Path):
    """Adapters that cannot share a graph are tested on one each."""
    narrow = save_adapter(folders.base, tmp_path / "narrow", seed=3, config=lora(target_modules=["q_proj"]))
    given = {"narrow": narrow, "one": folders.one}
    found = testing.run(folders.base, given, only=["graph.prefill"], greedy_tokens=4)
    assert found.verdict is Outcome.PASS, found.with_outcome(Outcome.FAIL)
    assert [r.subject for r in found.results] == ["base", "narrow", "base", "one"]


def test_adapters_that_share_no_base_are_tested_apart(tmp_path: Path):
    """PEFT takes one adapter with trained biases at a time: that is no fault of the second, and it is tested all the same."""
    base = save_base(tmp_path / "base", "qwen2")
    given = {n: save_adapter(base, tmp_path / n, seed=i, config=lora(bias="lora_only")) for i, n in enumerate("ab")}
    given["sound"] = save_adapter(base, tmp_path / "sound", seed=3)
    asked = ["pytorch.deterministic", "pytorch.gradients", "pytorch.several", "graph.prefill"]
    found = testing.run(base, given, only=asked, greedy_tokens=4)
    assert [(r.subject, r.name, r.message) for r in found.with_outcome(Outcome.FAIL)] == []
    assert [r.subject for r in found.results if r.name == "pytorch.deterministic"] == ["base", "sound", "a", "b"]
    assert [r.subject for r in found.results if r.name == "graph.prefill"] == ["base", "sound", "a", "b"]
    assert ["apart" in r.message for r in found.results if r.name == "pytorch.several"] == [False, True, True]

    tensors = load_file(given["b"] / "adapter_model.safetensors")
    broken = next(n for n in tensors if "lora_B" in n)
    save_file({**tensors, broken: tensors[broken] * np.nan}, given["b"] / "adapter_model.safetensors")
    found = testing.run(base, given, only=["pytorch.effect"], greedy_tokens=4)
    assert [r.subject for r in found.with_outcome(Outcome.FAIL)] == ["b"]


def test_adapter_that_peft_refuses_beside_others_is_tested_apart(folders: Folders, tmp_path: Path):
    """VeRA adapters share random matrices, which only fit those of one rank; one that fits nothing fails all the same."""
    given = {
        f"rank-{r}": save_adapter(folders.base, tmp_path / f"{r}", config=VeraConfig(r=r, task_type="CAUSAL_LM"))
        for r in (4, 8)
    }
    found = testing.run(folders.base, given, only=["adapter.shapes", "pytorch.effect"], greedy_tokens=4)
    assert found.with_outcome(Outcome.FAIL) == []
    (warned,) = found.with_outcome(Outcome.WARN)
    assert (warned.subject, warned.name) == ("rank-8", "adapter.shapes")
    assert "beside the others, so it was tested apart" in warned.message
    assert [r.subject for r in found.results if r.name == "pytorch.effect"] == ["rank-4", "rank-8"]


def test_other_models_pass(tmp_path: Path):
    """A healthy adapter of a model with soft-capped logits and sliding windows passes, far below the tolerance."""
    base = save_base(tmp_path / "base", "gemma2")
    adapter = save_adapter(base, tmp_path / "adapter")
    found = testing.run(base, {"a": adapter}, measure_speed=False, greedy_tokens=8, report_dir=tmp_path)
    assert [r.message for r in found.with_outcome(Outcome.FAIL)] == []
    assert max(r.measured or 0 for r in found.results if r.unit == "of range") < 1e-5


def test_nothing_to_test_is_refused(folders: Folders):
    """A run without adapters is refused."""
    with pytest.raises(ConfigError, match="at least one adapter"):
        testing.run(folders.base, {})


def test_unknown_check_is_refused(folders: Folders):
    """A pattern that fits no check is refused, with a suggestion."""
    with pytest.raises(ConfigError, match=r"did you mean 'graph\.prefill'"):
        testing.run(folders.base, adapters(folders), only=["graph.prefil"])


def test_graph_that_is_not_there_is_refused(folders: Folders, tmp_path: Path):
    """A missing graph folder, and a folder without a graph, are refused."""
    with pytest.raises(ArtifactError, match="does not exist"):
        testing.run(folders.base, adapters(folders), graph=tmp_path / "none", only=["graph.prefill"])
    with pytest.raises(ArtifactError, match="not an exported graph"):
        testing.run(folders.base, adapters(folders), graph=tmp_path, only=["graph.prefill"])


def test_adapter_that_the_graph_cannot_take_is_refused(folders: Folders, graph: Graph, tmp_path: Path):
    """An adapter of another structure than the given graph's is refused by name."""
    other = save_adapter(folders.base, tmp_path / "dora", config=lora(use_dora=True))
    with pytest.raises(AdapterMismatchError, match="'dora' does not fit the graph"):
        testing.run(folders.base, {"dora": other}, graph=graph.folder, only=["graph.prefill"])


def test_base_that_is_not_there_is_refused(tmp_path: Path):
    """A missing base folder and a folder without a model are refused."""
    with pytest.raises(ConfigError, match="does not exist"):
        read_base_config(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="is not a model"):
        read_base_config(str(tmp_path))


def measured(metric: str, value: float, low: float, high: float) -> list[Measurement]:
    """Return one ratio with its interval."""
    return [Measurement("program", "one", metric, value, low, high)]


@pytest.mark.parametrize(
    ("budgets", "found", "outcome"),
    [
        (Budgets(min_speedup=2), ("speedup", 2.5, 2.1, 2.9), Outcome.PASS),
        (Budgets(min_speedup=3), ("speedup", 2.5, 2.1, 2.9), Outcome.FAIL),
        (Budgets(min_speedup=2.7), ("speedup", 2.5, 2.1, 2.9), Outcome.WARN),
        (Budgets(max_overhead=0.25), ("overhead", 0.2, 0.16, 0.24), Outcome.PASS),
        (Budgets(max_overhead=0.15), ("overhead", 0.2, 0.16, 0.24), Outcome.FAIL),
        (Budgets(max_overhead=0.2), ("overhead", 0.2, 0.16, 0.24), Outcome.WARN),
    ],
)
def test_budgets_are_held_against_intervals(budgets: Budgets, found: tuple[str, float, float, float], outcome: Outcome):
    """A ratio passes or fails if all of its interval lies on one side of the budget; else it is inconclusive."""
    result = checks(budgets)[0].perform(Stage.EFFICIENCY, measured(*found), "one")
    assert (result.outcome, result.measured) == (outcome, found[1])
    assert result.message.startswith("Inconclusive") is (outcome is Outcome.WARN)


def test_interval_covers_the_true_ratio():
    """Of many noisy measurements about 95 % have the true ratio in their interval; a common load cancels."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        load = random.lognormal(0, 0.5, 6)
        above, below = (load * random.lognormal(0, 0.05, 6) for _ in range(2))
        value, low, high = interval(1.2 * above, below)
        held += low <= 1.2 <= high
        assert low < value < high < 1.5
    assert 0.9 <= held / 400 <= 0.99
    assert interval([2.0], [1.0]) == (2.0, 0.0, math.inf)


def test_machine_reads_and_multiplies():
    """Bandwidth and peak are what a machine of our days reaches, and the floors follow from them."""
    machine = Machine.measured()
    assert 1e8 < machine.bandwidth < 1e13
    assert 1e8 < machine.peak < 1e14
    assert Machine(1e9, 1e12).decode_seconds(2_000_000_000) == 2.0
    assert Machine(1e9, 1e12).prefill_seconds(10**9, 100) == 0.2


def test_share_is_a_percentage_or_a_number():
    """``15%`` and ``0.15`` mean the same; anything else is refused."""
    assert parse_share("15%", "--max-overhead") == parse_share("0.15", "--max-overhead") == 0.15
    with pytest.raises(ConfigError, match=r"must be a share such as 15% or 0\.15, not 'much'"):
        parse_share("much", "--max-overhead")


def test_report_dir_may_be_a_folder_of_its_own(folders: Folders, tmp_path: Path):
    """A report folder is made with its parents."""
    out = tmp_path / "a" / "b"
    testing.run(folders.base, adapters(folders), only=["adapter.*"], report_dir=out)
    assert sorted(p.name for p in out.iterdir()) == ["junit.xml", "report.html", "report.json", "report.md"]
    shutil.rmtree(out)


def test_context_that_export_limits_is_no_fault(tmp_path: Path):
    """Rotary frequencies that change at 64 positions limit the graph to them; the base is sound all the same."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.1] * 8,
        "long_factor": [3.0] * 8,
    }
    base = save_base(tmp_path / "base", LlamaConfig(**SHAPE, rope_parameters=rope))
    given = {"one": save_adapter(base, tmp_path / "one")}
    found = testing.run(
        base,
        given,
        greedy_tokens=8,
        measure_speed=False,
        only=["graph.integrity", "graph.prefill", "graph.greedy", "graph.long"],
    )
    assert [r.message for r in found.results if r.outcome is Outcome.FAIL] == []
    assert "graph.integrity" in {r.name for r in found.with_outcome(Outcome.PASS)}
