# SPDX-License-Identifier: BSD-3-Clause
"""A tiny base with a tokenizer of bytes and a chat template, adapters of it, and a real server in a process of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from QEfficient.runtime.requests import Request
from QEfficient.serve.preparing import Preparer, Wanted, prepare
from QEfficient.serve.registry import Registry
from QEfficient.serve.server import Server
from QEfficient.serve.start import build
from tests.tiny import SHAPE, lora, save_adapter, save_base

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
SPECIAL = ["<pad>", "<s>", "</s>"]


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are single bytes, so that most characters beyond ASCII take several."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def save_served(folder: Path) -> Path:
    """Write a base that can be served; return its folder."""
    base = save_base(folder, LlamaConfig(**{**SHAPE, "vocab_size": 260, "num_hidden_layers": 1}))
    save_tokenizer(base)
    return base


@dataclass
class Place:
    """A base folder and a folder of adapters."""

    base: Path
    adapters: Path

    def add(self, name: str, *, seed: int = 1, **fields: Any) -> Path:
        """Write one more adapter."""
        return save_adapter(self.base, self.adapters / name, seed=seed, scale=0.3, config=lora(**fields))


@dataclass
class Running:
    """A server in a process of its own."""

    process: "subprocess.Popen[str]"
    port: int
    log: Path
    lines: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "unused", **options: Any) -> openai.OpenAI:
        """Return OpenAI's own client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=600, **options)

    def connect(self) -> socket.socket:
        """Open a bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=600)

    def listens(self) -> bool:
        """Whether it has said where; `port` is that one then, the system's choice: one looked for before may be another's by now."""
        ports = [event["port"] for event in self.events() if event["event"] == "listening"]
        self.port = ports[0] if ports else self.port
        return bool(ports)

    def events(self) -> list[dict[str, Any]]:
        """Return what it has logged."""
        whole, _, _ = self.log.read_text().rpartition("\n")  # the last line may be half written
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]

    def stop(self) -> int:
        """Ask it to end, and wait for that."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=600)


class Here(Preparer):
    """Prepares in this process, which has the libraries already."""

    def __call__(self, wanted: Wanted) -> tuple[Path, Path | None]:
        """Prepare an adapter."""
        return prepare(wanted)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Write the base and two adapters, of different rank and targets."""
    folder = tmp_path_factory.mktemp("served")
    made = Place(save_served(folder / "base"), folder / "adapters")
    made.add("one", seed=1)
    made.add("two", seed=2, r=8, target_modules=["q_proj", "v_proj"])
    return made


@pytest.fixture(scope="session")
def start(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """Return what starts a server with more options; all are stopped at the end."""
    running: list[Running] = []

    def begin(*options: str) -> Running:
        log = tmp_path_factory.mktemp("log") / "server.log"
        command = [sys.executable, "-m", "QEfficient.cloud", "serve", str(place.base), "--port", "0"]
        command += ["--adapter", f"one={place.adapters / 'one'}", "--adapter", f"two={place.adapters / 'two'}"]
        command += ["--ctx-len", "256", "--threads", "1", "--allow-folder", str(place.adapters), *options]
        process = subprocess.Popen(command, stderr=log.open("w"), text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        made = Running(process, 0, log)
        running.append(made)
        end = time.monotonic() + 600
        while time.monotonic() < end:
            if process.poll() is not None:
                pytest.fail(f"the server ended: {log.read_text()}")
            if made.listens():
                return made
            time.sleep(0.1)
        pytest.fail("the server did not start")

    yield begin
    for one in running:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


@pytest.fixture(scope="session")
def served(start: Callable[..., Running]) -> Running:
    """Start the server that most tests share."""
    return start()


@pytest.fixture(scope="session")
def server(place: Place) -> Iterator[Server]:
    """Make a server without HTTP that knows five adapters."""
    names = ["one", "two", "three", "four", "five"]
    for seed, name in enumerate(names[2:], 3):
        place.add(name, seed=seed)
    made = build(
        str(place.base), {n: place.adapters / n for n in names}, slots=2, ctx_len=64, threads=1, large_pages=True
    )
    made.lanes.preparer = Here()
    yield made
    made.close()


@pytest.fixture
def registry(server: Server, place: Place) -> Iterator[Registry]:
    """Make a new registry on the server's engine, without bound, that knows three adapters."""
    server.engine.residents.max_bytes = None
    made = Registry(server.engine.residents, server.registry.source)
    for name in ("one", "two", "three"):
        made.register(name, place.adapters / name)
    yield made
    made.close()
    for name in server.engine.adapters:
        server.engine.unload_adapter(name)


def tokens(server: Server, version: str, prompt: Sequence[int] = (70, 71, 72)) -> list[int]:
    """Return what a version answers."""
    stream = server.engine.submit(Request(prompt_ids=prompt, adapter=version, max_new_tokens=6))
    assert stream.wait(600)
    return [t.id for t in stream.tokens]
