# SPDX-License-Identifier: BSD-3-Clause
"""Layers of the Mamba-2 kind, one token at a time: as in their pass over many tokens.

transformers keeps the time step within ``time_step_limit`` where it takes many tokens at once, as in training, and not
where it takes one from a cache (``mamba2_selective_state_update``). A graph has only the second form.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

_STEP = "mamba2_selective_state_update"


@contextmanager
def limited_steps(inner: nn.Module) -> Iterator[None]:
    """Context in which one token is taken with the limit that many are."""
    mixers: list[Any] = [module for module in inner.modules() if hasattr(module, "time_step_limit")]
    limits = {type(mixer).__module__: mixer.time_step_limit for mixer in mixers}
    sources = {sys.modules[name]: limit for name, limit in limits.items() if hasattr(sys.modules[name], _STEP)}
    steps = {source: getattr(source, _STEP) for source in sources}
    try:
        for source, limit in sources.items():
            setattr(source, _STEP, _limited(steps[source], *limit))
        yield
    finally:
        for source, step in steps.items():
            setattr(source, _STEP, step)


def _limited(step: Callable[..., Tensor], least: float, most: float) -> Callable[..., Tensor]:
    def limited(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        *others: Any,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
        dt = functional.softplus(dt) if dt_softplus else dt
        return step(state, hidden_states, dt.clamp(least, None if math.isinf(most) else most), *others, **kwargs)

    return limited
