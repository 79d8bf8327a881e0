# SPDX-License-Identifier: BSD-3-Clause
"""Operations that PyTorch traces or ONNX expresses badly, replaced by others that compute the same.

They are replaced by what is called, never by who calls it: no PEFT method and no model is named here.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes


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


def getitem(tensor: Tensor, index: Any) -> Tensor:
    """Return ``tensor[index]``, of a complex tensor by way of its two parts."""
    if not tensor.is_complex():
        return tensor[index]
    parts = index if isinstance(index, tuple) else (index,)
    behind = (slice(None),) if any(part is Ellipsis for part in parts) else ()
    return torch.view_as_complex(torch.view_as_real(tensor)[(*parts, *behind)])


def fft(signal: Tensor, *, sign: int = -1) -> Tensor:
    """Return the discrete Fourier transform over the last dimension, complex, as products with cosines and sines.

    Args:
        signal: Real or complex, ``(..., n)``, ``n`` known when tracing.
        sign: -1, or 1 for the inverse without its factor ``1 / n``.
    """
    size = signal.shape[-1]
    turns = torch.arange(size)[:, None] * torch.arange(size)[None] % size
    angles = turns.to(torch.float32) * (2 * math.pi / size)
    cos, sin = angles.cos(), angles.sin() * sign
    if not signal.is_complex():
        return torch.view_as_complex(torch.stack([signal @ cos, signal @ sin], -1))
    real, imaginary = torch.view_as_real(signal).unbind(-1)
    return torch.view_as_complex(torch.stack([real @ cos - imaginary @ sin, real @ sin + imaginary @ cos], -1))


def ifft(signal: Tensor) -> Tensor:
    """Return the inverse of :func:`fft`."""
    return fft(signal / signal.shape[-1], sign=1)


def einsum(equation: str, *operands: Any) -> Tensor:
    """Return ``torch.einsum``, of two complex tensors by way of their parts."""
    tensors = operands[0] if len(operands) == 1 and not isinstance(operands[0], Tensor) else operands
    if not any(t.is_complex() for t in tensors):
        return torch.einsum(equation, *tensors)
    (a, b), (c, d) = (torch.view_as_real(t).unbind(-1) for t in tensors)
    real = torch.einsum(equation, a, c) - torch.einsum(equation, b, d)
    imaginary = torch.einsum(equation, a, d) + torch.einsum(equation, b, c)
    return torch.view_as_complex(torch.stack([real, imaginary], -1))


def real_part(tensor: Tensor) -> Tensor:
    """Return the real part."""
    return torch.view_as_real(tensor)[..., 0] if tensor.is_complex() else tensor


def tolist(tensor: Tensor) -> Any:
    """Return the numbers of a tensor that is no input: they are known while tracing (sizes, kept in a buffer)."""
    if isinstance(tensor, FakeTensor):
        return tensor.tolist()
    with _disable_current_modes():
        return tensor.tolist()


def erfinv(x: Tensor) -> Tensor:
    """Return the inverse error function: Giles' polynomials and one Newton step, exact to float32.

    ONNX has no such operator. Source: M. Giles, "Approximating the erfinv function", 2010, single precision.
    """
    w = -torch.log((1 - x) * (1 + x))
    near, far = w - 2.5, torch.sqrt(w.clamp(min=5)) - 3
    p, q = torch.full_like(x, _GILES_NEAR[0]), torch.full_like(x, _GILES_FAR[0])
    for a, b in zip(_GILES_NEAR[1:], _GILES_FAR[1:], strict=True):
        p, q = a + p * near, b + q * far
    y = torch.where(w < 5, p, q) * x
    return y - (torch.erf(y) - x) / (2 / math.sqrt(math.pi) * torch.exp(-y * y))


_GILES_NEAR = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503,
               -0.00417768164, 0.246640727, 1.50140941)  # fmt: skip
_GILES_FAR = (-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613,
              0.00943887047, 1.00167406, 2.83297682)  # fmt: skip

REPLACED: dict[Any, Callable[..., Any]] = {
    vars(torch._C.TensorBase)["data"].__get__: torch.detach,  # a traced tensor has no data of its own
    torch.linalg.solve: solve,
    torch.linalg.inv: inverse,
    torch.inverse: inverse,
    torch.sparse_coo_tensor: scatter_dense,
    torch.Tensor.view: view,
    torch.Tensor.unsqueeze: unsqueeze,
    torch.unsqueeze: unsqueeze,
    torch.Tensor.__getitem__: getitem,
    torch.Tensor.bmm: torch.matmul,  # one matrix for all rows will do
    torch.bmm: torch.matmul,
    # What is sparse is traced dense.
    torch.erfinv: erfinv,
    torch.special.erfinv: erfinv,
    torch.Tensor.erfinv: erfinv,
    torch.Tensor.to_dense: lambda tensor, *_, **__: tensor,
    torch.Tensor.coalesce: lambda tensor: tensor,
    torch.Tensor._nnz: lambda tensor: tensor.numel(),
    torch.sparse.mm: torch.matmul,
    torch.Tensor.tolist: tolist,
    # ONNX has no complex numbers.
    torch.fft.fft: fft,
    torch.fft.ifft: ifft,
    torch.functional.einsum: einsum,
    vars(torch._C.TensorBase)["real"].__get__: real_part,
}
