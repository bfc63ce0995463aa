# ruff: noqa: RUF005 - Triton knows no starred tuples
# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
"""Statistics of the branches of a Dilated Reparam Block, without their outputs ever being written.

One pass over the map takes mean and variance of every branch from the float32 accumulators, before anything is rounded.
Every program writes what it found, and these partial results are put together in a fixed order: no atomics, the same
bits every time.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .branches import (
    Division,
    Plan,
    branch_values,
    division_of,
    groups_of,
    in_map,
    lay_out,
    plan_of,
    tile_of,
)
from .convolution import PLACES, corner_of

__all__ = ['SIZES', 'finish', 'merge', 'moments', 'patches_of', 'splits_of']

SIZES = ['N', 'C', 'H', 'W', 'pitch_units', 'blocks', 'splits']
_RESIDENT = 264  # programs at a time: two on each of 132 multiprocessors


def patches_of(x: Tensor, width: int, plan: Plan) -> tuple[Division, dict[str, Any]]:
    """How the outputs of the branches are computed: blocks of patches, and the rows of the window in each product."""
    tile = tile_of(x, 'outputs', plan)
    division = division_of(x, width, plan, tile)
    products = plan.products(tile.rows, tile.down)
    return division, {'PRODUCTS': products, 'DOWN': tile.down, 'DILATIONS': plan.dilations, **division.constants}


def splits_of(channels: int, blocks: int) -> int:
    """How many programs share the blocks of a channel: with those the GPU is done first."""
    return _splits(channels, blocks, _RESIDENT)


@functools.lru_cache(maxsize=4096)
def _splits(channels: int, blocks: int, resident: int) -> int:
    """What a program does once costs as much as a block."""
    choices = range(1, min(blocks, 64) + 1)
    return min(choices, key=lambda splits: triton.cdiv(channels * splits, resident) * (triton.cdiv(blocks, splits) + 1))


def moments(x: Tensor, width: int, weight: Tensor, plan: Plan) -> Tensor:
    """Partial statistics (splits, 2 branches + 1, C): means, sums of squared deviations from them, and the count.

    Args:
        x: (N, C, H, pitch), see ``branches.to_rows``.
        width: W of the map.
        weight: Of all branches, flat: one (C, 1, K, K) after the other. Rounded to the dtype of ``x``.
        plan: Of the branches.
    """
    c, branches = x.shape[1], len(plan.kernels)
    table = lay_out(weight, c, plan, x.dtype)
    division, _ = patches_of(x, width, plan)
    splits = splits_of(c, division.blocks)
    out = x.new_empty((splits, 2 * branches + 1, c), dtype=torch.float32)
    for members in groups_of(plan, tile_of(x, 'outputs', plan).together):
        division, constants = patches_of(x, width, plan_of(plan.kernels, plan.dilations, members))
        _moments_kernel[(c * splits,)](
            x, table, out, *division.sizes, division.blocks, splits, *division.places,
            FIRST=members[0], BRANCHES=branches, TABLE=table[0].numel(), **constants,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=SIZES + PLACES)
def _moments_kernel(
    x_ptr, table_ptr, out_ptr, N, C, H, W, pitch_units, blocks, splits, groups, groups_factor, groups_shift, tiles,
    tiles_factor, tiles_shift, FIRST: tl.constexpr, BRANCHES: tl.constexpr, DILATIONS: tl.constexpr,
    TABLE: tl.constexpr, PRODUCTS: tl.constexpr, DOWN: tl.constexpr, REACH: tl.constexpr, LEAD: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    pitch = pitch_units * ALIGN  # which tells the compiler what divides it
    plane = H.to(tl.int64) * pitch
    table = table_ptr + c.to(tl.int64) * TABLE
    # Each patch of the blocks keeps its own statistics: no exchange between the warps but at the end.
    count = tl.zeros((BLOCK,), tl.float32)
    means = ()
    squares = ()
    for _ in tl.static_range(len(DILATIONS)):
        means = means + (tl.zeros((BLOCK,), tl.float32),)
        squares = squares + (tl.zeros((BLOCK,), tl.float32),)
    for block in range(split, blocks, splits):
        n, y, x0 = corner_of(
            block * BLOCK + tl.arange(0, BLOCK), groups, groups_factor, groups_shift, tiles, tiles_factor, tiles_shift,
            ROWS, 16, 1,
        )  # fmt: skip
        valid = n < N
        corner = n * (C * plane) + c * plane + (y * pitch + x0)
        values = ()
        for _ in tl.static_range(len(DILATIONS)):
            values = values + (tl.zeros((BLOCK, ROWS * 16), tl.float32),)
        # The offset is 0, which no compiler knows: it must not keep what it loads there for the whole loop.
        values = branch_values(
            values, x_ptr, corner, valid, y, x0, H, pitch, table + tl.minimum(block, 0) * 16, PRODUCTS, DILATIONS,
            REACH, LEAD, DEPTH, ROWS, DOWN, PRECISION,
        )  # fmt: skip
        weights = in_map(valid, y, x0, H, W, ROWS).to(tl.float32)
        # The pixels of a patch that are inside, without summing them up.
        fresh = (tl.minimum(H - y, ROWS) * tl.minimum(W - x0, 16)).to(tl.float32) * valid.to(tl.float32)
        inverse = 1 / tl.maximum(fresh, 1)
        share = fresh / tl.maximum(count + fresh, 1)
        for b in tl.static_range(len(DILATIONS)):
            mean = tl.sum(values[b] * weights, axis=1) * inverse
            deviation = values[b] - mean[:, None]
            shift = mean - means[b]
            square = squares[b] + tl.sum(deviation * weights * deviation, axis=1) + shift * shift * count * share
            squares = squares[:b] + (square,) + squares[b + 1 :]
            means = means[:b] + (means[b] + shift * share,) + means[b + 1 :]
        count += fresh
    whole = tl.sum(count, axis=0)
    out = out_ptr + split * ((2 * BRANCHES + 1) * C) + c
    for b in tl.static_range(len(DILATIONS)):
        mean = tl.sum(count * means[b], axis=0) / whole
        shift = means[b] - mean
        tl.store(out + (FIRST + b) * C, mean)
        tl.store(out + (BRANCHES + FIRST + b) * C, tl.sum(squares[b] + count * shift * shift, axis=0))
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
