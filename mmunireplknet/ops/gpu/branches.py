# ruff: noqa: RUF005 - Triton knows no starred tuples
# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
"""The branches of a Dilated Reparam Block inside of a tile of the map, on tensor cores.

A row of a kernel over 16 neighbouring columns is a matrix product with a banded (Toeplitz) matrix. All branches look at
the same window of the map, so that each of its rows is read once for all of them; the matrices of the smaller branches
have zeros around their band. The window begins at a multiple of 8 pixels and rows of the map at one of 4 or 8, for
loads of 8 or 16 bytes: maps of other widths are copied first, with zeros at the end of every row.
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

__all__ = ['COLUMNS', 'Plan', 'branch_values', 'plan_of', 'tile_of', 'to_rows', 'unsupported']

COLUMNS = 16  # of a tile: the N of the matrix products
_MAX_SIZE = 31
_VECTOR = 8  # pixels of 2 bytes in the widest load


class Plan(NamedTuple):
    """Branches, as the kernels are specialised for them.

    Attributes:
        kernels: Size of each branch.
        dilations: Dilation of each branch.
        before: Taps of the weights that lie before each branch, of one channel.
        taps: For each row of the window, from the top, and each branch, which of all rows of the kernels belongs
            there, counted from the first of the first branch; -1 where a branch has no tap in this row of the window.
        lead: Columns of the window to the left of a tile.
        depth: Columns of the window, a power of two.
    """

    kernels: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    taps: tuple[tuple[int, ...], ...]
    lead: int
    depth: int

    def shared_bytes(self, x: Tensor) -> int:
        """Shared memory for the banded matrices of all branches; TF32 in three parts keeps each in two."""
        parts = 2 if x.dtype == torch.float32 and precision(x) == 'tf32x3' else 1
        return sum(self.kernels) * self.depth * COLUMNS * x.element_size() * parts

    def constants(self) -> dict[str, Any]:
        """The plan as arguments of a kernel."""
        return {name.upper(): value for name, value in self._asdict().items()}


@functools.lru_cache(maxsize=256)
def plan_of(kernels: tuple[int, ...], dilations: tuple[int, ...], members: tuple[int, ...] | None = None) -> Plan:
    """The plan for branches of these sizes, or for some of them."""
    members = tuple(range(len(kernels))) if members is None else members
    before = tuple(sum(k * k for k in kernels[:b]) for b in members)
    kernels, dilations = tuple(kernels[b] for b in members), tuple(dilations[b] for b in members)
    starts = [sum(kernels[:b]) for b in range(len(kernels))]
    reaches = [k // 2 * d for k, d in zip(kernels, dilations, strict=True)]
    taps = []
    for dy in range(-max(reaches), max(reaches) + 1):
        places = [divmod(dy + reach, d) for reach, d in zip(reaches, dilations, strict=True)]
        taps.append(
            tuple(
                start + ky if rest == 0 and 0 <= ky < k else -1
                for start, k, (ky, rest) in zip(starts, kernels, places, strict=True)
            )
        )
    lead = _VECTOR if max(reaches) <= _VECTOR else 2 * _VECTOR
    return Plan(kernels, dilations, before, tuple(taps), lead, 4 * lead)


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


def tile_of(x: Tensor, warps: int) -> dict[str, Any]:
    """How large the tiles of ``x`` (N, C, H, pitch) are, how their matrix products are computed, and by how many warps.

    In float32 an operand takes twice as many registers, so that it takes four warps at least.
    """
    align = _VECTOR if x.shape[3] % _VECTOR == 0 else 4
    warps = max(warps, x.element_size())
    return {'ROWS': 32, 'ALIGN': align, 'PRECISION': precision(x), 'num_warps': warps, 'num_stages': 1}


@triton.jit
def load_window(plane, y, x0, H, PITCH, LEAD: tl.constexpr, DEPTH: tl.constexpr):
    """Rows ``y`` of the window of the tile that begins in column ``x0``: zeros outside of the map."""
    columns = x0 - LEAD + tl.arange(0, DEPTH)
    inside = ((y >= 0) & (y < H))[:, None] & ((columns >= 0) & (columns < PITCH))[None, :]
    return tl.load(plane + y[:, None] * PITCH + columns[None, :], mask=inside, other=0.0)


@triton.jit
def load_band(
    weight, x, C, c, b: tl.constexpr, step: tl.constexpr, KERNELS: tl.constexpr, DILATIONS: tl.constexpr,
    BEFORE: tl.constexpr, TAPS: tl.constexpr, LEAD: tl.constexpr, DEPTH: tl.constexpr, FLIPPED: tl.constexpr,
):  # fmt: skip
    """The row of the kernel of branch ``b`` for a row of the window: a banded matrix (DEPTH, 16) in the dtype of ``x``.

    ``FLIPPED`` turns the kernel by 180 degrees.
    """
    column = tl.arange(0, DEPTH)[:, None] - tl.arange(0, 16)[None, :] - LEAD + KERNELS[b] // 2 * DILATIONS[b]
    kx = column // DILATIONS[b]
    taken = (column >= 0) & (kx < KERNELS[b]) & (column % DILATIONS[b] == 0)
    row = weight + BEFORE[b] * C + c * (KERNELS[b] * KERNELS[b])
    if FLIPPED:
        row += KERNELS[b] * KERNELS[b] - 1 - ((step - len(TAPS) // 2) // DILATIONS[b] + KERNELS[b] // 2) * KERNELS[b]
        kx = -kx
    else:
        row += ((step - len(TAPS) // 2) // DILATIONS[b] + KERNELS[b] // 2) * KERNELS[b]
    return tl.load(row + kx, mask=taken, other=0.0).to(x.dtype.element_ty)


@triton.jit
def load_bands(
    weight, x, C, c, KERNELS: tl.constexpr, DILATIONS: tl.constexpr, BEFORE: tl.constexpr, TAPS: tl.constexpr,
    LEAD: tl.constexpr, DEPTH: tl.constexpr, FLIPPED: tl.constexpr,
):  # fmt: skip
    """The rows of all kernels of a channel, see ``load_band``: a tuple, which loops keep in shared memory."""
    bands = ()
    for b in tl.static_range(len(KERNELS)):
        for step in tl.static_range(len(TAPS)):
            if TAPS[step][b] >= 0:
                band = load_band(
                    weight, x, C, c, b, step, KERNELS, DILATIONS, BEFORE, TAPS, LEAD, DEPTH, FLIPPED
                )  # fmt: skip
                bands = bands + (band,)
    return bands


@triton.jit
def branch_values(
    plane, bands, weight, C, c, y0, x0, H, PITCH, KERNELS: tl.constexpr, DILATIONS: tl.constexpr, BEFORE: tl.constexpr,
    TAPS: tl.constexpr, LEAD: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    """Outputs of the branches in the tile at (y0, x0): a tuple of (ROWS, 16) in float32.

    Without ``KEPT``, ``bands`` are not used but loaded again.
    """
    values = ()
    for _ in tl.static_range(len(KERNELS)):
        values = values + (tl.zeros((ROWS, 16), tl.float32),)
    for step in tl.static_range(len(TAPS)):
        window = load_window(plane, y0 + step - len(TAPS) // 2 + tl.arange(0, ROWS), x0, H, PITCH, LEAD, DEPTH)
        for b in tl.static_range(len(KERNELS)):
            if TAPS[step][b] >= 0:
                if KEPT:
                    band = bands[TAPS[step][b]]
                else:
                    band = load_band(
                        weight, plane, C, c, b, step, KERNELS, DILATIONS, BEFORE, TAPS, LEAD, DEPTH, False
                    )  # fmt: skip
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
