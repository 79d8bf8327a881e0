# SPDX-License-Identifier: BSD-3-Clause
"""A graph whose adapter inputs have defaults, for ONNX Runtime's own adapters.

ONNX Runtime fills in the inputs that an active ``LoraAdapter`` brings only if they may be left out, and its adapter files
hold no scalars. So every adapter input gets its neutral value as default, and scalings are taken as ``(1,)``.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from QEfficient.contract import MODEL_FILE, Manifest
from QEfficient.store import write_file

DEFAULTS_FILE = "model_onnx_adapter.onnx"
"""Stands beside the graph, since both read the same weights."""


def write_with_defaults(folder: Path, neutral: Mapping[str, np.ndarray]) -> Path:
    """Write the graph of ``folder`` once more, with adapter inputs that may be left out; return the file.

    Args:
        folder: A graph folder.
        neutral: Values of adapter inputs that leave the base as it is, where they are not zero.
    """
    proto = onnx.load(folder / MODEL_FILE, load_external_data=False)
    graph, squeezes = proto.graph, []
    inputs = {i.name: i for i in graph.input}
    scalars = {}
    for spec in Manifest.read(folder).adapter:
        shape = [1 if d == "rank" else int(d) for d in spec.shape]
        if not shape:
            inputs[spec.name].type.tensor_type.shape.dim.add().dim_value = 1
            scalars[spec.name] = f"{spec.name}/scalar"
            squeezes.append(helper.make_node("Squeeze", [spec.name], [scalars[spec.name]], name=f"{spec.name}/Squeeze"))
        default = np.asarray(neutral.get(spec.name, np.zeros(shape or [1])), spec.dtype).reshape(shape or [1])
        graph.initializer.append(numpy_helper.from_array(default, spec.name))
    for node in graph.node:
        node.input[:] = [scalars.get(name, name) for name in node.input]
    nodes = [*squeezes, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    path = folder / DEFAULTS_FILE
    write_file(path, lambda aside: onnx.save(proto, aside))
    return path
