"""A training that is interrupted, by force, too, and goes on, is the training that never was."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from QEfficient.cloud.finetune import main
from QEfficient.errors import ConfigError
from QEfficient.finetune import checkpoints
from QEfficient.finetune.trainer import AdapterTrainer
from tests.finetune.processes import Command

STEPS = 12
ROWS = [{"prompt": "p" * (i % 7 + 1), "completion": "ab" * (i % 5 + 1)} for i in range(20)]


@pytest.fixture(scope="module")
def options(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A training with everything that an interruption could lose: dropout, Adam, warm-up, epochs, order by length."""
    data = tmp_path_factory.mktemp("data") / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "model_name": str(base_folder),
        "train_file": data,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_train_step": STEPS,
        "lr": 1e-2,
        "lr_schedule": "cosine",
        "warmup_ratio": 0.3,
        "weight_decay": 0.1,
        "lora_r": 2,
        "lora_dropout": 0.2,
        "neftune_alpha": 1.0,
        "group_by_length": True,
        "val_share": 0.2,
        "save_steps": 2,
    }


@pytest.fixture(scope="module")
def uninterrupted(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a training that ran through."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    main(**options, output_dir=folder)
    return folder


def weights(folder: Path) -> bytes:
    """Return the adapter's file."""
    return (folder / "adapter_model.safetensors").read_bytes()


def losses(folder: Path) -> list[float]:
    """Return the loss of each step."""
    return [entry["loss"] for entry in json.loads((folder / "train_log.json").read_text()) if "loss" in entry]


def wait_for(done: Callable[[], Any], process: Command) -> None:
    """Wait until something is so."""
    end = time.monotonic() + 600
    while not done():
        assert process.runs(), process.printed()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_killed_and_resumed_is_the_same(
    options: dict[str, Any], uninterrupted: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """The final adapter is equal bit for bit, each step's loss equal; SIGTERM and Ctrl-C leave a checkpoint of their step."""
    out = tmp_path / "out"
    killed = number == signal.SIGKILL
    given = {**options, "output_dir": out, "save_steps": 2 if killed else 0}
    process = Command(given, tmp_path / "printed", waits_at=STEPS - 2)
    root = checkpoints.folder_for(out)
    wait_for(lambda: (root / "checkpoint-4").exists() if killed else "out: 1/12" in process.printed(), process)
    process.send(number)
    code = process.wait()
    if killed:
        assert code == -number
    else:
        assert code == 128 + number
        assert f"{number.name} after step" in process.printed()
    assert not out.exists()
    assert 0 < checkpoints.step_of(checkpoints.listed(root)[0]) < STEPS
    main(**options, output_dir=out, resume=True)
    assert weights(out) == weights(uninterrupted)
    assert losses(out) == losses(uninterrupted)
    assert not root.exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_a_random_moment(options: dict[str, Any], uninterrupted: Path, tmp_path: Path, seed: int) -> None:
    """Whenever ``kill -9`` comes, between steps or within a checkpoint's writing, and twice: the result is the same."""
    out, draw = tmp_path / "out", random.Random(seed)
    for attempt in range(2):
        process = Command(
            {**options, "output_dir": out, "save_steps": 1, "resume": True, "overwrite": True},
            tmp_path / f"printed{attempt}",
        )
        wait_for(lambda p=process: "out: 12 steps" in p.printed(), process)
        time.sleep(draw.uniform(0, 1.0))
        with suppress(ProcessLookupError):  # it has ended by itself, with 0
            process.send(signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 0)
    main(**options, output_dir=out, resume=True, overwrite=True)
    assert weights(out) == weights(uninterrupted)
    assert losses(out) == losses(uninterrupted)


@pytest.fixture(scope="module")
def left(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training leaves that broke down in step 8: whole checkpoints of its steps 4 and 6."""
    folder = tmp_path_factory.mktemp("left")

    def break_down(trainer: Any, logs: dict[str, float], start_time: Any = None) -> None:
        if trainer.state.global_step == 8:
            raise RuntimeError("out of memory, say")
        log(trainer, logs, start_time)

    log = AdapterTrainer.log
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterTrainer, "log", break_down)
        with pytest.raises(RuntimeError, match="out of memory"):
            main(**options, output_dir=folder / "out")
    assert [checkpoints.step_of(c) for c in checkpoints.listed(folder / "out.checkpoints")] == [6, 4]
    return folder


def truncate(path: Path) -> None:
    """Leave the first half of a file."""
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "optimizer-truncated": lambda c: truncate(c / "optimizer.pt"),
    "optimizer-missing": lambda c: (c / "optimizer.pt").unlink(),
    "weights-truncated": lambda c: truncate(c / "adapter_model.safetensors"),
    "state-missing": lambda c: (c / "trainer_state.json").unlink(),
    "rng-missing": lambda c: (c / "rng_state.pth").unlink(),
    "bit-flipped": lambda c: (c / "scheduler.pt").write_bytes((c / "scheduler.pt").read_bytes()[:-1] + b"\x01"),
    "empty": lambda c: [path.unlink() for path in c.iterdir()],
    "record-missing": lambda c: (c / "whole.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_checkpoint_falls_back(left: Path, tmp_path: Path, damage: str) -> None:
    """The one before is gone on from, and it is said what is wrong with the newest."""
    root = shutil.copytree(left / "out.checkpoints", tmp_path / "out.checkpoints")
    DAMAGES[damage](root / "checkpoint-6")
    found, damages = checkpoints.newest(root, {})
    assert found == root / "checkpoint-4"
    assert len(damages) == 1
    assert "checkpoint-6" in damages[0]


def test_resume_after_damage_is_the_same(
    left: Path, options: dict[str, Any], uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the checkpoint before the damaged one, too, the adapter comes out equal, and the fall-back is said."""
    root = shutil.copytree(left / "out.checkpoints", tmp_path / "out.checkpoints")
    (root / "checkpoint-6" / "optimizer.pt").unlink()
    main(**options, output_dir=tmp_path / "out", resume=True)
    said = capsys.readouterr().err
    assert "optimizer.pt is missing: going back to the checkpoint before it" in said
    assert "resuming from step 4" in said
    assert weights(tmp_path / "out") == weights(uninterrupted)


def test_checkpoints_are_not_thrown_away_silently(left: Path, options: dict[str, Any], tmp_path: Path) -> None:
    """Without --resume or --overwrite an interrupted training is not begun anew; with other options not gone on."""
    shutil.copytree(left / "out.checkpoints", tmp_path / "out.checkpoints")
    with pytest.raises(ConfigError, match="holds checkpoints of an interrupted training: go on with --resume"):
        main(**options, output_dir=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"checkpoint-6 was made with lr 0\.01, not 0\.02"):
        main(**{**options, "lr": 0.02}, output_dir=tmp_path / "out", resume=True)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "x", "completion": "y"}) + "\n")
    with pytest.raises(ConfigError, match="checkpoint-6 was made with train_file"):
        main(**{**options, "train_file": other, "val_share": 0.0}, output_dir=tmp_path / "out", resume=True)


def test_only_the_newest_are_kept(options: dict[str, Any], tmp_path: Path) -> None:
    """Older checkpoints go, the best stays."""
    for step in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoints.rotate(tmp_path, 2, tmp_path / "checkpoint-2")
    assert [checkpoints.step_of(c) for c in checkpoints.listed(tmp_path)] == [8, 6, 2]
