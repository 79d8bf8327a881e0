# SPDX-License-Identifier: BSD-3-Clause
"""Faults of batches whose rows have different adapters, planted into an engine before it is given adapters and requests.

Most change which adapter a call takes for a row; those that change tensors load a second, changed adapter for mixed calls alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from QEfficient.contract import BASE
from QEfficient.runtime.engine import Engine

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class MixedFault:
    """A planted fault and the names of the checks, any of which names it rightly."""

    name: str
    checks: tuple[str, ...]
    plant: Callable[[Engine], None]


def _is_mixed(adapters: Sequence[str]) -> bool:
    return len(set(adapters)) > 1


def _running(change: Callable[[Any, int, Any, Any, list[str]], Any]) -> Callable[[Engine], None]:
    """Return what replaces the calls of an engine's session; ``change`` is given the sound call first."""

    def plant(engine: Engine) -> None:
        run = engine._session.run_slots
        engine._session.run_slots = lambda first, ids, at, adapters: change(run, first, ids, at, list(adapters))  # type: ignore[method-assign]

    return plant


def _choosing(choose: Callable[[list[str]], list[str]]) -> Callable[[Engine], None]:
    """Return what lets mixed calls take other adapters."""
    return _running(lambda run, first, ids, at, a: run(first, ids, at, choose(a) if _is_mixed(a) else a))


def _twins(change: Callable[[str, Tensors, dict[str, Tensors]], Tensors]) -> Callable[[Engine], None]:
    """Return what lets mixed calls take changed tensors; ``change`` is given all that was loaded before, by version."""

    def plant(engine: Engine) -> None:
        session, held = engine._session, dict[str, Tensors]()
        load, unload, run = session.load_adapter, session.unload_adapter, session.run_slots

        def loaded(name: str, given: Any) -> None:
            load(name, given)
            load(f"{name}~", change(name, {k: np.array(v) for k, v in given.items()}, held))
            held[name] = {k: np.array(v) for k, v in given.items()}

        def unloaded(name: str) -> None:
            unload(name)
            unload(f"{name}~")

        def ran(first: int, ids: Any, at: Any, adapters: Sequence[str]) -> Any:
            mixed = _is_mixed(adapters)
            return run(first, ids, at, [f"{a}~" if mixed and a != BASE and a[-1] != "~" else a for a in adapters])

        session.load_adapter, session.unload_adapter, session.run_slots = loaded, unloaded, ran  # type: ignore[method-assign]

    return plant


def _each(tensors: Tensors, part: str, change: Callable[[str, np.ndarray], Any]) -> Tensors:
    return {k: np.asarray(change(k, v), v.dtype) if part in k else v for k, v in tensors.items()}


def _last_rank_lost(name: str, tensors: Tensors, held: dict[str, Tensors]) -> Tensors:
    return _each(tensors, "lora_A", lambda k, v: np.concatenate([v[:-1], 0 * v[-1:]]))


def _neighbours_rank(name: str, tensors: Tensors, held: dict[str, Tensors]) -> Tensors:
    other = next(iter(held.values()), tensors)
    return _each(tensors, "lora_A", lambda k, v: np.concatenate([other[k][-1:], v[1:]]))


def _others_scaling(name: str, tensors: Tensors, held: dict[str, Tensors]) -> Tensors:
    other = next(iter(held.values()), tensors)
    return _each(tensors, ".scaling", lambda k, v: other[k])


def _old_version(name: str, tensors: Tensors, held: dict[str, Tensors]) -> Tensors:
    return next((t for n, t in held.items() if n.split("@")[0] == name.split("@")[0]), tensors)


def _one_module_lost(name: str, tensors: Tensors, held: dict[str, Tensors]) -> Tensors:
    last = max(k for k in tensors if "lora_B" in k)
    return _each(tensors, last, lambda k, v: 0 * v)


def _base_adapted(adapters: list[str]) -> list[str]:
    other = next(a for a in adapters if a != BASE)
    return [other if a == BASE else a for a in adapters]


def _first_only(adapters: list[str]) -> list[str]:
    first = next(a for a in adapters if a != BASE)
    return [a if a == first else BASE for a in adapters]


def _keeps_first(engine: Engine) -> None:
    """Let every row keep the adapter of the request that sat there first."""
    seen: dict[int, str] = {}

    def change(run: Any, first: int, ids: Any, at: Any, adapters: list[str]) -> Any:
        if ids.shape[1] == 1:
            adapters = [seen.setdefault(first + i, a) for i, a in enumerate(adapters)]
        return run(first, ids, at, adapters)

    _running(change)(engine)


def _list_not_moved(engine: Engine) -> None:
    """Let a request that moves into a free row take the adapter of the one that left."""
    order: list[str] = []

    def change(run: Any, first: int, ids: Any, at: Any, adapters: list[str]) -> Any:
        if first == 0 and ids.shape[1] == 1:
            del order[len(adapters) :]
            order.extend(adapters[len(order) :])
            adapters = list(order)
        return run(first, ids, at, adapters)

    _running(change)(engine)


def _call_before(engine: Engine) -> None:
    """Run a mixed call with the adapters of the last one that had as many rows."""
    last: dict[int, list[str]] = {}

    def change(run: Any, first: int, ids: Any, at: Any, adapters: list[str]) -> Any:
        if _is_mixed(adapters):
            used, last[len(adapters)] = last.get(len(adapters), adapters), adapters
            return run(first, ids, at, used)
        return run(first, ids, at, adapters)

    _running(change)(engine)


def _prompt_of_base(run: Any, first: int, ids: Any, at: Any, adapters: list[str]) -> Any:
    """Read a prompt with the base while others decode."""
    return run(first, ids, at, [BASE] if first and ids.shape[1] > 1 else adapters)


def _last_late(run: Any, first: int, ids: Any, at: Any, adapters: list[str]) -> Any:
    """Give the last of several rows the position before."""
    if len(adapters) > 1:
        at = np.array(at)
        at[-1] -= 1
    return run(first, ids, at, adapters)


def _answers_swapped(run: Any, first: int, ids: Any, at: Any, adapters: list[str]) -> Any:
    logits = run(first, ids, at, adapters)
    return logits[::-1] if _is_mixed(adapters) else logits


def _rounded(run: Any, first: int, ids: Any, at: Any, adapters: list[str]) -> Any:
    logits = run(first, ids, at, adapters)
    return (
        (np.ascontiguousarray(logits).view(np.uint32) & 0xFFFF0000).view(np.float32) if _is_mixed(adapters) else logits
    )


def _neighbours_heard(run: Any, first: int, ids: Any, at: Any, adapters: list[str]) -> Any:
    """Let every row of a mixed call hear a tenth of the row before it."""
    logits = run(first, ids, at, adapters)
    return np.float32(0.9) * logits + np.float32(0.1) * np.roll(logits, 1, axis=0) if _is_mixed(adapters) else logits


def _unloaded_is_base(engine: Engine) -> None:
    """Give the rows of an adapter that was unloaded meanwhile the base."""

    def change(run: Any, first: int, ids: Any, at: Any, adapters: list[str]) -> Any:
        known = engine.residents.names
        return run(first, ids, at, [a if a.split("@")[0] in known else BASE for a in adapters])

    _running(change)(engine)


def _newest(engine: Engine) -> None:
    """Let requests that run go on with the newest version of their adapter."""

    def change(run: Any, first: int, ids: Any, at: Any, adapters: list[str]) -> Any:
        names = engine.residents.names
        now = [engine.residents.find(n).version if (n := a.split("@")[0]) in names else a for a in adapters]
        return run(first, ids, at, now)

    _running(change)(engine)


def _not_copied(engine: Engine) -> None:
    """Move a request into a free row without its cache."""
    engine._session.copy_row = lambda source, target, length: None  # type: ignore[method-assign]


def _copied_short(engine: Engine) -> None:
    """Move a request into a free row without its newest position."""
    copy = engine._session.copy_row
    engine._session.copy_row = lambda source, target, length: copy(source, target, length - 1)  # type: ignore[method-assign]


def _filling_lost(engine: Engine) -> None:
    """Leave a prompt that is being read where it is when the rows before it move up."""
    batch, leave = engine._batch, engine._batch.leave

    def left(row: int) -> Any:
        filling, batch.filling = batch.filling, None
        try:
            return leave(row)
        finally:
            batch.filling = filling

    batch.leave = left  # type: ignore[method-assign]


def _restoring(change: Callable[[Any, Callable[..., int], Any, int, str, Any], int]) -> Callable[[Engine], None]:
    """Let ``change(prefixes, restore, session, row, adapter, tokens)`` copy kept prefixes into rows."""

    def plant(engine: Engine) -> None:
        if (kept := engine._batch.prefixes) is not None:
            kept.restore = partial(change, kept, kept.restore)  # type: ignore[method-assign]

    return plant


def _any_prefix(kept: Any, restore: Callable[..., int], session: Any, row: int, adapter: str, tokens: Any) -> int:
    """Begin a prompt with what another adapter left of it."""
    others = sorted({key[0] for key in kept._kept}, key=lambda other: other == adapter)
    return next((n for other in others if (n := restore(session, row, other, tokens))), 0)


def _prefix_short(_: Any, restore: Callable[..., int], session: Any, row: int, adapter: str, tokens: Any) -> int:
    """Begin a prompt with a copy that lacks its last position."""
    count = restore(session, row, adapter, tokens)
    if count:
        for state in session._states.values():
            state[row, :, count - 1] = 0
    return count


_MIXED = ("program.mixed",)
MIXED_FAULTS = (
    MixedFault("rows' adapters exchanged", _MIXED, _choosing(lambda a: a[::-1])),
    MixedFault("base's row gets an adapter", _MIXED, _choosing(_base_adapted)),
    MixedFault("of several adapters only the first acts", _MIXED, _choosing(_first_only)),
    MixedFault("adapters of the call before", _MIXED, _call_before),
    MixedFault("a row keeps its first adapter", _MIXED, _keeps_first),
    MixedFault("who moves takes the adapter of who left", _MIXED, _list_not_moved),
    MixedFault("last rank masked out", _MIXED, _twins(_last_rank_lost)),
    MixedFault("a rank of the neighbour let in", _MIXED, _twins(_neighbours_rank)),
    MixedFault("scaling of another row's adapter", _MIXED, _twins(_others_scaling)),
    MixedFault("one module left out of the mix", _MIXED, _twins(_one_module_lost)),
    MixedFault("update not seen by mixed calls", _MIXED, _twins(_old_version)),
    MixedFault("running requests get the new version", _MIXED, _newest),
    MixedFault("rows of an unloaded adapter get the base", _MIXED, _unloaded_is_base),
    MixedFault("prompt read with the base", _MIXED, _running(_prompt_of_base)),
    MixedFault("last row one position early", _MIXED, _running(_last_late)),
    MixedFault("answers go to another request", _MIXED, _running(_answers_swapped)),
    MixedFault("a row hears its neighbour", _MIXED, _running(_neighbours_heard)),
    MixedFault("mixed calls rounded to bfloat16", _MIXED, _running(_rounded)),
    MixedFault("who moves loses the cache", _MIXED, _not_copied),
    MixedFault("who moves loses the newest position", _MIXED, _copied_short),
    MixedFault("prompt being read does not move along", _MIXED, _filling_lost),
    MixedFault("prefix of another adapter", _MIXED, _restoring(_any_prefix)),
    MixedFault("prefix without its last position", _MIXED, _restoring(_prefix_short)),
)
"""Faults of mixed batches."""
