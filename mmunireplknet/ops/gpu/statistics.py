# ruff: noqa: RUF005 - Triton knows no starred tuples
# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
"""Statistics of the branches of a Dilated Reparam Block, without their outputs ever being written.

One pass over the map takes mean and variance of every branch from the float32 accumulators, before anything is rounded;
another, over the map and the gradient, what the gradient of batch normalization sums up. Every program writes what it
found, and these partial results are put together in a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .branches import COLUMNS, Plan, branch_values, in_map, load_bands, load_window, tile_at, tile_of

__all__ = ['finish', 'gradient_sums', 'merge', 'moments', 'splits_of']

_WARPS = 2
_PROGRAMS = 1024  # enough for 132 multiprocessors, a handful on each


def splits_of(x: Tensor, rows: int) -> int:
    """How many programs share the tiles of a channel of ``x`` (N, C, H, pitch)."""
    n, c, h, w = x.shape
    return max(1, min(triton.cdiv(_PROGRAMS, c), n * triton.cdiv(h, rows) * triton.cdiv(w, COLUMNS)))


def moments(x: Tensor, width: int, weight: Tensor, plan: Plan) -> Tensor:
    """Partial statistics (splits, 2 branches + 1, C): means, sums of squared deviations from them, and the count.

    Args:
        x: (N, C, H, pitch), see ``branches.to_rows``.
        width: W of the map.
        weight: Of all branches, flat: one (C, 1, K, K) after the other. Rounded to the dtype of ``x``.
        plan: Of the branches.
    """
    n, c, h, pitch = x.shape
    tile = tile_of(x, _WARPS)
    splits = splits_of(x, tile['ROWS'])
    out = x.new_empty((splits, 2 * len(plan.kernels) + 1, c), dtype=torch.float32)
    _moments_kernel[(c, splits)](x, weight, out, n, c, h, width, pitch, splits, **plan.constants(), **tile)
    return out


@triton.jit(do_not_specialize=['N', 'C', 'H', 'W', 'pitch', 'SPLITS'])
def _moments_kernel(
    x_ptr, weight_ptr, out_ptr, N, C, H, W, pitch, SPLITS,
    KERNELS: tl.constexpr, DILATIONS: tl.constexpr, BEFORE: tl.constexpr, TAPS: tl.constexpr, LEAD: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    BRANCHES: tl.constexpr = len(TAPS[0])
    c = tl.program_id(0)
    split = tl.program_id(1)
    pitch = pitch // ALIGN * ALIGN  # which tells the compiler what divides it
    bands = load_bands(weight_ptr, x_ptr, C, c, KERNELS, DILATIONS, BEFORE, TAPS, LEAD, DEPTH, False)
    # Each row of the tiles keeps its own statistics: no exchange between the warps but at the end.
    count = tl.zeros((ROWS,), tl.float32)
    means = ()
    squares = ()
    for _ in tl.static_range(BRANCHES):
        means = means + (tl.zeros((ROWS,), tl.float32),)
        squares = squares + (tl.zeros((ROWS,), tl.float32),)
    for index in range(split, N * tl.cdiv(H, ROWS) * tl.cdiv(W, 16), SPLITS):
        n, y0, x0 = tile_at(index, H, W, ROWS)
        plane = x_ptr + (n * C + c).to(tl.int64) * H * pitch
        values = branch_values(
            plane, bands, weight_ptr, C, c, y0, x0, H, pitch, KERNELS, DILATIONS, BEFORE, TAPS, LEAD, DEPTH,
            ROWS, PRECISION, True,
        )  # fmt: skip
        valid = in_map(y0, x0, H, W, ROWS)
        fresh = tl.sum(valid.to(tl.float32), axis=1)
        inverse = 1 / tl.maximum(fresh, 1)
        share = fresh / tl.maximum(count + fresh, 1)
        for b in tl.static_range(BRANCHES):
            mean = tl.sum(tl.where(valid, values[b], 0.0), axis=1) * inverse
            deviation = tl.where(valid, values[b] - mean[:, None], 0.0)
            shift = mean - means[b]
            square = squares[b] + tl.sum(deviation * deviation, axis=1) + shift * shift * count * share
            squares = squares[:b] + (square,) + squares[b + 1 :]
            means = means[:b] + (means[b] + shift * share,) + means[b + 1 :]
        count += fresh
    whole = tl.sum(count, axis=0)
    out = out_ptr + split * ((2 * BRANCHES + 1) * C) + c
    for b in tl.static_range(BRANCHES):
        mean = tl.sum(count * means[b], axis=0) / whole
        shift = means[b] - mean
        tl.store(out + b * C, mean)
        tl.store(out + (BRANCHES + b) * C, tl.sum(squares[b] + count * shift * shift, axis=0))
    tl.store(out + 2 * BRANCHES * C, whole)


def merge(
    partial: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, plan: Plan, eps: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and biased variance (branches, C), and the one convolution the block is by them.

    Args:
        partial: See ``moments``.
        weight: Of all branches, flat.
        gamma: (branches, C).
        beta: (C,), the sum over the branches.
        plan: Of the branches.
        eps: One a branch.

    Returns:
        mean, var, weight (C, 1, K, K) and bias (C,), in float32.
    """
    splits, _, c = partial.shape
    size = plan.kernels[0]
    # Two allocations: outputs of an operator must not share memory.
    mean, var = partial.new_empty((len(plan.kernels), c)), partial.new_empty((len(plan.kernels), c))
    merged, bias = partial.new_empty((c, 1, size, size)), partial.new_empty(c)
    _merge_kernel[(c,)](
        partial, weight, gamma, beta, mean, var, merged, bias, c, splits, plan.kernels, plan.dilations, eps,
        triton.next_power_of_2(splits), triton.next_power_of_2(size), True, num_warps=1,
    )  # fmt: skip
    return mean, var, merged, bias


def finish(partial: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Mean and biased variance alone, see ``merge``."""
    splits, _, c = partial.shape
    mean, var = partial.new_empty((len(plan.kernels), c)), partial.new_empty((len(plan.kernels), c))
    _merge_kernel[(c,)](
        partial, partial, partial, partial, mean, var, partial, partial, c, splits, plan.kernels, plan.dilations, None,
        triton.next_power_of_2(splits), 1, False, num_warps=1,
    )  # fmt: skip
    return mean, var


@triton.jit(do_not_specialize=['C', 'SPLITS'])
def _merge_kernel(
    partial_ptr, weight_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, merged_ptr, bias_ptr, C, SPLITS,
    KERNELS: tl.constexpr, DILATIONS: tl.constexpr, EPS: tl.constexpr, MANY: tl.constexpr, SIDE: tl.constexpr,
    MERGE: tl.constexpr,
):  # fmt: skip
    BRANCHES: tl.constexpr = len(KERNELS)
    c = tl.program_id(0)
    some = tl.arange(0, MANY)
    partial = partial_ptr + some * ((2 * BRANCHES + 1) * C) + c
    count = tl.load(partial + 2 * BRANCHES * C, mask=some < SPLITS, other=0.0).to(tl.float64)
    whole = tl.sum(count, axis=0)
    if MERGE:
        y = tl.arange(0, SIDE)[:, None]
        x = tl.arange(0, SIDE)[None, :]
        merged = tl.zeros((SIDE, SIDE), tl.float32)
        bias = tl.load(beta_ptr + c).to(tl.float64)
        weight = weight_ptr
    for b in tl.static_range(BRANCHES):
        part = tl.load(partial + b * C, mask=some < SPLITS, other=0.0).to(tl.float64)
        square = tl.load(partial + (BRANCHES + b) * C, mask=some < SPLITS, other=0.0).to(tl.float64)
        mean = tl.sum(count * part, axis=0) / whole
        var = tl.sum(square + count * (part - mean) * (part - mean), axis=0) / whole
        tl.store(mean_ptr + b * C + c, mean.to(tl.float32))
        tl.store(var_ptr + b * C + c, var.to(tl.float32))
        if MERGE:
            scale = tl.load(gamma_ptr + b * C + c).to(tl.float64) / tl.sqrt(var + EPS[b])
            bias -= scale * mean
            across = x - KERNELS[0] // 2 + (KERNELS[b] // 2) * DILATIONS[b]
            down = y - KERNELS[0] // 2 + (KERNELS[b] // 2) * DILATIONS[b]
            kx = across // DILATIONS[b]
            ky = down // DILATIONS[b]
            taken = (across >= 0) & (kx < KERNELS[b]) & (across % DILATIONS[b] == 0)
            taken = taken & (down >= 0) & (ky < KERNELS[b]) & (down % DILATIONS[b] == 0)
            place = weight + c * (KERNELS[b] * KERNELS[b]) + ky * KERNELS[b] + kx
            merged += scale.to(tl.float32) * tl.load(place, mask=taken, other=0.0).to(tl.float32)
            weight += C * (KERNELS[b] * KERNELS[b])
    if MERGE:
        inside = (y < KERNELS[0]) & (x < KERNELS[0])
        tl.store(merged_ptr + c * (KERNELS[0] * KERNELS[0]) + y * KERNELS[0] + x, merged, mask=inside)
        tl.store(bias_ptr + c, bias.to(tl.float32))


def gradient_sums(
    grad: Tensor, x: Tensor, width: int, weight: Tensor, mean: Tensor, var: Tensor, plan: Plan, eps: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """``sum g (z_b - mean_b) / sqrt(var_b + eps_b)``, (branches, C), and ``sum g``, (C,), in float32.

    Args:
        grad: g, the gradient of the sum of the branches, (N, C, H, pitch), see ``branches.to_rows``.
        x: Like ``grad``.
        width: W of the map.
        weight: See ``moments``.
        mean: (branches, C).
        var: (branches, C), biased.
        plan: Of the branches.
        eps: One a branch.
    """
    n, c, h, pitch = x.shape
    tile, branches = tile_of(x, _WARPS), len(plan.kernels)
    splits = splits_of(x, tile['ROWS'])
    out = x.new_empty((splits, branches + 1, c), dtype=torch.float32)
    _gradient_sums_kernel[(c, splits)](
        grad, x, weight, mean, var, out, n, c, h, width, pitch, splits, EPS=eps, **plan.constants(), **tile
    )  # fmt: skip
    return out[:, :branches].sum(0), out[:, branches].sum(0)


@triton.jit(do_not_specialize=['N', 'C', 'H', 'W', 'pitch', 'SPLITS'])
def _gradient_sums_kernel(
    grad_ptr, x_ptr, weight_ptr, mean_ptr, var_ptr, out_ptr, N, C, H, W, pitch, SPLITS, EPS: tl.constexpr,
    KERNELS: tl.constexpr, DILATIONS: tl.constexpr, BEFORE: tl.constexpr, TAPS: tl.constexpr, LEAD: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    BRANCHES: tl.constexpr = len(TAPS[0])
    c = tl.program_id(0)
    split = tl.program_id(1)
    pitch = pitch // ALIGN * ALIGN
    bands = load_bands(weight_ptr, x_ptr, C, c, KERNELS, DILATIONS, BEFORE, TAPS, LEAD, DEPTH, False)
    total = tl.zeros((ROWS,), tl.float32)
    sums = ()
    means = ()
    for b in tl.static_range(BRANCHES):
        sums = sums + (tl.zeros((ROWS,), tl.float32),)
        means = means + (tl.load(mean_ptr + b * C + c),)
    for index in range(split, N * tl.cdiv(H, ROWS) * tl.cdiv(W, 16), SPLITS):
        n, y0, x0 = tile_at(index, H, W, ROWS)
        offset = (n * C + c).to(tl.int64) * H * pitch
        values = branch_values(
            x_ptr + offset, bands, weight_ptr, C, c, y0, x0, H, pitch, KERNELS, DILATIONS, BEFORE, TAPS, LEAD, DEPTH,
            ROWS, PRECISION, True,
        )  # fmt: skip
        grad = load_window(grad_ptr + offset, y0 + tl.arange(0, ROWS), x0, H, pitch, 0, 16).to(tl.float32)
        total += tl.sum(grad, axis=1)
        for b in tl.static_range(BRANCHES):
            more = sums[b] + tl.sum(grad * (values[b] - means[b]), axis=1)  # grad is 0 outside of the map
            sums = sums[:b] + (more,) + sums[b + 1 :]
    out = out_ptr + split * ((BRANCHES + 1) * C) + c
    for b in tl.static_range(BRANCHES):
        tl.store(out + b * C, tl.sum(sums[b], axis=0) * tl.rsqrt(tl.load(var_ptr + b * C + c) + EPS[b]))
    tl.store(out + BRANCHES * C, tl.sum(total, axis=0))
