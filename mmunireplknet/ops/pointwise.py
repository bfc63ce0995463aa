"""The pointwise half of a block on the CPU: few passes over memory, and little kept for the backward pass.

The three functions take (N, H, W, C) maps in contiguous memory and need the compiled kernels. Everything that depends
on images and channels alone, (N, C), is computed here; what touches every pixel are the three kernels ``apply``,
``sums`` and ``grad`` of ``csrc/cpu/pointwise.h``. Gradients are exact and cannot be differentiated again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .linear import linear, once_differentiable, product, without_autocast
from .moments import share_moments, sum_over_processes

__all__ = ['Statistics', 'gate', 'grn_mlp', 'normalize']


def _sums(x: Tensor, grad: Tensor | None = None, pivot: Tensor | None = None, gelu: bool = False,
          out: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums over the pixels, (N, C) each: of a and a^2, with ``grad`` of grad a and grad, for a = f(x) - pivot."""
    result = x.new_empty((x.shape[0], 2, x.shape[-1]), dtype=torch.float32)
    torch.ops.mmuni_cpu.sums(x, grad, pivot, out, result, gelu)
    first, second = result.unbind(1)
    return first, second


def _apply(x: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None = None,
           gelu: bool = False, out: Tensor | None = None) -> Tensor:  # fmt: skip
    """f(x) * scale + shift + residual; the coefficients are (N, C)."""
    out = torch.empty_like(x) if out is None else out
    scale, shift = (None if t is None else t.contiguous() for t in (scale, shift))
    torch.ops.mmuni_cpu.apply(x, scale, shift, residual, out, gelu)
    return out


def grn_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, gamma: Tensor, beta: Tensor | None, weight2: Tensor,
    bias2: Tensor | None,
) -> Tensor:  # fmt: skip
    """``linear2(GRN(GELU(linear1(x))))``, keeping ``x`` and the output of ``linear1`` for the backward pass.

    Args:
        x: (N, H, W, C), contiguous.
        weight1: (D, C).
        bias1: (D,) or None.
        gamma: (D,), of the GRN, https://arxiv.org/abs/2301.00808.
        beta: (D,) or None.
        weight2: (E, D).
        bias2: (E,) or None.

    Returns:
        (N, H, W, E).
    """
    beta = None if beta is None else beta.float()
    return _GrnMlp.apply(x, weight1, bias1, gamma.float(), beta, weight2, bias2, torch.is_grad_enabled())


class _GrnMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor | None, gamma: Tensor, beta: Tensor | None,
        weight2: Tensor, bias2: Tensor | None, keep: bool,
    ) -> Tensor:  # fmt: skip
        hidden = linear(x.flatten(0, 2), weight1, bias1).view(*x.shape[:3], -1)
        y = torch.empty_like(hidden) if keep else hidden
        squares = _sums(hidden, gelu=True, out=y)[1]
        norm = squares.sqrt()
        mean = norm.mean(1, keepdim=True) + 1e-6
        scale = gamma * norm / mean + 1
        shift = None if beta is None else beta.expand_as(scale)
        _apply(y, scale, shift, out=y)
        ctx.save_for_backward(x, hidden, norm, weight1, gamma, beta, weight2)
        return linear(y.flatten(0, 2), weight2, bias2).view(*x.shape[:3], -1)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, hidden, norm, weight1, gamma, beta, weight2 = ctx.saved_tensors
        needs, grad = ctx.needs_input_grad, grad.contiguous().flatten(0, 2)
        mean = norm.mean(1, keepdim=True) + 1e-6
        scale = gamma * norm / mean + 1
        grad_weight2 = None
        if needs[5]:
            y = _apply(hidden, scale, None if beta is None else beta.expand_as(scale), gelu=True)
            grad_weight2 = product(grad, y.flatten(0, 2))
            del y
        grad_y = linear(grad, weight2.t()).view_as(hidden)
        grad_scale, grad_shift = _sums(hidden, grad_y, gelu=True)
        grad_ratio = grad_scale * gamma
        grad_norm = grad_ratio / mean - (grad_ratio * norm).mean(1, keepdim=True) / mean.square()
        slope = torch.where(norm > 0, grad_norm / norm, 0.0)  # a channel without a signal has none to normalize
        torch.ops.mmuni_cpu.grad(grad_y, hidden, scale, None, slope.contiguous(), grad_y, True)
        grad_hidden = grad_y.flatten(0, 2)
        return (
            linear(grad_hidden, weight1.t()).view_as(x) if needs[0] else None,
            product(x.flatten(0, 2), grad_hidden).t() if needs[1] else None,
            grad_hidden.sum(0) if needs[2] else None,
            (grad_scale * norm / mean).sum(0),
            None if beta is None else grad_shift.sum(0),
            grad_weight2,
            grad.sum(0) if needs[6] else None,
            None,
        )


class Statistics(NamedTuple):
    """What a BN normalizes with: the statistics of the batch, or those that it has kept (``mean`` and ``var``)."""

    eps: float
    mean: Tensor | None = None
    var: Tensor | None = None
    group: dist.ProcessGroup | None = None


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor, statistics: Statistics, multiplier: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:  # fmt: skip
    """``BN(x) * multiplier + residual``.

    Args:
        x: (N, H, W, C), contiguous; overwritten where no gradient is recorded.
        weight: (C,).
        bias: (C,).
        statistics: Those to normalize with.
        multiplier: (N, C) or None for 1.
        residual: (N, H, W, C), contiguous, or None.

    Returns:
        The map; mean and biased variance (C,) that were used, without gradient, and how many values they are of.
    """
    keep = torch.is_grad_enabled()
    return _Normalize.apply(x, weight.float(), bias.float(), statistics, multiplier, residual, keep)


def gate(
    x: Tensor, weight: Tensor, bias: Tensor, statistics: Statistics,
    down: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:  # fmt: skip
    """Squeeze-and-Excitation of ``BN(x)``: ``b * sigmoid(up(relu(down(mean(b)))))`` with b = BN(x).

    Args:
        x: (N, H, W, C), contiguous.
        weight: (C,).
        bias: (C,).
        statistics: Those to normalize with.
        down: Weight (R, C) and bias (R,).
        up: Weight (C, R) and bias (C,).

    Returns:
        As ``normalize``.
    """
    return _Gate.apply(x, weight.float(), bias.float(), statistics, *(t.float() for t in (*down, *up)))


class _Moments(NamedTuple):
    mean: Tensor  # (C,), to normalize with
    inverse: Tensor  # (C,), of the standard deviation
    image_mean: Tensor  # (N, C), empty if not asked for
    pixels: int | Tensor  # values of a channel in all processes


def _moments(x: Tensor, statistics: Statistics, need_image_mean: bool) -> tuple[_Moments, Tensor]:
    """What the backward pass needs, too, and the variance (C,)."""
    pixels = x.shape[1] * x.shape[2]
    count: int | Tensor = x.shape[0] * pixels
    group = statistics.group
    if statistics.mean is not None and statistics.var is not None:
        mean, var = statistics.mean.float(), statistics.var.float()
        image_mean = _sums(x)[0] / pixels if need_image_mean else mean.new_empty(0)
    else:
        # Near the mean, so that the squares do not cancel; one pixel might be anything.
        pivot = x[0].flatten(0, 1)[:: max(1, pixels // 64)].float().mean(0)
        first, second = _sums(x, pivot=pivot)
        image_mean = first / pixels + pivot
        first, second = first.double().sum(0), second.double().sum(0)
        if count < 2 and group is None:
            raise ValueError(
                f'Expected more than 1 value per channel when training, got (N, H, W, C) {tuple(x.shape)}.'
            )
        offset = first / count
        mean, var = offset + pivot, (second / count - offset.square()).clamp_min(0)
        if group is not None:
            mean, var, count = share_moments(mean, var, x.shape[0] * pixels, group)
        mean, var = mean.float(), var.float()
    return _Moments(mean, torch.rsqrt(var + statistics.eps), image_mean, count), var


def _grad_normalize(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, m: _Moments, statistics: Statistics,
    multiplier: Tensor | None, sums: tuple[Tensor, Tensor], grad_pooled: Tensor | None, need_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Gradients for x, weight and bias, given sum(grad (x - mean)) and sum(grad) for every image and channel.

    ``grad_pooled`` (N, C) is that of the mean of BN(x) over the pixels.
    """
    first, second = sums if multiplier is None else (multiplier * t for t in sums)
    local = torch.stack([(first * m.inverse).sum(0), second.sum(0)])
    if grad_pooled is not None:
        local += torch.stack([(grad_pooled * (m.image_mean - m.mean) * m.inverse).sum(0), grad_pooled.sum(0)])
    grad_weight, grad_bias = local
    if not need_x:
        return None, grad_weight, grad_bias
    gain = weight * m.inverse
    scale = gain.expand_as(first) if multiplier is None else gain * multiplier
    shift = torch.zeros_like(first) if grad_pooled is None else gain * grad_pooled / (x.shape[1] * x.shape[2])
    slope = None
    if statistics.mean is None:
        # The gradients of the sums of x and x^2 over all processes, as `share_moments` takes them.
        tilt = gain * m.inverse * local[0] / m.pixels
        shared = torch.cat([m.mean * tilt - gain * local[1] / m.pixels, -tilt / 2, tilt.new_zeros(1)])
        if statistics.group is not None:
            shared = sum_over_processes(shared.double(), statistics.group).float()
        grad_sum, grad_squares = shared[:-1].chunk(2)
        shift = shift + grad_sum
        slope = (2 * grad_squares).expand_as(first).contiguous()
    grad_x = torch.empty_like(x)
    torch.ops.mmuni_cpu.grad(grad, x, scale.contiguous(), shift.contiguous(), slope, grad_x, False)
    return grad_x, grad_weight, grad_bias


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, statistics: Statistics, multiplier: Tensor | None,
        residual: Tensor | None, keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:  # fmt: skip
        m, var = _moments(x, statistics, need_image_mean=False)
        scale = (weight * m.inverse).expand(x.shape[0], -1)
        shift = (bias - m.mean * weight * m.inverse).expand_as(scale)
        if multiplier is not None:
            scale, shift = scale * multiplier, shift * multiplier
        ctx.save_for_backward(x, weight, bias, multiplier, *m[:3])  # kept statistics might change until then
        ctx.pixels, ctx.statistics = m.pixels, statistics
        ctx.mark_non_differentiable(m.mean, var)
        return _apply(x, scale, shift, residual, out=None if keep else x), m.mean, var, m.pixels

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
        x, weight, bias, multiplier, mean, inverse, image_mean = ctx.saved_tensors
        grad, m = grad.contiguous(), _Moments(mean, inverse, image_mean, ctx.pixels)
        sums = _sums(x, grad, m.mean)
        grad_x, grad_weight, grad_bias = _grad_normalize(
            grad, x, weight, bias, m, ctx.statistics, multiplier, sums, None, ctx.needs_input_grad[0]
        )
        grad_multiplier = None if multiplier is None else weight * m.inverse * sums[0] + bias * sums[1]
        return grad_x, grad_weight, grad_bias, None, grad_multiplier, grad if ctx.needs_input_grad[5] else None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, statistics: Statistics,
        down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:  # fmt: skip
        m, var = _moments(x, statistics, need_image_mean=True)
        gain = weight * m.inverse
        pooled = gain * (m.image_mean - m.mean) + bias
        squeezed = torch.addmm(down_bias, pooled, down.t()).relu_()
        gates = torch.addmm(up_bias, squeezed, up.t()).sigmoid_()
        ctx.save_for_backward(x, weight, bias, pooled, squeezed, gates, down, up, *m[:3])
        ctx.pixels, ctx.statistics = m.pixels, statistics
        ctx.mark_non_differentiable(m.mean, var)
        return _apply(x, gain * gates, (bias - m.mean * gain) * gates), m.mean, var, m.pixels

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
        x, weight, bias, pooled, squeezed, gates, down, up, mean, inverse, image_mean = ctx.saved_tensors
        grad, m = grad.contiguous(), _Moments(mean, inverse, image_mean, ctx.pixels)
        sums = _sums(x, grad, m.mean)
        grad_gates = weight * m.inverse * sums[0] + bias * sums[1]
        grad_up_out = grad_gates * gates * (1 - gates)
        grad_down_out = (grad_up_out @ up) * (squeezed > 0)
        grad_x, grad_weight, grad_bias = _grad_normalize(
            grad, x, weight, bias, m, ctx.statistics, gates, sums, grad_down_out @ down, ctx.needs_input_grad[0]
        )
        return (
            grad_x, grad_weight, grad_bias, None,
            grad_down_out.t() @ pooled, grad_down_out.sum(0), grad_up_out.t() @ squeezed, grad_up_out.sum(0),
        )  # fmt: skip
