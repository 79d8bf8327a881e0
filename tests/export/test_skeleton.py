# SPDX-License-Identifier: BSD-3-Clause
"""How long a text a base takes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from QEfficient.contract import Manifest
from QEfficient.errors import ConfigError
from QEfficient.export.skeleton import longest_context, uncounted_token
from QEfficient.export.torch_to_onnx import export_graph
from QEfficient.runtime.session import OrtSession
from scripts.coverage.shrink import tiny_model
from tests.export.test_rotary import DYNAMIC, LONGROPE
from tests.tiny import make_base


class _Configured(nn.Module):
    """A model that is nothing but its configuration."""

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = type("Config", (), {**fields, "get_text_config": lambda self: self})()


def test_longest_context() -> None:
    """The shortest of the lengths that configurations name, by layer type too."""
    assert longest_context(make_base("llama")) == 256
    assert longest_context(_Configured(max_position_embeddings=64, rope_parameters=LONGROPE)) == 32
    assert longest_context(_Configured()) == 0
    by_layer = {"full_attention": LONGROPE, "sliding_attention": DYNAMIC}
    assert longest_context(_Configured(rope_parameters=by_layer)) == 32


def test_base_that_does_not_count_padding(tmp_path: Path) -> None:
    """RoBERTa uses its table of positions from ``padding_idx + 1`` on: graph and session end where PyTorch does."""
    model = tiny_model("roberta", max_position_embeddings=24)
    assert uncounted_token(model) == model.config.pad_token_id == 0
    assert longest_context(model) == 23
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        want = model(input_ids=ids[:, :23]).logits[0, -1]
        with pytest.raises(RuntimeError, match="out of bounds"):
            model(input_ids=ids)
    folder = export_graph(model, tmp_path / "graph")
    assert Manifest.read(folder).max_positions == 23
    session = OrtSession(folder, threads=1)
    with pytest.raises(ConfigError, match="23"):
        session.allocate(1, 24)
    session.allocate(1, 23)
    got = session.run(ids[:, :23].numpy(), np.arange(23)[None])[0, 0]
    assert np.abs(got - want.numpy()).max() < 1e-5


def test_base_that_names_its_table_otherwise() -> None:
    """Whisper's decoder calls the length of its table of positions ``max_target_positions``."""
    assert longest_context(tiny_model("whisper")) == 256
