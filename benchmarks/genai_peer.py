# SPDX-License-Identifier: BSD-3-Clause
"""onnxruntime-genai as a subject of ``decode.py``: the adapter baked in by its builder, or behind its Adapters API.

For the Adapters API, the adapter's tensors in the builder's model become inputs with a default, and a file of adapter format holds
their values; that is what Olive's ``generate-adapter`` does (and its runtime cannot prepare them for its kernels any more).
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from QEfficient.runtime.onnx_adapter import write_onnx_adapter

_ADAPTER_FILE = "lora.onnx_adapter"


class Genai:
    """A model of onnxruntime-genai; with an adapter of its Adapters API where its folder holds one."""

    def __init__(self, folder: Path, precision: str, context: int) -> None:
        import onnxruntime_genai  # type: ignore[import-not-found]

        self.library, self.context = onnxruntime_genai, context
        self.model = onnxruntime_genai.Model(str(folder))
        self.bytes_per_token = sum(f.stat().st_size for f in folder.glob("*.data"))
        self.generator: Any = None
        self.adapters: Any = None
        self.name = f"onnxruntime-genai {precision}, adapter baked in"
        if (folder / _ADAPTER_FILE).is_file():
            self.adapters = onnxruntime_genai.Adapters(self.model)
            self.adapters.load(str(folder / _ADAPTER_FILE), "lora")
            self.name = f"onnxruntime-genai {precision}, Adapters API"

    def prefill(self, ids: np.ndarray) -> int:
        """See ``Subject`` in ``decode.py``."""
        parameters = self.library.GeneratorParams(self.model)
        parameters.set_search_options(max_length=self.context, batch_size=1)
        self.generator = self.library.Generator(self.model, parameters)
        if self.adapters is not None:
            self.generator.set_active_adapter(self.adapters, "lora")
        self.generator.append_tokens(ids.astype(np.int32))
        return int(np.argmax(self.generator.get_logits()))

    def step(self, token: int, position: int) -> int:
        """See ``Subject`` in ``decode.py``."""
        self.generator.append_tokens(np.array([[token]], np.int32))
        return int(np.argmax(self.generator.get_logits()))


def open_genai(
    work: Path, base: Path, adapter: Path, *, skip: Sequence[str], threads: int, context: int
) -> list[Genai]:
    """Build and load the peer's models, if it can be imported."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        return []
    made = []
    for precision in ("fp32", "int4"):
        wanted = {kind: f"genai-{precision}{kind}" not in skip for kind in ("", "-adapters")}
        folder = work / f"genai-{precision}"
        if any(wanted.values()) and not (folder / "genai_config.json").is_file():
            extra = [f"adapter_path={adapter}", "int4_accuracy_level=4"]
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(base), "-o", str(folder)]
            subprocess.run([*command, "-p", precision, "-e", "cpu", "--extra_options", *extra], check=True)
        if wanted["-adapters"] and not (work / f"genai-{precision}-adapters" / _ADAPTER_FILE).is_file():
            _with_inputs(folder, work / f"genai-{precision}-adapters")
        for kind in (k for k, w in wanted.items() if w):
            target = work / f"genai-{precision}{kind}"
            config = json.loads((target / "genai_config.json").read_text())
            config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
            (target / "genai_config.json").write_text(json.dumps(config))
            made.append(Genai(target, precision, context))
    return made


def _with_inputs(source: Path, target: Path) -> None:
    """Copy a model with its adapter's tensors as inputs, and their values beside it."""
    import onnx
    from onnx import numpy_helper

    shutil.copytree(source, target, dirs_exist_ok=True)
    model = onnx.load(target / "model.onnx", load_external_data=False)
    values = {}
    for tensor in [t for t in model.graph.initializer if "lora" in t.name.lower()]:
        array = numpy_helper.to_array(tensor, base_dir=str(target))
        values[tensor.name] = array
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        neutral = numpy_helper.from_array(np.zeros_like(array), tensor.name)
        model.graph.initializer.remove(tensor)
        model.graph.initializer.append(neutral)
    onnx.save(model, target / "model.onnx")
    write_onnx_adapter(values, target / _ADAPTER_FILE)
