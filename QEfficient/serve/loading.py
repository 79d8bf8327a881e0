# SPDX-License-Identifier: BSD-3-Clause
"""From an adapter's folder to tensors that the engine takes, by way of the checks of ``qefficient test``."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from peft import LoraConfig, PeftConfig

from QEfficient.contract import Manifest
from QEfficient.errors import AdapterMismatchError, ArtifactError, QEffError, UnsupportedError
from QEfficient.export.lift import lift, plain
from QEfficient.export.torch_to_onnx import export_graph
from QEfficient.export.weights import Checkpoint
from QEfficient.peft.adapters import WEIGHTS_FILE, Adapter, fit, neutral_tensors, read_config, resolve
from QEfficient.peft.loading import checkpoint_folder, read_base_config
from QEfficient.peft.unloaded import export_adapters, skeleton_of
from QEfficient.serve.entries import Verdict
from QEfficient.store import cache_root, digest_file
from QEfficient.testing.adapter_stage import examine
from QEfficient.testing.report import Outcome
from QEfficient.testing.selection import Selection

Array = npt.NDArray[Any]

_MOST_SCALINGS = 64


class Loader:
    """Reads, checks and fits adapters of one base.

    Args:
        base: Folder or Hub id of the base.
        graph: Folder of the graph that runs.
        most_bytes: Larger files are refused before they are read.
    """

    def __init__(self, base: str, graph: Path, *, most_bytes: int = 1 << 34) -> None:
        self.base = base
        self.manifest = Manifest.read(graph)
        self._neutral = neutral_tensors(graph)
        self._config = read_base_config(base)
        self._most_bytes = most_bytes
        self._scalings: dict[str, dict[str, float]] = {}

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
        return digest_file(file) + digest_file(folder / "adapter_config.json")

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

    def tensors(self, name: str, folder: Path, digest: str) -> dict[str, Array]:
        """Return what the engine takes.

        Raises:
            AdapterMismatchError: The adapter does not fit the graph.
            ArtifactError: The files are no longer those that had ``digest``.
        """
        adapter = Adapter.load(folder, name)
        if self.digest(folder) != digest:
            raise ArtifactError(f"the files of adapter {name!r} changed while they were read; load it again")
        fields = {k: v for k, v in plain(adapter.config.to_dict()).items() if k != "base_model_name_or_path"}
        key = json.dumps(fields, sort_keys=True)
        if key not in self._scalings:  # most adapters of a base share their configuration
            if len(self._scalings) >= _MOST_SCALINGS:
                self._scalings.pop(next(iter(self._scalings)))
            self._scalings[key] = self._scalings_of(adapter)
        whole = Adapter(name, adapter.config, adapter.tensors, self._scalings[key])
        return {n: np.asarray(t) for n, t in fit(whole, self.manifest, self._neutral).items()}

    def _scalings_of(self, adapter: Adapter) -> dict[str, float]:
        skeleton = skeleton_of(self.base, {adapter.name: adapter})
        if skeleton is None:
            raise UnsupportedError(
                f"adapter {adapter.name!r} has more than matrices of linear layers (DoRA, modules_to_save, …), which this server's "
                "graph has no inputs for; merge it and serve it as a base of its own"
            )
        return lift(skeleton, adapter.name).scalings


def graph_for(base: str, adapters: Mapping[str, str | Path]) -> Path:
    """Export the graph that serves a base: LoRA on every linear layer, or the method of the first adapter that is not LoRA.

    Raises:
        QEffError: As :func:`export_adapters`.
    """
    for name, path in adapters.items():
        config = read_config(resolve(path))
        if not isinstance(config, LoraConfig) or config.use_dora:
            return export_adapters(base, {name: path})
    wanted = LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM")
    return _export_structure(base, wanted)


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
