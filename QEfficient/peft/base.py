# SPDX-License-Identifier: BSD-3-Clause
"""A base without any adapter, as a graph."""

from pathlib import Path

from QEfficient.export.torch_to_onnx import export_graph
from QEfficient.export.weights import Checkpoint
from QEfficient.peft.loading import checkpoint_folder, load_base
from QEfficient.store import cache_root


def export_base(base: str | Path) -> Path:
    """Export a base on its own into the cache of exported graphs, unless it is there; return the graph's folder.

    Raises:
        ConfigError: There is no model in that place.
        UnsupportedError: The model cannot be exported; says why.
    """
    model = load_base(base)
    found = checkpoint_folder(base)
    destination = cache_root() / type(model).__name__ / type(model).__name__
    return export_graph(model, destination, checkpoint=Checkpoint(found) if found is not None else None)
