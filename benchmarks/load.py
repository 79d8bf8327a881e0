# SPDX-License-Identifier: BSD-3-Clause
"""Many streaming clients against a real server while adapters come and go: is every answer right, and is every request answered?

What each request gives alone is asked first, with the log probabilities of the likeliest tokens: an answer is right if its tokens are the same. Where one
token differs, the distributions that it was drawn from tell the reason: alike to the fifth digit, and the draw fell between them (sums
of floats in another order, counted as ``redrawn``), or not alike, and the answer is ``wrong``. In all answers they are compared up to there.
 Then 1 request in 20 is cancelled and 1 in 50 is malformed; adapters are unloaded and loaded, one is
replaced by another content under its name all the time, the memory does not hold them all, and the file of one is corrupted on the way. The last
line is JSON; the exit code is 1 if anything went wrong.

    python -m benchmarks.load --work DIR
"""

import asyncio
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil

from benchmarks.machine import machine
from QEfficient.options import option, parse
from tests.serve.conftest import Place, Running, save_served

PROMPTS = [
    f"{words} {n}"
    for n in range(4)
    for words in ("hello", "a sum of", "€uro and 漢字", "the system says: be brief." * 3)
]
SEEDS = (0, 1)
ALIKE = 1e-4
"""Log probabilities that differ by less are of the same distribution."""
MALFORMED: list[bytes] = [
    b"{",
    b'{"model": "one", "prompt": 5}',
    b'{"prompt": "x"}',
    b'{"model": "one", "prompt": "x", "temperature": 9}',
    b'{"model": "one", "prompt": "x", "max_tokens": 100000}',
    b'{"model": "../one", "prompt": "x"}',
    b"\xff\xfe\x00",
]
VICTIM, SWAPPED = "victim", "swapped"


@dataclass(slots=True, kw_only=True)
class Options:
    """Load a server of a tiny model, and hold every answer against what its request gives alone."""

    work: Path = option(help="Folder for the base and the adapters; made new.")
    seconds: float = option(300.0, "How long.")
    clients: int = option(64, "Clients that stream at a time.")
    tokens: int = option(24, "Tokens of each answer.")


@dataclass
class Seen:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    tokens: int = 0
    redrawn: int = 0
    difference: float = 0.0


@dataclass
class Answer:
    """Text, and for every token the log probabilities of the likeliest ones at its place."""

    tokens: list[str] = field(default_factory=list)
    likeliest: list[list[float]] = field(default_factory=list)


def compare(got: Answer, alone: Answer) -> tuple[bool, float]:
    """Return whether the tokens are the same, and by how much the distributions differ at most, up to the first other token."""
    same = [a == b for a, b in zip(got.tokens, alone.tokens, strict=False)]
    until = same.index(False) + 1 if False in same else len(same)
    pairs = zip(got.likeliest[:until], alone.likeliest[:until], strict=False)
    differ = [abs(x - y) if len(a) == len(b) else float("inf") for a, b in pairs for x, y in zip(a, b, strict=False)]
    return got.tokens == alone.tokens, max(differ, default=0.0)


def prepare(work: Path) -> Place:
    """Write a base and adapters, each a good part of what the server may hold."""
    shutil.rmtree(work, ignore_errors=True)
    place = Place(save_served(work / "base"), work / "adapters")
    for seed, name in enumerate(["one", "two", "three", "four", "five", "six", SWAPPED, "other", VICTIM], 1):
        place.add(name, seed=seed, r=64)
    return place


def start(place: Place, log: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Start a server that holds about half of the adapters."""
    command = [
        sys.executable,
        "-m",
        "QEfficient.cloud",
        "serve",
        str(place.base),
        "--port",
        "0",
        "--ctx-len",
        "192",
    ]
    command += [
        "--queue-len",
        "512",
        "--receive-seconds",
        "600",
        "--threads",
        "1",
        "--adapter-memory-mb",
        "1",
        "--prefix-memory-mb",
        "4",
    ]
    command += ["--allow-folder", str(place.adapters)]
    for folder in sorted(place.adapters.iterdir()):
        if folder.name != "other":
            command += ["--adapter", f"{folder.name}={folder}"]
    process = subprocess.Popen(command, stderr=log.open("wb"), env={**os.environ, "OMP_NUM_THREADS": "1"})
    server = Running(process, 0, log)
    while process.poll() is None:
        if server.listens():
            return process, server.port
        time.sleep(0.2)
    raise SystemExit(f"the server did not start: {log.read_text()}")


class Load:
    """The clients of one server.

    Args:
        client: OpenAI's.
        place: Where the adapters lie.
        options: How much.
    """

    def __init__(self, client: openai.AsyncOpenAI, place: Place, options: Options) -> None:
        self.client, self.place, self.options = client, place, options
        self.names = ["base", *sorted(p.name for p in place.adapters.iterdir() if p.name != "other")]
        self.alone: dict[tuple[str, str, int], Answer] = {}
        self.seen = Seen()
        self.end = 0.0
        self.corrupted = False

    async def learn(self) -> None:
        """Ask for everything once, one request at a time."""
        await self._adapter("load", lora_name="other", lora_path=str(self.place.adapters / "other"))
        for name in [*self.names, "other"]:
            for prompt in PROMPTS:
                for seed in SEEDS:
                    self.alone[name, prompt, seed] = await self._ask(name, prompt, seed) or Answer()
        await self._adapter("unload", lora_name="other")
        self.seen = Seen()

    async def run(self) -> int:
        """Load the server; return how many clients still wait long after the end."""
        self.end = time.monotonic() + self.options.seconds
        tasks = [asyncio.create_task(self._client(i)) for i in range(self.options.clients)]
        tasks += [asyncio.create_task(work()) for work in (self._come_and_go, self._swap, self._corrupt)]
        done, pending = await asyncio.wait(tasks, timeout=self.options.seconds + 300)
        for task in done:
            task.result()
        return len(pending)

    async def _ask(self, name: str, prompt: str, seed: int, *, pieces: int = 0) -> Answer | None:
        """Return the answer; ``None`` if it was cancelled after some pieces."""
        begun, answer = time.perf_counter(), Answer()
        stream = await self.client.completions.create(
            model=name,
            prompt=prompt,
            max_tokens=self.options.tokens,
            temperature=0.8,
            seed=seed,
            stream=True,
            logprobs=5,
        )
        async with stream:
            count = 0
            async for chunk in stream:
                if not count:
                    self.seen.first_token.append(time.perf_counter() - begun)
                count += 1
                told = chunk.choices[0].logprobs
                if told is not None:
                    answer.tokens += told.tokens
                    self.seen.tokens += len(told.tokens)  # a piece holds several where they are one character
                    answer.likeliest += [sorted(top.values()) for top in told.top_logprobs]
                if count == pieces:
                    return None
        return answer

    async def _client(self, number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < self.end:
            name, prompt, seed = draw.choice(self.names), draw.choice(PROMPTS), draw.choice(SEEDS)
            chance = draw.random()
            try:
                if chance < 0.02:
                    await self._malformed(draw.choice(MALFORMED))
                elif chance < 0.07:
                    if await self._ask(name, prompt, seed, pieces=draw.randint(1, 4)) is None:
                        self.seen.counts["cancelled"] += 1
                else:
                    self._judge(name, prompt, seed, await self._ask(name, prompt, seed))
            except openai.NotFoundError:
                self.seen.counts["unloaded at that moment (404)"] += 1
            except openai.UnprocessableEntityError as e:
                self.seen.counts["corrupted adapter (422)"] += 1
                if name != VICTIM or not self.corrupted:
                    self.seen.errors.append(f"{name}: {e}")
            except Exception as e:  # whatever else there is should not be
                self.seen.errors.append(f"{name}: {type(e).__name__}: {e}")

    def _judge(self, name: str, prompt: str, seed: int, answer: Answer | None) -> None:
        self.seen.counts["complete"] += 1
        names = (name, "other") if name == SWAPPED else (name,)
        results = [compare(answer or Answer(), self.alone[n, prompt, seed]) for n in names]
        same, differ = min(results, key=lambda r: (r[1], not r[0]))
        self.seen.difference = max(self.seen.difference, differ)
        self.seen.redrawn += not same and differ < ALIKE
        if differ >= ALIKE:
            self.seen.wrong.append(
                f"{name} {prompt!r} {seed}: {answer}, alone {[self.alone[n, prompt, seed] for n in names]}"
            )

    async def _malformed(self, body: bytes) -> None:
        reader, writer = await asyncio.open_connection(self.client.base_url.host, self.client.base_url.port)
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
        writer.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        status, _, answer = (await reader.read()).decode().partition("\r\n\r\n")
        writer.close()
        self.seen.counts["malformed, refused"] += 1
        if not status.startswith("HTTP/1.1 4") or not json.loads(answer)["error"]["message"]:
            self.seen.errors.append(f"{body!r}: {status} {answer}")

    async def _come_and_go(self) -> None:
        """Unload an adapter and load it again."""
        while time.monotonic() < self.end:
            for name in ("two", "three", "four"):
                await self._adapter("unload", lora_name=name)
                await asyncio.sleep(0.02)
                await self._adapter("load", lora_name=name, lora_path=str(self.place.adapters / name))
                self.seen.counts["unloaded and loaded"] += 1
                await asyncio.sleep(0.3)

    async def _swap(self) -> None:
        """Let a name mean another content, again and again."""
        folders = (self.place.adapters / "other", self.place.adapters / SWAPPED)
        while time.monotonic() < self.end:
            for folder in folders:
                await self._adapter("load", lora_name=SWAPPED, lora_path=str(folder), load_inplace=True)
                self.seen.counts["replaced"] += 1
                await asyncio.sleep(0.4)

    async def _corrupt(self) -> None:
        """A third on the way, cut the file of one adapter; then try to load it."""
        await asyncio.sleep(self.options.seconds / 3)
        self.corrupted = True
        weights = self.place.adapters / VICTIM / "adapter_model.safetensors"
        aside = weights.with_suffix(".cut")
        aside.write_bytes(weights.read_bytes()[:-100])
        aside.replace(weights)
        while time.monotonic() < self.end:
            try:
                await self._adapter("load", lora_name="again", lora_path=str(weights.parent))
                self.seen.errors.append("a corrupted adapter was loaded")
            except openai.UnprocessableEntityError:
                self.seen.counts["corrupted adapter, not loaded"] += 1
            await asyncio.sleep(1)

    async def _adapter(self, verb: str, **body: Any) -> None:
        await self.client.post(f"/{verb}_lora_adapter", body=body, cast_to=str)


async def drive(port: int, process: psutil.Process, place: Place, options: Options) -> dict[str, Any]:
    """Run the load; return what was seen, and what the server holds in the end."""
    memory: list[float] = []

    async def watch() -> None:
        while True:
            await asyncio.sleep(options.seconds / 40)
            memory.append(process.memory_info().rss / 2**20)

    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1",
        api_key="unused",
        max_retries=0,
        timeout=600,
    ) as client:
        load = Load(client, place, options)
        await load.learn()
        watcher = asyncio.create_task(watch())
        unanswered = await load.run()
        watcher.cancel()
        for _ in range(600):
            state = await client.get("/adapters", cast_to=dict)
            running = sum(a["running"] for a in state["adapters"])
            if not (state["engine"]["active"] or state["engine"]["waiting"] or running):
                break
            await asyncio.sleep(0.1)
    seen, quarter = load.seen, len(memory) // 4
    early, late = statistics.mean(memory[quarter : 2 * quarter]), statistics.mean(memory[-quarter:])
    times = sorted(seen.first_token)
    return {
        "clients": options.clients,
        "seconds": options.seconds,
        **dict(sorted(seen.counts.items())),
        "wrong": seen.wrong[:5],
        "redrawn": seen.redrawn,
        "largest_difference": seen.difference,
        "unanswered": unanswered,
        "errors": seen.errors[:5],
        "left_over": {"slots": state["engine"]["active"], "leases": running},
        "memory_mib": {
            "second_quarter": round(early, 1),
            "last_quarter": round(late, 1),
            "largest": round(max(memory), 1),
        },
        "memory_flat": late < 1.03 * early,
        "tokens_per_second": round(seen.tokens / options.seconds, 1),
        "first_piece_seconds": {f"p{p}": round(times[len(times) * p // 100], 3) for p in (50, 95, 99)},
    }


def main(argv: list[str]) -> int:
    """Run the benchmark."""
    options = parse(Options, argv, prog="benchmarks.load")
    place = prepare(options.work)
    process, port = start(place, options.work / "server.log")
    try:
        outcome = asyncio.run(drive(port, psutil.Process(process.pid), place, options))
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=300)
    text = (options.work / "server.log").read_text()
    evictions = sum(
        json.loads(line)["event"] == "adapter resident" for line in text.splitlines() if line.startswith("{")
    )
    outcome |= {"adapter_loads": evictions, "exit_code": code, "tracebacks": text.count("Traceback")}
    outcome["passed"] = (
        not (outcome["wrong"] or outcome["unanswered"] or outcome["errors"] or code or outcome["tracebacks"])
        and outcome["memory_flat"]
        and not any(outcome["left_over"].values())
    )
    for name, value in outcome.items():
        print(f"{name:34} {value}")
    print(json.dumps({**outcome, **machine(options)}, ensure_ascii=False))
    return int(not outcome["passed"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
