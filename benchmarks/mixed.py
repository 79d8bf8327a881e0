# SPDX-License-Identifier: BSD-3-Clause
"""Eight slots with eight adapters against eight slots with one: our engine, and PyTorch with PEFT's ``adapter_names``.

A random base of Qwen2.5-0.5B's shape, eight rows: seven LoRAs of ranks 4 to 64, two of them on fewer modules, and the base.
Every request's tokens are compared with what it gets alone. The last line is JSON.

    python benchmarks/mixed.py --work DIR
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode import VOCAB, make_model
from machine import machine
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from QEfficient.compile.program import compile_graph
from QEfficient.contract import Manifest
from QEfficient.export.torch_to_onnx import export_graph
from QEfficient.export.weights import Checkpoint
from QEfficient.options import option, parse
from QEfficient.peft.adapters import Adapter, fit
from QEfficient.runtime.engine import Engine
from QEfficient.runtime.requests import Request

KINDS = {
    "r4": (4, 0),
    "r8": (8, 0),
    "r8-qv": (8, 1),
    "r16": (16, 0),
    "r16-attention": (16, 2),
    "r32": (32, 0),
    "r64": (64, 0),
}
TARGETS: tuple[Any, ...] = ("all-linear", ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"])


@dataclass(slots=True, kw_only=True)
class Options:
    """Measure decoding of eight rows."""

    work: Path = option(help="Folder for the base, the graph and the program; kept for the next run.")
    layers: int = option(24, "Layers of the base.")
    prompt: int = option(32, "Tokens of each prompt.")
    tokens: int = option(32, "Tokens decoded in a turn.")
    turns: int = option(3, "Turns; figures are medians over them.")
    threads: int = option(2, "Threads of each subject.")
    precision: str = option("int4", "Precision of the program.")
    block_size: int | None = option(None, "Weights that share a scale; default: as `qefficient compile`.")
    target: str = option("onnxruntime", "What to compile for; onnxruntime-plain: without kernels of our own.")
    pytorch: bool = option(True, "Measure PyTorch with PEFT too.")


def load(options: Options) -> PeftModel:
    """Return the base with all adapters on it, random in every tensor."""
    base, _ = make_model(options)  # type: ignore[arg-type]
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, (rank, kind) in reversed(KINDS.items()):
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=TARGETS[kind], task_type="CAUSAL_LM", init_lora_weights=False
        )
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = PeftModel(model, config, adapter_name=name)
    found: PeftModel = model.eval()
    return found


def run(engine: Engine, prompts: np.ndarray, names: list[str], tokens: int) -> tuple[list[list[int]], float]:
    """Submit all, and return the tokens of each and the tokens per second of the steps that decode."""
    before = engine.stats()
    requests = [
        Request(prompt_ids=p.tolist(), adapter=n, max_new_tokens=tokens) for p, n in zip(prompts, names, strict=True)
    ]
    streams = [engine.submit(r) for r in requests]
    made = [[t.id for t in s] for s in streams]
    after = engine.stats()
    seconds = after.full_seconds - before.full_seconds
    return made, (after.full_tokens - before.full_tokens) / seconds if seconds else 0.0


def pytorch(model: PeftModel, prompts: np.ndarray, names: list[str], tokens: int) -> float:
    """Return PEFT's tokens per second of a mixed batch, decoding only."""
    mixed = ["__base__" if n == "base" else n for n in names]
    ids, cache, seconds = torch.from_numpy(prompts), None, []
    with torch.inference_mode():
        for _ in range(tokens):
            start = time.perf_counter()
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, adapter_names=mixed)
            ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            seconds.append(time.perf_counter() - start)
    return len(names) / float(np.median(seconds[1:]))


def main() -> None:
    """Run the benchmark."""
    options = parse(Options, sys.argv[1:], prog="benchmarks/mixed.py")
    torch.set_num_threads(options.threads)
    model = load(options)
    graph = export_graph(
        model, options.work / "graph", adapter_name="r64", checkpoint=Checkpoint(options.work / "base")
    )
    program = compile_graph(
        graph, target=options.target, precision=options.precision, block_size=options.block_size, mixed=True
    )
    names = [*KINDS, "base"]
    prompts = np.random.default_rng(0).integers(0, VOCAB, (8, options.prompt))
    wholes = {"8 different": names, "8 x r16": ["r16"] * 8, "8 x r64": ["r64"] * 8, "8 x base": ["base"] * 8}
    rates: dict[str, list[float]] = {name: [] for name in [*wholes, "one at a time"]}
    context = options.prompt + options.tokens
    with (
        Engine(program, slots=8, ctx_len=context, threads=options.threads) as engine,
        Engine(program, slots=1, ctx_len=context, threads=options.threads) as single,
    ):
        for name in KINDS:
            tensors = fit(Adapter.from_model(model, name), Manifest.read(graph))
            engine.load_adapter(name, tensors)
            single.load_adapter(name, tensors)
        alone, _ = run(single, prompts, names, options.tokens)
        for turn in range(options.turns + 1):
            for name, adapters in wholes.items():
                made, rate = run(engine, prompts, adapters, options.tokens)
                rates[name] += [rate] if turn else []
                if (
                    name == "8 different" and not turn
                ):  # later turns find their prompts in the cache, which `alone` did not
                    together = made
            rates["one at a time"] += [run(single, prompts, names, 8)[1]] if turn else []
    same = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(alone, together, strict=True)
    ]
    if options.pytorch:
        rates["PyTorch + PEFT fp32, adapter_names"] = [pytorch(model, prompts, names, 5)]
    median = {name: float(np.median(r)) for name, r in rates.items()}
    for name, rate in median.items():
        print(f"{name:36} {rate:8.1f} tok/s   8 different / this: {median['8 different'] / rate:5.2f}")
    print("tokens as alone, of", options.tokens, dict(zip(names, same, strict=True)))
    print(json.dumps({"tokens_per_second": median, "turns": rates, "same": same, **machine(options)}))


if __name__ == "__main__":
    main()
