# ruff: noqa: RUF005 - Triton knows no starred tuples
# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
"""Gradients of a Dilated Reparam Block for its weights and its input, from what ``outputs`` holds of some channels.

``weight_grad`` turns outputs of branches into their gradients, in place, and multiplies these with the map;
``input_grad`` convolves them back, all branches in one sum. No atomics: the same bits every time.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from . import layouts, statistics
from .branches import Plan, division_of, in_map, load_matrix, load_rows, multiply, plan_of, tile_of, window_of
from .convolution import PLACES, corner_of
from .statistics import SIZES

__all__ = ['gram_parts', 'input_grad', 'weight_grad']


@functools.lru_cache(maxsize=256)
def _groups(plan: Plan, limit: int) -> list[tuple[tuple[int, ...], int, int]]:
    """Which Gram matrices, one for each row of a kernel, one program keeps: some branches, and rows of these."""
    groups: list[tuple[tuple[int, ...], int, int]] = []
    for b, k in enumerate(plan.kernels):
        members, first, end = groups[-1] if groups else ((), 0, limit)
        if first == 0 and end + k <= limit:
            groups[-1] = ((*members, b), 0, end + k)
        else:  # a branch is cut only where it must be
            groups += [((b,), first, min(first + limit, k)) for first in range(0, k, limit)]
    return groups


def _gram_of(part: Plan, begin: int, end: int) -> tuple[tuple[int, ...], ...]:
    """For each row of the window and each branch, which of the Gram matrices ``begin`` to ``end`` that is; or -1."""
    first = part.starts[0] + begin
    rows = [[part.row_of(b, dy) for b in range(len(part.kernels))] for dy in range(-part.reach, part.reach + 1)]
    return tuple(tuple(r - first if first <= r < first + end - begin else -1 for r in row) for row in rows)


def gram_parts(x: Tensor, width: int, channels: int, plan: Plan) -> int:
    """How many parts of the gradient of the weights there are, when so many channels are taken at a time."""
    return 4 * statistics.splits_of(channels, division_of(x, width, plan, tile_of(x, 'weights', plan)).blocks)


def weight_grad(
    grad: Tensor, x: Tensor, width: int, held: Tensor, lines: Tensor, plan: Plan, first: int, channels: int,
    out: Tensor, ready: bool,
) -> None:  # fmt: skip
    """Turn what ``outputs`` wrote into the gradients of the outputs of the branches, and write those of the weights.

    Args:
        grad: See ``outputs``.
        x: See ``outputs``.
        width: W of the map.
        held: (channels or more, branches, N, H, pitch).
        lines: See ``collect``.
        plan: Of the branches.
        first: The first channel.
        channels: How many.
        out: (parts, weights) in float32, to be summed up, see ``gram_parts``.
        ready: Whether they are the gradients of the outputs already.
    """
    splits = out.shape[0] // 4
    tile = tile_of(x, 'weights', plan)
    for members, begin, end in _groups(plan, tile.together // plan.depth):
        part = plan_of(plan.kernels, plan.dilations, members)
        division = division_of(x, width, part, tile)
        _weight_grad_kernel[(channels * splits,)](
            grad, x, held, out, lines, *division.sizes, division.blocks, splits, *division.places, first, out.shape[1],
            MEMBERS=members, BRANCHES=len(plan.kernels), COUNT=end - begin, READY=ready or begin > 0,
            GRAMS=_gram_of(part, begin, end), PADDED=width != x.shape[3],
            TALLEST=triton.next_power_of_2(max(part.kernels)), KERNELS=part.kernels, DILATIONS=part.dilations,
            BEFORE=part.before, **division.constants,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES + PLACES + ['FIRST', 'WEIGHTS'])
def _weight_grad_kernel(
    grad_ptr, x_ptr, held_ptr, out_ptr, lines_ptr, N, C, H, W, pitch_units, blocks, splits, groups, groups_factor,
    groups_shift, tiles, tiles_factor, tiles_shift, FIRST, WEIGHTS, MEMBERS: tl.constexpr, BRANCHES: tl.constexpr,
    COUNT: tl.constexpr, READY: tl.constexpr, GRAMS: tl.constexpr, PADDED: tl.constexpr, TALLEST: tl.constexpr,
    KERNELS: tl.constexpr, DILATIONS: tl.constexpr, BEFORE: tl.constexpr, REACH: tl.constexpr, LEAD: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    local = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    c = FIRST + local
    pitch = pitch_units * ALIGN
    plane = H.to(tl.int64) * pitch
    lines = lines_ptr + c * (2 * BRANCHES + 1)
    offset = tl.load(lines + 2 * BRANCHES)
    px = tl.arange(0, 16)
    scales, slopes, grams = (), (), ()
    for m in tl.static_range(len(MEMBERS)):
        scales = scales + (tl.load(lines + MEMBERS[m]),)
        slopes = slopes + (tl.load(lines + BRANCHES + MEMBERS[m]),)
    for _ in tl.static_range(COUNT):
        grams = grams + (tl.zeros((16, DEPTH), tl.float32),)
    for block in range(split, blocks, splits):
        n, y, x0 = corner_of(
            block * BLOCK + tl.arange(0, BLOCK), groups, groups_factor, groups_shift, tiles, tiles_factor, tiles_shift,
            1, 16, 1,
        )  # fmt: skip
        valid = n < N
        in_plane = y * pitch + x0
        corner = n * (C * plane) + c * plane + in_plane
        place = held_ptr + ((local.to(tl.int64) * BRANCHES * N + n) * plane + in_plane)[:, None] + px[None, :]
        column = x0[:, None] + px[None, :]
        kept = column < tl.where(valid, pitch, 0)[:, None]
        inside = column < tl.where(valid, W, 0)[:, None] if PADDED else kept
        if not READY:
            centred = tl.load(grad_ptr + corner[:, None] + px[None, :], mask=kept, other=0.0).to(tl.float32)
            centred = tl.where(inside, centred - offset, 0.0)
        turned = ()
        for m in tl.static_range(len(MEMBERS)):
            where = place + MEMBERS[m] * (N * plane)
            value = tl.load(where, mask=kept, other=0.0)
            if not READY:
                e = scales[m] * centred - slopes[m] * value.to(tl.float32)
                value = (tl.where(inside, e, 0.0) if PADDED else e).to(value.dtype)
                tl.store(where, value, mask=kept)
            turned = turned + (tl.trans(value),)
        pointers, row = window_of(x_ptr, corner, valid, y, x0, pitch, REACH, LEAD, DEPTH, 1)
        for step in tl.static_range(2 * REACH + 1):
            window = load_rows(pointers, row, step, H, pitch)
            for m in tl.static_range(len(MEMBERS)):
                if GRAMS[step][m] >= 0:
                    more = multiply(turned[m], window, grams[GRAMS[step][m]], PRECISION)
                    grams = grams[: GRAMS[step][m]] + (more,) + grams[GRAMS[step][m] + 1 :]
    # Each sum over the columns of a patch is left in four parts, so that no warp has to wait for another.
    out = out_ptr + (split * 4 + tl.arange(0, 4)[None, :]).to(tl.int64) * WEIGHTS
    i = tl.arange(0, 16)[None, :]
    kx = tl.arange(0, TALLEST)
    for step in tl.static_range(2 * REACH + 1):
        for m in tl.static_range(len(MEMBERS)):
            if GRAMS[step][m] >= 0:
                # The sum for a tap is a diagonal of a Gram matrix: (i, j) are columns of the patch and of the window.
                j = tl.minimum(i + LEAD + (kx - KERNELS[m] // 2)[:, None] * DILATIONS[m], DEPTH - 1)
                sums = tl.reshape(tl.gather(tl.trans(grams[GRAMS[step][m]]), j, axis=0), (TALLEST, 4, 4))
                sums = tl.sum(sums, axis=1)
                ky = (step - REACH) // DILATIONS[m] + KERNELS[m] // 2
                tap = BEFORE[m] * C + (c * KERNELS[m] + ky) * KERNELS[m] + kx
                tl.store(out + tap[:, None], sums, mask=(kx < KERNELS[m])[:, None])


# ------------------------------------------------------------------------------------------ gradient of the input


def input_grad(
    held: Tensor, x: Tensor, width: int, table: Tensor, plan: Plan, first: int, channels: int, out: Tensor
) -> None:
    """Convolve the gradients of the outputs of the branches back, and sum them up.

    Args:
        held: (channels or more, branches, N, H, pitch).
        x: (N, C, H, pitch).
        width: W of the map.
        table: Of the kernels turned by 180 degrees, see ``branches.lay_out``.
        plan: Of the branches.
        first: The first channel.
        channels: How many.
        out: (N, C, H, W), like ``x`` in dtype.
    """
    tile = tile_of(x, 'input', plan)
    division = division_of(x, width, plan, tile)
    alone = [plan_of(plan.kernels, plan.dilations, (b,)) for b in range(len(plan.kernels))]
    n, c, h, _, pitch_units = division.sizes
    align = layouts.vector_of(width)
    products = [(p[0], b, *p[2:]) for b, branch in enumerate(alone) for p in branch.products(tile.rows, tile.down)]
    _input_grad_kernel[(channels * division.blocks,)](
        held, table, out, n, c, h, width // align, pitch_units, division.blocks, *division.places, first,
        TABLE=table[0].numel(), PRODUCTS=tuple(products), DILATIONS=plan.dilations,
        REACHES=tuple(branch.reach for branch in alone), BRANCHES=len(alone), DOWN=tile.down, ALIGN_OUT=align,
        **division.constants,
    )  # fmt: skip


_OF_INPUT = [name for name in SIZES if name not in ('splits', 'W')] + ['width_units', 'FIRST', *PLACES]


@triton.jit(do_not_specialize=_OF_INPUT)
def _input_grad_kernel(
    held_ptr, table_ptr, out_ptr, N, C, H, width_units, pitch_units, blocks, groups, groups_factor, groups_shift,
    tiles, tiles_factor, tiles_shift, FIRST, TABLE: tl.constexpr, PRODUCTS: tl.constexpr, DILATIONS: tl.constexpr,
    REACHES: tl.constexpr, BRANCHES: tl.constexpr, DOWN: tl.constexpr, REACH: tl.constexpr, LEAD: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, ALIGN_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    local = tl.program_id(0) // blocks
    c = FIRST + local
    pitch, W = pitch_units * ALIGN, width_units * ALIGN_OUT
    plane = H.to(tl.int64) * pitch
    table = table_ptr + c.to(tl.int64) * TABLE
    n, y, x0 = corner_of(
        tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK), groups, groups_factor, groups_shift, tiles,
        tiles_factor, tiles_shift, ROWS, 16, 1,
    )  # fmt: skip
    valid = n < N
    corner = (local.to(tl.int64) * BRANCHES * N + n) * plane + (y * pitch + x0)
    total = tl.zeros((BLOCK, ROWS * 16), tl.float32)
    for i in tl.static_range(len(PRODUCTS)):
        if i == 0 or PRODUCTS[i][1] != PRODUCTS[i - 1][1]:
            held = held_ptr + PRODUCTS[i][1] * (N * plane)
            pointers, row = window_of(
                held, corner, valid, y, x0, pitch, REACHES[PRODUCTS[i][1]], LEAD, DEPTH, DOWN
            )  # fmt: skip
        window = load_rows(pointers, row, PRODUCTS[i][0], H, pitch)
        matrix = load_matrix(table, i, PRODUCTS, DILATIONS, DEPTH, ROWS, DOWN)
        total = multiply(window, matrix, total, PRECISION)
    pixel = tl.arange(0, ROWS * 16)
    plane = H.to(tl.int64) * W
    corner = n * (C * plane) + c * plane + (y * W + x0)
    pixels = corner[:, None] + ((pixel // 16) * W + pixel % 16)[None, :]
    tl.store(out_ptr + pixels, total.to(out_ptr.dtype.element_ty), mask=in_map(valid, y, x0, H, W, ROWS))
