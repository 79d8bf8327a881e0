# SPDX-License-Identifier: BSD-3-Clause
"""Faults planted into the folder of a program of rounded weights: numbers and scales."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.numpy_helper

from tests.testing.planted_graphs import GraphFault

Array = np.ndarray


def stored(pattern: str, change: Callable[[Array], Array]) -> Callable[[Path], None]:
    """Return what changes the first tensor of a name in the files of a program's weights."""

    def plant(folder: Path) -> None:
        for path in sorted(folder.glob("*.safetensors")):
            content = bytearray(path.read_bytes())
            start = 8 + int.from_bytes(content[:8], "little")
            header = json.loads(content[8:start])
            name = next((n for n in sorted(header) if re.search(pattern, n)), None)
            if name is None:
                continue
            begin, end = header[name]["data_offsets"]
            kind = {"F32": np.float32, "U8": np.uint8, "BF16": ml_dtypes.bfloat16}[header[name]["dtype"]]
            values = np.frombuffer(bytes(content[start + begin : start + end]), kind).reshape(header[name]["shape"])
            content[start + begin : start + end] = change(values.copy()).astype(kind).tobytes()
            path.unlink()  # it may be a link to the graph's
            path.write_bytes(content)
            return
        model = onnx.load(folder / "model.onnx", load_external_data=False)  # small tensors lie in the graph itself
        tensor = next(t for t in model.graph.initializer if re.search(pattern, t.name))
        changed = np.ascontiguousarray(change(onnx.numpy_helper.to_array(tensor).copy()), dtype=np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
        (folder / "model.onnx").unlink()
        onnx.save(model, folder / "model.onnx")

    return plant


def _block(numbers: Array) -> Array:
    numbers[0, :4, 3] = 255 - numbers[0, :4, 3]
    return numbers


def _row_of_strip(numbers: Array) -> Array:
    numbers[0, :, 5] = numbers[0, :, 6]
    return numbers


def _row(numbers: Array) -> Array:
    numbers[5] = numbers[6]
    return numbers


# Numbers are (strips, bytes of a row / 4, rows of a strip, 4), scales (strips, blocks, rows of a strip): kernels/strips.py.
_CODES, _SCALES = r"down_proj.*_int[48]_in_strips$", r"down_proj.*_scales_in_strips$"
_NAMED = ("quality.precision",)
ROUNDED_FAULTS = (
    GraphFault("scales shifted by a row", _NAMED, stored(_SCALES, lambda t: np.roll(t, 1, axis=2))),
    GraphFault("scales of one weight 10 % larger", _NAMED, stored(_SCALES, lambda t: t * np.float32(1.1))),
    GraphFault("one scale a hundredfold", _NAMED, stored(_SCALES, lambda t: np.where(np.arange(t.size).reshape(t.shape) == 7, 100 * t, t))),
    GraphFault("numbers shifted by a row", _NAMED, stored(_CODES, lambda t: np.roll(t, 1, axis=2))),
    GraphFault("one block of numbers turned", ("program.integrity", *_NAMED), stored(_CODES, _block)),
    GraphFault("one row a copy of another", ("program.integrity", *_NAMED), stored(_CODES, _row_of_strip)),
    GraphFault("halves of every byte exchanged", _NAMED, stored(_CODES, lambda t: (t << 4) | (t >> 4))),
    GraphFault("scales of the embedding lost", _NAMED, stored(r"embed_tokens.*_scales(_in_strips)?$", np.ones_like)),
)  # fmt: skip
"""Faults of a program in int8 or int4."""

HALVES_FAULTS = (
    GraphFault("one row a copy of another", _NAMED, stored(r"down_proj.*_bfloat16$", _row)),
    GraphFault("one weight in a thousand 1 % larger", _NAMED, stored(r"down_proj.*_bfloat16$", lambda t: np.where(np.arange(t.size).reshape(t.shape) % 1000 == 7, t * 1.01, t))),
)  # fmt: skip
"""Faults of a program in bf16."""
