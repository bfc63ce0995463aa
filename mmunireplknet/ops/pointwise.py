"""The pointwise half of a block: few passes over memory, and little kept for the backward pass.

The functions take (N, H, W, C) maps. What touches every pixel are the kernels ``apply``, ``sums`` and ``grad``, on the
CPU those of ``csrc/cpu/pointwise.h``, which need contiguous memory, on a GPU those of ``gpu/pointwise.py``, where a map
may as well be the view of one in NCHW. Everything that depends on images and channels alone, (N, C), is computed as
``coefficients`` says. Gradients are exact and cannot be differentiated again.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .coefficients import Excitation
from .linear import linear, once_differentiable, product, without_autocast
from .moments import share_moments, sum_over_processes
from .pointwise_kernels import are_triton, coefficients_for, passes_for

__all__ = ['Statistics', 'add', 'excite', 'gate', 'grn_mlp', 'normalize']


def _sums(x: Tensor, grad: Tensor | None = None, pivot: Tensor | None = None, gelu: bool = False,
          out: Tensor | None = None, *affine: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums over the pixels, (N, C) each: of a and a^2, with ``grad`` of grad a and grad, for a = f(x) - pivot.

    ``out`` becomes f(x), with the Triton kernels times a scale plus a shift.
    """
    result = x.new_empty((x.shape[0], 2, x.shape[-1]), dtype=torch.float32)
    passes_for(x).sums(x, grad, pivot, out, result, gelu, *affine)
    first, second = result.unbind(1)
    return first, second


def _apply(x: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None = None,
           gelu: bool = False, out: Tensor | None = None) -> Tensor:  # fmt: skip
    """f(x) * scale + shift + residual; the coefficients are (N, C) or (C,)."""
    out = torch.empty_like(x) if out is None else out
    passes_for(x).apply(x, *_rows(x, scale, shift), residual, out, gelu)
    return out


def _grad(grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor | None, slope: Tensor | None, out: Tensor,
          gelu: bool = False, total: Tensor | None = None) -> Tensor:  # fmt: skip
    """(grad * scale + shift + f(x) * slope) * f'(x); the Triton kernels write its sum over all pixels to ``total``."""
    sums = () if total is None else (total,)
    passes_for(x).grad(grad, x, *_rows(x, scale, shift, slope), out, gelu, *sums)
    return out


def _rows(x: Tensor, *coefficients: Tensor | None) -> list[Tensor | None]:
    """As the kernels take them: on the CPU (N, C)."""
    if are_triton(x):
        return [*coefficients]
    return [None if t is None else t.expand(x.shape[0], -1).contiguous() for t in coefficients]


def _dense(x: Tensor) -> Tensor:
    """``x`` in a layout that the kernels take."""
    return x if are_triton(x) and x.permute(0, 3, 1, 2).is_contiguous() else x.contiguous()


def grn_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, gamma: Tensor, beta: Tensor | None, weight2: Tensor,
    bias2: Tensor | None,
) -> Tensor:  # fmt: skip
    """``linear2(GRN(GELU(linear1(x))))``, keeping ``x`` and the output of ``linear1`` for the backward pass.

    Args:
        x: (N, H, W, C).
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
    return _GrnMlp.apply(x.contiguous(), weight1, bias1, gamma.float(), beta, weight2, bias2, torch.is_grad_enabled())


class _GrnMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor | None, gamma: Tensor, beta: Tensor | None,
        weight2: Tensor, bias2: Tensor | None, keep: bool,
    ) -> Tensor:  # fmt: skip
        hidden = linear(x.flatten(0, 2), weight1, bias1).view(*x.shape[:3], -1)
        y = torch.empty_like(hidden) if keep else hidden
        again = are_triton(x)  # a GPU computes GELU twice in the time it takes to write and read a map
        squares = _sums(hidden, gelu=True, out=None if again else y)[1]
        norm, scale = coefficients_for(x).grn(squares, gamma)
        _apply(hidden if again else y, scale, beta, gelu=again, out=y)
        ctx.save_for_backward(x, hidden, norm, scale, weight1, gamma, beta, weight2)
        return linear(y.flatten(0, 2), weight2, bias2).view(*x.shape[:3], -1)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, hidden, norm, scale, weight1, gamma, beta, weight2 = ctx.saved_tensors
        needs, grad = ctx.needs_input_grad, grad.contiguous().flatten(0, 2)
        grad_weight2: Tensor | None = None
        total: Tensor | None = None
        if are_triton(x):  # the pass that sums writes y as well
            grad_y, y = linear(grad, weight2.t()).view_as(hidden), torch.empty_like(hidden) if needs[5] else None
            grad_scale, grad_shift = _sums(hidden, grad_y, None, True, y, scale, beta)
            grad_weight2 = None if y is None else product(grad, y.flatten(0, 2))
            total = norm.new_empty(norm.shape[1]) if needs[2] else None
            del y
        else:
            if needs[5]:
                grad_weight2 = product(grad, _apply(hidden, scale, beta, gelu=True).flatten(0, 2))
            grad_y = linear(grad, weight2.t()).view_as(hidden)
            grad_scale, grad_shift = _sums(hidden, grad_y, gelu=True)
        slope, grad_gamma = coefficients_for(x).grn_grads(grad_scale, norm, gamma)
        grad_hidden = _grad(grad_y, hidden, scale, None, slope, grad_y, True, total).flatten(0, 2)
        return (
            linear(grad_hidden, weight1.t()).view_as(x) if needs[0] else None,
            _weight_grad(grad_hidden, x.flatten(0, 2)) if needs[1] else None,
            grad_hidden.sum(0) if needs[2] and total is None else total,
            grad_gamma,
            None if beta is None else grad_shift.sum(0),
            grad_weight2,
            grad.sum(0) if needs[6] else None,
            None,
        )


def _weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """(D, C), by grad (P, D) and x (P, C); the other way around, it is quicker on a CPU."""
    return product(grad, x) if are_triton(x) else product(x, grad).t()


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
        x: (N, H, W, C); overwritten where no gradient is recorded.
        weight: (C,).
        bias: (C,).
        statistics: Those to normalize with.
        multiplier: (N, C) or None for 1.
        residual: (N, H, W, C) or None. The result has its dtype, and on a GPU its layout; without one, those of ``x``.

    Returns:
        The map; mean and biased variance (C,) that were used, without gradient, and how many values they are of.
    """
    keep, x = torch.is_grad_enabled(), _dense(x)
    if residual is not None:
        residual = _dense(residual)
        x = x if are_triton(x) else x.to(residual.dtype)
    multiplier = None if multiplier is None else multiplier.contiguous()
    return _Normalize.apply(x, weight.float(), bias.float(), statistics, multiplier, residual, keep)


def gate(
    x: Tensor, weight: Tensor, bias: Tensor, statistics: Statistics,
    down: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:  # fmt: skip
    """Squeeze-and-Excitation of ``BN(x)``: ``b * sigmoid(up(relu(down(mean(b)))))`` with b = BN(x).

    Args:
        x: (N, H, W, C).
        weight: (C,).
        bias: (C,).
        statistics: Those to normalize with.
        down: Weight (R, C) and bias (R,).
        up: Weight (C, R) and bias (C,).

    Returns:
        As ``normalize``; the map is contiguous.
    """
    return _Gate.apply(_dense(x), weight.float(), bias.float(), statistics, *(t.float() for t in (*down, *up)))


@torch.no_grad()
def excite(x: Tensor, sums: Tensor, down: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor]) -> Tensor:
    """Squeeze-and-Excitation of ``x`` (N, H, W, C), whose ``sums`` (N, C) over H and W are known; without gradient.

    Args:
        x: (N, H, W, C).
        sums: (N, C), float32.
        down: Weight (R, C) and bias (R,).
        up: Weight (C, R) and bias (C,).

    Returns:
        (N, H, W, C), contiguous.
    """
    x, gates = _dense(x), coefficients_for(x).gates(sums, x.shape[1] * x.shape[2], down, up)
    return _apply(x, gates, None, out=x.new_empty(x.shape))


@torch.no_grad()
def add(x: Tensor, residual: Tensor) -> Tensor:
    """``x + residual`` for maps (N, H, W, C), in dtype and layout of ``residual``; without gradient."""
    x, residual = _dense(x), _dense(residual)
    return _apply(x if are_triton(x) else x.to(residual.dtype), None, None, residual, out=torch.empty_like(residual))


class _Moments(NamedTuple):
    mean: Tensor  # (C,), to normalize with
    inverse: Tensor  # (C,), of the standard deviation
    image_mean: Tensor  # (N, C), empty if not asked for
    values: int | Tensor  # of a channel in all processes


def _moments(x: Tensor, statistics: Statistics, need_image_mean: bool) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:
    """Mean and variance to normalize with, and what else ``_Moments`` has."""
    pixels = x.shape[1] * x.shape[2]
    values, group = x.shape[0] * pixels, statistics.group
    if statistics.mean is not None and statistics.var is not None:
        mean, var = statistics.mean.float(), statistics.var.float()
        return mean, var, _sums(x)[0] / pixels if need_image_mean else mean.new_empty(0), values
    if values < 2 and group is None:
        raise ValueError(f'Expected more than 1 value per channel when training, got (N, H, W, C) {tuple(x.shape)}.')
    image_mean, mean, var = passes_for(x).moments(x) if are_triton(x) else _cpu_moments(x)
    if group is None:
        return mean.float(), var.float(), image_mean, values
    mean, var, count = share_moments(mean, var, values, group)
    return mean.float(), var.float(), image_mean, count


def _cpu_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means of each image (N, C), and mean and biased variance (C,) of all in float64."""
    pixels = x.shape[1] * x.shape[2]
    # Near the mean, so that the squares do not cancel; one pixel might be anything.
    pivot = x[0].flatten(0, 1)[:: max(1, pixels // 64)].float().mean(0)
    sums = _sums(x, pivot=pivot)
    first, second = (t.double().sum(0) / (x.shape[0] * pixels) for t in sums)
    return sums[0] / pixels + pivot, first + pivot, (second - first.square()).clamp_min(0)


def _grad_normalize(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, m: _Moments, statistics: Statistics,
    multiplier: Tensor | None, sums: tuple[Tensor, Tensor], grad_pooled: Tensor | None, need_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients for x, weight, bias and multiplier, given sum(grad (x - mean)) and sum(grad) for images and channels.

    ``grad_pooled`` (N, C) is that of the mean of BN(x) over the pixels.
    """
    group = statistics.group
    grad_weight, grad_bias, grad_multiplier, scale, shift, slope = coefficients_for(x).normalize_grads(
        sums, weight, bias, m.mean, m.inverse, m.image_mean, multiplier, grad_pooled, x.shape[1] * x.shape[2], m.values,
        None if group is None else functools.partial(sum_over_processes, group=group),
        statistics.mean is None and need_x,
    )  # fmt: skip
    grad_x = _grad(grad, x, scale, shift, slope, torch.empty_like(x)) if need_x else None
    return grad_x, grad_weight, grad_bias, grad_multiplier


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, statistics: Statistics, multiplier: Tensor | None,
        residual: Tensor | None, keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:  # fmt: skip
        mean, var, image_mean, count = _moments(x, statistics, need_image_mean=False)
        inverse, scale, shift = coefficients_for(x).affine(mean, var, statistics.eps, weight, bias, multiplier)
        # Not what `statistics` holds: it might change until then.
        ctx.save_for_backward(x, weight, bias, multiplier, mean, inverse, image_mean)
        ctx.count, ctx.statistics = count, statistics
        ctx.set_materialize_grads(False)  # zeros for mean and variance, which nobody reads
        ctx.mark_non_differentiable(mean, var)
        like = x if residual is None else residual
        out = x if not keep and like.dtype == x.dtype and like.stride() == x.stride() else torch.empty_like(like)
        return _apply(x, scale, shift, residual, out=out), mean, var, count

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
        x, weight, bias, multiplier, mean, inverse, image_mean = ctx.saved_tensors
        grad, m = _dense(grad), _Moments(mean, inverse, image_mean, ctx.count)
        sums = _sums(x, grad, m.mean)
        grad_x, grad_weight, grad_bias, grad_multiplier = _grad_normalize(
            grad, x, weight, bias, m, ctx.statistics, multiplier, sums, None, ctx.needs_input_grad[0]
        )
        return grad_x, grad_weight, grad_bias, None, grad_multiplier, grad if ctx.needs_input_grad[5] else None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, statistics: Statistics,
        down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:  # fmt: skip
        mean, var, image_mean, count = _moments(x, statistics, need_image_mean=True)
        e = coefficients_for(x).excite(
            image_mean, mean, var, statistics.eps, weight, bias, (down, down_bias), (up, up_bias)
        )
        ctx.save_for_backward(x, weight, bias, down, up, mean, image_mean, *e)
        ctx.count, ctx.statistics = count, statistics
        ctx.set_materialize_grads(False)  # zeros for mean and variance, which nobody reads
        ctx.mark_non_differentiable(mean, var)
        return _apply(x, e.scale, e.shift, out=x.new_empty(x.shape)), mean, var, count

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
        x, weight, bias, down, up, mean, image_mean, *rest = ctx.saved_tensors
        grad, e = _dense(grad), Excitation(*rest)
        m = _Moments(mean, e.inverse, image_mean, ctx.count)
        sums = _sums(x, grad, m.mean)
        grad_pooled, parameters = coefficients_for(x).excite_grads(sums, e, weight, bias, down, up)
        grad_x, grad_weight, grad_bias = _grad_normalize(
            grad, x, weight, bias, m, ctx.statistics, e.gates, sums, grad_pooled, ctx.needs_input_grad[0]
        )[:3]
        return grad_x, grad_weight, grad_bias, None, *parameters
