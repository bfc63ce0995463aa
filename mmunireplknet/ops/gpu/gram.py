"""The weight gradient of the depthwise convolution on tensor cores, in Triton.

The gradient of a tap is the sum over the map of the product of the gradient and the map shifted by the tap. A program
takes a channel and some rows of the windows that belong to patches of 4 x 16 pixels (``convolution``), and multiplies,
over all patches of the images, every pixel of a patch with every pixel of its window: a Gram matrix, of which the
diagonals hold the products of one tap. These are summed at the end. Programs write sums of their own, which a second
kernel adds in a fixed order, so that the result does not depend on which came first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layouts, toeplitz, tuning
from .convolution import PLACES, corner_of, precision, reciprocal, shift_of
from .tuning import Config

__all__ = ['weight_grad']

_SIZES = ['batch', 'channels', 'height', 'width_units', 'steps', 'splits']


@triton.jit(do_not_specialize=_SIZES + PLACES)
def _gram(  # type: ignore[no-untyped-def]
    x,
    grad,
    parts,
    batch,
    channels,
    height,
    width_units,
    steps,
    splits,
    groups,
    groups_factor,
    groups_shift,
    tiles,
    tiles_factor,
    tiles_shift,
    KERNEL: tl.constexpr,
    DILATION: tl.constexpr,
    DEPTH: tl.constexpr,
    SHIFT: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW_X: tl.constexpr,
    WINDOW_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
    TAPS_Y: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PIXELS: tl.constexpr = ROWS * COLUMNS
    REACH: tl.constexpr = KERNEL // 2 * DILATION
    FAR: tl.constexpr = -(2**30)
    width = width_units * ALIGN
    plane = height.to(tl.int64) * width
    chunk = tl.program_id(0) % CHUNKS
    channel = tl.program_id(0) // CHUNKS % channels
    split = tl.program_id(0) // CHUNKS // channels
    k = tl.arange(0, WINDOW_X * WINDOW_Y)
    dy, dx = k // WINDOW_X + chunk * WINDOW_Y, k % WINDOW_X
    pixel = tl.arange(0, PIXELS)
    py, px = pixel // COLUMNS, pixel % COLUMNS

    total = tl.full((PIXELS, WINDOW_X * WINDOW_Y), 0.0, tl.float32)
    for step in tl.range(split, steps, splits, num_stages=1):
        patch = step * BLOCK + tl.arange(0, BLOCK)
        image, y, x0 = corner_of(
            patch, groups, groups_factor, groups_shift, tiles, tiles_factor, tiles_shift, ROWS, COLUMNS, DILATION
        )
        corner = image * (channels * plane) + channel * plane + (y * width + x0)
        y = tl.where(image < batch, y, FAR)
        row, column = y[:, None] + (py * DILATION)[None, :], x0[:, None] + px[None, :]
        inside = tl.where(column < width, row, FAR).to(tl.uint32) < height.to(tl.uint32)
        right = tl.load(grad + (corner[:, None] + (py * DILATION * width + px)[None, :]), mask=inside, other=0.0)
        row = (y - REACH)[:, None] + (dy * DILATION)[None, :]
        column = (x0 - (REACH + SHIFT))[:, None] + dx[None, :]
        inside = (column >= 0) & (column < width) & (dx < DEPTH)[None, :]
        inside = tl.where(inside, row, FAR).to(tl.uint32) < height.to(tl.uint32)
        window = (corner - REACH * width - (REACH + SHIFT))[:, None] + (dy * DILATION * width + dx)[None, :]
        left = tl.load(x + window, mask=inside, other=0.0)
        total = tl.dot(tl.trans(right), left, total, input_precision=PRECISION)

    # The tap (ky, kx) of pixel (py, px) stands at (ky + py, kx * DILATION + px + SHIFT) of its window, or in no row.
    tap = tl.arange(0, TAPS_X * TAPS_Y)
    ky, kx = tap // TAPS_X - (ROWS - 1), tap % TAPS_X
    at = tl.where(kx < KERNEL, ky * WINDOW_X + kx * DILATION + SHIFT, FAR)[None, :] + (py * WINDOW_X + px)[:, None]
    inside = at.to(tl.uint32) < WINDOW_X * WINDOW_Y
    products = tl.gather(total, at & (WINDOW_X * WINDOW_Y - 1), 1)
    sums = tl.sum(tl.where(inside, products, 0.0), axis=0)
    tl.store(parts + tl.program_id(0).to(tl.int64) * (TAPS_X * TAPS_Y) + tap, sums)


@triton.jit(do_not_specialize=['channels', 'splits'])
def _collect(  # type: ignore[no-untyped-def]
    parts,
    out,
    channels,
    splits,
    KERNEL: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
    TAPS_Y: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the parts (splits, channels, CHUNKS, TAPS_Y, TAPS_X) to taps (channels, KERNEL, KERNEL)."""
    channel = tl.program_id(0).to(tl.int64)
    tap = tl.arange(0, BLOCK)
    ky, kx = tap // KERNEL, tap % KERNEL
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for split in range(splits):
        for chunk in tl.static_range(CHUNKS):
            row = ky - chunk * WINDOW_Y + (ROWS - 1)
            part = ((split * channels + channel) * CHUNKS + chunk) * (TAPS_X * TAPS_Y)
            inside = (row >= 0) & (row < WINDOW_Y + ROWS - 1) & (ky < KERNEL)
            total += tl.load(parts + part + row * TAPS_X + kx, mask=inside, other=0.0)
    tl.store(out + channel * (KERNEL * KERNEL) + tap, total, mask=ky < KERNEL)


def weight_grad(x: Tensor, grad: Tensor, kernel: int, dilation: int, config: Config | None = None) -> Tensor:
    """Gradient for the weight of the depthwise convolution, summed in float32 in a fixed order.

    Factors in float32 are rounded as in ``convolution.forward``.

    Args:
        x: (N, C, H, W), not empty, in a dtype that ``convolution.supports`` allows.
        grad: (N, C, H, W), the gradient of the output.
        kernel: Size K of the kernel.
        dilation: Pixels between neighbouring taps.
        config: Division of the work; None for what ``tuning`` chooses.

    Returns:
        (C, 1, K, K) in float32.
    """
    if config is None:
        config = tuning.choose('weight_grad', x, kernel, dilation)
    return multiply(x, grad.to(x.dtype), kernel, dilation, config)


def multiply(x: Tensor, grad: Tensor, kernel: int, dilation: int, config: Config) -> Tensor:
    """``weight_grad`` with a given division of the work."""
    # Columns of zeros that make reads wide change nothing.
    x, grad = (layouts.widen(layouts.to_planes(t)) for t in (x, grad))
    n, c, h, w = x.shape
    shift = shift_of(kernel, dilation)
    depth = toeplitz.depth_of(kernel, dilation, config.columns, shift)
    window_x = triton.next_power_of_2(depth)
    window_y = config.step // window_x
    chunks = -(-(config.rows + kernel - 1) // window_y)
    taps_x, taps_y = triton.next_power_of_2(kernel), triton.next_power_of_2(window_y + config.rows - 1)
    groups = dilation * -(-h // (config.rows * dilation))
    tiles = -(-w // config.columns)
    steps = triton.cdiv(n * groups * tiles, config.block)
    splits = tuning.splits(c * chunks, steps)
    align = layouts.vector_of(w)

    parts = x.new_empty((splits, c, chunks, taps_y, taps_x), dtype=torch.float32)
    out = x.new_empty((c, 1, kernel, kernel), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _gram[(splits * c * chunks,)](
            *(x, grad, parts),
            *(n, c, h, w // align, steps, splits, groups, *reciprocal(groups), tiles, *reciprocal(tiles)),
            *(kernel, dilation, depth, shift, chunks, config.rows, config.columns, config.block),
            *(window_x, window_y, taps_x, taps_y, align, precision(x)),
            num_warps=config.warps,
        )
        _collect[(c,)](
            *(parts, out, c, splits),
            *(kernel, chunks, config.rows, window_y, taps_x, taps_y, triton.next_power_of_2(kernel**2)),
        )
    return out
