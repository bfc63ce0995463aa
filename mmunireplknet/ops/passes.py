"""What the kernels between the matrix products of a block compute, in plain torch: for every device and dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['apply', 'grad', 'moments', 'sums']


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(t: Tensor, x: Tensor) -> Tensor:
    """Coefficients (N, C) or (C,) for a map ``x`` (N, ..., C)."""
    return t.view(t.shape[0], *(1,) * (x.dim() - 2), t.shape[1]) if t.dim() == 2 else t


def _affine(value: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    value = value if scale is None else value * _rows(scale, value)
    return value if shift is None else value + _rows(shift, value)


def apply(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, out: Tensor, gelu: bool = False
) -> None:
    """``out = f(x) * scale + shift + residual``, f being GELU or nothing.

    Args:
        x: (N, ..., C).
        scale: (N, C) or (C,); None for 1.
        shift: Like ``scale``; None for 0.
        residual: Like ``x``, or None.
        out: Like ``x``; may be ``x`` or ``residual``.
        gelu: Whether f is GELU.
    """
    value = _affine(F.gelu(_wide(x)) if gelu else _wide(x), scale, shift)
    out.copy_(value if residual is None else value + residual)


def grad(
    grad: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, slope: Tensor | None, out: Tensor,
    gelu: bool = False, total: Tensor | None = None,
) -> None:  # fmt: skip
    """``out = (grad * scale + shift + f(x) * slope) * f'(x)``, see ``apply``.

    Args:
        grad: (N, ..., C).
        x: Like ``grad``.
        scale: (N, C) or (C,); None for 1.
        shift: Like ``scale``; None for 0.
        slope: Like ``scale``; None for 0.
        out: Like ``grad``; may be ``grad`` or ``x``.
        gelu: Whether f is GELU.
        total: (C,), for the sum of ``out`` over all pixels; None for none.
    """
    x = _wide(x)
    value = _affine(_wide(grad), scale, shift)
    if slope is not None:
        value = value + (F.gelu(x) if gelu else x) * _rows(slope, x)
    if gelu:
        value = torch.ops.aten.gelu_backward(value, x)
    out.copy_(value)
    if total is not None:
        total.copy_(value.flatten(0, -2).sum(0))


def sums(
    x: Tensor, grad: Tensor | None, pivot: Tensor | None, out: Tensor | None, result: Tensor, gelu: bool = False,
    scale: Tensor | None = None, shift: Tensor | None = None,
) -> None:  # fmt: skip
    """Sums over the pixels of each image: of a and a^2 or, with ``grad``, of grad a and grad, for a = f(x) - pivot.

    Args:
        x: (N, ..., C).
        grad: Like ``x``, or None.
        pivot: (C,); None for 0.
        out: Like ``x``, for ``f(x) * scale + shift``; may be ``x``; None where that is not needed.
        result: (N, 2, C), for the sums.
        gelu: Whether f is GELU.
        scale: (N, C) or (C,); None for 1.
        shift: Like ``scale``; None for 0.
    """
    value = F.gelu(_wide(x)) if gelu else _wide(x)
    if out is not None:
        out.copy_(_affine(value, scale, shift))
    a = value if pivot is None else value - pivot
    pair = (a, a.square()) if grad is None else (a * _wide(grad), _wide(grad))
    result.copy_(torch.stack([t.flatten(1, -2).sum(1) for t in pair], 1))


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means of each image (N, C), and mean and biased variance (C,) of all, of ``x`` (N, ..., C)."""
    values = _wide(x).flatten(1, -2)
    var, mean = torch.var_mean(values, (0, 1), correction=0)
    return values.mean(1), mean, var
