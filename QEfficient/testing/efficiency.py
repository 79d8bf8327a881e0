# SPDX-License-Identifier: BSD-3-Clause
"""Speed and memory of PyTorch + PEFT and of the program, measured in turns in the same process.

Knows no verdict. Both engines get the same tokens, one row, and as many threads as they choose. Turns alternate, so that
what else the machine does hits both; a value is the median of its repetitions.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from QEfficient.contract import BASE
from QEfficient.runtime.prefill import prefill
from QEfficient.runtime.session import Session
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import Measurement
from QEfficient.testing.workload import Tokens

_PREFILL = 128
_DECODE = 24
_REPEATS = 5
_SWITCHES = 8
_FEWEST_STEPS = 4
_SUBJECT_SECONDS = 5.0
_BUDGET_SECONDS = 20.0


class Engine(Protocol):
    """One way to run the model."""

    def select(self, subject: str) -> None:
        """Choose the adapter, or the base."""

    def start(self, prompt: Tokens) -> int:
        """Read a prompt into an empty cache and return the next token."""

    def step(self, token: int) -> int:
        """Read one token and return the next."""


class PyTorchEngine:
    """transformers and PEFT, with the fastest attention that the model has, cache on."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._active = contextlib.ExitStack()
        self._cache: Any = None

    def select(self, subject: str) -> None:
        """Choose the adapter, or the base."""
        self._active.close()
        self._active.enter_context(self._reference.selected(subject))

    def close(self) -> None:
        """Leave the model as it was found."""
        self._active.close()

    def start(self, prompt: Tokens) -> int:
        """Read a prompt into an empty cache and return the next token."""
        self._cache = None
        return self._forward(prompt)

    def step(self, token: int) -> int:
        """Read one token and return the next."""
        return self._forward(np.array([token], dtype=np.int64))

    def _forward(self, tokens: Tokens) -> int:
        with torch.no_grad():
            out = self._reference.model(
                input_ids=torch.from_numpy(tokens)[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache = out.past_key_values
        return int(out.logits[0, -1].argmax())


class ProgramEngine:
    """A session of the program."""

    def __init__(self, session: Session, ctx_len: int) -> None:
        self._session = session
        self._position = 0
        session.allocate(1, ctx_len)

    def select(self, subject: str) -> None:
        """Choose the adapter, or the base."""
        self._session.set_adapter(subject)

    def start(self, prompt: Tokens) -> int:
        """Read a prompt into an empty cache and return the next token."""
        self._session.reset()
        self._position = len(prompt)
        return int(prefill(self._session, [prompt], chunk_len=len(prompt))[0].argmax())

    def step(self, token: int) -> int:
        """Read one token and return the next."""
        logits = self._session.run(np.array([[token]]), np.array([[self._position]]))
        self._position += 1
        return int(logits[0, -1].argmax())


def measure(
    reference: Reference,
    session: Session,
    names: tuple[str, ...],
    *,
    max_positions: int = 0,
    notify: Callable[[str], None] = lambda subject: None,
) -> list[Measurement]:
    """Measure the base and adapters, as many as fit into the time allowed: at least the base and one adapter.

    Args:
        reference: PyTorch + PEFT.
        session: The program's session, adapters loaded.
        names: The adapters.
        max_positions: Longest context of the base; 0 if it has none.
        notify: Called with each subject before it is measured.
    """
    room = max_positions or _PREFILL + _DECODE
    decode = min(_DECODE, room // 4)
    tokens = np.resize(reference.workload.rows[0], min(_PREFILL, room - decode))
    with _fast_attention(reference.model):
        pytorch = PyTorchEngine(reference)
        engines: dict[str, Engine] = {"pytorch": pytorch, "program": ProgramEngine(session, len(tokens) + decode)}
        found: list[Measurement] = []
        begin = time.perf_counter()
        for index, subject in enumerate((BASE, *names)):
            if index > 1 and time.perf_counter() - begin > _BUDGET_SECONDS:
                break
            notify(subject)
            found += _measure_subject(engines, subject, tokens, decode)
        for engine, value in engines.items():
            found += [_summary(engine, name, "switch_ms", _switches(value, name, tokens)) for name in names[:1]]
        pytorch.close()
    return found + _memory(reference, session, len(tokens) + decode, names)


def _measure_subject(engines: dict[str, Engine], subject: str, tokens: Tokens, decode: int) -> list[Measurement]:
    """Measure in turns, after a short prompt to warm up; at least twice, whatever the time."""
    for engine in engines.values():
        engine.select(subject)
        engine.step(engine.start(_short(tokens)))
    times: dict[tuple[str, str], list[float]] = {}
    begin = time.perf_counter()
    for repeat in range(_REPEATS):
        for name, engine in engines.items():
            engine.select(subject)
            for key, values in _turn(engine, tokens, decode).items():
                times.setdefault((name, key), []).extend(values)
        if repeat and time.perf_counter() - begin > _SUBJECT_SECONDS:
            break
    return [m for name in engines for m in _metrics(name, subject, times, len(tokens))]


def _turn(engine: Engine, tokens: Tokens, decode: int) -> dict[str, list[float]]:
    """Read a long prompt, then a short one, then decode; a slow engine decodes less."""
    begin = time.perf_counter()
    engine.start(tokens)
    whole = time.perf_counter() - begin
    begin = time.perf_counter()
    token = engine.start(_short(tokens))
    first = time.perf_counter() - begin
    steps: list[float] = []
    while len(steps) < decode and (len(steps) < _FEWEST_STEPS or sum(steps) < _SUBJECT_SECONDS / 2):
        begin = time.perf_counter()
        token = engine.step(token)
        steps.append(time.perf_counter() - begin)
    return {"prefill": [whole], "first": [first], "step": steps}


def _metrics(engine: str, subject: str, times: dict[tuple[str, str], list[float]], tokens: int) -> list[Measurement]:
    steps = np.array(times[engine, "step"])
    p50, p90, p99 = (float(v) * 1e3 for v in np.percentile(steps, (50, 90, 99)))
    return [
        _summary(engine, subject, "prefill_tokens_per_second", [tokens / t for t in times[engine, "prefill"]]),
        _summary(engine, subject, "first_token_ms", [t * 1e3 for t in times[engine, "first"]]),
        _summary(engine, subject, "decode_tokens_per_second", [1 / t for t in steps]),
        Measurement(engine, subject, "token_latency_p50_ms", p50),
        Measurement(engine, subject, "token_latency_p90_ms", p90),
        Measurement(engine, subject, "token_latency_p99_ms", p99),
    ]


def _summary(engine: str, subject: str, metric: str, values: list[float]) -> Measurement:
    return Measurement(engine, subject, metric, float(np.median(values)), float(min(values)), float(max(values)))


def _short(tokens: Tokens) -> Tokens:
    return tokens[: max(1, len(tokens) // 4)]


def _switches(engine: Engine, name: str, tokens: Tokens) -> list[float]:
    """Return how long it takes to go from the base to an adapter and give its first token, in milliseconds."""
    engine.select(BASE)
    token = engine.start(_short(tokens))
    taken: list[float] = []
    most = min(_SWITCHES, 3 * len(tokens) // 8)  # each takes two positions of the cache
    while len(taken) < most and sum(taken) < 1e3 * _SUBJECT_SECONDS / 4:
        engine.select(BASE)
        token = engine.step(token)
        begin = time.perf_counter()
        engine.select(name)
        token = engine.step(token)
        taken.append((time.perf_counter() - begin) * 1e3)
    return taken


def _memory(reference: Reference, session: Session, ctx_len: int, names: tuple[str, ...]) -> list[Measurement]:
    """Return bytes by part; PyTorch's cache is what the same positions take."""
    adapters, weights = 0, 0
    for key, tensor in reference.model.named_parameters():
        if any(f".{name}." in f"{key}." for name in names):
            adapters += tensor.nbytes
        else:
            weights += tensor.nbytes
    ours = session.memory_bytes()
    pytorch = {"weights": weights, "adapters": adapters, "cache": ours["cache"]}
    subject = names[0] if names else BASE
    return [
        Measurement(engine, subject, f"memory_bytes.{part}", float(parts[part]))
        for engine, parts in (("pytorch", pytorch), ("program", ours))
        for part in pytorch
    ]


@contextlib.contextmanager
def _fast_attention(model: Any) -> Any:
    """Let PyTorch use its fused attention while it is timed; a model that has none stays as it is."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("sdpa")
    except (ValueError, AttributeError, ImportError):
        pass
    try:
        yield
    finally:
        model.set_attn_implementation(before)
