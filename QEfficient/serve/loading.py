# SPDX-License-Identifier: BSD-3-Clause
"""From an adapter's folder to tensors that the engine takes, by way of the checks of ``qefficient test``."""

import json
import logging
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy.typing as npt
from peft import LoraConfig, PeftConfig

from QEfficient.errors import AdapterMismatchError, ArtifactError, ConfigError, QEffError, UnsupportedError
from QEfficient.export.lift import lift, plain
from QEfficient.export.torch_to_onnx import export_graph
from QEfficient.export.weights import Checkpoint
from QEfficient.peft.adapters import WEIGHTS_FILE, Adapter, check_name, read_config, resolve
from QEfficient.peft.loading import checkpoint_folder, read_base_config
from QEfficient.peft.unloaded import export_adapters, skeleton_of
from QEfficient.runtime.residents import Residents
from QEfficient.serve.entries import Verdict
from QEfficient.serve.lanes import Lanes
from QEfficient.serve.logs import log
from QEfficient.serve.preparing import content_digest, content_key
from QEfficient.store import cache_root, is_local
from QEfficient.testing.adapter_stage import examine
from QEfficient.testing.report import Outcome
from QEfficient.testing.selection import Selection

Array = npt.NDArray[Any]

_MOST_SCALINGS = 64


class Loader:
    """Reads, checks and fits adapters of one base.

    Args:
        lanes: Where they may go.
        most_bytes: Larger files are refused before they are read.
    """

    def __init__(self, lanes: Lanes, *, most_bytes: int = 1 << 34) -> None:
        self.base, self._lanes = lanes.base, lanes
        self._config = read_base_config(self.base)
        self._most_bytes = most_bytes
        self._scalings: dict[str, dict[str, float] | None] = {}

    def fetch(self, place: str | Path) -> Path:
        """Return an adapter's folder, downloaded from the Hub if need be.

        Raises:
            AdapterNotFoundError: It is not where it should be.
        """
        return resolve(place)

    def digest(self, folder: Path) -> str:
        """Return the identity of an adapter's tensors and configuration.

        Raises:
            ArtifactError: It has no safetensors file, or one that is larger than allowed.
        """
        file = folder / WEIGHTS_FILE
        if not file.is_file():
            pickled = file.with_suffix(".bin")
            hint = f"; {pickled.name} is a pickle, which is not loaded" if pickled.is_file() else ""
            raise ArtifactError(f"the adapter has no {WEIGHTS_FILE}{hint}")
        if (size := file.stat().st_size) > self._most_bytes:
            raise ArtifactError(f"{WEIGHTS_FILE} has {size} bytes, at most {self._most_bytes} are allowed")
        return content_digest(folder)

    def examine(self, name: str, folder: Path) -> Verdict:
        """Ask the checks of ``qefficient test`` that need no model run."""
        try:
            digest = self.digest(folder)
            found = examine(name, folder, self.base, self._config, Selection())
        except QEffError as e:
            return Verdict(str(e), (), "")
        failed = [r.message for r in found.results if r.outcome is Outcome.FAIL]
        warned = tuple(r.message for r in found.results if r.outcome is Outcome.WARN)
        refused = str(found.error) if found.error is not None else " ".join(failed)
        return Verdict(refused, warned, digest)

    def tensors(self, name: str, folder: Path, digest: str) -> tuple[Residents, dict[str, Array]] | None:
        """Return what an engine takes, and which; ``None``: it must be prepared first.

        Raises:
            ArtifactError: The files are no longer those that had ``digest``.
        """
        for lane in self._lanes:
            if (found := lane.prepared(content_key(digest))) is not None:
                return lane.engine.residents, lane.fitted(found)
        adapter = Adapter.load(folder, name)
        if self.digest(folder) != digest:
            raise ArtifactError(f"the files of adapter {name!r} changed while they were read; load it again")
        scalings = self._scalings_of(adapter)
        if scalings is None:
            return None
        whole = Adapter(name, adapter.config, adapter.tensors, scalings)
        for lane in self._lanes:
            with suppress(AdapterMismatchError):
                return lane.engine.residents, lane.fitted(whole)
        return None

    def prepare(self, name: str, folder: Path, digest: str) -> None:
        """Make ready an adapter whose file alone is not enough, or which needs a graph of its own.

        Raises:
            QEffError: As :meth:`Lanes.prepare`.
        """
        self._lanes.prepare(content_key(digest), name, folder)

    def tidy(self) -> bool:
        """Close engines without adapters; return whether there were any."""
        return self._lanes.close_empty()

    def evict(self) -> bool:
        """Close the engine that was idle for longest; return whether one was idle."""
        return self._lanes.evict()

    def _scalings_of(self, adapter: Adapter) -> dict[str, float] | None:
        """Return an adapter's scalings, ``None`` if it has more than matrices of linear layers."""
        fields = {k: v for k, v in plain(adapter.config.to_dict()).items() if k != "base_model_name_or_path"}
        key = json.dumps(fields, sort_keys=True)
        if key not in self._scalings:  # most adapters of a base share their configuration
            if len(self._scalings) >= _MOST_SCALINGS:
                self._scalings.pop(next(iter(self._scalings)))
            skeleton = skeleton_of(self.base, {adapter.name: adapter})
            self._scalings[key] = lift(skeleton, adapter.name).scalings if skeleton is not None else None
        return self._scalings[key]


def check_given(adapters: Mapping[str, str | Path]) -> None:
    """Refuse to start with adapters on this machine that are not there, or whose configuration cannot be read.

    Those of the Hub may be out of reach for a while; and what is wrong with tensors is found out before their first use.

    Raises:
        ConfigError: Names the first; or a name cannot be one.
    """
    for name, path in adapters.items():
        check_name(name)
        if not (is_local(path) or Path(path).exists()):
            continue
        try:
            read_config(resolve(path))
        except QEffError as e:
            raise ConfigError(f"--adapter {name}={path}: {e}; give an adapter that PEFT saved, or leave it out") from e


def graph_for(base: str, adapters: Mapping[str, str | Path]) -> Path:
    """Export the graph that serves a base: LoRA on every linear layer, or what the first adapter needs if none of them is LoRA.

    An adapter that cannot be read says nothing here; it is refused when it is asked for.

    Raises:
        QEffError: As :func:`export_adapters`.
    """
    others: dict[str, Path] = {}
    for name, path in adapters.items():
        try:
            folder = resolve(path)
            config = read_config(folder)
        except QEffError as e:
            log("adapter cannot be read", level=logging.WARNING, model=name, reason=str(e))
            continue
        if isinstance(config, LoraConfig) and not config.use_dora and not config.modules_to_save:
            others = {}
            break
        others = others or {name: folder}
    for name, folder in others.items():
        try:
            return export_adapters(base, {name: folder})
        except QEffError as e:
            log("adapter cannot be exported", level=logging.WARNING, model=name, reason=str(e))
    return _export_structure(base, LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM"))


def _export_structure(base: str, config: PeftConfig) -> Path:
    found = checkpoint_folder(base)
    if found is None:
        raise UnsupportedError(f"the base {base!r} must lie in safetensors files to be served")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        skeleton = skeleton_of(base, {"served": Adapter("served", config, {}, {})}, held=False)
    if skeleton is None:
        raise AdapterMismatchError(f"LoRA cannot be put on every linear layer of {base!r}")
    architecture = type(skeleton.get_base_model()).__name__
    return export_graph(
        skeleton, cache_root() / architecture / architecture, adapter_name="served", checkpoint=Checkpoint(found)
    )
