# SPDX-License-Identifier: BSD-3-Clause
"""Skeletons: models with all their structure and none of their weights.

A skeleton's parameters lie on the ``meta`` device in float32; its buffers (rotary frequencies, for example) are real.
Export may change a skeleton as it likes: the model it was made from is never touched.
"""

import copy

import torch
from torch import nn

from QEfficient.export.lift import beside, inner_model


def skeleton_of(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` whose parameters take no memory.

    Floating-point parameters become float32 whatever their type was; parameters that are one object stay one object.
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        dtype = torch.float32 if parameter.dtype.is_floating_point else parameter.dtype
        empty = torch.empty_like(parameter, dtype=dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for buffer in model.buffers():
        if buffer.device.type != "meta":
            memo[id(buffer)] = _plain(buffer)
    skeleton: nn.Module = copy.deepcopy(model, memo)
    for name, module in beside(skeleton).items():
        inner_model(skeleton).add_module(name, module)  # so that everything that is traced hangs on one module
    return skeleton.eval()


def _plain(buffer: torch.Tensor) -> torch.Tensor:
    real = buffer.detach().cpu()
    return real.float().clone() if real.dtype in {torch.float16, torch.bfloat16} else real.clone()
