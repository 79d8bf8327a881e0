# SPDX-License-Identifier: BSD-3-Clause
"""Faults planted into a graph's folder, and into a session that runs it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.testing.faults import scale_weight


@dataclass(frozen=True)
class GraphFault:
    """A planted fault of a folder and the checks, any of which names it rightly."""

    name: str
    checks: tuple[str, ...]
    plant: Callable[[Path], Any]


@dataclass(frozen=True)
class SessionFault:
    """A session made wrong and the checks, any of which names it rightly."""

    name: str
    checks: tuple[str, ...]
    make: Callable[[Any], Any]


def exported(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    """Return what changes the tensors of adapter ``one`` where they lie in a graph's folder."""

    def plant(folder: Path) -> None:
        path = folder / "adapters" / "one.safetensors"
        with safe_open(str(path), framework="np") as f:
            metadata = f.metadata()
        tensors = {k: v.copy() for k, v in load_file(path).items()}
        change(tensors)
        save_file(tensors, path, metadata=metadata)

    return plant


def _swap(folder: Path) -> None:
    one, two = (folder / "adapters" / f"{n}.safetensors" for n in ("one", "two"))
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)


def _scalings(tensors: dict[str, np.ndarray]) -> None:
    for key in [k for k in tensors if k.endswith(".scaling")]:
        tensors[key] = np.asarray(tensors[key] * np.float32(1.5))


def _one_scaling(tensors: dict[str, np.ndarray]) -> None:
    key = next(k for k in sorted(tensors) if k.endswith(".scaling"))
    tensors[key] = np.asarray(tensors[key] * np.float32(1.5))


def _layers(tensors: dict[str, np.ndarray]) -> None:
    for key in [k for k in tensors if ".layers.0." in k]:
        other = key.replace(".layers.0.", ".layers.1.")
        tensors[key], tensors[other] = tensors[other], tensors[key]


def _module_zero(tensors: dict[str, np.ndarray]) -> None:
    key = next(k for k in sorted(tensors) if "lora_B" in k)
    tensors[key] = np.zeros_like(tensors[key])


def _half_precision(tensors: dict[str, np.ndarray]) -> None:
    for key in tensors:
        tensors[key] = tensors[key].astype(np.float16).astype(np.float32)


_TENSORS = ("graph.tensors",)
GRAPH_FAULTS = (
    GraphFault("exported adapters swapped", _TENSORS, _swap),
    GraphFault("alpha changed after the export", _TENSORS, exported(_scalings)),
    GraphFault("one module's scaling changed", _TENSORS, exported(_one_scaling)),
    GraphFault("exported layers swapped", _TENSORS, exported(_layers)),
    GraphFault("exported module zeroed", _TENSORS, exported(_module_zero)),
    GraphFault("exported adapter rounded to float16", _TENSORS, exported(_half_precision)),
    GraphFault("exported adapter truncated", _TENSORS, lambda g: (g / "adapters" / "one.safetensors").write_bytes(b"00")),
    GraphFault("base weight scaled", ("graph.integrity", "graph.prefill"), lambda g: scale_weight(g, "layers.1.mlp.up_proj.weight")),
    GraphFault("one number of a base weight", ("graph.integrity",), lambda g: scale_weight(g, "layers.0.mlp.down_proj.weight", elements=slice(9, 10))),
    GraphFault("a norm scaled", ("graph.integrity", "graph.prefill"), lambda g: scale_weight(g, "layers.0.input_layernorm.weight")),
    GraphFault("embedding corrupted", ("graph.integrity", "graph.prefill"), lambda g: scale_weight(g, "embed_tokens.weight")),
)  # fmt: skip
"""Faults of an exported folder."""


class Wrapped:
    """A session; what a fault does not replace goes to the healthy one."""

    def __init__(
        self, session: Any, run: Callable[[Any, Any, Any], Any] | None = None, **methods: Callable[..., Any]
    ) -> None:
        self._session, self._run, self._methods = session, run, methods
        self.memory: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name in self._methods:
            return lambda *args: self._methods[name](self, *args)
        return getattr(self._session, name)

    def run(self, ids: Any, positions: Any) -> Any:
        """Run, with the fault if it is one of running."""
        return self._run(self, ids, positions) if self._run else self._session.run(ids, positions)


def _session(
    name: str, checks: str, run: Callable[[Any, Any, Any], Any] | None = None, **methods: Callable[..., Any]
) -> SessionFault:
    return SessionFault(name, tuple(f"graph.{c}" for c in checks.split()), lambda s: Wrapped(s, run, **methods))


def _logits(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any, Any, Any], Any]:
    return lambda s, ids, at: change(s._session.run(ids, at).copy())


def _decode_only(
    ids: Callable[[Any], Any] = lambda x: x, at: Callable[[Any], Any] = lambda x: x
) -> Callable[[Any, Any, Any], Any]:
    return lambda s, i, p: s._session.run(ids(i), at(p)) if i.shape[1] == 1 else s._session.run(i, p)


def _poke(logits: np.ndarray) -> np.ndarray:
    logits[..., 7] += 1e-3 * np.ptp(logits)
    return logits


def _cache(pattern: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any, Any, Any], Any]:
    def run(s: Any, ids: Any, at: Any) -> Any:
        logits = s._session.run(ids, at)
        for name, state in s._session._states.items():
            if re.search(pattern, name):
                state[...] = change(state)
        return logits

    return run


def _forget(s: Any, ids: Any, at: Any) -> Any:
    if ids.shape[1] > 1:
        s._session.reset()
    return s._session.run(ids, at)


def _window(s: Any, ids: Any, at: Any) -> Any:
    if at.max() > 100:
        for state in s._session._states.values():
            state[:, :, :50] = 0
    return s._session.run(ids, at)


def _last_lost(s: Any, ids: Any, at: Any) -> Any:
    logits = s._session.run(ids, at)
    for state in s._session._states.values():
        state[:, :, int(at.max())] = 0
    return logits


def _once(s: Any, name: str) -> None:
    if "set" not in s.memory:
        s._session.set_adapter(name)
    s.memory["set"] = True


def _late(s: Any, name: str) -> None:
    s._session.set_adapter(s.memory.get("next", name))
    s.memory["next"] = name


def _drift(s: Any, ids: Any, at: Any) -> Any:
    s.memory["n"] = s.memory.get("n", 0.0) + 1e-6
    return s._session.run(ids, at) + np.float32(s.memory["n"])


_LOGITS = "prefill chunked decode ragged"
SESSION_FAULTS = (
    _session("one logit off", _LOGITS, _logits(_poke)),
    _session("logits scaled", _LOGITS, _logits(lambda x: x * np.float32(1.01))),
    _session("logits in float16", _LOGITS, _logits(lambda x: x.astype(np.float16).astype(np.float32))),
    _session("logits in bfloat16", _LOGITS, _logits(lambda x: (x.view(np.uint32) & 0xFFFF0000).view(np.float32))),
    _session("logits not finite", _LOGITS, _logits(lambda x: x * np.float32(np.nan))),
    _session("vocabulary shifted by one", _LOGITS, _logits(lambda x: np.roll(x, 1, axis=-1))),
    _session("rows in another order", "ragged greedy_batch neighbours", _logits(lambda x: x[::-1])),
    _session("rows averaged", "ragged neighbours", _logits(lambda x: x * np.float32(0.99) + np.float32(0.01) * x.mean(axis=0, keepdims=True))),
    _session("chunk forgets the cache", "chunked", _forget),
    _session("decode one position late", "decode", _decode_only(at=lambda p: p + 1)),
    _session("decode one position early", "decode", _decode_only(at=lambda p: p - 1)),
    _session("decode of another token", "decode", _decode_only(ids=lambda i: (i + 1) % 128)),
    _session("prompt's first token lost", _LOGITS, lambda s, i, p: s._session.run(np.where(p == 0, 5, i), p)),
    _session("keys shifted", "decode layers", _cache("past_key", lambda x: np.roll(x, 1, axis=-1))),
    _session("values of another head", "decode layers", _cache("past_value", lambda x: x[:, ::-1].copy())),
    _session("cache in float16", "layers decode", _cache("past", lambda x: x.astype(np.float16).astype(np.float32))),
    _session("last layer's cache scaled", "layers decode", _cache(r"\.1$", lambda x: x * np.float32(1.02))),
    _session("cache of the newest token lost", "decode layers", _last_lost),
    _session("a window that the base does not have", "long", _window),
    _session("switch ignored", "switching effect", set_adapter=_once),
    _session("switch one call late", "switching effect prefill", set_adapter=_late),
    _session("always the base", "effect", set_adapter=lambda s, name: s._session.set_adapter("base")),
    _session("always the other adapter", "effect", set_adapter=lambda s, name: s._session.set_adapter("two")),
    _session("drifts from call to call", "switching", _drift),
)  # fmt: skip
"""Faults of running."""
