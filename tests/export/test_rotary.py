# SPDX-License-Identifier: BSD-3-Clause
"""Rotary frequencies that transformers changes at some length: the graph stays within it, and computes the same."""

from typing import Any

import numpy as np
import pytest
import torch

from QEfficient.contract import Manifest
from QEfficient.errors import ConfigError
from QEfficient.export.skeleton import skeleton_of
from QEfficient.export.torch_to_onnx import export_graph
from QEfficient.runtime.session import OrtSession
from scripts.coverage.shrink import tiny_model

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.1] * 8,
    "long_factor": [3.0] * 8,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


def test_longrope_within_its_first_length(tmp_path: Any) -> None:
    """A model that has just run a long text, whose frequencies it kept, is exported with those of short ones."""
    model = tiny_model("llama", rope_parameters=LONGROPE)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        want = model(input_ids=ids).logits[0, -1]
        long = model(input_ids=torch.arange(3, 43)[None]).logits[0, 11]
    assert (long - want).abs().max() > 1e-3
    folder = export_graph(model, tmp_path / "graph")
    session = OrtSession(folder, threads=1)
    assert Manifest.read(folder).max_positions == 32
    with pytest.raises(ConfigError, match="32"):
        session.allocate(1, 33)
    session.allocate(1, 32)
    got = session.run(ids.numpy(), np.arange(12)[None])[0, 0]
    assert np.abs(got - want.numpy()).max() < 1e-5


def test_dynamic_frequencies_are_the_first_ones() -> None:
    """A skeleton does not ask how long the batch is, and is not what its model became by a long text."""
    model = tiny_model("llama", rope_parameters=DYNAMIC)
    first = model.model.rotary_emb.original_inv_freq.clone()
    with torch.no_grad():
        model(input_ids=torch.arange(3, 123).repeat(3)[None])  # more than the configuration's 256 positions
    assert not torch.equal(model.model.rotary_emb.inv_freq, first)
    skeleton: Any = skeleton_of(model)
    assert torch.equal(skeleton.model.rotary_emb.inv_freq, first)
    assert skeleton.model.rotary_emb.rope_type == "default"
    assert model.model.rotary_emb.rope_type == "dynamic"
