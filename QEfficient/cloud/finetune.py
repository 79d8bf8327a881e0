# SPDX-License-Identifier: BSD-3-Clause
"""``qefficient finetune``: options → base, adapter, data → one call of the training.

The three fine-tuning functions are importable from here; they load PyTorch when first called, not with ``--help``.
"""

import os
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
        The metrics of :func:`QEfficient.finetune.train.train`.

    Raises:
        ConfigError: An option is unknown (with a suggestion), has a wrong value, or contradicts another.
    """
    return _finetune(resolve("finetune", **kwargs))


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
    print(f"{metrics['train_seconds']:.0f} s, {metrics['train_tokens_per_second']:,.0f} tokens/s", end="")
    print(f", loss {metrics['train_loss']:.3f}", end="")
    if "perplexity" in metrics:
        print(f", perplexity {metrics['perplexity_before']:,.3g} → {metrics['perplexity']:,.3g}", end="")
    print(f"\nsaved {config.output_dir}")
    return 0


def _finetune(config: TrainConfig) -> dict[str, float]:
    from transformers.utils import logging

    from QEfficient.finetune.data import rendered
    from QEfficient.finetune.model import count_parameters
    from QEfficient.finetune.sets import load_sets
    from QEfficient.finetune.train import refuse_leftovers, train

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading weights; the training shows its own
    refuse_leftovers(config)
    if config.use_peft and config.from_peft_checkpoint is None:
        generate_peft_config(config)  # a mistake here must not wait for the base
    base, tokenizer = load_model_and_tokenizer(config, None)
    sets = load_sets(config, tokenizer)
    model = apply_peft(base, config)
    trained, total = count_parameters(model)
    said = [f"{len(sets.train):,} examples", *([f"{len(sets.val):,} to validate"] if sets.val else []), *sets.notes]
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{config.model_name}: {trained:,} of {total:,} parameters to train ({trained / total:.2%})", flush=True)
        print(", ".join(said), flush=True)
        if config.show_example:
            print(f"the first, with what is learned in ⟦ ⟧:\n{rendered(sets.train[0], tokenizer)}", flush=True)
    return train(config, model, tokenizer, sets.train, sets.val, title=config.output_dir.name)


if __name__ == "__main__":
    sys.exit(run("finetune"))
