# SPDX-License-Identifier: BSD-3-Clause
"""The same training by ours, the bare ``Trainer`` and TRL's ``SFTTrainer``; each step's end is noted."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flops import synchronize
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be trained.

    Attributes:
        model: With its adapter.
        examples: Tokens, all of them learned.
        folder: An empty one.
        batch: Examples of a step.
        length: Tokens of the longest example.
        steps: Optimizer steps.
        packing: Whether examples share rows, where the trainer knows how to.
        autocast: Whether products are made in bfloat16, whatever the type of the weights.
        recompute: Whether activations are computed again in the backward pass.
    """

    model: Any
    examples: Any
    folder: Path
    batch: int
    length: int
    steps: int
    packing: bool
    autocast: bool
    recompute: bool

    def arguments(self) -> dict[str, Any]:
        """Return what both peers are told."""
        return {
            "output_dir": str(self.folder),
            "per_device_train_batch_size": self.batch,
            "max_steps": self.steps,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "include_num_input_tokens_seen": "non_padding",
            "dataloader_pin_memory": torch.cuda.is_available(),
            "use_cpu": not torch.cuda.is_available(),
            "bf16": self.autocast,
        }


@dataclass(frozen=True, slots=True)
class Trained:
    """What was seen.

    Attributes:
        times: Of each step's end: seconds by the clock and of the processor.
        tokens: Learned from in all steps, padding left out.
    """

    times: list[tuple[float, float]]
    tokens: int


class Clock(TrainerCallback):
    """Notes the end of each step, when the device has done it."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See the class."""
        synchronize(args.device.type)
        self.times.append((time.perf_counter(), time.process_time()))


def ours(work: Work) -> Trained:
    """Train as ``qefficient finetune`` does."""
    from QEfficient.finetune.allocator import memory_kept
    from QEfficient.finetune.batches import Collator, Rows
    from QEfficient.finetune.config import TrainConfig
    from QEfficient.finetune.trainer import AdapterTrainer

    config = TrainConfig(
        train_batch_size=work.batch,
        gradient_accumulation_steps=1,
        max_train_step=work.steps,
        context_length=work.length,
        packing=work.packing,
        gradient_checkpointing=work.recompute,
        dtype=str(work.model.dtype).removeprefix("torch."),
        report_to=["none"],
    )
    rows = Rows(work.examples, work.batch, context_length=work.length if work.packing else 0)
    collator = Collator(0, packed=work.packing)
    trainer = AdapterTrainer(config, work.model, rows, collator, [], root=work.folder / "out", made_by={})
    with memory_kept():
        return _run(trainer, lambda: trainer.run(None))


def bare(work: Work) -> Trained:
    """Train as the ``Trainer`` does when it is given examples and a padding collator."""

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        width = max(len(r["input_ids"]) for r in rows)
        fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        return {k: torch.tensor([r[k] + [v] * (width - len(r[k])) for r in rows]) for k, v in fill.items()}

    arguments = TrainingArguments(**work.arguments(), activation_checkpointing=work.recompute)
    data = [
        {"input_ids": e.input_ids, "labels": e.labels, "attention_mask": [1] * len(e.input_ids)} for e in work.examples
    ]
    return _run(Trainer(model=work.model, args=arguments, train_dataset=data, data_collator=collate))


def kept(work: Work) -> Trained:
    """Train as :func:`bare` does, with the allocator set as in :func:`ours`."""
    from QEfficient.finetune.allocator import memory_kept

    with memory_kept():
        return bare(work)


def trl(work: Work) -> Trained:
    """Train as TRL's ``SFTTrainer`` does with examples that are tokens already."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    arguments = SFTConfig(
        **work.arguments(), max_length=work.length, packing=work.packing, gradient_checkpointing=work.recompute
    )
    data = Dataset.from_list([{"input_ids": e.input_ids} for e in work.examples])
    return _run(SFTTrainer(model=work.model, args=arguments, train_dataset=data, processing_class=tokenizer))


TRAINERS: dict[str, Callable[[Work], Trained]] = {"ours": ours, "bare": bare, "kept": kept, "trl": trl}


def _run(trainer: Any, train: Callable[[], Any] | None = None) -> Trained:
    clock = Clock()
    trainer.pop_callback(PrinterCallback)
    trainer.add_callback(clock)
    (train or trainer.train)()
    return Trained(clock.times, trainer.state.num_input_tokens_seen)
