# SPDX-License-Identifier: BSD-3-Clause
"""The weights that a program has of its own: written one after the other, never all in memory."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

WEIGHTS_FILE = "program.safetensors"
_MIN_BYTES = 1 << 10  # what is smaller stays in the model file

_NAMES = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.UINT8: "U8",
    ir.DataType.INT64: "I64",
    ir.DataType.INT32: "I32",
}
_HALVES = {_NAMES[ir.DataType.FLOAT16], _NAMES[ir.DataType.BFLOAT16]}


def store_weights(model: ir.Model, folder: Path, *, move_below_bytes: int = 0) -> None:
    """Write the initializers of ``model`` that lie in memory, or are still to be computed, into one file beside it.

    Args:
        model: Its initializers refer to the file afterwards.
        folder: Where the file ``program.safetensors`` goes; there is none if there is nothing to write.
        move_below_bytes: Initializers that lie in other files are taken over too, if they are smaller than this.
    """
    chosen = []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _MIN_BYTES or tensor.dtype not in _NAMES:
            moved = isinstance(tensor, ir.ExternalTensor) and tensor.nbytes < min(move_below_bytes, _MIN_BYTES)
            if moved and tensor is not None:
                value.const_value = ir.tensor(read_weight(tensor).copy(), name=value.name)
        elif not isinstance(tensor, ir.ExternalTensor) or tensor.nbytes < move_below_bytes:
            chosen.append((value, tensor))
    if not chosen:
        return
    header: dict[str, dict[str, Any]] = {}
    offset = 0
    for value, tensor in chosen:
        span = [offset, offset + tensor.nbytes]
        header[str(value.name)] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape.numpy()),
            "data_offsets": span,
        }
        offset = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64 + 56)  # data starts at a cache line
    begin = 8 + len(text)
    with (folder / WEIGHTS_FILE).open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in chosen:
            f.write(np.ascontiguousarray(read_weight(tensor)).reshape(-1).view(np.uint8).data)
    for value, tensor in chosen:
        start = header[str(value.name)]["data_offsets"][0]
        value.const_value = ir.ExternalTensor(
            WEIGHTS_FILE,
            begin + start,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=str(value.name),
            base_dir=folder,
        )


def read_weight(tensor: ir.TensorProtocol) -> npt.NDArray[Any]:
    """Return a tensor's elements, mapped from the file that they lie in if there is one.

    ``onnx_ir`` does not read files with several hard links, which is how graphs and programs share weights.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    path = Path(tensor.base_dir) / Path(tensor.location).name
    shape = tuple(int(n) for n in tensor.shape.numpy())
    raw = np.memmap(path, np.uint8, "r", offset=tensor.offset or 0, shape=(tensor.nbytes,))
    elements: npt.NDArray[Any] = np.asarray(raw).view(tensor.dtype.numpy()).reshape(shape)
    return elements


def files_of(model: ir.Model) -> set[str]:
    """Return the names of the files that initializers of ``model`` lie in."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return {Path(t.location).name for t in tensors if isinstance(t, ir.ExternalTensor)}


def holds_halves(folder: Path) -> bool:
    """Whether the weights of a graph folder have matrices of 16-bit floats."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as f:
            header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        if any(t.get("dtype") in _HALVES and len(t["shape"]) == 2 for t in header.values()):
            return True
    return False
