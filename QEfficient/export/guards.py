# SPDX-License-Identifier: BSD-3-Clause
"""What a trace assumed about sizes: checked, since a graph cannot assert it.

A model that asks ``if seq_len > 64`` is traced along one branch, and PyTorch notes the condition. Conditions that hold
for every size are dropped; with any other one the graph would be wrong for some sizes, without an error.
"""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import sympy  # type: ignore[import-untyped]  # torch's own dependency: sizes are its expressions
import torch
from torch.export import ExportedProgram

from QEfficient.errors import UnsupportedError

_SIZES = (1, 2, 3, 4, 5, 7, 8, 16, 31, 64, 100, 128, 255, 512, 1000, 2047, 2048, 4096, 5000, 8192, 32768, 131072)
_DRAWS = 300
_SMALLEST_ALLOWED = 2  # PyTorch's lower bound of every dynamic size; sizes 1 and 0 never took another branch


class SizeError(UnsupportedError):
    """The model computes differently for some sizes."""


def check_sizes(exported: ExportedProgram, longest: int = 0, fits: Any = None) -> None:
    """Take the assertions on sizes out of a traced program, if they hold for all sizes.

    Args:
        exported: The program.
        longest: A limit of a size that a caller keeps; 0 if there is none.
        fits: A condition on sizes that a caller keeps: a call's tokens fit into the cache.

    Raises:
        SizeError: One does not; names it.
    """
    limits: dict[Any, int] = {}
    for symbol, allowed in exported.range_constraints.items():
        if _from_data(symbol):
            continue
        if longest and allowed.upper == longest:
            limits[symbol] = longest
        elif allowed.lower > _SMALLEST_ALLOWED or allowed.upper < max(_SIZES):
            raise SizeError(f"the model computes differently outside of {allowed.lower} <= {symbol} <= {allowed.upper}")
    graph = exported.graph_module.graph
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten._assert_scalar.default:
            continue
        condition = _expression(node.args[0])
        known = condition is not None and not any(_from_data(s) for s in condition.free_symbols)
        if known and (broken := next(_counterexamples(condition, limits, fits), None)) is not None:
            raise SizeError(f"the model computes differently unless {condition}, for example at {broken}")
        graph.erase_node(node)
    graph.eliminate_dead_code()
    exported.graph_module.recompile()


def _from_data(symbol: Any) -> bool:
    """Whether a size depends on values, not on shapes: what is asserted of it would be an error in PyTorch too."""
    return str(symbol).startswith("u")


def _expression(argument: Any) -> Any:
    value = argument.meta.get("val") if isinstance(argument, torch.fx.Node) else argument
    return value.node.expr if isinstance(value, torch.SymBool | torch.SymInt) else None


def _counterexamples(condition: Any, limits: dict[Any, int], fits: Any) -> Iterator[dict[str, int]]:
    """Yield sizes, such as a caller gives, for which ``condition``, a SymPy expression, does not hold."""
    symbols = sorted(condition.free_symbols, key=str)
    draw = random.Random(0)
    some = ([draw.choice(_SIZES) for _ in symbols] for _ in range(_DRAWS))
    every = itertools.product(_SIZES, repeat=len(symbols)) if len(symbols) == 1 else some
    for sizes in every:
        if any(n > limits.get(s, n) for s, n in zip(symbols, sizes, strict=True)):
            continue
        values = {s: sympy.Integer(n) for s, n in zip(symbols, sizes, strict=True)}
        if fits is not None and fits.xreplace(values) == sympy.false:
            continue
        if not bool(condition.xreplace(values)):
            yield {str(s): n for s, n in zip(symbols, sizes, strict=True)}
