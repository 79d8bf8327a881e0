# SPDX-License-Identifier: BSD-3-Clause
"""How fast one row decodes with a switchable adapter: PyTorch with PEFT, our programs, and what the memory allows.

A random base of Qwen2.5-0.5B's shape and a random LoRA of rank 16 on all seven projections are made, exported and compiled
(once: the folder is kept). All multiply the same numbers, in float32 where they are called fp32. Then all subjects take turns,
A B C A B C: one prompt, then single tokens. The last line is JSON.

Where they can be imported, onnxruntime-genai takes part, with the adapter baked in by its own builder, and llama.cpp, with its
LoRA. What is named with ``--skip`` stays out: a run of a few minutes may measure one precision.

    python benchmarks/decode.py --work DIR
"""

import gc
import importlib.util
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from genai_peer import open_genai
from llama_cpp_peer import LlamaCpp, write_adapter, write_base
from machine import machine, read_bytes_per_second
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from QEfficient.compile.program import compile_graph
from QEfficient.contract import MODEL_FILE, Manifest
from QEfficient.export.torch_to_onnx import export_graph
from QEfficient.export.weights import Checkpoint
from QEfficient.options import option, parse
from QEfficient.runtime.session import OrtSession

VOCAB = 151936
ALPHA, RANK = 32, 16


@dataclass(slots=True, kw_only=True)
class Options:
    """Measure prefill and decode of one row, side by side."""

    work: Path = option(help="Folder for the base, the adapter, the graph and the programs; kept for the next run.")
    layers: int = option(24, "Layers of the base.")
    checkpoint: str = option(
        "bfloat16",
        "How the base's file holds its weights: as nearly all are published, or drawn in float32.",
        choices=["bfloat16", "float32"],
    )
    prompt: int = option(128, "Tokens of the prompt.")
    tokens: int = option(64, "Tokens decoded in a turn.")
    turns: int = option(5, "Turns of each subject; figures are medians over them.")
    threads: int = option(2, "Threads of each subject.")
    pytorch: list[str] = option(
        ["sdpa", "eager"],
        "Ways to run PyTorch (sdpa, eager, compile); the first is what others are held to. Repeatable.",
    )
    skip: list[str] = option(
        [],
        "Peers that stay out: genai-fp32, genai-fp32-adapters, genai-int4, genai-int4-adapters, llama-Q4_0, llama-Q8_0. Repeatable.",
    )
    programs: list[str] = option(
        ["fp32", "int8", "int4", "int4-128"],
        "Programs: a precision, perhaps with its block size, perhaps on large pages (int4-128-large), perhaps without kernels of our own (int4-plain). Repeatable.",
    )


class Subject(Protocol):
    """Something that prefills and decodes."""

    name: str
    bytes_per_token: int

    def prefill(self, ids: np.ndarray) -> int:
        """Take the prompt into an empty cache; return the likeliest next token."""

    def step(self, token: int, position: int) -> int:
        """Take one token; return the likeliest next one."""


class Torch:
    """PyTorch with PEFT, float32, in one of its ways: ``"sdpa"``, ``"eager"`` or ``"compile"`` (of sdpa)."""

    def __init__(self, model: PeftModel, way: str) -> None:
        self.name = f"PyTorch + PEFT fp32, {way}"
        self.model, self.way = model, way
        self.forward: Any = torch.compile(model.forward, dynamic=True) if way == "compile" else model.forward
        tensors = {id(p): p.nbytes for p in model.parameters()}
        self.bytes_per_token = sum(tensors.values())
        self.cache: Any = None

    def prefill(self, ids: np.ndarray) -> int:
        """See :class:`Subject`."""
        self.model.get_base_model().set_attn_implementation("eager" if self.way == "eager" else "sdpa")
        self.cache = None
        return self._call(torch.from_numpy(ids))

    def step(self, token: int, position: int) -> int:
        """See :class:`Subject`."""
        return self._call(torch.tensor([[token]]))

    def _call(self, ids: torch.Tensor) -> int:
        with torch.inference_mode(self.way != "compile"), torch.no_grad():
            out = self.forward(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return int(out.logits[0, -1].argmax())


class Program:
    """A program of ours, with the adapter or without."""

    def __init__(self, name: str, session: OrtSession, adapter: str) -> None:
        self.name, self.session, self.adapter = name, session, adapter
        sizes = session.memory_bytes()
        model = session.manifest.files[MODEL_FILE]["bytes"]
        self.bytes_per_token = sizes["weights"] - model + (sizes["adapters"] if adapter != "base" else 0)

    def prefill(self, ids: np.ndarray) -> int:
        """See :class:`Subject`."""
        self.session.set_adapter(self.adapter)
        self.session.reset()
        return int(self.session.run(ids, np.arange(ids.shape[1])[None])[0, -1].argmax())

    def step(self, token: int, position: int) -> int:
        """See :class:`Subject`."""
        return int(self.session.run(np.array([[token]]), np.array([[position]]))[0, -1].argmax())


@dataclass
class Timings:
    """Seconds of a subject: one prefill and the median token for each turn."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def make_model(options: Options, dtype: str = "float32") -> tuple[Path, Path]:
    """Write the base, its weights in ``dtype``, and the adapter, once; return their folders."""
    base, adapter = options.work / "base", options.work / "adapter"
    if not (adapter / "adapter_config.json").is_file():
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=options.layers,
            num_attention_heads=14,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )
        model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
        model.save_pretrained(base)
        lora = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
        )
        get_peft_model(model, lora).save_pretrained(str(adapter))
    held = AutoConfig.from_pretrained(base).dtype
    if held != getattr(torch, dtype):
        raise SystemExit(f"{base} holds {held}, not {dtype}: give another folder for --work")
    return base, adapter


def open_programs(options: Options, model: PeftModel, base: Path, adapter: Path) -> list[Program]:
    """Export, compile and load what is asked for."""
    checkpoint = Checkpoint(base)
    graph = export_graph(model, options.work / "graph", adapter_name="default", checkpoint=checkpoint)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for spec in Manifest.read(graph).adapter:
        if spec.name.endswith(".scaling"):
            tensors[spec.name] = np.array(ALPHA / RANK, np.float32)
    programs = []
    for name in options.programs:
        precision, *how = name.split("-")
        blocks = next((int(h) for h in how if h.isdigit()), None)
        target = "onnxruntime-plain" if "plain" in how else "onnxruntime"
        folder = compile_graph(graph, target=target, precision=precision, block_size=blocks)
        session = OrtSession(folder, threads=options.threads, large_pages="large" in how)
        session.load_adapter("lora", tensors)
        session.allocate(1, options.prompt + options.tokens)
        programs += [Program(f"ours {name}", session, "lora"), Program(f"ours {name}, bare base", session, "base")]
    return programs


def open_llama(options: Options, base: Path, adapter: Path) -> list[LlamaCpp]:
    """Write and load the peer's models, if it can be imported."""
    wanted = [p for p in ("Q4_0", "Q8_0") if f"llama-{p}" not in options.skip]
    if not wanted or any(importlib.util.find_spec(name) is None for name in ("llama_cpp", "gguf")):
        return []
    folder = options.work / "gguf"
    if not (folder / "adapter.gguf").is_file():
        folder.mkdir(exist_ok=True)
        write_base(base, folder / "base.gguf")
        write_adapter(adapter, folder / "adapter.gguf", alpha=ALPHA)
    context = options.prompt + options.tokens
    return [LlamaCpp(folder, p, context=context, threads=options.threads) for p in wanted]


def measure(options: Options, subjects: list[Subject]) -> tuple[dict[str, Timings], list[float]]:
    """Let all subjects take turns; a first round only warms up."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, (1, options.prompt))
    data = np.ones(1 << 28, np.float32)
    timings = {s.name: Timings() for s in subjects}
    floor = []
    for turn in range(options.turns + 1):
        if turn:
            floor.append(1 / read_bytes_per_second(data, options.threads))
        for subject in subjects:
            start = time.perf_counter()
            token = subject.prefill(ids)
            prefill, steps, tokens = time.perf_counter() - start, [], [token]
            for position in range(
                options.prompt, options.prompt + (options.tokens if turn else min(3, options.tokens))
            ):
                start = time.perf_counter()
                token = subject.step(token, position)
                steps.append(time.perf_counter() - start)
                tokens.append(token)
            if turn:
                found = timings[subject.name]
                found.prefill.append(prefill)
                found.decode.append(float(np.median(steps)))
                found.tokens = tokens
    return timings, floor


def summarise(options: Options, subjects: list[Subject], timings: dict[str, Timings], floor: list[float]) -> list[Any]:
    """Return one row for each subject.

    Ratios to the first subject are medians of the ratios within each turn, and so are shares of the floor: a machine shared with others
    reads faster in one turn than in another.
    """
    first = timings[subjects[0].name]
    rows = []
    for subject in subjects:
        mine = timings[subject.name]
        limits = np.array(floor) * subject.bytes_per_token
        rows.append(
            {
                "subject": subject.name,
                "prefill_tokens_per_second": round(options.prompt / float(np.median(mine.prefill)), 1),
                "decode_tokens_per_second": round(1 / float(np.median(mine.decode)), 2),
                "prefill_ratio": round(float(np.median(np.array(first.prefill) / mine.prefill)), 2),
                "decode_ratio": round(float(np.median(np.array(first.decode) / mine.decode)), 2),
                "share_of_floor": round(float(np.median(limits / mine.decode)), 2),
                "megabytes_per_token": round(subject.bytes_per_token / 1e6),
                "same_tokens": next(
                    (i for i, (a, b) in enumerate(zip(first.tokens, mine.tokens, strict=True)) if a != b),
                    len(mine.tokens),
                ),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    heads = ("prefill tok/s", "decode tok/s", "x prefill", "x decode", "of floor", "MB/token", "same tokens")
    width = max(len(r["subject"]) for r in rows)
    print(" " * width, *heads, sep=" | ")
    for row in rows:
        name, *values = row.values()
        print(name.ljust(width), *(str(v).rjust(len(h)) for v, h in zip(values, heads, strict=True)), sep=" | ")


def main() -> None:
    """Run the benchmark."""
    options = parse(Options, sys.argv[1:], prog="benchmarks/decode.py")
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    base, adapter = make_model(options, options.checkpoint)
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(loaded, str(adapter)).eval()
    subjects: list[Subject] = [Torch(model, way) for way in options.pytorch]
    subjects += open_programs(options, model, base, adapter)
    context = options.prompt + options.tokens
    subjects += open_genai(options.work, base, adapter, skip=options.skip, threads=options.threads, context=context)
    subjects += open_llama(options, base, adapter)
    gc.collect()
    timings, floor = measure(options, subjects)
    rows = summarise(options, subjects, timings, floor)
    show(rows)
    read = [round(1e-9 / seconds, 1) for seconds in floor]
    print("memory reads GB/s, by turn:", *read)
    print(json.dumps({"rows": rows, "gigabytes_per_second": read, **machine(options)}))


if __name__ == "__main__":
    main()
