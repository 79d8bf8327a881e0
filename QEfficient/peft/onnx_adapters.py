# SPDX-License-Identifier: BSD-3-Clause
"""The adapters of a graph folder for ONNX Runtime's own ``LoraAdapter``: plain ONNX Runtime runs them without our code."""

from pathlib import Path

from QEfficient.contract import ADAPTERS_DIR, Manifest
from QEfficient.errors import UnsupportedError
from QEfficient.export.default_inputs import write_with_defaults
from QEfficient.export.lift import plain, shapes_graph
from QEfficient.peft.adapters import fit, neutral_tensors, read_exported
from QEfficient.runtime.onnx_adapter import write_onnx_adapter


def write_onnx_adapters(folder: Path) -> tuple[Path, list[Path]]:
    """Write every adapter of a graph folder as ``adapters/NAME.onnx_adapter``, and the graph that takes them.

    Args:
        folder: A graph folder, as export returns it.

    Returns:
        The graph whose adapter inputs have defaults (without an active adapter it is the bare base), and the adapters.

    Raises:
        UnsupportedError: An adapter brings virtual tokens: these are first entries of the cache, not inputs.
    """
    manifest, neutral = Manifest.read(folder), neutral_tensors(folder)
    read = [read_exported(path) for path in sorted((folder / ADAPTERS_DIR).glob("*.safetensors"))]
    for adapter in read:
        if not shapes_graph(adapter.config):
            method = plain(adapter.config.peft_type)
            raise UnsupportedError(
                f"adapter {adapter.name!r} ({method}) brings virtual tokens: they are first entries of the cache, which "
                "ONNX Runtime's adapters cannot hold. Use --adapter-format safetensors"
            )
    written = []
    for adapter in read:
        path = folder / ADAPTERS_DIR / f"{adapter.name}.onnx_adapter"
        write_onnx_adapter(fit(adapter, manifest, neutral), path)
        written.append(path)
    return write_with_defaults(folder, neutral), written
