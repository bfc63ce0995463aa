"""The depthwise convolution on tensor cores, in Triton: forward, and with the kernel turned its input gradient.

A program makes ``block`` patches of one channel, each of ``rows`` x ``columns`` (4 x 16) pixels, as one product of
matrices: a row of the left one is the window of the map that a patch reaches, the right one is the kernel, laid out for
each of the 64 pixels of a patch (``toeplitz``). So each pixel of the map is read (4 + K - 1) / 4 times instead of K
times, and the right matrix is read once for all patches of a program. Patches are counted through rows, columns and the
images of a batch, so that small maps fill a program as well. Windows start at a column that is a multiple of 8, which
keeps reads of 16 bytes possible wherever the width allows them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import compat
from . import layouts, toeplitz, tuning
from .tuning import Config

__all__ = ['forward', 'supports']

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_EXTENT = 31
# Compiling anew for sizes that are 1 or multiples of 16 would gain nothing: they only place the patches.
_SIZES = ['batch', 'channels', 'height', 'wide_units', 'width_units', 'blocks']
PLACES = ['groups', 'groups_factor', 'groups_shift', 'tiles', 'tiles_factor', 'tiles_shift']


@triton.jit
def divide(number, factor, shift):  # type: ignore[no-untyped-def]
    """Numbers below 2**31 by what ``reciprocal`` made the factor and the shift of: 3 instructions instead of 20."""
    return (tl.umulhi(number.to(tl.uint32) * 2, factor.to(tl.uint32)) >> shift.to(tl.uint32)).to(tl.int32)


@triton.jit
def corner_of(  # type: ignore[no-untyped-def]
    patch,
    groups,
    groups_factor,
    groups_shift,
    tiles,
    tiles_factor,
    tiles_shift,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DILATION: tl.constexpr,
):
    """Image, and first row and column, of patches. The rows of a patch are DILATION apart, like those of the kernel."""
    row_of_tiles = divide(patch, tiles_factor, tiles_shift)
    image = divide(row_of_tiles, groups_factor, groups_shift)
    group = row_of_tiles - image * groups
    y = group // DILATION * (ROWS * DILATION) + group % DILATION
    return image, y, (patch - row_of_tiles * tiles) * COLUMNS


@triton.jit(do_not_specialize=_SIZES + PLACES)
def _convolve(  # type: ignore[no-untyped-def]
    x,
    table,
    bias,
    out,
    sums,
    batch,
    channels,
    height,
    wide_units,
    width_units,
    blocks,
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
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP_X: tl.constexpr,
    STEP_Y: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PIXELS: tl.constexpr = ROWS * COLUMNS
    REACH: tl.constexpr = KERNEL // 2 * DILATION
    ACROSS: tl.constexpr = DEPTH // STEP_X
    STEPS: tl.constexpr = (ROWS + KERNEL - 1 + STEP_Y - 1) // STEP_Y * ACROSS
    FAR: tl.constexpr = -(2**30)  # a row that is in no map, as a number without sign
    # Rows of x may be wider than the map, by zeros. The factors tell the compiler what divides the widths.
    wide, width = wide_units * ALIGN, width_units * ALIGN_OUT
    channel = tl.program_id(0) // blocks
    patch = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    image, y, x0 = corner_of(
        patch, groups, groups_factor, groups_shift, tiles, tiles_factor, tiles_shift, ROWS, COLUMNS, DILATION
    )
    plane = height.to(tl.int64) * wide
    corner = image * (channels * plane) + channel * plane + (y * wide + x0)

    k = tl.arange(0, STEP_X * STEP_Y)
    dy, dx = k // STEP_X, k % STEP_X
    pixel = tl.arange(0, PIXELS)
    py, px = pixel // COLUMNS, pixel % COLUMNS
    window = x + (corner - REACH * wide - (REACH + SHIFT))[:, None] + (dy * DILATION * wide + dx)[None, :]
    row = tl.where(image < batch, y - REACH, FAR)[:, None] + (dy * DILATION)[None, :]
    column = (x0 - (REACH + SHIFT))[:, None] + dx[None, :]
    matrix = table + channel.to(tl.int64) * ((KERNEL + 2 * PAD) * DEPTH * COLUMNS)
    matrix += (dy[:, None] + PAD - py[None, :]) * (DEPTH * COLUMNS) + dx[:, None] * COLUMNS + px[None, :]

    total = tl.full((BLOCK, PIXELS), 0.0, tl.float32)
    for step in tl.range(STEPS, num_stages=1):
        down, right = step // ACROSS * STEP_Y, step % ACROSS * STEP_X
        inside = tl.where((column + right >= 0) & (column + right < wide), row + down * DILATION, FAR)
        inside = inside.to(tl.uint32) < height.to(tl.uint32)
        left = tl.load(window + (down * DILATION * wide + right), mask=inside, other=0.0)
        weights = tl.load(matrix + (down * DEPTH + right) * COLUMNS)
        total = tl.dot(left, weights, total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + channel).to(tl.float32)

    inside = (image < batch)[:, None] & ((y[:, None] + (py * DILATION)[None, :]) < height)
    inside = inside & ((x0[:, None] + px[None, :]) < width)
    plane = height.to(tl.int64) * width
    corner = image * (channels * plane) + channel * plane + (y * width + x0)
    pixels = corner[:, None] + (py * DILATION * width + px)[None, :]
    tl.store(out + pixels, total.to(out.dtype.element_ty), mask=inside)
    if sums is not None:
        of_patch = tl.sum(tl.where(inside, total, 0.0), axis=1)
        place = (image.to(tl.int64) * channels + channel - image) * (groups * tiles) + patch
        tl.store(sums + place, of_patch, mask=image < batch)


def supports(x: Tensor, kernel: int, dilation: int) -> str:
    """Why these kernels cannot convolve maps like ``x`` (N, C, H, W) with a KxK kernel; empty where they can."""
    extent = (kernel - 1) * dilation + 1
    if x.dtype not in DTYPES:
        return f'the dtype is {x.dtype}: the Triton kernels are for float32, bfloat16 and float16.'
    if kernel < 3 or kernel % 2 == 0 or extent > LARGEST_EXTENT:
        return f'kernel {kernel} with dilation {dilation} spans {extent} pixels; the Triton kernels span 3 to 31, odd.'
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return 'the GPU is older than compute capability 8.0, which the Triton kernels need.'
    n, c, h, w = x.shape
    # Planes are addressed with 64 bits; the pixels of one, patches and programs are counted with 32.
    pixels = (h + 128) * (w + 128)
    patches = n * pixels // 16
    if max(pixels, patches, c * (patches // 16 + 1)) >= 2**31:
        return f'a map of {tuple(x.shape)} is too large: its planes must have less than 2**31 pixels.'
    return ''


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    flipped: bool = False,
    pooled: bool = False,
    layout: torch.memory_format | None = None,
    config: Config | None = None,
) -> Any:
    """Depthwise convolution of stride 1 that keeps the size of the map, summed in float32.

    The weight is rounded to the dtype of ``x``. In float32 the factors are rounded to TF32 where torch allows that for
    convolutions (``torch.backends.cudnn.allow_tf32``), otherwise each is split in two and three products are added,
    which keeps nearly the accuracy of float32.

    Args:
        x: (N, C, H, W), not empty, in a dtype that ``supports`` allows.
        weight: (C, 1, K, K) in any floating dtype.
        bias: (C,) or None.
        dilation: Pixels between neighbouring taps.
        flipped: Whether to turn the kernel by 180 degrees, which makes this the input gradient.
        pooled: Whether to return the sums of the planes as well.
        layout: ``torch.contiguous_format`` or ``torch.channels_last`` for the output, None for that of ``x``.
        config: Division of the work; None for what ``tuning`` chooses.

    Returns:
        (N, C, H, W) in the dtype of ``x``; with ``pooled`` also (N, C) in float32, of the sums before rounding.
    """
    if config is None:
        function = 'input_grad' if flipped else 'pooled' if pooled else 'forward'
        config = tuning.choose(function, x, weight.shape[-1], dilation)
    return convolve(x, weight, bias, dilation, flipped, pooled, layout, config)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    flipped: bool,
    pooled: bool,
    layout: torch.memory_format | None,
    config: Config,
) -> Any:
    """``forward`` with a given division of the work."""
    n, c, h, w = x.shape
    kernel = weight.shape[-1]
    shift = shift_of(kernel, dilation)
    depth = toeplitz.depth_of(kernel, dilation, config.columns, shift)
    step_x = 32 if depth % 32 == 0 else 16
    step_y = config.step // step_x
    steps = -(-(config.rows + kernel - 1) // step_y)
    pad = config.rows - 1 + steps * step_y - (config.rows + kernel - 1)
    groups = dilation * -(-h // (config.rows * dilation))
    tiles = -(-w // config.columns)
    blocks = triton.cdiv(n * groups * tiles, config.block)

    table = toeplitz.expand(weight, dilation, flipped, x.dtype, config.columns, shift, pad)
    planes = layouts.widen(layouts.to_planes(x))
    wide, align, align_out = planes.shape[3], layouts.vector_of(planes.shape[3]), layouts.vector_of(w)
    out = torch.empty((n, c, h, w), dtype=x.dtype, device=x.device)
    sums = x.new_empty((n, c, groups * tiles), dtype=torch.float32) if pooled else None
    with torch.cuda.device_of(x):
        _convolve[(c * blocks,)](
            *(planes, table, None if bias is None else bias.contiguous(), out, sums),
            *(n, c, h, wide // align, w // align_out, blocks, groups, *reciprocal(groups), tiles, *reciprocal(tiles)),
            *(kernel, dilation, depth, shift, pad, config.rows, config.columns, config.block),
            *(step_x, step_y, align, align_out, precision(x)),
            num_warps=config.warps,
        )
    out = layouts.like(out, x, layout)
    return out if sums is None else (out, sums.sum(-1))


def reciprocal(divisor: int) -> tuple[int, int]:
    """Factor and shift for ``divide``; the factor is between 2**31 and 2**32, and passed as the 32-bit number below."""
    shift = (divisor - 1).bit_length()
    return -(-(2 ** (31 + shift)) // divisor) - 2**32, shift


def shift_of(kernel: int, dilation: int) -> int:
    """Columns by which windows start early, so that they start at multiples of the widest read."""
    return -(kernel // 2) * dilation % layouts.VECTOR


def precision(x: Tensor) -> str:
    """How factors in float32 are multiplied; those of 16 bits are exact in any case."""
    return 'tf32' if x.dtype == torch.float32 and compat.convolutions_may_use_tf32() else 'tf32x3'
