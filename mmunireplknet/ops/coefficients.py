"""What the pointwise half of a block computes for images and channels alone, (N, C), in plain torch.

``csrc/cpu/pointwise.h`` and ``gpu/pointwise.py`` then touch every pixel; ``gpu/coefficients.py`` has the same as this
in few kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ['Excitation', 'affine', 'excite', 'excite_grads', 'gates', 'grn', 'grn_grads', 'normalize_grads']


def affine(
    mean: Tensor, var: Tensor, eps: float, weight: Tensor, bias: Tensor, multiplier: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One over the standard deviation (C,), and scale and shift of ``BN(x) * multiplier``, (C,) or (N, C) like it."""
    inverse = torch.rsqrt(var + eps)
    scale, shift = weight * inverse, bias - mean * weight * inverse
    if multiplier is not None:
        scale, shift = scale * multiplier, shift * multiplier
    return inverse, scale, shift


class Excitation(NamedTuple):
    """What Squeeze-and-Excitation of ``BN(x)`` makes of the means of x."""

    inverse: Tensor  # (C,), of the standard deviation
    pooled: Tensor  # (N, C), means of BN(x)
    squeezed: Tensor  # (N, R)
    gates: Tensor  # (N, C)
    scale: Tensor  # (N, C), of BN(x) * gates
    shift: Tensor  # (N, C)


def excite(
    image_mean: Tensor, mean: Tensor, var: Tensor, eps: float, weight: Tensor, bias: Tensor,
    down: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor],
) -> Excitation:  # fmt: skip
    """Gates by the means (N, C) of each image; ``down`` and ``up`` are weight (R, C) or (C, R) and bias."""
    inverse = torch.rsqrt(var + eps)
    gain = weight * inverse
    pooled = gain * (image_mean - mean) + bias
    squeezed = torch.addmm(down[1], pooled, down[0].t()).relu_()
    gates = torch.addmm(up[1], squeezed, up[0].t()).sigmoid_()
    return Excitation(inverse, pooled, squeezed, gates, gain * gates, (bias - mean * gain) * gates)


def gates(sums: Tensor, pixels: int, down: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor]) -> Tensor:
    """Gates (N, C) of Squeeze-and-Excitation, by the sums (N, C) over the pixels of each image; without gradient."""
    (down_weight, down_bias), (up_weight, up_bias) = ([t.to(sums.dtype) for t in pair] for pair in (down, up))
    squeezed = torch.addmm(down_bias, sums / pixels, down_weight.t()).relu_()
    return torch.addmm(up_bias, squeezed, up_weight.t()).sigmoid_()


def excite_grads(
    sums: tuple[Tensor, Tensor], e: Excitation, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Gradients of the means of BN(x), (N, C), and of weight and bias of down and up, see ``normalize_grads``."""
    grad_gates = weight * e.inverse * sums[0] + bias * sums[1]
    grad_up_out = grad_gates * e.gates * (1 - e.gates)
    grad_down_out = (grad_up_out @ up) * (e.squeezed > 0)
    parameters = (
        grad_down_out.t() @ e.pooled, grad_down_out.sum(0), grad_up_out.t() @ e.squeezed, grad_up_out.sum(0),
    )  # fmt: skip
    return grad_down_out @ down, parameters


def grn(squares: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Norms (N, D) and scale (N, D) of a GRN, by the sums of squares (N, D)."""
    norm = squares.sqrt()
    return norm, gamma * norm / (norm.mean(1, keepdim=True) + 1e-6) + 1


def grn_grads(grad_scale: Tensor, norm: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """The factor (N, D) of the map in its own gradient, and the gradient of gamma (D,), by that of the scale (N, D)."""
    mean = norm.mean(1, keepdim=True) + 1e-6
    grad_ratio = grad_scale * gamma
    grad_norm = grad_ratio / mean - (grad_ratio * norm).mean(1, keepdim=True) / mean.square()
    slope = torch.where(norm > 0, grad_norm / norm, 0.0)  # a channel without a signal has none to normalize
    return slope, (grad_scale * norm / mean).sum(0)


def normalize_grads(
    sums: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, image_mean: Tensor,
    multiplier: Tensor | None, grad_pooled: Tensor | None, pixels: int, count: int | Tensor,
    share: Callable[[Tensor], Tensor] | None, of_batch: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of ``BN(x) * multiplier``, but for that of x, which is ``grad * scale + shift + x * slope``.

    Args:
        sums: Of grad (x - mean) and of grad over the pixels of each image, (N, C).
        weight: (C,).
        bias: (C,).
        mean: (C,), that was used.
        inverse: (C,), of the standard deviation.
        image_mean: (N, C) of x; used with ``grad_pooled`` alone.
        multiplier: (N, C) or None for 1.
        grad_pooled: (N, C), the gradient of the means of BN(x), or None.
        pixels: Of an image.
        count: Values of a channel in all processes.
        share: Sums over all processes; None where there is one.
        of_batch: Whether mean and variance are those of the batch, and depend on x.

    Returns:
        Gradients of weight and bias, (C,), and of multiplier, (N, C), None without one or with ``grad_pooled``; scale,
        shift and slope, (N, C) or (C,), the last two None for 0.
    """
    grad_multiplier = None
    if multiplier is not None and grad_pooled is None:
        grad_multiplier = weight * inverse * sums[0] + bias * sums[1]
    first, second = sums if multiplier is None else (multiplier * t for t in sums)
    local = torch.stack([(first * inverse).sum(0), second.sum(0)])
    if grad_pooled is not None:
        local += torch.stack([(grad_pooled * (image_mean - mean) * inverse).sum(0), grad_pooled.sum(0)])
    gain = weight * inverse
    scale = gain if multiplier is None else gain * multiplier
    shift = None if grad_pooled is None else gain * grad_pooled / pixels
    slope = None
    if of_batch:
        # The gradients of the sums of x and x^2 over all processes, as `share_moments` takes them.
        tilt = gain * inverse * local[0] / count
        shared = torch.cat([mean * tilt - gain * local[1] / count, -tilt / 2, tilt.new_zeros(1)])
        if share is not None:
            shared = share(shared.double()).float()
        grad_sum, grad_squares = shared[:-1].chunk(2)
        shift = grad_sum if shift is None else shift + grad_sum
        slope = 2 * grad_squares
    return local[0], local[1], grad_multiplier, scale, shift, slope
