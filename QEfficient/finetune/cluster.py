# SPDX-License-Identifier: BSD-3-Clause
"""``--engine ray``: the same training in Ray Train's workers, on a cluster that exists. Knows no training."""

import dataclasses
import importlib
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from QEfficient.errors import ConfigError, QEffError
from QEfficient.finetune.config import TrainConfig

_REACH_SECONDS = 10.0


def train_on_ray(work: Callable[[TrainConfig], dict[str, float]], config: TrainConfig) -> dict[str, float]:
    """Run ``work`` in ``config.workers`` processes of a cluster; they share a step's examples as under torchrun.

    Base, data and ``output_dir`` are handed over as absolute paths: every node must see them there.

    Args:
        work: What a worker does, a function that workers can import.
        config: The options.

    Returns:
        What ``work`` returned in the first worker.

    Raises:
        ConfigError: Ray is not installed, no cluster is reached, or it has no room.
        QEffError: What a worker raised, or that one died.
    """
    ray, train, trainer_class = _libraries()
    began = not ray.is_initialized()
    if began:
        _connect(ray, config.ray_address)
    records = config.output_dir.resolve().with_name(f"{config.output_dir.name}.ray")
    try:
        gpus = ray.cluster_resources().get("GPU", 0) > 0
        _check_room(ray.cluster_resources(), config, gpus=gpus)
        trainer = trainer_class(
            lambda values: work(TrainConfig(**values)),
            train_loop_config=portable(config),
            scaling_config=train.ScalingConfig(
                num_workers=config.workers,
                use_gpu=gpus,
                resources_per_worker={"CPU": config.worker_cpus, **({"GPU": 1} if gpus else {})},
            ),
            run_config=train.RunConfig(name=config.output_dir.name, storage_path=str(records)),
        )
        metrics: dict[str, float] = trainer.fit().return_value
    except train.TrainingFailedError as e:
        raise _cause(e) from e
    finally:
        shutil.rmtree(records, ignore_errors=True)
        if began:
            ray.shutdown()
    return metrics


def portable(config: TrainConfig) -> dict[str, Any]:
    """Return what a worker is told: the options for one process, with absolute paths, for it works in another folder."""
    values = dataclasses.asdict(config) | {"config": None, "engine": "local", "workers": 1, "ray_address": ""}
    for name, value in values.items():
        if isinstance(value, Path):
            values[name] = value.expanduser().resolve()
    for name in ("model_name", "tokenizer_name", "dataset"):
        if values[name] and Path(values[name]).expanduser().exists():  # else an id on the Hub
            values[name] = str(Path(values[name]).expanduser().resolve())
    if config.preprocess and ":" in config.preprocess:
        file, _, function = config.preprocess.rpartition(":")
        values["preprocess"] = f"{Path(file).expanduser().resolve()}:{function}"
    return values


def _libraries() -> tuple[Any, Any, Any]:
    try:
        ray, train = importlib.import_module("ray"), importlib.import_module("ray.train")
        return ray, train, importlib.import_module("ray.train.torch").TorchTrainer
    except ImportError as e:
        raise ConfigError(
            f"--engine ray needs Ray Train, which is not installed: pip install 'efficient-transformers[ray]' ({e})"
        ) from e


def _connect(ray: Any, address: str) -> None:
    """Connect to the cluster.

    Raises:
        ConfigError: There is none. Ray itself waits for minutes for an address where nobody listens.
    """
    given = address or os.environ.get("RAY_ADDRESS", "")
    advice = "start one with `ray start --head`, or name one with --ray-address"
    host, colon, port = given.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=_REACH_SECONDS).close()
        except OSError as e:
            raise ConfigError(f"--engine ray: no cluster answers at {given}: {advice} ({e})") from e
    try:
        ray.init(address=given or "auto", log_to_driver=True)
    except (ConnectionError, ValueError) as e:
        raise ConfigError(f"--engine ray: no cluster was found: {advice} ({' '.join(str(e).split())})") from e


def _check_room(resources: dict[str, float], config: TrainConfig, *, gpus: bool) -> None:
    """Refuse more workers than the cluster can ever run: Ray would wait for them without end.

    Raises:
        ConfigError: It has fewer processors or GPUs than they need.
    """
    needs = {"CPU": config.workers * config.worker_cpus, **({"GPU": config.workers} if gpus else {})}
    for kind, count in needs.items():
        if resources.get(kind, 0) < count:
            raise ConfigError(
                f"--engine ray: {config.workers} workers need {count} {kind}s, the cluster has "
                f"{resources.get(kind, 0):g}: give fewer --workers, or add nodes"
            )


def _cause(error: Any) -> QEffError:
    """Return the error of ours that a worker raised, if there is one; else one that says how a worker ended."""
    left: list[Any] = list(getattr(error, "worker_failures", {}).values()) or [error]
    first = left[0]
    while left:
        one = left.pop()
        if isinstance(one, QEffError):
            return one
        left += [e for e in (getattr(one, "cause", None), one.__cause__) if isinstance(e, BaseException)]
    text = next(iter(str(first).strip().splitlines()), type(first).__name__)
    return QEffError(
        f"a worker of the Ray cluster failed: {type(first).__name__}: {text}. With --save-steps, "
        "the same command and --resume go on from the newest checkpoint"
    )
