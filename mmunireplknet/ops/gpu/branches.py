# ruff: noqa: RUF005 - Triton knows no starred tuples
# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
"""The branches of a Dilated Reparam Block over patches of the map, on tensor cores.

A patch is 2 or 4 x 16 pixels; its window is one row of a matrix product, as in ``convolution``. All branches look at
the same window, so that each of its rows is read once for all of them, and multiplied with the matrices of those
branches that have taps there. The matrices are put together from rows of kernels that one small kernel lays out for all
branches. The window begins at a multiple of 8 pixels and rows of the map at one of 4 or 8, for loads of 8 or 16 bytes:
maps of other widths are copied first, with zeros at the end of every row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import layouts
from .convolution import precision, reciprocal

__all__ = ['Plan', 'Tile', 'division_of', 'groups_of', 'lay_out', 'plan_of', 'tile_of', 'to_rows', 'unsupported']

COLUMNS = 16  # of a patch
_MAX_SIZE = 31
_VECTOR = 8  # pixels of 2 bytes in the widest load


class Plan(NamedTuple):
    """Branches, as the kernels are specialised for them.

    Attributes:
        kernels: Size of each branch.
        dilations: Dilation of each branch.
        before: Taps of the weights that lie before each branch, of one channel.
        starts: Row of the table (``lay_out``) at which each branch begins.
        reach: Rows of the window above a patch.
        lead: Columns of the window to the left of a patch.
        depth: Columns of the window, a power of two.
    """

    kernels: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    starts: tuple[int, ...]
    reach: int
    lead: int
    depth: int

    def row_of(self, b: int, dy: int) -> int:
        """Row of the table with the taps of branch ``b`` that are ``dy`` rows below its middle; -1 for none."""
        ky, rest = divmod(dy + self.kernels[b] // 2 * self.dilations[b], self.dilations[b])
        return self.starts[b] + ky if rest == 0 and 0 <= ky < self.kernels[b] else -1

    def products(self, rows: int, down: int) -> tuple[tuple[int, ...], ...]:
        """The matrix products for patches of so many rows, each over ``down`` rows of the window.

        Rows of the window and of the patch whose distance is ``low + i * dilation``, and at most ``high``, meet in row
        ``place + i`` of the table, all others in no row.

        Returns:
            From the top of the window on, for each product its first row of the window, branch, place, low and high.
        """
        found: list[tuple[int, ...]] = []
        first, distances = 0, range(1 - rows, down)
        while first < rows + 2 * self.reach:
            taken = []
            for b in range(len(self.kernels)):
                places = {q: self.row_of(b, first + q - self.reach) for q in distances}
                some = [q for q in distances if places[q] >= 0]
                if some:
                    taken.append((first, b, places[some[0]], some[0], some[-1]))
            if any(low <= 0 for *_, low, _ in taken):  # taps in the first row
                found += taken
                first += down
            else:
                first += 1
        return tuple(found)


@functools.lru_cache(maxsize=256)
def plan_of(kernels: tuple[int, ...], dilations: tuple[int, ...], members: tuple[int, ...] | None = None) -> Plan:
    """The plan for branches of these sizes, or for some of them."""
    members = tuple(range(len(kernels))) if members is None else members
    before = tuple(sum(k * k for k in kernels[:b]) for b in members)
    starts = tuple(sum(kernels[:b]) for b in members)
    largest = max(k // 2 * d for k, d in zip(kernels, dilations, strict=True))
    kernels, dilations = tuple(kernels[b] for b in members), tuple(dilations[b] for b in members)
    reach = max(k // 2 * d for k, d in zip(kernels, dilations, strict=True))
    lead = _VECTOR if largest <= _VECTOR else 2 * _VECTOR  # the same for all, as it is that of the table
    return Plan(kernels, dilations, before, starts, reach, lead, 4 * lead)


def groups_of(plan: Plan, together: int) -> list[tuple[int, ...]]:
    """The branches, divided into as many as one program can sum up."""
    members = tuple(range(len(plan.kernels)))
    return [members[first : first + together] for first in range(0, len(members), together)]


def unsupported(kernels: Sequence[int], dilations: Sequence[int]) -> str:
    """Why there are no kernels for such branches; empty where there are."""
    for k, d in zip(kernels, dilations, strict=True):
        if k % 2 == 0:
            return f'a branch of size {k} is not odd.'
        if (k - 1) * d + 1 > _MAX_SIZE:
            return f'a {k}x{k} branch of dilation {d} covers {(k - 1) * d + 1} pixels, more than {_MAX_SIZE}.'
        if (k - 1) * d + 1 > kernels[0]:
            return f'a {k}x{k} branch of dilation {d} does not fit into the {kernels[0]}x{kernels[0]} of the first.'
    return ''


def to_rows(x: Tensor) -> Tensor:
    """``x`` (N, C, H, W) as contiguous planes (N, C, H, pitch), pitch a multiple of 4: zeros fill the rows."""
    x, w = layouts.to_planes(x), x.shape[3]
    return x if w % 4 == 0 else F.pad(x, (0, -w % _VECTOR))


class Tile(NamedTuple):
    """What a program does at a time.

    Attributes:
        rows: Of a patch.
        block: Patches.
        warps: Of a program.
        down: Rows of the window in one product.
        together: Branches summed up at the same time; for the gradient of the weights, columns of Gram matrices.
    """

    rows: int
    block: int
    warps: int
    down: int
    together: int


# For the outputs of the branches, the gradient of the weights and that of the input: what spills no registers.
_TILES = {
    ('bytes 2', 'hopper'): (Tile(2, 64, 4, 2, 6), Tile(1, 32, 4, 1, 34 * 32), Tile(4, 128, 8, 2, 1)),
    ('bytes 2', 'others'): (Tile(2, 64, 4, 1, 3), Tile(1, 32, 4, 1, 34 * 32), Tile(4, 64, 4, 1, 1)),
    ('bytes 2', 'sm_120'): (Tile(2, 64, 4, 1, 3), Tile(1, 32, 4, 1, 27 * 32), Tile(4, 64, 4, 1, 1)),
    ('bytes 4', 'hopper'): (Tile(2, 64, 4, 1, 3), Tile(1, 32, 4, 1, 18 * 32), Tile(4, 128, 8, 1, 1)),
    ('bytes 4', 'others'): (Tile(2, 64, 4, 1, 1), Tile(1, 32, 4, 1, 18 * 32), Tile(2, 64, 4, 1, 1)),
    ('tf32x3', 'hopper'): (Tile(2, 64, 4, 1, 3), Tile(1, 32, 4, 1, 13 * 32), Tile(2, 64, 4, 1, 1)),
    ('tf32x3', 'others'): (Tile(2, 64, 4, 1, 1), Tile(1, 32, 4, 1, 13 * 32), Tile(2, 64, 4, 1, 1)),
}
TILES_OF = ('outputs', 'weights', 'input')


def capability_of(x: Tensor) -> int:
    """Compute capability of the GPU, like 90; of an H100 where there is none to ask."""
    return 10 * torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 90


def tile_of(x: Tensor, purpose: str, plan: Plan) -> Tile:
    """How a kernel for maps like ``x`` divides its work; ``purpose`` is one of ``TILES_OF``."""
    exact = x.dtype == torch.float32 and precision(x) == 'tf32x3'
    kind = 'tf32x3' if exact else f'bytes {x.element_size()}'
    chip = {90: 'hopper', 120: 'sm_120'}.get(capability_of(x), 'others')
    tile = _TILES.get((kind, chip), _TILES[kind, 'others'])[TILES_OF.index(purpose)]
    return tile if plan.depth == 32 else tile._replace(down=1)


class Division(NamedTuple):
    """How the patches of a channel are divided.

    Attributes:
        sizes: N, C, H, W and pitch in units of ALIGN pixels.
        places: Rows and columns of patches of an image, each with its reciprocal.
        blocks: Programs or steps of programs for a channel.
        constants: Of the kernels.
    """

    sizes: tuple[int, ...]
    places: tuple[int, ...]
    blocks: int
    constants: dict[str, Any]


def division_of(x: Tensor, width: int, plan: Plan, tile: Tile) -> Division:
    """Blocks of patches of ``x`` (N, C, H, pitch), which is ``width`` wide."""
    n, c, h, pitch = x.shape
    align = _VECTOR if pitch % _VECTOR == 0 else 4
    groups, tiles = triton.cdiv(h, tile.rows), triton.cdiv(width, COLUMNS)
    constants = {
        'REACH': plan.reach, 'LEAD': plan.lead, 'DEPTH': plan.depth, 'ROWS': tile.rows, 'BLOCK': tile.block,
        'ALIGN': align, 'PRECISION': precision(x), 'num_warps': tile.warps, 'num_stages': 1,
    }  # fmt: skip
    places = (groups, *reciprocal(groups), tiles, *reciprocal(tiles))
    return Division((n, c, h, width, pitch // align), places, triton.cdiv(n * groups * tiles, tile.block), constants)


def lay_out(weight: Tensor, channels: int, plan: Plan, dtype: torch.dtype, flipped: bool = False) -> Tensor:
    """The rows of the kernels of all branches as banded (Toeplitz) matrices, (C, rows, depth, 16).

    ``table[c, r, k, n]`` is the tap of row r for which column k of a window lies under column n of the patch.

    Args:
        weight: Of all branches, flat: one (C, 1, K, K) after the other.
        channels: C.
        plan: Of all branches.
        dtype: Of the table.
        flipped: Whether to turn the kernels by 180 degrees.
    """
    table = weight.new_empty((channels, sum(plan.kernels), plan.depth, COLUMNS), dtype=dtype)
    _lay_out_kernel[(channels,)](
        weight, table, channels, plan.kernels, plan.dilations, plan.before, sum(plan.kernels), plan.lead, plan.depth,
        flipped, num_warps=2,
    )  # fmt: skip
    return table


@triton.jit(do_not_specialize=['C'])
def _lay_out_kernel(
    weight_ptr, table_ptr, C, KERNELS: tl.constexpr, DILATIONS: tl.constexpr, BEFORE: tl.constexpr, ROWS: tl.constexpr,
    LEAD: tl.constexpr, DEPTH: tl.constexpr, FLIPPED: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    place = tl.arange(0, DEPTH * 16)
    offset = place // 16 - place % 16 - LEAD
    out = table_ptr + c.to(tl.int64) * (ROWS * DEPTH * 16) + place
    for b in tl.static_range(len(KERNELS)):
        column = offset + KERNELS[b] // 2 * DILATIONS[b]
        kx = column // DILATIONS[b]
        taken = (column >= 0) & (kx < KERNELS[b]) & (column % DILATIONS[b] == 0)
        tap = weight_ptr + BEFORE[b] * C + c * (KERNELS[b] * KERNELS[b])
        for ky in range(KERNELS[b]):
            if FLIPPED:
                value = tl.load(tap + ((KERNELS[b] - ky) * KERNELS[b] - 1 - kx), mask=taken, other=0.0)
            else:
                value = tl.load(tap + (ky * KERNELS[b] + kx), mask=taken, other=0.0)
            tl.store(out, value.to(table_ptr.dtype.element_ty))
            out += DEPTH * 16


@triton.jit
def window_of(
    plane, corner, valid, y, x0, pitch, REACH: tl.constexpr, LEAD: tl.constexpr, DEPTH: tl.constexpr,
    DOWN: tl.constexpr,
):  # fmt: skip
    """Where the first DOWN rows of the windows of patches are, (BLOCK, DOWN * DEPTH), and in which row of the map.

    Columns outside of the map are in a row that is in no map.
    """
    FAR: tl.constexpr = -(2**30)
    k = tl.arange(0, DOWN * DEPTH)
    dy, dx = k // DEPTH, k % DEPTH
    pointers = plane + (corner - REACH * pitch - LEAD)[:, None] + (dy * pitch + dx)[None, :]
    column = (x0 - LEAD)[:, None] + dx[None, :]
    row = tl.where(valid, y - REACH, FAR)[:, None] + dy[None, :]
    return pointers, tl.where((column >= 0) & (column < pitch), row, FAR)


@triton.jit
def load_rows(pointers, row, down, H, pitch):
    """What ``window_of`` found, ``down`` rows lower: zeros outside of the map."""
    return tl.load(pointers + down * pitch, mask=(row + down).to(tl.uint32) < H.to(tl.uint32), other=0.0)


@triton.jit
def load_matrix(
    table, i: tl.constexpr, PRODUCTS: tl.constexpr, DILATIONS: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
    DOWN: tl.constexpr,
):  # fmt: skip
    """What the rows of the window in product i are multiplied with, (DOWN * DEPTH, ROWS * 16): ``Plan.products``."""
    k = tl.arange(0, DOWN * DEPTH)
    pixel = tl.arange(0, ROWS * 16)
    # Nothing but a constant differs between products whose distances have the same remainders.
    d: tl.constexpr = DILATIONS[PRODUCTS[i][1]]
    rest: tl.constexpr = (PRODUCTS[i][3] + ROWS * d) % d
    distance = (k // DEPTH)[:, None] - (pixel // 16)[None, :] + (ROWS * d - rest)
    pointers = table + (distance // d * (DEPTH * 16) + ((k % DEPTH)[:, None] * 16 + (pixel % 16)[None, :]))
    pointers += (PRODUCTS[i][2] - (PRODUCTS[i][3] + ROWS * d - rest) // d) * (DEPTH * 16)
    low: tl.constexpr = PRODUCTS[i][3] + ROWS * d - rest
    high: tl.constexpr = PRODUCTS[i][4] + ROWS * d - rest
    if low == ROWS * d - rest + 1 - ROWS and high == ROWS * d - rest + DOWN - 1 and d == 1:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(distance % d == 0) & (distance >= low) & (distance <= high), other=0.0)


@triton.jit
def in_two(value):
    """float32 as the sum of the nearest number in TF32 and of what is left."""
    coarse = ((value.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    return coarse, value - coarse


@triton.jit
def multiply(left, right, total, PRECISION: tl.constexpr):
    """``total`` plus the product; with tf32x3 that of both in two parts, less their smallest product.

    Unlike the precision of that name this splits a matrix once for all of its products, and makes NaN of infinity.
    """
    if PRECISION == 'tf32x3' and left.dtype == tl.float32:
        coarse, fine = in_two(left)
        coarse_right, fine_right = in_two(right)
        total = tl.dot(coarse, fine_right, total, input_precision='tf32')
        total = tl.dot(fine, coarse_right, total, input_precision='tf32')
        return tl.dot(coarse, coarse_right, total, input_precision='tf32')
    else:
        return tl.dot(left, right, total, input_precision='tf32')


@triton.jit
def branch_values(
    values, plane, corner, valid, y, x0, H, pitch, table, PRODUCTS: tl.constexpr, DILATIONS: tl.constexpr,
    REACH: tl.constexpr, LEAD: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, DOWN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of the branches in patches, added to ``values``: a tuple of (BLOCK, ROWS * 16) in float32."""
    pointers, row = window_of(plane, corner, valid, y, x0, pitch, REACH, LEAD, DEPTH, DOWN)
    for i in tl.static_range(len(PRODUCTS)):
        if i == 0 or PRODUCTS[i][0] != PRODUCTS[i - 1][0]:
            window = load_rows(pointers, row, PRODUCTS[i][0], H, pitch)
        matrix = load_matrix(table, i, PRODUCTS, DILATIONS, DEPTH, ROWS, DOWN)
        more = multiply(window, matrix, values[PRODUCTS[i][1]], PRECISION)
        values = values[: PRODUCTS[i][1]] + (more,) + values[PRODUCTS[i][1] + 1 :]
    return values


@triton.jit
def in_map(valid, y, x0, H, W, ROWS: tl.constexpr):
    """Which pixels of patches are inside of the map, (BLOCK, ROWS * 16)."""
    pixel = tl.arange(0, ROWS * 16)
    bottom = tl.where(valid, H - y, 0)
    return ((pixel // 16)[None, :] < bottom[:, None]) & ((pixel % 16)[None, :] < (W - x0)[:, None])
