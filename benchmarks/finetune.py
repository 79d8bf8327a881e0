# SPDX-License-Identifier: BSD-3-Clause
"""Fine-tuning next to the bare ``Trainer`` and TRL: tokens per second and peak memory, each in a process of its own.

A Llama of Qwen2.5-0.5B's width cut to some layers, LoRA on all seven projections, random text. "equal" are examples of
one length; "mixed" are mostly short ones, where padding costs. "kept" is the bare ``Trainer`` with the allocator set as
ours sets it (:mod:`QEfficient.finetune.allocator`). Speed is that of the median step times the real tokens of
an average step. Where other jobs share the machine, compare the processor time for a thousand tokens instead: it counts
our own work only. Prints a table, then one JSON line.

    python benchmarks/finetune.py [--steps 8] [--layers 4] [--runs ours/equal/float32,bare/equal/float32]
"""

import argparse
import importlib.util
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

LENGTH, BATCH, VOCAB, RANK, WARM_UP = 256, 4, 32000, 16, 2
RUNS: tuple[str, ...] = ("bare/equal/float32", "kept/equal/float32", "ours/equal/float32", "ours/equal/bfloat16")
RUNS += ("bare/mixed/float32", "kept/mixed/float32", "ours/mixed/float32")
RUNS += ("trl/equal/float32",) if importlib.util.find_spec("trl") else ()


def main() -> None:
    """Measure each run in a process of its own, then print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of a run, after the warm-up")
    parser.add_argument("--layers", type=int, default=4, help="layers of the base")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of PyTorch")
    parser.add_argument("--runs", default=",".join(RUNS), help="who/data/type, separated by commas")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.steps, options.layers, options.threads)))
        return
    found = {}
    for run in options.runs.split(","):
        given = [f"--{name}={getattr(options, name)}" for name in ("steps", "layers", "threads")]
        done = subprocess.run([sys.executable, __file__, f"--one={run}", *given], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found[run] = json.loads(done.stdout.splitlines()[-1])
        values = found[run]
        print(
            f"{run:<24}{values['tokens_per_second']:>10,.0f} tokens/s{values['peak_memory_mib']:>10,.0f} MiB",
            flush=True,
        )
    ratios = {}
    for name, a, b in pairs(found):
        wall = found[a]["tokens_per_second"] / found[b]["tokens_per_second"]
        work = found[b]["cpu_seconds_per_1000_tokens"] / found[a]["cpu_seconds_per_1000_tokens"]
        ratios[name] = {"tokens_per_second": wall, "cpu": work}
        print(f"{name:<46}{wall:>6.2f} x as fast, {work:.2f} x by processor time")
    print(json.dumps({"threads": options.threads, "layers": options.layers, "runs": found, "ratios": ratios}))


def pairs(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return what is compared with what."""
    wanted = [
        ("ours to bare Trainer, equal lengths", "ours/equal/float32", "bare/equal/float32"),
        ("ours to bare Trainer with memory kept", "ours/equal/float32", "kept/equal/float32"),
        ("ours to TRL's SFTTrainer, equal lengths", "ours/equal/float32", "trl/equal/float32"),
        ("ours packed to bare Trainer, mixed lengths", "ours/mixed/float32", "bare/mixed/float32"),
        ("the same to bare Trainer with memory kept", "ours/mixed/float32", "kept/mixed/float32"),
        ("bfloat16 to float32", "ours/equal/bfloat16", "ours/equal/float32"),
    ]
    return [pair for pair in wanted if pair[1] in found and pair[2] in found]


def lengths(data: str, count: int) -> list[int]:
    """Return the examples' lengths: all the same, or mostly short with some long ones."""
    draw = random.Random(0)
    if data == "equal":
        return [LENGTH] * count
    return [draw.randint(LENGTH // 2, LENGTH) if draw.random() < 0.25 else draw.randint(16, 64) for _ in range(count)]


def measure(run: str, steps: int, layers: int, threads: int) -> dict[str, float]:
    """Train once and return the speed of the median step and the peak memory."""
    import torch

    from QEfficient.finetune.data import Example
    from QEfficient.finetune.train import peak_memory_bytes

    who, data, dtype = run.split("/")
    torch.set_num_threads(threads)
    draw = random.Random(1)
    rows = [[draw.randrange(3, VOCAB) for _ in range(n)] for n in lengths(data, BATCH * (steps + WARM_UP) * 6)]
    examples = [Example(ids, list(ids)) for ids in rows]
    model = make_model(layers, getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as folder:
        train = {"ours": ours, "bare": bare, "kept": kept, "trl": trl}[who]
        times, tokens = train(model, examples, steps + WARM_UP, Path(folder), packing=data == "mixed")
    wall, cpu = ([b[i] - a[i] for a, b in itertools.pairwise(times[WARM_UP - 1 :])] for i in (0, 1))
    return {
        "tokens_per_second": tokens / len(times) / statistics.median(wall),
        "cpu_seconds_per_1000_tokens": statistics.median(cpu) / (tokens / len(times)) * 1000,
        "peak_memory_mib": peak_memory_bytes() / 2**20,
    }


def make_model(layers: int, dtype: Any) -> Any:
    """Return a random base with a LoRA on its seven projections."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_hidden_layers=layers, tie_word_embeddings=True, **shape))
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base.to(dtype), lora)


def clock(times: list[tuple[float, float]]) -> Any:
    """Return a callback that notes the end of each step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times.append((time.perf_counter(), time.process_time()))

    return Clock()


def ours(
    model: Any, examples: Any, steps: int, folder: Path, *, packing: bool
) -> tuple[list[tuple[float, float]], int]:
    """Train as ``qefficient finetune`` does."""
    from transformers import PrinterCallback

    from QEfficient.finetune.allocator import memory_kept
    from QEfficient.finetune.batches import Collator, Rows
    from QEfficient.finetune.config import TrainConfig
    from QEfficient.finetune.trainer import AdapterTrainer

    config = TrainConfig(
        train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        max_train_step=steps,
        context_length=LENGTH,
        packing=packing,
    )
    rows = Rows(examples, BATCH, context_length=LENGTH if packing else 0)
    trainer = AdapterTrainer(config, model, rows, Collator(0, packed=packing), [], root=folder, made_by={})
    with memory_kept():
        return _train(trainer, PrinterCallback)


def bare(
    model: Any, examples: Any, steps: int, folder: Path, *, packing: bool
) -> tuple[list[tuple[float, float]], int]:
    """Train as the ``Trainer`` does when it is given examples and a padding collator."""
    import torch
    from transformers import PrinterCallback, Trainer, TrainingArguments

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        width = max(len(r["input_ids"]) for r in rows)
        fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        return {k: torch.tensor([r[k] + [v] * (width - len(r[k])) for r in rows]) for k, v in fill.items()}

    arguments = TrainingArguments(**_arguments(steps, folder))
    data = [{"input_ids": e.input_ids, "labels": e.labels, "attention_mask": [1] * len(e.input_ids)} for e in examples]
    return _train(Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate), PrinterCallback)


def kept(
    model: Any, examples: Any, steps: int, folder: Path, *, packing: bool
) -> tuple[list[tuple[float, float]], int]:
    """Train as :func:`bare` does, with the allocator set as in :func:`ours`."""
    from QEfficient.finetune.allocator import memory_kept

    with memory_kept():
        return bare(model, examples, steps, folder, packing=packing)


def trl(model: Any, examples: Any, steps: int, folder: Path, *, packing: bool) -> tuple[list[tuple[float, float]], int]:
    """Train as TRL's ``SFTTrainer`` does with examples that are tokens already."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    arguments = SFTConfig(
        **_arguments(steps, folder), max_length=LENGTH, packing=packing, bf16=False, gradient_checkpointing=False
    )
    data = Dataset.from_list([{"input_ids": e.input_ids} for e in examples])
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    return _train(trainer, PrinterCallback)


def _arguments(steps: int, folder: Path) -> dict[str, Any]:
    """Return what both peers are told."""
    import torch

    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "max_steps": steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "include_num_input_tokens_seen": "non_padding",
        "dataloader_pin_memory": False,
        "use_cpu": not torch.cuda.is_available(),
    }


def _train(trainer: Any, printer: Any) -> tuple[list[tuple[float, float]], int]:
    times: list[tuple[float, float]] = []
    trainer.pop_callback(printer)
    trainer.add_callback(clock(times))
    trainer.train()
    return times, trainer.state.num_input_tokens_seen


if __name__ == "__main__":
    main()
