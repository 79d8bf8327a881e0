# SPDX-License-Identifier: BSD-3-Clause
"""Operations that PyTorch traces or ONNX expresses badly, replaced by others that compute the same.

They are replaced by what is called, never by who calls it: no PEFT method and no model is named here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Repairs(TorchFunctionMode):
    """Context in which the operations of :data:`REPLACED` are called in place of PyTorch's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return REPLACED.get(func, func)(*args, **(kwargs or {}))


def solve(a: Tensor, b: Tensor, *, left: bool = True) -> Tensor:
    """Solve ``a @ x = b`` (``x @ a = b`` with ``left=False``) by unrolled Gauss-Jordan elimination.

    ONNX has no solver. There is no pivoting: who solves inside a forward does so for identity plus skew-symmetric
    matrices, whose pivots are at least one.

    Args:
        a: ``(..., n, n)``, ``n`` known when tracing.
        b: ``(..., n, m)``, or ``(..., m, n)`` with ``left=False``.
        left: On which side of ``x`` the matrix stands.
    """
    if not left:
        return solve(a.transpose(-1, -2), b.transpose(-1, -2)).transpose(-1, -2)
    size = a.shape[-1]
    both = torch.cat([a, b.expand(*a.shape[:-2], *b.shape[-2:])], -1)
    unit = torch.eye(size, dtype=a.dtype)
    for k in range(size):
        row = both[..., k : k + 1, :] / both[..., k : k + 1, k : k + 1]
        both = both - (both[..., :, k : k + 1] - unit[:, k : k + 1]) * row
    return both[..., size:]


def inverse(a: Tensor) -> Tensor:
    """Return the inverse of ``(..., n, n)``; see :func:`solve`."""
    return solve(a, torch.eye(a.shape[-1], dtype=a.dtype).expand(a.shape))


def scatter_dense(indices: Tensor, values: Tensor, size: Any = None, **_: Any) -> Tensor:
    """Return what ``torch.sparse_coo_tensor`` describes as a dense tensor."""
    return torch.zeros(tuple(size), dtype=values.dtype).index_put(
        tuple(indices.long().unbind(0)), values, accumulate=True
    )


def view(tensor: Tensor, *shape: Any, **kwargs: Any) -> Tensor:
    """Return ``tensor.reshape``: how a tensor lies in memory is nothing that a graph knows."""
    if kwargs or isinstance(shape[0], torch.dtype):
        return tensor.view(*shape, **kwargs)
    return tensor.reshape(*shape)


def unsqueeze(tensor: Tensor, dim: int) -> Tensor:
    """Return ``tensor.unsqueeze(dim)``, of a complex tensor by way of its two parts: ONNX has no complex numbers."""
    if not tensor.is_complex():
        return tensor.unsqueeze(dim)
    return torch.view_as_complex(torch.view_as_real(tensor).unsqueeze(dim if dim >= 0 else dim - 1))


REPLACED: dict[Any, Callable[..., Any]] = {
    vars(torch._C.TensorBase)["data"].__get__: torch.detach,  # a traced tensor has no data of its own
    torch.linalg.solve: solve,
    torch.linalg.inv: inverse,
    torch.inverse: inverse,
    torch.sparse_coo_tensor: scatter_dense,
    torch.Tensor.view: view,
    torch.Tensor.unsqueeze: unsqueeze,
    torch.unsqueeze: unsqueeze,
    torch.Tensor.to_dense: lambda tensor, *_, **__: tensor,
}
