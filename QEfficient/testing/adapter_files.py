# SPDX-License-Identifier: BSD-3-Clause
"""One adapter as it lies on disk, and what the base expects of it. No model runs: the base exists only as shapes."""

import copy
import json
import re
import warnings
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from QEfficient.errors import AdapterMismatchError, ArtifactError
from QEfficient.peft.adapters import Adapter, resolve

Shape = tuple[int, ...]
ANY_SHAPE: Shape = (-1,)
"""Of a tensor whose shape depends on the base's weights."""
PREFIX = "base_model.model."
"""What PEFT writes in front of a module's name."""

EMBEDDING = re.compile(r"\.(embed_tokens|wte|word_embeddings|embed_in|lm_head|embed_out|output_embeddings)\.")
"""In the name of a tensor that belongs to the vocabulary."""

_LEAF = re.compile(
    r"\.[^.]*(lora|ia3|oft|hada|lokr|vera|hira|miss|fourierft|waveft|c3a|shira|road|hra|delora|trainable_tokens)_?[^.]*(\.weight|\.bias)?$"
)


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """One adapter, read.

    Attributes:
        path: Its folder.
        config: Its ``PeftConfig``.
        tensors: The tensors of its file.
        expected: Names and shapes that PEFT would save for this configuration on this base.
        optional: Names of the base's own tensors, which a file may hold besides (resized embeddings).
        base: Folder or Hub id of the base.
        base_config: The base's configuration.
    """

    path: Path
    config: Any
    tensors: dict[str, npt.NDArray[Any]]
    expected: dict[str, Shape]
    optional: dict[str, Shape]
    base: str = ""
    base_config: Any = None

    @property
    def method(self) -> str:
        """PEFT's name of the method."""
        return str(self.config.peft_type.value)

    @property
    def volume(self) -> int:
        """Bytes of the tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def modules(self) -> list[str]:
        """Return the names, in the base, of the modules that the adapter's tensors belong to."""
        return sorted({module_of(k).removeprefix(PREFIX) for k in self.tensors})


def read_adapter(name: str, path: str | Path, base: str, base_config: Any) -> AdapterFiles:
    """Read one adapter, and build the base as shapes to see what it should hold.

    Raises:
        AdapterNotFoundError: The folder is missing or holds no adapter.
        ArtifactError: A file is damaged.
        AdapterMismatchError: PEFT cannot put such an adapter on this base.
    """
    folder = resolve(path)
    adapter = Adapter.load(folder, name)
    _refuse_wrong_types(name, adapter.config)
    expected, own = expected_tensors(base_config, adapter.config, name)
    return AdapterFiles(folder, adapter.config, adapter.tensors, expected, own, base, base_config)


def _refuse_wrong_types(name: str, config: Any) -> None:
    """Refuse numbers that are none: what PEFT makes of them names neither field nor value."""
    usual = {one.name: one.default for one in fields(config)}
    for number in ("r", "lora_alpha", "lora_dropout"):
        value = getattr(config, number, 0)
        if not isinstance(value, int | float) and value != usual.get(number):
            raise ArtifactError(
                f"adapter {name!r} cannot be used: adapter_config.json says {number} {value!r}, which must be a number; correct it"
            )


def expected_tensors(base_config: Any, config: Any, name: str) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Return what PEFT would save for ``config`` on the base, and the base's own tensors, names to shapes.

    Many adapters of one base mostly have one configuration: what was made for it last is kept.

    Raises:
        AdapterMismatchError: PEFT cannot put such an adapter on this base.
    """
    values = {**config.to_dict(), "base_model_name_or_path": None, "revision": None}
    said = json.dumps(values, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    return _expected(_Pair(base_config.to_json_string(use_diff=False) + said, base_config, config, name))


@dataclass(frozen=True, slots=True)
class _Pair:
    """A base's and an adapter's configuration, known by what they say."""

    said: str
    base_config: Any = field(compare=False)
    config: Any = field(compare=False)
    name: str = field(compare=False)


@lru_cache(maxsize=8)
def _expected(pair: _Pair) -> tuple[dict[str, Shape], dict[str, Shape]]:
    base_config, config, name = pair.base_config, pair.config, pair.name
    try:
        return _build(base_config, config, "meta")
    except NotImplementedError:  # a few methods look at values when they are made
        device = "cpu"
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as e:
        if "meta tensor" not in str(e):
            raise AdapterMismatchError(f"adapter {name!r} does not fit the base: {_first_line(e)}") from e
        device = "cpu"
    try:
        (saved, own), (again, _) = (_build(base_config, config, device) for _ in range(2))
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as e:
        raise AdapterMismatchError(f"adapter {name!r} does not fit the base: {_first_line(e)}") from e
    # Where other random weights make other shapes (AdaMSS counts clusters of them), only the names are known.
    return saved if saved == again else dict.fromkeys(saved, ANY_SHAPE), own


def _build(base_config: Any, config: Any, device: str) -> tuple[dict[str, Shape], dict[str, Shape]]:
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(copy.deepcopy(base_config))  # type: ignore[no-untyped-call] # replicated layers are noted there
        own = {PREFIX + key: tuple(value.shape) for key, value in model.state_dict().items()}
        wrapped = PeftModel(model, copy.deepcopy(config), adapter_name="default", low_cpu_mem_usage=device == "meta")
        saved = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    embeddings = {re.sub(r"\.weight$", ".base_layer.weight", k): v for k, v in own.items() if EMBEDDING.search(k)}
    return {key: tuple(value.shape) for key, value in saved.items()}, own | embeddings


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def refuse_other_shapes(name: str, files: AdapterFiles) -> None:
    """Refuse an adapter whose tensors have other shapes than base and configuration ask for.

    Raises:
        AdapterMismatchError: Naming the first tensor that differs, and what the difference looks like.
    """
    known = files.optional | files.expected
    wrong = [k for k, t in sorted(files.tensors.items()) if known.get(k, ANY_SHAPE) not in (t.shape, ANY_SHAPE)]
    if wrong:
        key = wrong[0]
        raise AdapterMismatchError(
            f"adapter {name!r} does not fit the base: {key} is {files.tensors[key].shape}, this base and the adapter's "
            f"configuration need {known[key]}. {_what_differs(files, wrong, known)}"
        )


def _what_differs(files: AdapterFiles, wrong: list[str], known: dict[str, Shape]) -> str:
    pairs = [(files.tensors[k].shape, known[k]) for k in wrong]
    if all(got == want[::-1] for got, want in pairs):
        return f"The {len(wrong)} tensors that differ are transposed; write them the other way round."
    ranks = {_rank(k, files.tensors[k].shape) for k in wrong} - {0}
    wanted = {_rank(k, known[k]) for k in wrong} - {0}
    width = all(_without_rank(k, got) == _without_rank(k, want) for k, (got, want) in zip(wrong, pairs, strict=True))
    if width and len(ranks) == len(wanted) == 1:
        return (
            f"Its {len(wrong)} tensors have rank {ranks.pop()}, its configuration says {wanted.pop()} "
            "(r or rank_pattern): correct the configuration."
        )
    if all(
        re.search("embed|lm_head|wte", k) and got[1:] == want[1:] for k, (got, want) in zip(wrong, pairs, strict=True)
    ):
        rows = pairs[0][0][0]
        return f"Its vocabulary has {rows} entries: resize the base's embeddings to {rows} before loading it."
    return "Was it trained on another base, or was its rank edited?"


def _rank(key: str, shape: Shape) -> int:
    """Return the rank that a LoRA factor's shape shows, 0 for other tensors."""
    if len(shape) != 2:
        return 0
    if re.search(r"lora_(A|embedding_A)\b", key):
        return shape[0]
    return shape[1] if re.search(r"lora_(B|embedding_B)\b", key) else 0


def _without_rank(key: str, shape: Shape) -> Shape:
    if not _rank(key, shape):
        return shape
    return shape[1:] if re.search(r"lora_(A|embedding_A)\b", key) else shape[:1]


def module_of(key: str) -> str:
    """Return the module that a tensor belongs to."""
    return _LEAF.sub("", key)


def leaf_of(key: str) -> str:
    """Return what kind of tensor it is: ``"lora_B"``."""
    found = _LEAF.search(key)
    return found.group(0).strip(".").removesuffix(".weight") if found else key.rsplit(".", 1)[-1]


def is_float(tensor: npt.NDArray[Any]) -> bool:
    """Whether a tensor holds numbers that can be NaN."""
    return bool(np.issubdtype(tensor.dtype, np.floating))
