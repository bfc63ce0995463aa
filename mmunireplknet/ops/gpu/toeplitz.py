"""Rows of depthwise kernels as banded Toeplitz matrices."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ['depth_of', 'expand']

_BLOCK = 1024


@triton.jit(do_not_specialize=['size'])
def _expand(  # type: ignore[no-untyped-def]
    weight,
    table,
    size,  # of the table of one channel, padded at its end to a whole number of blocks
    KERNEL: tl.constexpr,
    DILATION: tl.constexpr,
    FLIPPED: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHIFT: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = index % COLUMNS
    row = index // COLUMNS % DEPTH
    ky = index // (COLUMNS * DEPTH) - PAD
    distance = row - column - SHIFT
    kx = distance // DILATION
    inside = (ky >= 0) & (ky < KERNEL) & (distance >= 0) & (distance % DILATION == 0) & (kx < KERNEL)
    tap = ky * KERNEL + kx
    if FLIPPED:
        tap = KERNEL * KERNEL - 1 - tap
    value = tl.load(weight + channel * (KERNEL * KERNEL) + tap, mask=inside, other=0.0)
    tl.store(table + channel * size + index, value.to(table.dtype.element_ty), mask=index < size)


def depth_of(kernel: int, dilation: int, columns: int = 16, shift: int = 0) -> int:
    """Rows of the matrix that gives ``columns`` sums: the pixels they reach, in whole steps of a tensor core (16)."""
    return -(-(columns + (kernel - 1) * dilation + shift) // 16) * 16


def expand(
    weight: Tensor,
    dilation: int,
    flipped: bool,
    dtype: torch.dtype,
    columns: int = 16,
    shift: int = 0,
    pad: int = 0,
) -> Tensor:
    """Every row of every kernel as a banded matrix, with all of its taps on the diagonals.

    ``table[c, pad + ky, k, n]`` is ``weight[c, 0, ky, (k - n - shift) / dilation]`` where that is a tap, else 0. With
    ``X[y, k] = x[y + (ky - K // 2) * dilation, x0 - (K // 2) * dilation - shift + k]``, the sum of ``X @ table[c, ky]``
    over ky is the convolution at the columns ``x0 + n``.

    Args:
        weight: (C, 1, K, K) in any floating dtype.
        dilation: Pixels between neighbouring taps.
        flipped: Whether to turn the kernel by 180 degrees, which makes the convolution the input gradient.
        dtype: Of the table.
        columns: Sums in one row of a product.
        shift: Pixels by which the window starts early, so that it starts where a vector can be read.
        pad: Matrices of zeros before the first and after the last row of the kernel.

    Returns:
        (C, K + 2 * pad, depth, columns), see ``depth_of``.
    """
    channels, kernel = weight.shape[0], weight.shape[-1]
    depth = depth_of(kernel, dilation, columns, shift)
    table = torch.empty((channels, kernel + 2 * pad, depth, columns), dtype=dtype, device=weight.device)
    size = table[0].numel()
    with torch.cuda.device_of(table):
        _expand[(channels, triton.cdiv(size, _BLOCK))](  # of the second there may be 65535
            weight.contiguous(), table, size, kernel, dilation, flipped, depth, columns, shift, pad, _BLOCK
        )
    return table
