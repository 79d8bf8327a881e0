"""Two processes are one process with the same global batch."""

import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from QEfficient.cloud.finetune import main
from QEfficient.finetune import checkpoints
from tests.finetune.processes import Command

STEPS = 50


@pytest.fixture
def options(base_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Examples of different lengths, a last step of an epoch that is not full."""
    rows = [{"prompt": "p" * (i % 7 + 1), "completion": "ab" * (i % 5 + 1)} for i in range(21)]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name": str(base_folder),
        "train_file": data,
        "val_share": 0.15,
        "eval_steps": 10,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_train_step": STEPS,
        "lr": 1e-2,
        "lora_r": 2,
    }


def launch(options: dict[str, Any], out: Path, processes: int, waits_at: int = 0) -> list[Command]:
    """Start the command as torchrun does; the last process waits behind a step for a signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    started = []
    for rank in range(processes):
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
        printed = out.with_name(f"{out.name}.{rank}.txt")
        waits = waits_at if rank == processes - 1 else 0
        started.append(Command({**options, "output_dir": out}, printed, environment if processes > 1 else {}, waits))
    return started


def curve(folder: Path, name: str) -> list[float]:
    """Return what was logged under a name."""
    return [entry[name] for entry in json.loads((folder / "train_log.json").read_text()) if name in entry]


def test_two_processes_are_one(options: dict[str, Any], tmp_path: Path) -> None:
    """Each of 50 losses, each validation and the adapter agree; one process speaks and writes."""
    running = {count: launch(options, tmp_path / str(count), count) for count in (1, 2)}
    for processes in running.values():
        assert [p.wait() for p in processes] == [0] * len(processes), processes[0].printed()
    one, two = tmp_path / "1", tmp_path / "2"
    assert [json.loads((f / "train_metrics.json").read_text())["processes"] for f in (one, two)] == [1, 2]
    assert len(curve(one, "loss")) == STEPS
    assert curve(two, "loss") == pytest.approx(curve(one, "loss"), abs=1e-5)
    assert curve(two, "eval_loss") == pytest.approx(curve(one, "eval_loss"), abs=1e-5)
    assert curve(two, "num_input_tokens_seen") == curve(one, "num_input_tokens_seen")
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=1e-3, atol=1e-4)
    assert "parameters to train" in running[2][0].printed()
    assert "parameters to train" not in running[2][1].printed()


def test_two_sharding_processes_are_one(options: dict[str, Any], tmp_path: Path) -> None:
    """FSDP2 on CPUs: each process holds half of the parameters; each of 50 losses and the adapter agree."""
    out = {count: tmp_path / str(count) for count in (1, 2)}
    running = launch(options, out[1], 1) + launch({**options, "fsdp": True}, out[2], 2)
    assert [p.wait() for p in running] == [0] * 3, running[1].printed()
    assert len(curve(out[1], "loss")) == STEPS
    assert curve(out[2], "loss") == pytest.approx(curve(out[1], "loss"), abs=1e-5)
    assert curve(out[2], "eval_loss") == pytest.approx(curve(out[1], "eval_loss"), abs=1e-5)
    metrics = json.loads((out[2] / "train_metrics.json").read_text())
    assert metrics["processes"] == 2
    assert metrics["parameters_per_process"] == pytest.approx(metrics["parameters"] / 2, rel=0.02)
    a, b = (load_file(out[count] / "adapter_model.safetensors") for count in (1, 2))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=1e-3, atol=1e-4)


def stop_one_of_two(options: dict[str, Any], out: Path) -> None:
    """Start two processes on ten steps, and send SIGTERM to one after the first; both have to end by it."""
    stopped = launch(options, out, 2, waits_at=8)
    end = time.monotonic() + 600
    while "out: 1/10" not in stopped[0].printed():
        assert stopped[0].runs(), stopped[0].printed()
        assert time.monotonic() < end
        time.sleep(0.01)
    stopped[1].send(signal.SIGTERM)
    assert [p.wait() for p in stopped] == [128 + signal.SIGTERM] * 2


def test_sharded_training_is_resumed(options: dict[str, Any], tmp_path: Path) -> None:
    """SIGTERM to a sharded training writes a whole checkpoint; resumed, the curve is that of one process."""
    options |= {"max_train_step": 10, "fsdp": True}
    stop_one_of_two(options, tmp_path / "out")
    resumed = launch({**options, "resume": True}, tmp_path / "out", 2)
    assert [p.wait() for p in resumed] == [0] * 2, resumed[0].printed()
    main(**{**options, "fsdp": False}, output_dir=tmp_path / "one")
    assert curve(tmp_path / "out", "loss") == pytest.approx(curve(tmp_path / "one", "loss"), abs=1e-5)


def test_processes_stop_together_and_resume(options: dict[str, Any], tmp_path: Path) -> None:
    """SIGTERM to one of two writes one checkpoint of one step; resumed, the curve is that of one process; sorted, too."""
    options |= {"max_train_step": 10, "group_by_length": True}
    stop_one_of_two(options, tmp_path / "out")
    assert 0 < checkpoints.step_of(checkpoints.listed(tmp_path / "out.checkpoints")[0]) < 10
    resumed = launch({**options, "resume": True}, tmp_path / "out", 2)
    assert [p.wait() for p in resumed] == [0] * 2, resumed[0].printed()
    main(**options, output_dir=tmp_path / "one")
    assert curve(tmp_path / "out", "loss") == pytest.approx(curve(tmp_path / "one", "loss"), abs=1e-5)
