# mypy: allow-untyped-defs
"""The branches of a Dilated Reparam Block inside of a tile of the map, on tensor cores.

A row of a kernel over 16 neighbouring columns is a matrix product with a banded (Toeplitz) matrix. All branches look at
the same window of the map, so that each of its rows is read once for all of them; the matrices of the smaller branches
have zeros around their band. The window begins at a multiple of 8 pixels and rows of the map at one of 4 or 8, for loads
of 8 or 16 bytes: maps of other widths are copied first, with zeros at the end of every row.
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
from .convolution import precision

__all__ = ['COLUMNS', 'Plan', 'branch_values', 'expand', 'plan_of', 'tile_of', 'to_rows', 'unsupported']

COLUMNS = 16  # of a tile: the N of the matrix products
_MAX_SIZE = 31
_VECTOR = 8  # pixels of 2 bytes in the widest load


class Plan(NamedTuple):
    """What the kernels are specialised for; every field is known when they are compiled.

    Attributes:
        kernels: Size of each branch.
        dilations: Dilation of each branch.
        taps: For each row of the window, from the top, and each branch, the row of the table that belongs there; -1
            where the branch has no tap in this row of the window.
        lead: Columns of the window to the left of a tile.
        depth: Columns of the window.
        rows: Of the table: the heights of all kernels.
    """

    kernels: tuple[int, ...]
    dilations: tuple[int, ...]
    taps: tuple[tuple[int, ...], ...]
    lead: int
    depth: int
    rows: int

    def of(self, members: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """``taps`` of some branches only, in their order."""
        return tuple(tuple(row[b] for b in members) for row in self.taps)


@functools.lru_cache(maxsize=256)
def plan_of(kernels: tuple[int, ...], dilations: tuple[int, ...]) -> Plan:
    """The plan for branches of these sizes; raises ValueError where `unsupported` says why."""
    if reason := unsupported(kernels, dilations):
        raise ValueError(reason)
    reach = max(_reaches(kernels, dilations))
    starts = [sum(kernels[:b]) for b in range(len(kernels))]
    taps = []
    for dy in range(-reach, reach + 1):
        places = [divmod(dy + r, d) for r, d in zip(_reaches(kernels, dilations), dilations, strict=True)]
        taps.append(
            tuple(
                start + ky if rest == 0 and 0 <= ky < k else -1
                for start, k, (ky, rest) in zip(starts, kernels, places, strict=True)
            )
        )
    lead = 8 if reach <= 8 else 16
    return Plan(kernels, dilations, tuple(taps), lead, 32 if reach <= 8 else 64, sum(kernels))


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


def _reaches(kernels: Sequence[int], dilations: Sequence[int]) -> list[int]:
    return [k // 2 * d for k, d in zip(kernels, dilations, strict=True)]


def to_rows(x: Tensor) -> Tensor:
    """``x`` (N, C, H, W) as contiguous planes (N, C, H, pitch), pitch a multiple of 4: zeros fill the rows."""
    x, w = layouts.to_planes(x), x.shape[3]
    return x if w % 4 == 0 else F.pad(x, (0, -w % _VECTOR))


def tile_of(x: Tensor) -> dict[str, Any]:
    """How large the tiles of ``x`` (N, C, H, pitch) are, and how their matrix products are computed."""
    align = _VECTOR if x.shape[3] % _VECTOR == 0 else 4
    return {'ROWS': 32, 'ALIGN': align, 'PRECISION': precision(x), 'num_warps': 4, 'num_stages': 1}


def expand(weight: Tensor, plan: Plan, dtype: torch.dtype, flipped: bool = False) -> Tensor:
    """The banded matrices of all branches, (C, rows, depth, 16) in ``dtype``.

    Args:
        weight: Of all branches, flat: one (C, 1, K, K) after the other.
        plan: Of the branches.
        dtype: That of the map.
        flipped: Turn every kernel by 180 degrees.
    """
    channels = weight.numel() // sum(k * k for k in plan.kernels)
    table = weight.new_empty((channels, plan.rows, plan.depth, COLUMNS), dtype=dtype)
    _expand_kernel[(channels, len(plan.kernels))](
        weight, table, channels, plan.kernels, plan.dilations, plan.rows, plan.lead, plan.depth, flipped, num_warps=4
    )
    return table


@triton.jit(do_not_specialize=['C'])
def _expand_kernel(
    weight_ptr, table_ptr, C, KERNELS: tl.constexpr, DILATIONS: tl.constexpr, TOTAL: tl.constexpr,
    LEAD: tl.constexpr, DEPTH: tl.constexpr, FLIPPED: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    k = tl.arange(0, DEPTH)[:, None]
    n = tl.arange(0, 16)[None, :]
    weight = weight_ptr
    table = table_ptr + c.to(tl.int64) * (TOTAL * DEPTH * 16) + k * 16 + n
    for b in tl.static_range(len(KERNELS)):
        if tl.program_id(1) == b:
            band = k - n - LEAD + (KERNELS[b] // 2) * DILATIONS[b]
            kx = band // DILATIONS[b]
            taken = (band >= 0) & (kx < KERNELS[b]) & (band % DILATIONS[b] == 0)
            first = weight + c * (KERNELS[b] * KERNELS[b])
            for ky in range(KERNELS[b]):
                place = ky * KERNELS[b] + kx
                if FLIPPED:
                    place = KERNELS[b] * KERNELS[b] - 1 - place
                value = tl.load(first + place, mask=taken, other=0.0)
                tl.store(table + ky * (DEPTH * 16), value.to(table_ptr.dtype.element_ty))
        weight += C * (KERNELS[b] * KERNELS[b])
        table += KERNELS[b] * (DEPTH * 16)


@triton.jit
def load_window(plane, y, x0, H, PITCH, LEAD: tl.constexpr, DEPTH: tl.constexpr):
    """Rows ``y`` of the window of the tile that begins in column ``x0``: zeros outside of the map."""
    columns = x0 - LEAD + tl.arange(0, DEPTH)
    inside = ((y >= 0) & (y < H))[:, None] & ((columns >= 0) & (columns < PITCH))[None, :]
    return tl.load(plane + y[:, None] * PITCH + columns[None, :], mask=inside, other=0.0)


@triton.jit
def load_band(table, row, DEPTH: tl.constexpr):
    """One row of a kernel as a banded matrix, (DEPTH, 16)."""
    return tl.load(table + row * (DEPTH * 16) + tl.arange(0, DEPTH)[:, None] * 16 + tl.arange(0, 16)[None, :])


@triton.jit
def branch_values(
    plane, table, y0, x0, H, PITCH, TAPS: tl.constexpr, LEAD: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of the branches of ``TAPS`` in the tile at (y0, x0): a tuple of (ROWS, 16) in float32."""
    values = ()
    for _ in tl.static_range(len(TAPS[0])):
        values = values + (tl.zeros((ROWS, 16), tl.float32),)
    for step in tl.static_range(len(TAPS)):
        window = load_window(plane, y0 + step - len(TAPS) // 2 + tl.arange(0, ROWS), x0, H, PITCH, LEAD, DEPTH)
        for b in tl.static_range(len(TAPS[0])):
            if TAPS[step][b] >= 0:
                band = load_band(table, TAPS[step][b], DEPTH)
                more = tl.dot(window, band, values[b], input_precision=PRECISION)
                values = values[:b] + (more,) + values[b + 1 :]
    return values


@triton.jit
def tile_at(index, H, W, ROWS: tl.constexpr):
    """Image, first row and first column of the tile of this index; tiles of an image follow each other."""
    across = tl.cdiv(W, 16)
    tiles = tl.cdiv(H, ROWS) * across
    return index // tiles, index % tiles // across * ROWS, index % across * 16


@triton.jit
def in_map(y0, x0, H, W, ROWS: tl.constexpr):
    """Which pixels of a tile are inside of the map, (ROWS, 16)."""
    return (y0 + tl.arange(0, ROWS) < H)[:, None] & (x0 + tl.arange(0, 16) < W)[None, :]
