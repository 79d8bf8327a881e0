# SPDX-License-Identifier: BSD-3-Clause
"""Adapter files in ONNX Runtime's own format, for ``onnxruntime.LoraAdapter``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from QEfficient.store import write_file


def write_onnx_adapter(tensors: Mapping[str, npt.NDArray[Any]], path: Path) -> None:
    """Write the inputs of an adapter as a file that ``onnxruntime.LoraAdapter().Load(path)`` reads.

    Args:
        tensors: Arrays by input name; scalars are written as ``(1,)``, since the format has none.
        path: The file.
    """
    arrays = {name: np.ascontiguousarray(array).reshape(array.shape or (1,)) for name, array in tensors.items()}
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(1)
    made.set_parameters(values)
    write_file(path, lambda aside: made.export_adapter(str(aside)))
