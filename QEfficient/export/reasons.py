# SPDX-License-Identifier: BSD-3-Clause
"""Why a model cannot be exported: what PyTorch says of a failed trace, in words that name the model's own code."""

import inspect
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from torch._dynamo.exc import UserError
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from QEfficient.errors import UnsupportedError
from QEfficient.export.caches import ShapeCache, TracedCache

_BOUND = re.compile(r"^  (\w+) = Dim\('\w+', (.*)\)$", re.MULTILINE)
_FIXED = re.compile(r"^  (\w+) = \d+$", re.MULTILINE)
_END = re.compile(r"(min|max)=(\d+)")
_SIGNS = {"min": ">=", "max": "<="}


@contextmanager
def explained(inner: nn.Module) -> Iterator[None]:
    """Turn whatever goes wrong while ``inner`` is traced into an :class:`UnsupportedError` with the reason."""
    try:
        yield
    except UnsupportedError:
        raise
    except Exception as e:
        cause: BaseException = e
        while cause.__cause__ is not None:  # the exporter wraps what happened several times
            cause = cause.__cause__
        raise UnsupportedError(
            f"{type(inner).__name__} cannot be exported: {_reason(cause)}{_place(cause, inner)}"
        ) from e


def _reason(cause: BaseException) -> str:
    if isinstance(cause, UserError) and (names := _FIXED.findall(str(cause))):
        return f"what it computes is bound to the {' and the '.join(dict.fromkeys(names))} that it is traced with"
    if isinstance(cause, UserError) and (bounds := _BOUND.findall(str(cause))):
        limits = [f"{name} {_SIGNS[end]} {size}" for name, ends in bounds for end, size in _END.findall(ends)]
        return f"it computes differently unless {' and '.join(limits)}"
    if isinstance(cause, GuardOnDataDependentSymNode):
        return "the values of a tensor decide what it computes"
    if isinstance(cause, AttributeError) and isinstance(cause.obj, TracedCache):
        return f"it keeps {cause.name!r} in its cache, beside keys, values and states of layers"
    if ShapeCache.__name__ in str(cause):
        return "it takes no cache but one of its own class"
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0][:300]}" if lines else type(cause).__name__


def _place(cause: BaseException, inner: nn.Module) -> str:
    """Return the line of the model's own code at which it happened, or nothing."""
    folder = Path(inspect.getfile(type(inner))).parent
    frames = [f for f in traceback.extract_tb(cause.__traceback__) if Path(f.filename).parent == folder]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
