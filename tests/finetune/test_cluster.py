"""Training in workers of a Ray cluster."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from QEfficient.cloud.finetune import main
from QEfficient.errors import ConfigError
from QEfficient.finetune.cluster import portable, train_on_ray
from QEfficient.finetune.config import TrainConfig, resolve
from tests.finetune.test_distributed import curve

NODES = """
import sys
from ray.cluster_utils import Cluster
node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
patient = {"health_check_timeout_ms": 600000, "health_check_failure_threshold": 100}
cluster = Cluster(initialize_head=True, head_node_args={**node, "_system_config": patient})
cluster.add_node(**node)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def test_what_is_wrong_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options that belong to Ray, an address where nobody listens, a missing library: each is one line."""
    for values, message in (
        ({"workers": 2}, "workers, worker_cpus and ray_address belong to engine ray: give it"),
        ({"ray_address": "auto"}, "belong to engine ray"),
        ({"engine": "ray", "workers": 0}, "workers must be 1 or more, not 0"),
        ({"engine": "rai"}, "engine must be one of local, ray, not 'rai'"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve("t", model_name="x", train_file=Path(__file__), output_dir=tmp_path, **values)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    config = TrainConfig(engine="ray", output_dir=tmp_path / "out", ray_address=nobody)
    if pytest.importorskip("ray", reason="the extra 'ray' is not installed"):
        with pytest.raises(ConfigError, match=f"no cluster answers at {nobody}: start one with `ray start --head`"):
            train_on_ray(lambda config: {}, config)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs Ray Train.*pip install 'efficient-transformers\[ray\]'"):
        train_on_ray(lambda config: {}, config)


def test_workers_are_told_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They work in other folders; a Hub id is no path; and none of them asks Ray again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    given = {"model_name": "base", "dataset": "some/rows", "preprocess": "mine.py:f", "output_dir": Path("out")}
    told = portable(TrainConfig(**given, engine="ray", workers=2, ray_address="auto"))
    assert told["model_name"] == str(tmp_path / "base")
    assert told["dataset"] == "some/rows"
    assert told["preprocess"] == f"{tmp_path / 'mine.py'}:f"
    assert told["output_dir"] == tmp_path / "out"
    assert TrainConfig(**told).engine == "local"


def environment() -> dict[str, str]:
    """Return what a process of a cluster or of the command needs."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # else everything else on the machine comes first
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # else a slow machine starts workers anew each minute, without end
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }


@pytest.fixture
def address() -> Iterator[str]:
    """A cluster of two nodes with a processor each."""
    pytest.importorskip("ray.train", reason="the extra 'ray' is not installed")
    nodes = subprocess.Popen([sys.executable, "-c", NODES], stdin=-1, stdout=-1, env=environment(), text=True)
    assert nodes.stdout is not None
    assert nodes.stdin is not None
    yield nodes.stdout.readline().strip()
    nodes.stdin.close()
    nodes.wait(600)


def on_ray(address: str, options: dict[str, Any], folder: Path, *, fails: int = 0) -> str:
    """Run the command in ``folder``, with paths relative to it; return what it printed."""
    given = {"engine": "ray", "ray_address": address, "workers": 2, **options}
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    command = [sys.executable, "-m", "QEfficient.cloud", "finetune", *words]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def given(base_folder: Path, tmp_path: Path, write_rows: Any) -> dict[str, Any]:
    """A training of 48 steps, with a function of the user's."""
    rows = [{"prompt": "p" * (i % 5 + 1), "completion": "ab" * (i % 7 + 1)} for i in range(19)]
    (tmp_path / "mine.py").write_text(
        "import os, signal\ndef same(row):\n    return row\ndef die(row):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    return {
        "model_name": str(base_folder),
        "train_file": write_rows(*rows).name,
        "preprocess": "mine.py:same",
        "val_share": 0.15,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lr": 1e-2,
        "num_epochs": 12,
        "lora_r": 2,
    }


@pytest.mark.slow
def test_two_workers_are_one_process(
    address: str, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have the losses of one, each of 48; sharded, too; one of them speaks."""
    monkeypatch.chdir(tmp_path)
    one = main(**given, output_dir="one")
    losses = curve(tmp_path / "one", "loss")
    assert len(losses) >= 48
    printed = on_ray(address, {**given, "output_dir": "two"}, tmp_path)
    assert "saved two" in printed
    assert len({line for line in printed.splitlines() if "parameters to train" in line}) == 1
    two = json.loads((tmp_path / "two" / "train_metrics.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    assert curve(tmp_path / "two", "loss") == pytest.approx(losses, abs=1e-5)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], abs=1e-5)
    on_ray(address, {**given, "output_dir": "sharded", "fsdp": True}, tmp_path)
    sharded = json.loads((tmp_path / "sharded" / "train_metrics.json").read_text())
    assert sharded["parameters_per_process"] == pytest.approx(sharded["parameters"] / 2, rel=0.02)
    assert curve(tmp_path / "sharded", "loss") == pytest.approx(losses, abs=1e-5)
    assert not (tmp_path / "two.ray").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"workers": 3}, "3 workers need 3 CPUs, the cluster has 2"),
        ({"train_batch_size": 3, "gradient_accumulation_steps": 1}, "2 processes cannot share train_batch_size 3"),
        ({"preprocess": "mine.py:die"}, "a worker of the Ray cluster failed"),
    ],
    ids=["no-room", "mistake", "killed"],
)
def test_what_goes_wrong_there(
    address: str, given: dict[str, Any], tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    """No room, a mistake that a worker finds and a killed worker are one line and nothing is left."""
    printed = on_ray(address, {**given, **wrong, "output_dir": "out"}, tmp_path, fails=2)
    assert message in next(line for line in printed.splitlines() if line.startswith("error: "))
    assert not list(tmp_path.glob("out*"))
