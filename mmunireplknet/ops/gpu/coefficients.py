# mypy: allow-untyped-defs, disable-error-code="assignment"
"""What a block computes for images and channels alone, in Triton: ``ops/coefficients.py`` in few kernels.

Some thousand numbers each, in float32: as many kernels as torch takes for them, two to three dozen a norm, would take
longer than the passes over the maps. All sums have a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..coefficients import Excitation

__all__ = ['affine', 'excite', 'excite_grads', 'gates', 'grn', 'grn_grads', 'normalize_grads']

_BLOCK = 128  # channels of a program


@triton.jit
def _norm_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channel, inside):
    """Mean, one over the standard deviation, scale and shift of a norm; of none where there is no ``mean_ptr``."""
    zero = tl.zeros(channel.shape, tl.float32)
    if mean_ptr is None:
        return zero, zero + 1, zero + 1, zero
    else:
        mean = tl.load(mean_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        var = tl.load(var_ptr + channel, mask=inside, other=1.0).to(tl.float32)
        weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        return mean, 1 / tl.sqrt_rn(var + eps), weight, bias


@triton.jit(do_not_specialize=['channels', 'eps'])
def _affine_kernel(
    mean_ptr, var_ptr, weight_ptr, bias_ptr, multiplier_ptr, inverse_ptr, scale_ptr, shift_ptr, channels, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    mean, inverse, weight, bias = _norm_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channel, inside)
    scale = weight * inverse
    shift = bias - mean * scale
    place = image * channels + channel
    if multiplier_ptr is not None:
        multiplier = tl.load(multiplier_ptr + place, mask=inside, other=0.0)
        scale, shift = scale * multiplier, shift * multiplier
    tl.store(scale_ptr + place, scale, mask=inside)
    tl.store(shift_ptr + place, shift, mask=inside)
    if image == 0:
        tl.store(inverse_ptr + channel, inverse, mask=inside)


def affine(
    mean: Tensor, var: Tensor, eps: float, weight: Tensor, bias: Tensor, multiplier: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``ops.coefficients``."""
    inverse = torch.empty_like(mean)
    scale, shift = (torch.empty_like(mean if multiplier is None else multiplier) for _ in range(2))
    n, c = (1, len(mean)) if multiplier is None else multiplier.shape
    with torch.cuda.device_of(mean):
        _affine_kernel[(triton.cdiv(c, _BLOCK), n)](
            mean, var, weight, bias, multiplier, inverse, scale, shift, c, eps, _BLOCK
        )
    return inverse, scale, shift


@triton.jit(do_not_specialize=['channels', 'inner', 'eps', 'factor'])
def _squeeze_kernel(
    means_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, down_ptr, down_bias_ptr, inverse_ptr, pooled_ptr, squeezed_ptr,
    channels, inner, eps, factor, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, channels, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        inside = channel < channels
        mean, inverse, weight, bias = _norm_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channel, inside)
        pooled = tl.load(means_ptr + image * channels + channel, mask=inside, other=0.0).to(tl.float32) * factor
        pooled = tl.where(inside, (pooled - mean) * (weight * inverse) + bias, 0.0)
        place = row[:, None] * channels + channel[None, :]
        down = tl.load(down_ptr + place, mask=(row < inner)[:, None] & inside[None, :], other=0.0)
        total += down.to(tl.float32) * pooled[None, :]
        if tl.program_id(0) == 0:
            if pooled_ptr is not None:
                tl.store(pooled_ptr + image * channels + channel, pooled, mask=inside)
            if inverse_ptr is not None and tl.program_id(1) == 0:
                tl.store(inverse_ptr + channel, inverse, mask=inside)
    squeezed = tl.sum(total, axis=1) + tl.load(down_bias_ptr + row, mask=row < inner, other=0.0).to(tl.float32)
    tl.store(squeezed_ptr + image * inner + row, tl.maximum(squeezed, 0.0), mask=row < inner)


@triton.jit(do_not_specialize=['channels', 'inner', 'eps'])
def _excite_kernel(
    squeezed_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, up_ptr, up_bias_ptr, gates_ptr, scale_ptr, shift_ptr,
    channels, inner, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = channel < channels
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, inner, BLOCK):
        row = start + tl.arange(0, BLOCK)
        squeezed = tl.load(squeezed_ptr + image * inner + row, mask=row < inner, other=0.0)
        place = channel[:, None] * inner + row[None, :]
        up = tl.load(up_ptr + place, mask=inside[:, None] & (row < inner)[None, :], other=0.0)
        total += up.to(tl.float32) * squeezed[None, :]
    value = tl.sum(total, axis=1) + tl.load(up_bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    gates = 1 / (1 + tl.exp(-value))
    place = image * channels + channel
    tl.store(gates_ptr + place, gates, mask=inside)
    if mean_ptr is not None:
        mean, inverse, weight, bias = _norm_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channel, inside)
        tl.store(scale_ptr + place, weight * inverse * gates, mask=inside)
        tl.store(shift_ptr + place, (bias - mean * (weight * inverse)) * gates, mask=inside)


def excite(
    image_mean: Tensor, mean: Tensor, var: Tensor, eps: float, weight: Tensor, bias: Tensor,
    down: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor],
) -> Excitation:  # fmt: skip
    """See ``ops.coefficients``."""
    inverse, squeezed = torch.empty_like(mean), image_mean.new_empty((len(image_mean), len(down[1])))
    pooled, gates, scale, shift = (torch.empty_like(image_mean) for _ in range(4))
    norm = (mean, var, weight, bias)
    _squeeze(image_mean, norm, down, inverse, pooled, squeezed, eps, 1.0)
    _excite(squeezed, norm, up, gates, scale, shift, eps)
    return Excitation(inverse, pooled, squeezed, gates, scale, shift)


def gates(sums: Tensor, pixels: int, down: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor]) -> Tensor:
    """See ``ops.coefficients``."""
    squeezed, result = sums.new_empty((len(sums), len(down[1]))), torch.empty_like(sums)
    _squeeze(sums, (None,) * 4, down, None, None, squeezed, 0.0, 1 / pixels)
    _excite(squeezed, (None,) * 4, up, result, None, None, 0.0)
    return result


def _squeeze(
    means: Tensor, norm: tuple, down: tuple[Tensor, Tensor], inverse: Tensor | None, pooled: Tensor | None,
    squeezed: Tensor, eps: float, factor: float,
) -> None:  # fmt: skip
    (n, inner), c = squeezed.shape, means.shape[1]
    with torch.cuda.device_of(means):
        _squeeze_kernel[(triton.cdiv(inner, 16), n)](
            means, *norm, down[0].contiguous(), down[1], inverse, pooled, squeezed, c, inner, eps, factor, 16, _BLOCK
        )


def _excite(
    squeezed: Tensor, norm: tuple, up: tuple[Tensor, Tensor], gates: Tensor, scale: Tensor | None,
    shift: Tensor | None, eps: float,
) -> None:  # fmt: skip
    (n, inner), c = squeezed.shape, gates.shape[1]
    with torch.cuda.device_of(squeezed):
        _excite_kernel[(triton.cdiv(c, 32), n)](
            squeezed, *norm, up[0].contiguous(), up[1], gates, scale, shift, c, inner, eps, 32, 64
        )


@triton.jit(do_not_specialize=['channels', 'step'])
def _gate_grad_kernel(
    first_ptr, second_ptr, weight_ptr, bias_ptr, inverse_ptr, gates_ptr, result_ptr, channels, step,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    first = tl.load(first_ptr + image * step + channel, mask=inside, other=0.0)
    second = tl.load(second_ptr + image * step + channel, mask=inside, other=0.0)
    gain = tl.load(weight_ptr + channel, mask=inside, other=0.0)
    gain *= tl.load(inverse_ptr + channel, mask=inside, other=0.0)
    value = gain * first + tl.load(bias_ptr + channel, mask=inside, other=0.0) * second
    gates = tl.load(gates_ptr + image * channels + channel, mask=inside, other=0.0)
    tl.store(result_ptr + image * channels + channel, value * gates * (1 - gates), mask=inside)


def excite_grads(
    sums: tuple[Tensor, Tensor], e: Excitation, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """See ``ops.coefficients``."""
    grad_up_out, (n, c) = torch.empty_like(e.gates), e.gates.shape
    with torch.cuda.device_of(e.gates):
        _gate_grad_kernel[(triton.cdiv(c, _BLOCK), n)](
            *sums, weight, bias, e.inverse, e.gates, grad_up_out, c, _step(*sums), _BLOCK
        )
    grad_down_out = torch.ops.aten.threshold_backward(grad_up_out @ up, e.squeezed, 0)
    parameters = (
        grad_down_out.t() @ e.pooled, grad_down_out.sum(0), grad_up_out.t() @ e.squeezed, grad_up_out.sum(0),
    )  # fmt: skip
    return grad_down_out @ down, parameters


def _step(*tensors: Tensor) -> int:
    """How far the rows of tensors (N, C) are apart, in all of them."""
    steps = {t.stride(0) for t in tensors}
    if len(steps) > 1 or any(t.stride(1) != 1 and t.shape[1] > 1 for t in tensors):
        raise ValueError(f'rows must be as far apart in all tensors, not {[t.stride() for t in tensors]}.')
    return steps.pop()


@triton.jit(do_not_specialize=['channels', 'step'])
def _grn_kernel(squares_ptr, gamma_ptr, norm_ptr, scale_ptr, channels, step, BLOCK: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < channels
    norm = tl.sqrt_rn(tl.load(squares_ptr + image * step + channel, mask=inside, other=0.0))
    mean = tl.sum(norm, axis=0) / channels + 1e-6
    scale = tl.load(gamma_ptr + channel, mask=inside, other=0.0) * norm / mean + 1
    tl.store(norm_ptr + image * channels + channel, norm, mask=inside)
    tl.store(scale_ptr + image * channels + channel, scale, mask=inside)


def grn(squares: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """See ``ops.coefficients``."""
    n, c = squares.shape
    norm, scale = (squares.new_empty((n, c)) for _ in range(2))
    with torch.cuda.device_of(squares):
        _grn_kernel[(n,)](squares, gamma, norm, scale, c, _step(squares), triton.next_power_of_2(c), num_warps=8)
    return norm, scale


@triton.jit(do_not_specialize=['channels', 'step'])
def _grn_grad_kernel(grad_ptr, norm_ptr, gamma_ptr, slope_ptr, result_ptr, channels, step, BLOCK: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < channels
    grad = tl.load(grad_ptr + image * step + channel, mask=inside, other=0.0)
    norm = tl.load(norm_ptr + image * channels + channel, mask=inside, other=0.0)
    mean = tl.sum(norm, axis=0) / channels + 1e-6
    ratio = grad * tl.load(gamma_ptr + channel, mask=inside, other=0.0)
    grad_norm = ratio / mean - tl.sum(ratio * norm, axis=0) / channels / (mean * mean)
    # A channel without a signal has none to normalize.
    slope = tl.where(norm > 0, grad_norm / tl.where(norm > 0, norm, 1.0), 0.0)
    tl.store(slope_ptr + image * channels + channel, slope, mask=inside)
    tl.store(result_ptr + image * channels + channel, grad * norm / mean, mask=inside)


def grn_grads(grad_scale: Tensor, norm: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """See ``ops.coefficients``."""
    slope, of_images, (n, c) = torch.empty_like(norm), torch.empty_like(norm), norm.shape
    with torch.cuda.device_of(norm):
        _grn_grad_kernel[(n,)](
            grad_scale, norm, gamma, slope, of_images, c, _step(grad_scale), triton.next_power_of_2(c), num_warps=8
        )
    return slope, of_images.sum(0)


@triton.jit(do_not_specialize=['images', 'channels', 'step', 'count'])
def _norm_sums_kernel(
    first_ptr, second_ptr, weight_ptr, bias_ptr, mean_ptr, inverse_ptr, image_mean_ptr, multiplier_ptr, pooled_ptr,
    local_ptr, multiplied_ptr, shared_ptr, images, channels, step, count, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    within = channel < channels
    weight = tl.load(weight_ptr + channel, mask=within, other=0.0)
    inverse = tl.load(inverse_ptr + channel, mask=within, other=0.0)
    mean = tl.load(mean_ptr + channel, mask=within, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=within, other=0.0)
    grad_weight, grad_bias = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, images, ROWS):
        image = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (image < images) & within[None, :]
        place = image * channels + channel[None, :]
        first = tl.load(first_ptr + image * step + channel[None, :], mask=inside, other=0.0)
        second = tl.load(second_ptr + image * step + channel[None, :], mask=inside, other=0.0)
        if multiplied_ptr is not None:
            value = (weight * inverse)[None, :] * first + bias[None, :] * second
            tl.store(multiplied_ptr + place, value, mask=inside)
        if multiplier_ptr is not None:
            multiplier = tl.load(multiplier_ptr + place, mask=inside, other=0.0)
            first, second = first * multiplier, second * multiplier
        if pooled_ptr is not None:
            pooled = tl.load(pooled_ptr + place, mask=inside, other=0.0)
            image_mean = tl.load(image_mean_ptr + place, mask=inside, other=0.0)
            first += pooled * (image_mean - mean[None, :])
            second += pooled
        grad_weight += first * inverse[None, :]
        grad_bias += second
    grad_weight, grad_bias = tl.sum(grad_weight, axis=0), tl.sum(grad_bias, axis=0)
    tl.store(local_ptr + channel, grad_weight, mask=within)
    tl.store(local_ptr + channels + channel, grad_bias, mask=within)
    if shared_ptr is not None:
        tilt = weight * inverse * inverse * grad_weight / count
        tl.store(shared_ptr + channel, mean * tilt - weight * inverse * grad_bias / count, mask=within)
        tl.store(shared_ptr + channels + channel, -tilt / 2, mask=within)


@triton.jit(do_not_specialize=['channels', 'pixels'])
def _norm_grad_kernel(
    weight_ptr, inverse_ptr, multiplier_ptr, pooled_ptr, shared_ptr, scale_ptr, shift_ptr, slope_ptr, channels, pixels,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    place = image * channels + channel
    gain = tl.load(weight_ptr + channel, mask=inside, other=0.0)
    gain *= tl.load(inverse_ptr + channel, mask=inside, other=0.0)
    scale, shift = gain, tl.zeros((BLOCK,), tl.float32)
    if multiplier_ptr is not None:
        scale *= tl.load(multiplier_ptr + place, mask=inside, other=0.0)
    if pooled_ptr is not None:
        shift += gain * tl.load(pooled_ptr + place, mask=inside, other=0.0) / pixels
    if shared_ptr is not None:
        shift += tl.load(shared_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        slope = 2 * tl.load(shared_ptr + channels + channel, mask=inside, other=0.0).to(tl.float32)
        if tl.program_id(1) == 0:
            tl.store(slope_ptr + channel, slope, mask=inside)
    tl.store(scale_ptr + place, scale, mask=inside)
    if shift_ptr is not None:
        tl.store(shift_ptr + place, shift, mask=inside)


def normalize_grads(
    sums: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, image_mean: Tensor,
    multiplier: Tensor | None, grad_pooled: Tensor | None, pixels: int, count: int | Tensor,
    share: Callable[[Tensor], Tensor] | None, of_batch: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See ``ops.coefficients``."""
    n, c = sums[0].shape
    local = mean.new_empty((2, c))
    at_hand = 1.0 if isinstance(count, Tensor) else float(count)
    multiplied = None if multiplier is None or grad_pooled is not None else torch.empty_like(multiplier)
    shared = None
    if of_batch:  # as many values as `share_moments` reduces
        shared = mean.new_empty(2 * c) if share is None else mean.new_zeros(2 * c + 1, dtype=torch.float64)
    with torch.cuda.device_of(mean):
        _norm_sums_kernel[(triton.cdiv(c, 32),)](
            *sums, weight, bias, mean, inverse, image_mean, multiplier, grad_pooled, local, multiplied, shared,
            n, c, _step(*sums), at_hand, 64, 32,
        )  # fmt: skip
        if shared is not None and isinstance(count, Tensor):
            shared = shared / count  # which stays on the GPU: nobody waits for it
        if shared is not None and share is not None:
            shared = share(shared)
        rows = 1 if multiplier is None and grad_pooled is None else n
        scale = mean.new_empty((n, c) if rows == n else (c,))
        shift = None if shared is None and grad_pooled is None else torch.empty_like(scale)
        slope = None if shared is None else mean.new_empty(c)
        _norm_grad_kernel[(triton.cdiv(c, _BLOCK), rows)](
            weight, inverse, multiplier, grad_pooled, shared, scale, shift, slope, c, pixels, _BLOCK
        )
    return local[0], local[1], multiplied, scale, shift, slope
