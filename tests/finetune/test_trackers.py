"""What the losses also go to while a model is trained."""

import json
from pathlib import Path
from typing import Any

import pytest

from QEfficient.errors import ConfigError
from QEfficient.finetune.config import TrainConfig
from QEfficient.finetune.data import Example
from QEfficient.finetune.trainer import trackers
from tests.finetune.test_train import run


def test_tensorboard_by_default(base_folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    """Its files lie beside the adapter and hold each step's loss."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="optional")
    ids = tokenizer("<s>abcd</s>").input_ids
    run(base_folder, tmp_path / "out", [Example(ids, list(ids))] * 6, report_to=[], num_epochs=1)
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    found = accumulator.EventAccumulator(str(folder)).Reload()
    log = json.loads((tmp_path / "out" / "train_log.json").read_text())
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert [event.value for event in found.Scalars("train/loss")] == pytest.approx(losses)


def test_trackers_that_are_chosen() -> None:
    """``none`` switches them off; what is unknown or not installed is named."""
    assert trackers(TrainConfig(report_to=["none"])) == []
    assert trackers(TrainConfig(save_metrics=False)) == []
    with pytest.raises(ConfigError, match="report_to 'tensorbored' is unknown to transformers, or its library"):
        trackers(TrainConfig(report_to=["tensorbored"]))
