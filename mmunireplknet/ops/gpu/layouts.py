"""From channels_last to planes and back, and rows that can be read quickly: what the convolutions work on."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference

__all__ = ['like', 'to_planes', 'vector_of', 'widen']

_BLOCK = 64
VECTOR = 8  # pixels of 2 bytes in the widest read


@triton.jit(do_not_specialize=['rows_units', 'columns_units'])
def _transpose(  # type: ignore[no-untyped-def]
    source,
    target,
    rows_units,
    columns_units,
    ROWS_ALIGN: tl.constexpr,
    COLUMNS_ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows, columns = rows_units * ROWS_ALIGN, columns_units * COLUMNS_ALIGN
    across = tl.cdiv(columns, BLOCK)
    blocks = across * tl.cdiv(rows, BLOCK)
    block = tl.program_id(0) % blocks
    matrix = (tl.program_id(0) // blocks).to(tl.int64) * rows * columns
    row = block // across * BLOCK + tl.arange(0, BLOCK)
    column = block % across * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(source + matrix + (row[:, None].to(tl.int64) * columns + column[None, :]), mask=inside)
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(target + matrix + (column[:, None].to(tl.int64) * rows + row[None, :]), tl.trans(value), mask=inside)


def transpose(source: Tensor, target: Tensor) -> None:
    """Write every matrix of ``source`` (N, A, B), turned, to ``target`` (N, B, A); both are contiguous."""
    n, rows, columns = source.shape
    aligned = [8 if size % 8 == 0 else 1 for size in (rows, columns)]
    programs = n * triton.cdiv(rows, _BLOCK) * triton.cdiv(columns, _BLOCK)
    with torch.cuda.device_of(source):
        _transpose[(programs,)](source, target, rows // aligned[0], columns // aligned[1], *aligned, _BLOCK)


@triton.jit(do_not_specialize=['rows', 'width', 'wide_units'])
def _widen(  # type: ignore[no-untyped-def]
    source, target, rows, width, wide_units, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    wide = wide_units * ALIGN
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for start in range(0, wide, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None]
        value = tl.load(source + row[:, None] * width + column[None, :], mask=inside & (column < width), other=0.0)
        tl.store(target + row[:, None] * wide + column[None, :], value, mask=inside & (column < wide))


def vector_of(width: int) -> int:
    """The widest read that maps of this width allow at the start of each of their rows, in pixels."""
    return next(pixels for pixels in (VECTOR, 4, 2, 1) if width % pixels == 0)


def widen(planes: Tensor) -> Tensor:
    """NCHW ``planes``, with columns of zeros at the right where rows cannot be read 4 pixels at a time without.

    A copy costs less than the many small reads of every window.
    """
    n, c, h, w = planes.shape
    if vector_of(w) >= 4:
        return planes
    out = planes.new_empty((n, c, h, -(-w // VECTOR) * VECTOR))
    rows, wide = n * c * h, out.shape[3]
    with torch.cuda.device_of(planes):
        _widen[(triton.cdiv(rows, 16),)](planes, out, rows, w, wide // VECTOR, VECTOR, 16, 64)
    return out


def to_planes(x: Tensor) -> Tensor:
    """``x`` (N, C, H, W) in the layout NCHW."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous()
    n, c, h, w = x.shape
    out = torch.empty((n, c, h, w), dtype=x.dtype, device=x.device)
    transpose(x.permute(0, 2, 3, 1).view(n, h * w, c), out.view(n, c, h * w))
    return out


def like(planes: Tensor, x: Tensor, layout: torch.memory_format | None = None) -> Tensor:
    """NCHW ``planes`` in ``layout``, or with the strides of ``torch.empty_like(x)`` where it is None."""
    if layout is None:
        last = x.is_contiguous(memory_format=torch.channels_last)
        if not (last or x.is_contiguous()):
            return reference.like(planes, x)
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    if planes.is_contiguous(memory_format=layout):
        return planes
    n, c, h, w = planes.shape
    out = torch.empty_like(planes, memory_format=layout)
    transpose(planes.view(n, c, h * w), out.permute(0, 2, 3, 1).view(n, h * w, c))
    return out
