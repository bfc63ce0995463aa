# ruff: noqa: RUF005 - Triton knows no starred tuples
# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
"""The outputs of the branches of a Dilated Reparam Block, convolved again for the backward pass.

They are summed up, for the gradient of batch normalization, and held for some channels in memory that stays in the L2
cache: the outputs themselves or, where the sums are known, the gradients that follow from them. Every program writes
sums of its own, which are put together in a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import statistics
from .branches import Plan, branch_values, groups_of, in_map, plan_of, tile_of
from .convolution import PLACES, corner_of
from .statistics import SIZES

__all__ = ['Norm', 'collect', 'outputs']


class Norm(NamedTuple):
    """What the normalization of the branches is: gamma and biased var (branches, C), values a channel, and eps."""

    gamma: Tensor
    var: Tensor
    count: float
    eps: tuple[float, ...]


def outputs(
    grad: Tensor, x: Tensor, width: int, table: Tensor, mean: Tensor, plan: Plan, first: int, channels: int,
    held: Tensor | None, lines: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Convolve with all branches, and center, for channels from ``first`` on.

    Either the results are summed up, and written if wanted; or the gradients that follow from them are.

    Args:
        grad: g, the gradient of the sum of the branches, (N, C, H, pitch), see ``branches.to_rows``.
        x: Like ``grad``.
        width: W of the map.
        table: See ``branches.lay_out``.
        mean: (branches, C).
        plan: Of the branches.
        first: The first channel.
        channels: How many.
        held: Where to write, (channels or more, branches, N, H, pitch); None for nowhere.
        lines: See ``collect``; given, the gradients of the outputs are written instead, and there are no sums.

    Returns:
        Unless ``lines`` are given the partial sums of g times the results, and of g: (splits, branches + 1, channels).
    """
    branches = len(plan.kernels)
    division, _ = statistics.patches_of(x, width, plan)
    splits = statistics.splits_of(channels, division.blocks)
    sums = None if lines is not None else x.new_empty((splits, branches + 1, channels), dtype=torch.float32)
    for members in groups_of(plan, tile_of(x, 'outputs', plan).together):
        division, constants = statistics.patches_of(x, width, plan_of(plan.kernels, plan.dilations, members))
        _outputs_kernel[(channels * splits,)](
            grad, x, table, mean, held, lines, sums, *division.sizes, division.blocks, splits, *division.places,
            first, channels, MEMBER=members[0], BRANCHES=branches, TABLE=table[0].numel(), **constants,
        )  # fmt: skip
    return sums


@triton.jit(do_not_specialize=SIZES + PLACES + ['FIRST', 'CHANNELS'])
def _outputs_kernel(
    grad_ptr, x_ptr, table_ptr, mean_ptr, held_ptr, lines_ptr, sums_ptr, N, C, H, W, pitch_units, blocks, splits,
    groups, groups_factor, groups_shift, tiles, tiles_factor, tiles_shift, FIRST, CHANNELS, MEMBER: tl.constexpr,
    BRANCHES: tl.constexpr, DILATIONS: tl.constexpr, TABLE: tl.constexpr, PRODUCTS: tl.constexpr, DOWN: tl.constexpr,
    REACH: tl.constexpr, LEAD: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    local = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    c = FIRST + local
    pitch = pitch_units * ALIGN  # which tells the compiler what divides it
    plane = H.to(tl.int64) * pitch
    table = table_ptr + c.to(tl.int64) * TABLE
    pixel = tl.arange(0, ROWS * 16)
    total = tl.zeros((BLOCK,), tl.float32)
    sums = ()
    means = ()
    for b in tl.static_range(len(DILATIONS)):
        sums = sums + (tl.zeros((BLOCK,), tl.float32),)
        means = means + (tl.load(mean_ptr + (MEMBER + b) * C + c),)
    for block in range(split, blocks, splits):
        n, y, x0 = corner_of(
            block * BLOCK + tl.arange(0, BLOCK), groups, groups_factor, groups_shift, tiles, tiles_factor, tiles_shift,
            ROWS, 16, 1,
        )  # fmt: skip
        valid = n < N
        in_plane = y * pitch + x0
        corner = n * (C * plane) + c * plane + in_plane
        values = ()
        for b in tl.static_range(len(DILATIONS)):
            values = values + (tl.zeros((BLOCK, ROWS * 16), tl.float32) - means[b],)
        # The offset is 0, which no compiler knows: it must not keep what it loads there for the whole loop.
        values = branch_values(
            values, x_ptr, corner, valid, y, x0, H, pitch, table + tl.minimum(block, 0) * 16, PRODUCTS, DILATIONS,
            REACH, LEAD, DEPTH, ROWS, DOWN, PRECISION,
        )  # fmt: skip
        place = ((pixel // 16) * pitch + pixel % 16)[None, :]
        inside = in_map(valid, y, x0, H, pitch, ROWS)
        grad = tl.load(grad_ptr + corner[:, None] + place, mask=inside, other=0.0)
        if grad.dtype != tl.float32:
            # The product is the same numbers, where the results are: in the registers of the tensor cores.
            grad = tl.dot(grad, (pixel[:, None] == pixel[None, :]).to(grad.dtype))
        if sums_ptr is not None:
            total += tl.sum(grad, axis=1)
            for b in tl.static_range(len(DILATIONS)):
                # The gradient is 0 outside of the map.
                sums = sums[:b] + (sums[b] + tl.sum(grad * values[b], axis=1),) + sums[b + 1 :]
        if held_ptr is not None:
            corner_held = (local.to(tl.int64) * BRANCHES * N + n) * plane + in_plane
            if lines_ptr is not None:
                lines = lines_ptr + c * (2 * BRANCHES + 1) + MEMBER
                grad -= tl.load(lines + (2 * BRANCHES - MEMBER))
                in_width = in_map(valid, y, x0, H, W, ROWS)
            for b in tl.static_range(len(DILATIONS)):
                value = values[b]
                if lines_ptr is not None:
                    value = tl.load(lines + b) * grad - tl.load(lines + (BRANCHES + b)) * value
                    value = tl.where(in_width, value, 0.0)
                held = held_ptr + (MEMBER + b) * (N * plane)
                tl.store(held + corner_held[:, None] + place, value.to(x_ptr.dtype.element_ty), mask=inside)
    if sums_ptr is not None:
        out = sums_ptr + split * ((BRANCHES + 1) * CHANNELS) + local
        for b in tl.static_range(len(DILATIONS)):
            tl.store(out + (MEMBER + b) * CHANNELS, tl.sum(sums[b], axis=0))
        tl.store(out + BRANCHES * CHANNELS, tl.sum(total, axis=0))


def collect(
    partial: Tensor | None, norm: Norm, sums: tuple[Tensor, Tensor], first: int, channels: int, lines: Tensor | None
) -> None:
    """Put together what ``outputs`` summed up, and write what follows for the gradients of the outputs of the branches.

    Args:
        partial: See ``outputs``; None where the sums are known.
        norm: Of the branches.
        sums: ``sum g (z_b - mean_b) / sqrt(var_b + eps_b)``, (branches, C), and ``sum g``, (C,), in float32; written
            for these channels if ``partial`` is given, else read.
        first: The first channel.
        channels: How many.
        lines: (C, 2 branches + 1) in float32, to be written: the gradient for the output of branch b is its entry b,
            times the gradient less the last entry, minus entry branches + b times the centred output.
    """
    splits = 1 if partial is None else partial.shape[0]
    _collect_kernel[(channels,)](
        partial, norm.gamma, norm.var, *sums, lines, norm.count, norm.var.shape[1], splits, first, channels, norm.eps,
        triton.next_power_of_2(splits), num_warps=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=['C', 'splits', 'FIRST', 'CHANNELS'])
def _collect_kernel(
    partial_ptr, gamma_ptr, var_ptr, sum_gamma_ptr, sum_beta_ptr, lines_ptr, count, C, splits, FIRST, CHANNELS,
    EPS: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    BRANCHES: tl.constexpr = len(EPS)
    c = FIRST + tl.program_id(0)
    some = tl.arange(0, MANY)
    if partial_ptr is not None:
        partial = partial_ptr + some * ((BRANCHES + 1) * CHANNELS) + tl.program_id(0)
        whole = tl.sum(tl.load(partial + BRANCHES * CHANNELS, mask=some < splits, other=0.0).to(tl.float64), axis=0)
        tl.store(sum_beta_ptr + c, whole.to(tl.float32))
    else:
        whole = tl.load(sum_beta_ptr + c).to(tl.float64)
    if lines_ptr is not None:
        lines = lines_ptr + c * (2 * BRANCHES + 1)
        tl.store(lines + 2 * BRANCHES, (whole / count).to(tl.float32))
    for b in tl.static_range(BRANCHES):
        inverse = 1 / tl.sqrt(tl.load(var_ptr + b * C + c).to(tl.float64) + EPS[b])
        if partial_ptr is not None:
            part = tl.load(partial + b * CHANNELS, mask=some < splits, other=0.0).to(tl.float64)
            whole = tl.sum(part, axis=0) * inverse
            tl.store(sum_gamma_ptr + b * C + c, whole.to(tl.float32))
        else:
            whole = tl.load(sum_gamma_ptr + b * C + c).to(tl.float64)
        if lines_ptr is not None:
            scale = tl.load(gamma_ptr + b * C + c).to(tl.float64) * inverse
            tl.store(lines + b, scale.to(tl.float32))
            tl.store(lines + BRANCHES + b, (scale * inverse * whole / count).to(tl.float32))
