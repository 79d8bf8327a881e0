# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints that are whole or absent, and which of them to go on from. Knows files, no model.

A checkpoint is written aside, its files are recorded with their digests, and it is moved in; what is there but
does not match its record is damaged, however it came to that, and is never trained on.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from QEfficient.errors import ArtifactError, ConfigError
from QEfficient.finetune.config import TrainConfig
from QEfficient.store import record_files, verify_files

RECORD_FILE = "whole.json"
"""Lists the files of a checkpoint with their digests; written last."""

PREFIX = "checkpoint-"

# Options that may differ when a training goes on: none of them changes a weight.
_FREE = {
    "config",
    "output_dir",
    "overwrite",
    "resume",
    "save_steps",
    "keep_checkpoints",
    "save_metrics",
    "report_to",
    "show_example",
    "val_batch_size",
    "test",
    "engine",
    "workers",
    "worker_cpus",
    "ray_address",
}


def folder_for(output_dir: Path) -> Path:
    """Return where the checkpoints of a training are: beside its result, which stays absent until it is whole."""
    return output_dir.with_name(f"{output_dir.name}.checkpoints")


def facts(config: TrainConfig, data: str) -> dict[str, Any]:
    """Return what decides the weights: options, and the digest of the data."""
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE}
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return {**plain, "data": data}


def seal(written: Path, root: Path, made_by: dict[str, Any]) -> None:
    """Record the files of the folder ``written``, flush them to disk, and move it into ``root``."""
    for path in written.iterdir():
        _flush(path)
    record = written / RECORD_FILE
    record.write_text(json.dumps({"files": record_files(written), "made_by": made_by}, indent=1), encoding="utf-8")
    _flush(record)
    target = root / written.name
    shutil.rmtree(target, ignore_errors=True)  # of an earlier, interrupted training that reached the same step
    os.rename(written, target)
    _flush(root)


def verify(checkpoint: Path) -> dict[str, Any]:
    """Read every byte of ``checkpoint`` and return its record.

    Raises:
        ArtifactError: Something is missing, truncated or changed.
    """
    try:
        record: dict[str, Any] = json.loads((checkpoint / RECORD_FILE).read_text(encoding="utf-8"))
        files = record["files"]
    except (OSError, ValueError, KeyError) as e:
        raise ArtifactError(f"{checkpoint} was never finished: it has no readable {RECORD_FILE}") from e
    verify_files(checkpoint, files, full=True)
    return record


def step_of(checkpoint: Path) -> int:
    """Return after which optimizer step ``checkpoint`` was written; -1 if its name does not say so."""
    number = checkpoint.name.removeprefix(PREFIX)
    return int(number) if checkpoint.name.startswith(PREFIX) and number.isdigit() else -1


def listed(root: Path) -> list[Path]:
    """Return the checkpoints in ``root``, the newest first, whole or not."""
    found = [p for p in root.iterdir() if p.is_dir() and step_of(p) >= 0] if root.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def newest(root: Path, made_by: dict[str, Any]) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint in ``root``, if any, and what is wrong with each newer one.

    Raises:
        ConfigError: It was made with other options or other data, so that going on would be another training.
    """
    damages: list[str] = []
    for checkpoint in listed(root):
        try:
            record = verify(checkpoint)
        except ArtifactError as e:
            damages.append(str(e).removesuffix("; export again."))
            continue
        differing = [k for k in made_by if k in record["made_by"] and record["made_by"][k] != made_by[k]]
        if differing:
            name = differing[0]
            then, now = (f"{v[name]!r}" for v in (record["made_by"], made_by))
            raise ConfigError(
                f"{checkpoint} was made with {name} {then}, not {now}: go on with the same, or remove {root}"
            )
        return checkpoint, damages
    return None, damages


def rotate(root: Path, keep: int, best: Path | None) -> None:
    """Remove all checkpoints but the newest ``keep`` and ``best``."""
    for old in listed(root)[keep:]:
        if old != best:
            shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
