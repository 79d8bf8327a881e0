# SPDX-License-Identifier: BSD-3-Clause
"""Adapters: loaded from PEFT folders, and fitted to a graph. Here is the rule of what fits.

An adapter fits a graph when its tensors fit: rank is dynamic, a target that the adapter lacks is zero, scaling is data.
Dropout, initialisation or the recorded base path say nothing about it, unless the initialisation changes the base (PiSSA).
"""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from QEfficient.contract import ADAPTERS_DIR, ALL_TARGETS, BASE, NEUTRAL_FILE, AdapterSpec, Manifest
from QEfficient.errors import AdapterMismatchError, AdapterNotFoundError, ArtifactError, ConfigError
from QEfficient.export.lift import graph_fields, lift, plain, shapes_graph
from QEfficient.peft.virtual_tokens import first_entries
from QEfficient.store import is_local, write_file

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's tensors and configuration, in memory.

    Attributes:
        name: What the user calls it.
        config: Its PEFT configuration.
        tensors: Arrays by their names in the adapter's file; of prompt learning, the first entries of the cache by
            state name.
        scalings: What PEFT multiplies each adapted module's output by, by graph input name.
    """

    name: str
    config: PeftConfig
    tensors: dict[str, np.ndarray]
    scalings: dict[str, float]

    @classmethod
    def from_model(cls, model: PeftModel, name: str) -> "Adapter":
        """Take adapter ``name`` from a ``PeftModel``, buffers that its file leaves out included.

        Raises:
            AdapterNotFoundError: The model has no adapter of that name.
        """
        if name not in model.peft_config:
            raise AdapterNotFoundError(f"no adapter {name!r}; there are: {', '.join(model.peft_config) or 'none'}")
        if not shapes_graph(model.peft_config[name]):
            return cls(name, model.peft_config[name], first_entries(model, name), {})
        # A method that swaps whole modules keeps only those of the active adapter in the model.
        swapped_in = getattr(model.base_model, "_temporarily_active", lambda _: nullcontext())
        with swapped_in(name):
            lifted = lift(model, name)
        return cls(name, model.peft_config[name], {n: to_numpy(t) for n, t in lifted.adapter.items()}, lifted.scalings)

    @classmethod
    def load(cls, path: str | Path, name: str) -> "Adapter":
        """Read an adapter from a folder in PEFT's format, or from the Hugging Face Hub.

        Scalings stay empty: they depend on the modules of a base. :meth:`from_model` has them.

        Raises:
            AdapterNotFoundError: There is no such folder, or it holds no adapter.
            ArtifactError: A file is damaged.
        """
        folder = resolve(path)
        return cls(name, read_config(folder), read_tensors(folder / WEIGHTS_FILE), {})

    def inputs(self) -> dict[str, np.ndarray]:
        """Return everything that a graph wants of this adapter, by input name."""
        return {**self.tensors, **{n: np.asarray(v, np.float32) for n, v in self.scalings.items()}}


def check_name(name: str) -> str:
    """Return ``name`` if an adapter may be called so.

    Raises:
        ConfigError: It is empty, is ``"base"``, or could not be part of a path and of a module name.
    """
    if not name or name == BASE:
        raise ConfigError(f"an adapter cannot be called {name!r}: {BASE!r} means no adapter; choose another name")
    if not all(c.isalnum() or c in "-_" for c in name):
        raise ConfigError(f"adapter name {name!r} may hold letters, digits, '-' and '_' only")
    return name


def resolve(path: str | Path) -> Path:
    """Return the local folder of an adapter, downloading it if ``path`` is a Hub id.

    Raises:
        AdapterNotFoundError: There is no such folder, it holds no adapter, or the Hub has none.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / CONFIG_FILE).is_file():
            raise AdapterNotFoundError(f"{folder} is not a PEFT adapter: it has no {CONFIG_FILE}")
        return folder
    if folder.exists():
        raise AdapterNotFoundError(f"{str(path)!r} is a file; an adapter is a folder: give {str(folder.parent)!r}")
    if is_local(path):
        raise AdapterNotFoundError(f"adapter folder {str(path)!r} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=["adapter_*", "*.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        reason = str(e).strip().splitlines()[0]
        raise AdapterNotFoundError(
            f"adapter {str(path)!r} is neither a folder nor to be had from the Hub: {reason}"
        ) from e


def read_config(folder: Path) -> PeftConfig:
    """Read ``adapter_config.json``.

    Raises:
        ArtifactError: It is not valid JSON, or PEFT does not know what it says.
    """
    path = folder / CONFIG_FILE
    try:
        content = json.loads(path.read_text())
        return PeftConfig.from_pretrained(str(folder)) if content else PeftConfig()
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ArtifactError(f"{path} is not a valid PEFT configuration: {e}") from e


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file as float32 arrays (integers stay integers).

    Raises:
        ArtifactError: The file is missing, truncated or not safetensors.
    """
    if not path.is_file():
        pickled = path.with_suffix(".bin")
        hint = (
            f"; {pickled.name} is a pickle, which is not loaded: convert it to safetensors" if pickled.is_file() else ""
        )
        raise ArtifactError(f"{path} is missing{hint}")
    try:
        with safe_open(str(path), framework="pt") as f:
            return {name: to_numpy(f.get_tensor(name)) for name in f.keys()}
    except (SafetensorError, OSError, ValueError) as e:
        raise ArtifactError(f"{path} is damaged or not a safetensors file: {e}") from e


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a float32 (or integer, or boolean) array of ``tensor``."""
    real = tensor.detach().cpu()
    return (real.float() if real.dtype.is_floating_point else real).numpy()


def saved_tensors(model: PeftModel, name: str) -> dict[str, np.ndarray]:
    """Return the tensors that PEFT would save for adapter ``name``, by their names in the file."""
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {n: to_numpy(t) for n, t in state.items()}


def fit(adapter: Adapter, manifest: Manifest, neutral: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Return ``adapter`` as the inputs of a graph: ranks padded to one, missing targets neutral.

    Args:
        adapter: With scalings, so from :meth:`Adapter.from_model` or :func:`read_exported`.
        manifest: The graph's manifest.
        neutral: Values of ``neutral.safetensors``, for targets that the adapter lacks.

    Returns:
        Arrays by input name, and the first entries of the cache by state name.

    Raises:
        AdapterMismatchError: A tensor or a field of the configuration does not fit; names the first and both values.
    """
    specs = {spec.name: spec for spec in manifest.adapter}
    if not shapes_graph(adapter.config):
        none = {name: _fit_tensor(adapter.name, spec, (neutral or {}).get(name), 1) for name, spec in specs.items()}
        return none | _fit_entries(adapter, manifest)
    _check_structure(adapter, manifest)
    given = adapter.inputs()
    for name in sorted(given):
        if name not in specs:
            raise AdapterMismatchError(
                f"adapter {adapter.name!r} does not fit the graph: it has {name!r}, which is not an input of the graph. "
                f"Export again with {adapter.name!r} active."
            )
    lacks = next((name for name in specs if name not in given), None)
    if lacks is not None and manifest.options.get(ALL_TARGETS):
        raise AdapterMismatchError(
            f"adapter {adapter.name!r} does not fit the graph: it lacks {lacks!r}, an input without which no other value "
            f"makes its target nothing. Export again with {adapter.name!r} active."
        )
    rank = max((_rank(specs[n], a) for n, a in given.items()), default=1)
    fitted = {}
    for name, spec in specs.items():
        default = (neutral or {}).get(name)
        fitted[name] = _fit_tensor(adapter.name, spec, given.get(name, default), max(rank, 1))
    return fitted


def neutral_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Return the adapter inputs of ``"base"`` that are not zero."""
    path = folder / NEUTRAL_FILE
    return read_tensors(path) if path.is_file() else {}


def write_exported(adapter: Adapter, folder: Path) -> Path:
    """Write ``adapters/NAME.safetensors`` into a graph folder: the adapter as it will be bound, ranks as they are."""
    path = folder / ADAPTERS_DIR / f"{check_name(adapter.name)}.safetensors"
    metadata = {"peft_config": json.dumps(plain(adapter.config.to_dict()), sort_keys=True)}
    arrays = {n: np.asarray(a, order="C") for n, a in adapter.inputs().items()}
    write_file(path, lambda aside: save_file(arrays, str(aside), metadata=metadata))
    return path


def read_exported(path: Path) -> Adapter:
    """Read what :func:`write_exported` wrote.

    Raises:
        ArtifactError: The file is missing or damaged.
    """
    tensors = read_tensors(path)
    with safe_open(str(path), framework="np") as f:
        metadata = f.metadata() or {}
    if "peft_config" not in metadata:
        raise ArtifactError(f"{path} was not written by export: it records no PEFT configuration")
    config = PeftConfig.from_peft_type(**json.loads(metadata["peft_config"]))  # type: ignore[no-untyped-call]
    scalings = {n: float(tensors.pop(n)) for n in list(tensors) if n.endswith(".scaling")}
    return Adapter(path.stem, config, tensors, scalings)


def _check_structure(adapter: Adapter, manifest: Manifest) -> None:
    ours, theirs = graph_fields(plain(adapter.config.to_dict())), graph_fields(manifest.peft_config)
    for key in sorted(ours.keys() | theirs.keys(), key=lambda k: (k != "peft_type", k)):
        if ours.get(key) != theirs.get(key):
            raise AdapterMismatchError(
                f"adapter {adapter.name!r} does not fit the graph: {key} is {ours.get(key)!r}, exported with "
                f"{theirs.get(key)!r}. Export again with {adapter.name!r} active."
            )


def _fit_entries(adapter: Adapter, manifest: Manifest) -> dict[str, np.ndarray]:
    """Return the first entries of the cache that an adapter of prompt learning brings, if they fit the graph's states."""
    for spec in manifest.states:
        have = adapter.tensors.get(spec.name)
        given = "nothing" if have is None else [have.shape[0], "ctx_len", *have.shape[2:]]
        if given != list(spec.shape[1:]):
            raise AdapterMismatchError(
                f"adapter {adapter.name!r} does not fit the graph: its virtual tokens bring {given} for {spec.name}, the "
                f"graph keeps {list(spec.shape[1:])}. Was it trained on another base?"
            )
    return {spec.name: np.asarray(adapter.tensors[spec.name], spec.dtype, order="C") for spec in manifest.states}


def _rank(spec: AdapterSpec, array: np.ndarray) -> int:
    return array.shape[spec.shape.index("rank")] if "rank" in spec.shape and array.ndim == len(spec.shape) else 0


def _fit_tensor(adapter: str, spec: AdapterSpec, array: np.ndarray | None, rank: int) -> np.ndarray:
    shape = tuple(rank if d == "rank" else int(d) for d in spec.shape)
    if array is None:
        return np.zeros(shape, spec.dtype)
    fits = array.ndim == len(shape) and all(s == "rank" or s == d for s, d in zip(spec.shape, array.shape, strict=True))
    if not fits:
        raise AdapterMismatchError(
            f"adapter {adapter!r} does not fit the graph: {spec.name} has shape {list(array.shape)}, "
            f"the graph takes {list(spec.shape)}. Was it trained on another base? If not, export again with {adapter!r} active."
        )
    padding = [(0, want - have) for want, have in zip(shape, array.shape, strict=True)]
    padded = np.pad(array, padding) if any(p != (0, 0) for p in padding) else array
    return np.asarray(padded, dtype=spec.dtype, order="C")


def describe(config: PeftConfig) -> dict[str, Any]:
    """Return the fields of a configuration that a reader wants to see: method, rank, targets."""
    fields = plain(config.to_dict())
    return {
        k: fields[k]
        for k in ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules")
        if fields.get(k)
    }
