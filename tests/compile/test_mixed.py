# SPDX-License-Identifier: BSD-3-Clause
"""A mixed program runs with one adapter as any program does; tests/runtime/test_mixing.py mixes."""

import numpy as np
import onnx_ir as ir
import pytest

from QEfficient.compile.program import compile_graph
from QEfficient.contract import ADAPTER_MASK, MIXED, MODEL_FILE, Manifest
from QEfficient.runtime.session import OrtSession

TOLERANCE = 5e-5  # as for the passes


@pytest.mark.parametrize(("style", "precision"), [("llama", "fp32"), ("llama", "int4"), ("gpt2", "fp32")])
def test_with_one_adapter_the_logits_are_those_of_any_program(exported, trace, style, precision):
    """Prompts, chunks of several rows, single tokens; with the adapter and with the base."""
    made, results = exported(style), []
    for mixed in (False, True):
        program = compile_graph(made.graph, precision=precision, mixed=mixed)
        assert bool(Manifest.read(program).options.get(MIXED)) == mixed
        session = OrtSession(program, threads=1)
        session.load_adapter("a", made.adapter)
        base = trace(session)
        session.set_adapter("a")
        results.append(base + trace(session))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


def test_the_same_modules_of_all_layers_are_of_one_kind(exported):
    """What reads one input is of one kind: queries and values; the manifest names each pair of matrices once, ``A`` first."""
    program = compile_graph(exported("llama").graph, mixed=True)
    layers = "base_model.model.model.layers"
    assert Manifest.read(program).options[MIXED] == [
        [
            f"{layers}.{layer}.self_attn.{module}.lora_{letter}.weight"
            for layer in (0, 1)
            for module in ("q_proj", "v_proj")
            for letter in "AB"
        ],
        [f"{layers}.{layer}.mlp.down_proj.lora_{letter}.weight" for layer in (0, 1) for letter in "AB"],
    ]


def test_nothing_but_the_mask_is_fed(exported):
    """A session that knows one mask can run it, and no input has a value of its own, of which ONNX Runtime would warn."""
    graphs = [
        ir.load(compile_graph(exported("llama").graph, mixed=mixed) / MODEL_FILE).graph for mixed in (False, True)
    ]
    plain, mixed = ([v.name for v in graph.inputs] for graph in graphs)
    assert mixed == [*plain, ADAPTER_MASK]
    assert not {*mixed} & {*graphs[1].initializers}
