# SPDX-License-Identifier: BSD-3-Clause
"""Fine-tuning next to the bare ``Trainer`` and TRL: tokens per second, share of peak and peak memory, each in a process of its own.

A Llama of Qwen2.5-0.5B's width cut to some layers, LoRA on all seven projections, random text. A run is who/data/type. "equal"
are examples of one length; "mixed" are mostly short ones, where padding costs. "kept" is the bare ``Trainer`` with the allocator
set as ours sets it (:mod:`QEfficient.finetune.allocator`). "autocast" is a bfloat16 base whose adapter's products are made in
bfloat16, too: an option of the peers; on a GPU ours does so by itself.

Speed is that of the median step times the real tokens of an average step. The share of peak is what had to be computed
(:mod:`flops`) in that time, of what a matrix product of the type reached in the same process. Where other jobs share the machine,
compare the processor time for a thousand tokens instead: it counts our own work only. Prints a table, then one JSON line.

    python benchmarks/finetune.py [--runs ours/equal/float32 --runs bare/equal/float32]
    python benchmarks/finetune.py --layers 24 --batch 16 --length 1024 --steps 20        # for a GPU
"""

import importlib.util
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from machine import machine

from QEfficient.options import option, parse

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

VOCAB, RANK, WARM_UP = 32000, 16, 2
RUNS = ["bare/equal/float32", "kept/equal/float32", "ours/equal/float32", "ours/equal/bfloat16"]
RUNS += ["bare/mixed/float32", "kept/mixed/float32", "ours/mixed/float32"]
RUNS += ["trl/equal/float32"] if importlib.util.find_spec("trl") else []


@dataclass(slots=True, kw_only=True)
class Options:
    """Measure trainings, side by side."""

    steps: int = option(8, "Optimizer steps of a run, after the warm-up.")
    layers: int = option(4, "Layers of the base.")
    batch: int = option(4, "Examples of a step.")
    length: int = option(256, "Tokens of the longest example.")
    recompute: bool = option(False, "Compute activations again in the backward pass.")
    threads: int = option(os.cpu_count() or 1, "Threads of PyTorch.")
    runs: list[str] = option(RUNS, "Who/data/type; repeatable.")
    one: str = option("", "Measure this run here, and print nothing but JSON.")


def main() -> None:
    """Measure each run in a process of its own, then print the table and the JSON line."""
    options = parse(Options, sys.argv[1:], prog="benchmarks/finetune.py")
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    given = [
        f"--{f.name}={getattr(options, f.name)}" for f in fields(options) if f.name not in ("runs", "one", "recompute")
    ]
    given += ["--recompute"] if options.recompute else []
    found = {}
    for run in options.runs:
        done = subprocess.run([sys.executable, __file__, f"--one={run}", *given], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{run}: {done.stderr}")
        found[run] = values = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{run:<24}{values['tokens_per_second']:>10,.0f} tokens/s{values['share_of_peak']:>8.1%} of peak"
            f"{values['peak_memory_mib']:>10,.0f} MiB",
            flush=True,
        )
    ratios = {}
    for name, a, b in pairs(found):
        wall = found[a]["tokens_per_second"] / found[b]["tokens_per_second"]
        work = found[b]["cpu_seconds_per_1000_tokens"] / found[a]["cpu_seconds_per_1000_tokens"]
        ratios[name] = {"tokens_per_second": wall, "cpu": work}
        print(f"{name:<46}{wall:>6.2f} x as fast, {work:.2f} x by processor time")
    print(json.dumps({"runs": found, "ratios": ratios, **machine(options)}))


def pairs(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return what is compared with what: ours with the peers on the same data in the same type, and types with each other."""
    named = {
        "bare": {"equal": "bare Trainer", "mixed": "bare Trainer, which pads"},
        "kept": {"equal": "bare Trainer with memory kept", "mixed": "bare Trainer with memory kept, which pads"},
        "trl": {"equal": "TRL's SFTTrainer", "mixed": "TRL's SFTTrainer"},
    }
    wanted = []
    for run in found:
        who, data, dtype = run.split("/")
        if who == "ours":
            wanted += [(f"{run} to {named[peer][data]}", run, f"{peer}/{data}/{dtype}") for peer in named]
            wanted += [
                (f"{run} to {named[peer][data]}, autocast", run, f"{peer}/{data}/autocast")
                for peer in named
                if dtype == "bfloat16"
            ]
            wanted += [(f"{run} to float32", run, f"ours/{data}/float32")] if dtype == "bfloat16" else []
    return [pair for pair in wanted if pair[2] in found]


def lengths(data: str, count: int, longest: int) -> list[int]:
    """Return the examples' lengths: all the same, or mostly short with some long ones."""
    draw = random.Random(0)
    if data == "equal":
        return [longest] * count
    short = longest // 16, longest // 4
    return [draw.randint(longest // 2, longest) if draw.random() < 0.25 else draw.randint(*short) for _ in range(count)]


def measure(run: str, options: Options) -> dict[str, Any]:
    """Train once and return the speed of the median step, its share of what is possible, and the peak memory."""
    import torch
    from finetune_trainers import TRAINERS, Work
    from flops import product_flops_per_second, training_flops

    from QEfficient.finetune.allocator import peak_memory_bytes
    from QEfficient.finetune.data import Example

    who, data, name = run.split("/")
    torch.set_num_threads(options.threads)
    dtype = torch.bfloat16 if name == "autocast" else getattr(torch, name)
    draw = random.Random(1)
    steps = options.steps + WARM_UP
    sizes = lengths(data, options.batch * steps * 6, options.length)
    rows = [[draw.randrange(3, VOCAB) for _ in range(n)] for n in sizes]
    model = make_model(options.layers, options.length, dtype)
    flops_per_token = training_flops(model, sizes) / sum(sizes)
    with tempfile.TemporaryDirectory() as folder:
        work = Work(
            model=model,
            examples=[Example(ids, list(ids)) for ids in rows],
            folder=Path(folder),
            batch=options.batch,
            length=options.length,
            steps=steps,
            packing=data == "mixed",
            autocast=name == "autocast",
            recompute=options.recompute,
        )
        trained = TRAINERS[who](work)
    tokens = trained.tokens / len(trained.times)
    wall, cpu = ([b[i] - a[i] for a, b in itertools.pairwise(trained.times[WARM_UP - 1 :])] for i in (0, 1))
    speed, memory = tokens / statistics.median(wall), peak_memory_bytes()
    gpu = torch.cuda.is_available()
    peak = product_flops_per_second(dtype, "cuda" if gpu else "cpu")
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "tokens_per_second": speed,
        "cpu_seconds_per_1000_tokens": statistics.median(cpu) / tokens * 1000,
        "peak_memory_mib": memory / 2**20,
        "flops_per_token": flops_per_token,
        "product_flops_per_second": peak,
        "share_of_peak": speed * flops_per_token / peak,
    }


def make_model(layers: int, length: int, dtype: Any) -> Any:
    """Return a random base with a LoRA on its seven projections."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
    shape |= {"vocab_size": VOCAB, "num_hidden_layers": layers, "max_position_embeddings": max(length, 2048)}
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        base = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **shape))
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base.to(dtype), lora)


if __name__ == "__main__":
    main()
