# SPDX-License-Identifier: BSD-3-Clause
"""``qefficient finetune``: options → base, adapter, data → one call of the training.

The three fine-tuning functions are importable from here; they load PyTorch when first called, not with ``--help``.
"""

import dataclasses
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from QEfficient.cloud.__main__ import run
from QEfficient.finetune.config import TrainConfig, parse_args, resolve

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["TrainConfig", "apply_peft", "command", "generate_peft_config", "load_model_and_tokenizer", "main"]


def load_model_and_tokenizer(train_config: TrainConfig, dataset_config: Any = None, **kwargs: Any) -> tuple[Any, Any]:
    """Load base and tokenizer; see :func:`QEfficient.finetune.model.load_model_and_tokenizer`."""
    from QEfficient.finetune import model

    return model.load_model_and_tokenizer(train_config, dataset_config, **kwargs)


def generate_peft_config(train_config: TrainConfig, **kwargs: Any) -> "PeftConfig":
    """Return the method's config; see :func:`QEfficient.finetune.model.generate_peft_config`."""
    from QEfficient.finetune import model

    return model.generate_peft_config(train_config, **kwargs)


def apply_peft(model: Any, train_config: TrainConfig, **kwargs: Any) -> Any:
    """Return ``model`` with a new adapter; see :func:`QEfficient.finetune.model.apply_peft`."""
    from QEfficient.finetune.model import apply_peft as apply

    return apply(model, train_config, **kwargs)


def main(**kwargs: Any) -> dict[str, float]:
    """Train an adapter and save it.

    Args:
        **kwargs: Fields of :class:`TrainConfig`; ``config=FILE`` reads others from a file.

    Returns:
        The metrics of :func:`QEfficient.finetune.train.train`; with ``test``, its exit code as ``test_exit_code``.

    Raises:
        ConfigError: An option is unknown (with a suggestion), has a wrong value, or contradicts another.
    """
    config = resolve("finetune", **kwargs)
    metrics = _finetune(config)
    if config.test and _speaks():
        metrics["test_exit_code"] = float(_tested(config))
    return metrics


def command(argv: Sequence[str]) -> int:
    """Run ``qefficient finetune`` with the arguments behind it; return the exit code."""
    config = parse_args(argv, prog="qefficient finetune")
    # PEFT and the Trainer ask transformers for a name that it is about to rename.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    from QEfficient.finetune.train import Interrupted

    try:
        metrics = _finetune(config)
    except Interrupted as e:
        print(e, file=sys.stderr)
        return e.exit_code
    if not _speaks():
        return 0
    _print_summary(config, metrics)
    return _tested(config) if config.test else 0


def _print_summary(config: TrainConfig, metrics: dict[str, float]) -> None:
    from QEfficient.finetune.summary import HTML_FILE, lines
    from QEfficient.finetune.train import LOG_FILE

    log = config.output_dir / LOG_FILE
    print("\n".join(lines(metrics, json.loads(log.read_text(encoding="utf-8")) if config.save_metrics else [])))
    print(f"saved {config.output_dir}" + (f", summary in {HTML_FILE}" if config.save_metrics else ""), flush=True)


def _tested(config: TrainConfig) -> int:
    """Hold the adapter against its base; return the exit code of ``qefficient test``."""
    from QEfficient.cloud import test

    name = re.sub(r"[^A-Za-z0-9_-]+", "-", config.output_dir.name).strip("-") or "adapter"
    report = config.output_dir.with_name(f"{config.output_dir.name}.report")
    return test.command([config.model_name, f"--adapter={name}={config.output_dir}", f"--report={report}"])


def _speaks() -> bool:
    """Tell whether this process, of several, is the one that prints."""
    return int(os.environ.get("RANK", "0")) == 0


def _finetune(config: TrainConfig) -> dict[str, float]:
    if config.engine == "ray":
        from QEfficient.finetune.cluster import train_on_ray

        return train_on_ray(_finetune, config)
    from transformers.utils import logging

    from QEfficient.finetune.classes import rendered_class
    from QEfficient.finetune.data import rendered
    from QEfficient.finetune.model import count_parameters
    from QEfficient.finetune.preflight import longest
    from QEfficient.finetune.sets import load_classes, load_sets
    from QEfficient.finetune.train import refuse_leftovers, train

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading weights; the training shows its own
    refuse_leftovers(config)
    if config.use_peft and config.from_peft_checkpoint is None:
        generate_peft_config(config)  # a mistake here must not wait for the base
    classes = load_classes(config)
    base, tokenizer = load_model_and_tokenizer(config, classes)
    model = apply_peft(base, config)
    limit, notes = longest(model, tokenizer, classifies=bool(classes)), []
    if limit is not None and limit < config.context_length:
        notes.append(f"context_length {limit}, not {config.context_length}: the base has no more positions")
        config = dataclasses.replace(config, context_length=limit)
    sets = load_sets(config, tokenizer, classes)
    trained, total = count_parameters(model)
    said = [f"{len(sets.train):,} examples", *([f"{len(sets.val):,} to validate"] if sets.val else [])]
    said += [*sets.notes, *notes]
    if classes:
        said.append(f"{len(classes)} classes: {', '.join(classes[:10])}{', …' if len(classes) > 10 else ''}")
    if _speaks():
        print(f"{config.model_name}: {trained:,} of {total:,} parameters to train ({trained / total:.2%})", flush=True)
        print(", ".join(said), flush=True)
        if config.show_example:
            first = sets.train[0]
            shown = rendered_class(first, tokenizer, classes) if classes else rendered(first, tokenizer)
            print(f"the first, with what is learned in ⟦ ⟧:\n{shown}", flush=True)
    return train(config, model, tokenizer, sets.train, sets.val, classes=classes, title=config.output_dir.name)


if __name__ == "__main__":
    sys.exit(run("finetune"))
