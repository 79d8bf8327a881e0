# SPDX-License-Identifier: BSD-3-Clause
"""A thousand adapters registered, room for fifty: what does it cost that most of them are not in memory?

Clients ask one after the other, each for an adapter drawn by Zipf's law, and compare every answer with what the adapter gave first. The same requests are
made with room for all adapters (and all of them in memory already), and with room for a few. The last line is JSON; the exit code is 1 if a
request was lost or wrong, or memory went beyond its bound.

    python -m benchmarks.registry --work DIR
"""

import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.machine import machine
from QEfficient.compile.program import compile_graph
from QEfficient.options import option, parse
from QEfficient.runtime.engine import Engine
from QEfficient.runtime.requests import Request
from QEfficient.serve.lanes import Lane, Lanes
from QEfficient.serve.loading import Loader, graph_for
from QEfficient.serve.registry import Registry

VOCAB = 1024


@dataclass(slots=True, kw_only=True)
class Options:
    """Measure a registry whose adapters do not all fit into memory."""

    work: Path = option(help="Folder for the base and the adapters; kept for the next run.")
    adapters: int = option(1000, "Adapters that are registered.")
    resident: int = option(50, "Adapters that fit into memory.")
    requests: int = option(1000, "Requests of a turn.")
    clients: int = option(32, "Clients that ask at a time.")
    exponent: float = option(1.0, "Of Zipf's law: the n-th adapter is asked for n**-exponent as often as the first.")
    hidden: int = option(512, "Width of the base.")
    layers: int = option(8, "Layers of the base.")
    rank: int = option(4, "Rank of the adapters.")
    prompt: int = option(32, "Tokens of a prompt.")
    tokens: int = option(32, "Tokens of an answer.")
    threads: int = option(1, "Threads of the engine.")
    turns: int = option(2, "Turns of each; figures are medians over them.")


def prepare(options: Options) -> tuple[Path, dict[str, Path]]:
    """Write the base and the adapters, once."""
    base, folder = options.work / "base", options.work / "adapters"
    names = {f"a{i:04}": folder / f"a{i:04}" for i in range(options.adapters)}
    if not (base / "config.json").is_file():
        torch.manual_seed(0)
        width = options.hidden
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=options.layers,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.1,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
    first, *others = names.values()
    if not first.is_dir():
        rank = options.rank
        lora = LoraConfig(
            r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
        )
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(str(first))
    rng, text = np.random.default_rng(0), (first / "adapter_config.json").read_text()
    tensors = load_file(first / "adapter_model.safetensors")
    for path in others:
        if not (path / "adapter_config.json").is_file():
            path.mkdir(parents=True, exist_ok=True)
            made = {n: rng.standard_normal(t.shape, np.float32) * np.float32(0.05) for n, t in tensors.items()}
            save_file(made, path / "adapter_model.safetensors", metadata={"format": "pt"})
            (path / "adapter_config.json").write_text(text)
    return base, names


class Run:
    """Clients of one registry.

    Args:
        engine: Where the adapters run.
        registry: Where they come from.
        options: How much.
    """

    def __init__(self, engine: Engine, registry: Registry, options: Options) -> None:
        self.engine, self.registry, self.options = engine, registry, options
        self.most_bytes = self.lost = self.wrong = 0
        self._lock = threading.Lock()

    def __call__(self, asked: Sequence[str], right: dict[str, list[int]]) -> dict[str, Any]:
        """Make all requests; return the figures."""
        before, evicted = _copy(self.registry), self.registry.residents.evictions
        waits: list[float] = []
        todo = iter(asked)
        start = time.perf_counter()
        threads = [
            threading.Thread(target=self._client, args=(todo, right, waits)) for _ in range(self.options.clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start
        loads = self.registry.counts.loads - before["loads"]
        self.lost += len(asked) - len(waits)
        return {
            "tokens_per_second": len(waits) * self.options.tokens / seconds,
            "hit_rate": (self.registry.counts.hits - before["hits"]) / len(asked),
            "loads": loads,
            "evictions": self.registry.residents.evictions - evicted,
            "load_ms": (self.registry.counts.load_seconds - before["load_seconds"]) / loads * 1e3 if loads else 0.0,
            "seconds_p50": float(np.percentile(waits, 50)),
            "seconds_p95": float(np.percentile(waits, 95)),
        }

    def _client(self, todo: Any, right: dict[str, list[int]], waits: list[float]) -> None:
        prompt = list(range(1, self.options.prompt + 1))
        while True:
            with self._lock:
                name = next(todo, None)
            if name is None:
                return
            begun = time.perf_counter()
            with self.registry.acquire(name, seconds=600) as lease:
                request = Request(prompt_ids=prompt, adapter=lease.version, max_new_tokens=self.options.tokens)
                answer = [token.id for token in self.engine.submit(request)]
            with self._lock:
                waits.append(time.perf_counter() - begun)
                self.wrong += right.setdefault(name, answer) != answer
                self.most_bytes = max(self.most_bytes, self.registry.residents.bytes)


def _copy(registry: Registry) -> dict[str, float]:
    counts = registry.counts
    return {"hits": counts.hits, "loads": counts.loads, "load_seconds": counts.load_seconds}


def draw(options: Options, turn: int) -> list[str]:
    """Return the adapters that are asked for."""
    weights = np.arange(1, options.adapters + 1, dtype=float) ** -options.exponent
    drawn = np.random.default_rng(turn).choice(options.adapters, options.requests, p=weights / weights.sum())
    return [f"a{i:04}" for i in drawn]


def main(argv: list[str]) -> int:
    """Run the benchmark."""
    options = parse(Options, argv, prog="benchmarks.registry")
    base, adapters = prepare(options)
    graph = graph_for(str(base), {})
    program = compile_graph(graph, ctx_len=options.prompt + options.tokens, mixed=True)
    engine = Engine(
        program,
        slots=8,
        ctx_len=options.prompt + options.tokens,
        queue_len=256,
        threads=options.threads,
        prefix_bytes=0,
    ).start()
    loader = Loader(Lanes(str(base), Lane(graph, engine)))
    registry = Registry(engine.residents, loader)
    for name, path in adapters.items():
        registry.register(name, path)
    registry.acquire("a0000").release()
    one = engine.residents.bytes
    right: dict[str, list[int]] = {}
    run = Run(engine, registry, options)
    figures: dict[str, list[dict[str, Any]]] = {"all": [], "few": []}
    first = [registry.acquire(name).release() for name in adapters]
    print(f"{len(first)} adapters of {one} bytes read and checked the first time: {_first(registry)}")
    for turn in range(options.turns):
        engine.residents.max_bytes = None
        for name in adapters:
            registry.acquire(name).release()
        figures["all"].append(run(draw(options, turn), right))
        run.most_bytes, engine.residents.max_bytes = 0, options.resident * one
        found = loader.tensors("one-more", adapters["a0000"], loader.digest(adapters["a0000"]))
        registry.residents.load("one-more", found[1] if found is not None else {})
        registry.residents.unload("one-more")  # until here the others were in memory; now no more than may be
        figures["few"].append(run(draw(options, turn), right))
    engine.close()
    registry.close()
    return _report(options, run, one, figures)


def _first(registry: Registry) -> str:
    return f"{registry.counts.load_seconds / registry.counts.loads * 1e3:.1f} ms each"


def _report(options: Options, run: Run, one: int, figures: dict[str, list[dict[str, Any]]]) -> int:
    median = {kind: {n: float(np.median([r[n] for r in rows])) for n in rows[0]} for kind, rows in figures.items()}
    ratio = [
        few["tokens_per_second"] / every["tokens_per_second"]
        for few, every in zip(figures["few"], figures["all"], strict=True)
    ]
    print(f"{'':20}{'all resident':>14}{f'{options.resident} resident':>14}")
    for name in median["all"]:
        print(f"{name:20}{median['all'][name]:14.2f}{median['few'][name]:14.2f}")
    bound = (options.resident + 1) * one  # while one comes, its own bytes are on top
    print(
        f"throughput, {options.resident} of {options.adapters} resident / all: {', '.join(f'{r:.2f}' for r in ratio)}"
    )
    print(f"adapters in memory: at most {run.most_bytes} bytes, bound {options.resident * one} and one that comes")
    print(f"requests lost: {run.lost}, wrong: {run.wrong}")
    whole = {"ratio": ratio, "median": median, "turns": figures, "lost": run.lost, "wrong": run.wrong}
    print(
        json.dumps({**whole, "most_bytes": run.most_bytes, "bound_bytes": options.resident * one, **machine(options)})
    )
    return int(bool(run.lost or run.wrong or run.most_bytes > bound))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
