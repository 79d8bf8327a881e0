# SPDX-License-Identifier: BSD-3-Clause
"""Speed and memory of PyTorch + PEFT and of the program, measured in turns in the same process.

Knows no verdict. Both engines get the same tokens and as many threads as they choose. Turns alternate, so that what else
the machine does hits both; a value is the median of its repetitions, a ratio is taken turn by turn and has an interval.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from QEfficient.contract import BASE
from QEfficient.runtime.session import Session
from QEfficient.testing.engines import Engine, ProgramEngine, PyTorchEngine, fast_attention
from QEfficient.testing.floor import Machine
from QEfficient.testing.loading import Loading
from QEfficient.testing.ratios import interval
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import Measurement
from QEfficient.testing.workload import Tokens

_PREFILL = 128
_DECODE = 24
_REPEATS = 3
_SWITCHES = 8
_ROWS = (2, 4, 8)
_ROW_STEPS = 3
_PAIRS = 8
_PAIR_STEPS = 3
_FEWEST_PAIRS = 4
_SUBJECT_SECONDS = 4.0
_BUDGET_SECONDS = 20.0

Times = dict[tuple[str, str], list[list[float]]]
"""Seconds by engine and kind (prefill, first, step): a list for each turn."""


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
    with fast_attention(reference.model):
        pytorch = PyTorchEngine(reference)
        program = ProgramEngine(session, len(tokens) + decode)
        engines: dict[str, Engine] = {"pytorch": pytorch, "program": program}
        found: list[Measurement] = []
        begin = time.perf_counter()
        for index, subject in enumerate((BASE, *names)):
            if index > 1 and time.perf_counter() - begin > _BUDGET_SECONDS:
                break
            notify(subject)
            found += _measure_subject(engines, subject, tokens, decode)
            if subject != BASE:
                found.append(_overhead(program, subject, tokens))
        for name, engine in engines.items():
            for subject in names[:1]:
                found.append(_summary(name, subject, "switch_ms", _switches(engine, subject, tokens)))
                found += _batches(name, engine, subject, _short(tokens))
        pytorch.close()
    found += _memory(reference, session, len(tokens) + decode, names)
    return found + _floors(reference, found, names, len(tokens))


def _measure_subject(engines: dict[str, Engine], subject: str, tokens: Tokens, decode: int) -> list[Measurement]:
    """Measure in turns, after a short prompt to warm up; at least a few, whatever the time."""
    times: Times = {}
    for engine in engines.values():
        engine.select(subject)
        engine.step(engine.start(_short(tokens)))
    begin = time.perf_counter()
    for _ in range(_REPEATS):
        for name, engine in engines.items():
            engine.select(subject)
            for key, prompt in (("prefill", tokens), ("first", _short(tokens))):
                times.setdefault((name, key), []).append([_timed(engine.start, prompt)[1]])
        if time.perf_counter() - begin > _SUBJECT_SECONDS / 2:
            break
    _decode(engines, subject, tokens, decode, times)
    steps = [[float(np.median(turn)) for turn in times[name, "step"]] for name in ("pytorch", "program")]
    found = [m for name in engines for m in _metrics(name, subject, times, len(tokens))]
    return [*found, Measurement("program", subject, "speedup", *interval(*steps))]


def _decode(engines: dict[str, Engine], subject: str, tokens: Tokens, decode: int, times: Times) -> None:
    """Add short turns of decoding: the shorter, the more alike is what the machine does beside the two of a pair."""
    last = dict.fromkeys(engines, 0)
    for name, engine in engines.items():
        engine.select(subject)
        last[name] = engine.start(_short(tokens))
    begin = time.perf_counter()
    for turn in range(max(1, decode // _PAIR_STEPS)):
        for name, engine in engines.items():
            engine.select(subject)
            last[name], steps = _steps(engine, last[name])
            times.setdefault((name, "step"), []).append(steps)
        if turn + 1 >= _FEWEST_PAIRS and time.perf_counter() - begin > _SUBJECT_SECONDS / 2:
            break


def _steps(engine: Engine, token: int) -> tuple[int, list[float]]:
    steps = []
    for _ in range(_PAIR_STEPS):
        token, seconds = _timed(engine.step, token)
        steps.append(seconds)
    return token, steps


def _timed(call: Callable[[Any], int], argument: Any) -> tuple[int, float]:
    begin = time.perf_counter()
    token = call(argument)
    return token, time.perf_counter() - begin


def _metrics(engine: str, subject: str, times: Times, tokens: int) -> list[Measurement]:
    whole, first, steps = (np.concatenate(times[engine, key]) for key in ("prefill", "first", "step"))
    p50, p90, p99 = (float(v) * 1e3 for v in np.percentile(steps, (50, 90, 99)))
    return [
        _summary(engine, subject, "prefill_tokens_per_second", [tokens / t for t in whole]),
        _summary(engine, subject, "first_token_ms", [t * 1e3 for t in first]),
        _summary(engine, subject, "decode_tokens_per_second", [1 / t for t in steps]),
        Measurement(engine, subject, "token_latency_p50_ms", p50),
        Measurement(engine, subject, "token_latency_p90_ms", p90),
        Measurement(engine, subject, "token_latency_p99_ms", p99),
    ]


def _summary(engine: str, subject: str, metric: str, values: list[float]) -> Measurement:
    return Measurement(engine, subject, metric, float(np.median(values)), float(min(values)), float(max(values)))


def _short(tokens: Tokens) -> Tokens:
    return tokens[: max(1, len(tokens) // 4)]


def _overhead(engine: Engine, name: str, tokens: Tokens) -> Measurement:
    """Return how much longer a token takes with an adapter than without, as a share: pairs of turns, the order changing."""
    times: dict[str, list[float]] = {BASE: [], name: []}
    begin = time.perf_counter()
    for pair in range(_PAIRS + 1):
        for subject in (BASE, name) if pair % 2 else (name, BASE):
            engine.select(subject)
            token = engine.step(engine.start(tokens[:2]))  # the first token pays for the switch
            seconds = float(np.median(_steps(engine, token)[1]))
            if pair:  # the first pair warms up
                times[subject].append(seconds)
        if pair >= _FEWEST_PAIRS and time.perf_counter() - begin > _SUBJECT_SECONDS / 2:
            break
    return Measurement("program", name, "overhead", *(v - 1 for v in interval(times[name], times[BASE])))


def _switches(engine: Engine, name: str, tokens: Tokens) -> list[float]:
    """Return how long it takes to go from the base to an adapter and give its first token, in milliseconds."""
    engine.select(BASE)
    token = engine.start(_short(tokens))
    taken: list[float] = []
    most = min(_SWITCHES, 3 * len(tokens) // 8)  # each takes two positions of the cache
    while len(taken) < most and sum(taken) < 1e3 * _SUBJECT_SECONDS / 5:
        engine.select(BASE)
        token = engine.step(token)
        begin = time.perf_counter()
        engine.select(name)
        token = engine.step(token)
        taken.append((time.perf_counter() - begin) * 1e3)
    return taken


def _batches(name: str, engine: Engine, subject: str, prompt: Tokens) -> list[Measurement]:
    """Return tokens per second over all rows, by number of rows; larger ones are left out where they take too long."""
    found: list[Measurement] = []
    engine.select(subject)
    begin = time.perf_counter()
    for rows in _ROWS:
        if found and time.perf_counter() - begin > _SUBJECT_SECONDS / 2:
            break
        engine.resize(rows)
        token = engine.step(engine.start(prompt[:2]))
        speeds = []
        for _ in range(_ROW_STEPS):
            token, seconds = _timed(engine.step, token)
            speeds.append(rows / seconds)
        found.append(_summary(name, subject, f"throughput_{rows}_tokens_per_second", speeds))
    engine.resize(1)
    return found


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


def of_loading(loadings: Mapping[str, Loading], found: list[Measurement], subject: str) -> list[Measurement]:
    """Return what loading took, and what of it is none of the parts: an engine's own, and weights that it laid out once more.

    Args:
        loadings: By engine.
        found: The parts of the memory among them.
        subject: Of the measurements.
    """
    parts = {(m.engine, m.metric): m.value for m in found}
    made = []
    for engine, loading in loadings.items():
        known = sum(parts.get((engine, f"memory_bytes.{part}"), 0.0) for part in ("weights", "adapters"))
        made.append(Measurement(engine, subject, "load_seconds", loading.seconds))
        made.append(Measurement(engine, subject, "memory_bytes.rest", max(0.0, loading.grown - known)))
    return made


def _floors(reference: Reference, found: list[Measurement], names: tuple[str, ...], tokens: int) -> list[Measurement]:
    """Return what the machine can do, and what part of it each engine reaches: 1 is the floor itself."""
    machine, subject = Machine.measured(), names[0] if names else BASE
    values = {(m.engine, m.metric): m.value for m in found if m.subject == subject}
    table = reference.model.get_input_embeddings().weight  # read row by row, unless it is the output projection too
    tied = bool(getattr(reference.model.config, "tie_word_embeddings", False))
    everything = sum(p.numel() for p in reference.model.parameters())
    once = everything - table.numel() * (1 if tied else 2)  # a prompt takes the projection of its last token alone
    best = [
        Measurement("machine", BASE, "bandwidth_bytes_per_second", machine.bandwidth),
        Measurement("machine", BASE, "peak_operations_per_second", machine.peak),
    ]
    for engine in ("pytorch", "program"):
        read = values[engine, "memory_bytes.weights"] * (1 if tied else 1 - table.numel() / everything)
        floors = {
            "decode": 1 / machine.decode_seconds(int(read)),
            "prefill": tokens / machine.prefill_seconds(once, tokens),
        }
        for kind, floor in floors.items():
            reached = values[engine, f"{kind}_tokens_per_second"] / floor
            best.append(Measurement(engine, subject, f"{kind}_share_of_floor", reached))
    return best
