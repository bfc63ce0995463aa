# mypy: allow-untyped-defs
"""The passes over memory between the matrix products of a block, in Triton: what ``csrc/cpu/pointwise.h`` has.

A map (N, H, W, C) may lie in memory as that, rows of channels, or as planes, NCHW: a tile of pixels x channels is read
and written along whichever of the two is contiguous, and turned around in shared memory in between. So the pass that
applies a normalization reads what a convolution has written and writes what a matrix product reads, and the other way
around at the end of a block and in the backward pass. Maps may differ in dtype; what is computed is float32.

Every program sums over its part of the pixels, and these sums are put together in a fixed order: the same bits every
time.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layouts import vector_of

__all__ = ['SIZES', 'apply', 'grad', 'place_of', 'sums', 'tile_at', 'tiling_of']

_ELEMENTS = 4096  # of a tile
_WARPS = 8
_PROGRAMS = 1056  # that share a sum: eight for each of 132 multiprocessors
_CHUNKS = 256  # of them, most for an image


def is_planes(x: Tensor) -> bool:
    """Whether a dense map (N, ..., C) lies in memory as (N, C, ...).

    Raises:
        ValueError: It is no dense map of either layout.
    """
    if x.is_contiguous():
        return False
    if (x.permute(0, 3, 1, 2) if x.dim() == 4 else x.movedim(-1, 1)).is_contiguous():
        return True
    raise ValueError(f'a map must lie in memory as NHWC or as NCHW, not with strides {x.stride()} of {tuple(x.shape)}.')


class Tiling(NamedTuple):
    """How maps (N, ..., C) are divided into tiles, and what the kernels are told about it.

    Attributes:
        images: N.
        channels: C.
        pixels: Of an image.
        chunks: Programs that share the pixels of an image.
        trips: Tiles of each of them.
        grid: Programs: blocks of channels of a chunk of pixels follow one another, then chunks, then images.
        sizes: As arguments: in units that the kernels know, so that 1 and multiples of 16 are nothing special.
        constants: Other arguments, by name.
    """

    images: int
    channels: int
    pixels: int
    chunks: int
    trips: int
    grid: tuple[int]
    sizes: tuple[int, int, int, int]
    constants: dict[str, Any]


def tiling_of(x: Tensor, shared: bool, /, **maps: Tensor | None) -> Tiling:
    """The division of ``x``; with ``shared`` into no more programs than a sum takes, of several tiles each.

    Args:
        x: (N, ..., C).
        shared: See above.
        **maps: The maps of the kernel, by the names of the constants that say whether they lie in memory as planes.
    """
    shape = x.shape
    if wrong := [name for name, t in maps.items() if t is not None and t.shape != shape]:
        names = ', '.join(name.removesuffix('_PLANES').lower() for name in wrong)
        raise ValueError(f'{names} must have the shape of x, {tuple(shape)}.')
    planes = tuple((name, t is not None and is_planes(t)) for name, t in maps.items())
    return _tiling(shape[0], shape[1:-1].numel(), shape[-1], planes, _PROGRAMS if shared else 0)


@functools.lru_cache(maxsize=4096)  # asked at every launch
def _tiling(images: int, pixels: int, channels: int, planes: tuple[tuple[str, bool], ...], programs: int) -> Tiling:
    align_p = vector_of(pixels) if any(turned for _, turned in planes) else 1
    align_c = vector_of(channels)
    wide = 32 if -channels % 64 >= 32 else 64
    across, chunks = triton.cdiv(channels, wide), triton.cdiv(pixels, _ELEMENTS // wide)
    trips = triton.cdiv(chunks, min(chunks, _CHUNKS, triton.cdiv(programs, images * across))) if programs else 1
    chunks = triton.cdiv(chunks, trips)
    constants = {
        **dict(planes), 'ALIGN_P': align_p, 'ALIGN_C': align_c, 'P': _ELEMENTS // wide, 'C': wide, 'num_warps': _WARPS,
    }  # fmt: skip
    sizes = (pixels // align_p, channels // align_c, chunks, trips)
    return Tiling(images, channels, pixels, chunks, trips, (images * chunks * across,), sizes, constants)


def _rows(t: Tensor | None, tiling: Tiling, name: str) -> tuple[Tensor | None, int]:
    """Coefficients (N, C) or, the same for all images, (C,) in contiguous memory, and whether images have their own."""
    if t is None:
        return None, 0
    n, c = tiling.images, tiling.channels
    if t.dtype != torch.float32 or t.shape not in ((n, c), (c,)) or not t.is_contiguous():
        given = f'{t.dtype} {tuple(t.shape)} with strides {t.stride()}'
        raise ValueError(f'{name} must be ({n}, {c}) or ({c},) in float32 and contiguous memory, not {given}.')
    return t, int(t.dim() == 2)


@triton.jit
def _gelu(x):
    """x * Phi(x) and its derivative, by the formula of ``gelu_of`` in csrc/cpu/pointwise.h, which is off by 7.5e-8.

    Of the ways to write it, this one takes the fewest instructions: a division takes several times those of a root.
    """
    y = 1 + 0.3275911 * 0.70710678 * tl.abs(x)
    t = tl.rsqrt(y * y)
    density = tl.exp2(-0.72134752 * x * x)
    p = (((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796
    tail = p * t * density
    phi = tl.where(x < 0, tail, 1 - tail)
    # Where the density is zero already, x may be inf, and inf times zero would not be zero.
    return x * phi, phi + tl.where(tl.abs(x) < 20, x, 20.0) * density * 0.39894228


@triton.jit
def place_of(pixels_units, channels_units, chunks, ALIGN_P: tl.constexpr, ALIGN_C: tl.constexpr, C: tl.constexpr):
    """Sizes of a map, whose divisors the compiler sees, and of this program: image, chunk and first channel."""
    pixels, channels = pixels_units * ALIGN_P, channels_units * ALIGN_C
    across = tl.cdiv(channels, C)
    program = tl.program_id(0)
    return pixels, channels, program // across // chunks, program // across % chunks, program % across * C


@triton.jit
def tile_at(ptr, image, p0, c0, pixels, channels, PLANES: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    """Pointers to a tile of pixels x channels of a map."""
    p, c = tl.arange(0, P), tl.arange(0, C)
    start = image.to(tl.int64) * pixels * channels
    if PLANES:
        return ptr + (start + c0.to(tl.int64) * pixels + p0) + (c.to(tl.int64)[None, :] * pixels + p[:, None])
    return ptr + (start + p0.to(tl.int64) * channels + c0) + (p[:, None] * channels + c[None, :])


@triton.jit
def _row(ptr, image, each, c0, channels, missing: tl.constexpr, C: tl.constexpr):
    """Coefficients of a block of channels of an image, (1, C); ``each`` is 1 where images have their own, else 0."""
    if ptr is None:
        row = tl.full((C,), missing, tl.float32)
    else:
        channel = c0 + tl.arange(0, C)
        row = tl.load(ptr + image.to(tl.int64) * each * channels + channel, mask=channel < channels, other=0.0)
    return row[None, :]


SIZES = ['pixels_units', 'channels_units', 'chunks', 'trips']


@triton.jit(do_not_specialize=[*SIZES, 'scale_each', 'shift_each'])
def _apply_kernel(
    x_ptr, scale_ptr, shift_ptr, residual_ptr, out_ptr, scale_each, shift_each,
    pixels_units, channels_units, chunks, trips, GELU: tl.constexpr,
    X_PLANES: tl.constexpr, RESIDUAL_PLANES: tl.constexpr, OUT_PLANES: tl.constexpr,
    ALIGN_P: tl.constexpr, ALIGN_C: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    pixels, channels, image, chunk, c0 = place_of(pixels_units, channels_units, chunks, ALIGN_P, ALIGN_C, C)
    p0 = chunk * P
    inside = (p0 + tl.arange(0, P) < pixels)[:, None] & (c0 + tl.arange(0, C) < channels)[None, :]
    value = tl.load(tile_at(x_ptr, image, p0, c0, pixels, channels, X_PLANES, P, C), mask=inside, other=0.0)
    value = value.to(tl.float32)
    if GELU:
        value = _gelu(value)[0]
    value = value * _row(scale_ptr, image, scale_each, c0, channels, 1.0, C)
    value += _row(shift_ptr, image, shift_each, c0, channels, 0.0, C)
    if residual_ptr is not None:
        place = tile_at(residual_ptr, image, p0, c0, pixels, channels, RESIDUAL_PLANES, P, C)
        value += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    place = tile_at(out_ptr, image, p0, c0, pixels, channels, OUT_PLANES, P, C)
    tl.store(place, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*SIZES, 'scale_each', 'shift_each', 'slope_each'])
def _grad_kernel(
    grad_ptr, x_ptr, scale_ptr, shift_ptr, slope_ptr, out_ptr, sum_ptr, scale_each, shift_each, slope_each,
    pixels_units, channels_units, chunks, trips, GELU: tl.constexpr,
    GRAD_PLANES: tl.constexpr, X_PLANES: tl.constexpr, OUT_PLANES: tl.constexpr,
    ALIGN_P: tl.constexpr, ALIGN_C: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    pixels, channels, image, chunk, c0 = place_of(pixels_units, channels_units, chunks, ALIGN_P, ALIGN_C, C)
    scale = _row(scale_ptr, image, scale_each, c0, channels, 1.0, C)
    shift = _row(shift_ptr, image, shift_each, c0, channels, 0.0, C)
    slope = _row(slope_ptr, image, slope_each, c0, channels, 0.0, C)
    total = tl.zeros((P, C), tl.float32)
    for trip in range(trips):
        p0 = (chunk * trips + trip) * P
        inside = (p0 + tl.arange(0, P) < pixels)[:, None] & (c0 + tl.arange(0, C) < channels)[None, :]
        value = tl.load(tile_at(x_ptr, image, p0, c0, pixels, channels, X_PLANES, P, C), mask=inside, other=0.0)
        g = tl.load(tile_at(grad_ptr, image, p0, c0, pixels, channels, GRAD_PLANES, P, C), mask=inside, other=0.0)
        value = value.to(tl.float32)
        result = g.to(tl.float32) * scale + shift
        derivative = 1.0
        if GELU:
            value, derivative = _gelu(value)
        if slope_ptr is not None:
            result += value * slope
        result *= derivative
        place = tile_at(out_ptr, image, p0, c0, pixels, channels, OUT_PLANES, P, C)
        tl.store(place, result.to(out_ptr.dtype.element_ty), mask=inside)
        if sum_ptr is not None:
            total += tl.where(inside, result, 0.0)
    if sum_ptr is not None:
        channel = c0 + tl.arange(0, C)
        place = sum_ptr + (image * chunks + chunk).to(tl.int64) * channels + channel
        tl.store(place, tl.sum(total, axis=0), mask=channel < channels)


@triton.jit(do_not_specialize=[*SIZES, 'scale_each', 'shift_each'])
def _sums_kernel(
    x_ptr, grad_ptr, pivot_ptr, scale_ptr, shift_ptr, out_ptr, partial_ptr, scale_each, shift_each,
    pixels_units, channels_units, chunks, trips, GELU: tl.constexpr,
    X_PLANES: tl.constexpr, GRAD_PLANES: tl.constexpr, OUT_PLANES: tl.constexpr,
    ALIGN_P: tl.constexpr, ALIGN_C: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    pixels, channels, image, chunk, c0 = place_of(pixels_units, channels_units, chunks, ALIGN_P, ALIGN_C, C)
    pivot = _row(pivot_ptr, image, 0, c0, channels, 0.0, C)
    first, second = tl.zeros((P, C), tl.float32), tl.zeros((P, C), tl.float32)
    for trip in range(trips):
        p0 = (chunk * trips + trip) * P
        inside = (p0 + tl.arange(0, P) < pixels)[:, None] & (c0 + tl.arange(0, C) < channels)[None, :]
        value = tl.load(tile_at(x_ptr, image, p0, c0, pixels, channels, X_PLANES, P, C), mask=inside, other=0.0)
        value = value.to(tl.float32)
        if GELU:
            value = _gelu(value)[0]
        if out_ptr is not None:
            scaled = value * _row(scale_ptr, image, scale_each, c0, channels, 1.0, C)
            scaled += _row(shift_ptr, image, shift_each, c0, channels, 0.0, C)
            place = tile_at(out_ptr, image, p0, c0, pixels, channels, OUT_PLANES, P, C)
            tl.store(place, scaled.to(out_ptr.dtype.element_ty), mask=inside)
        value = tl.where(inside, value - pivot, 0.0)
        if grad_ptr is None:
            first += value
            second += value * value
        else:
            g = tl.load(tile_at(grad_ptr, image, p0, c0, pixels, channels, GRAD_PLANES, P, C), mask=inside, other=0.0)
            g = g.to(tl.float32)
            first += value * g
            second += g
    channel = c0 + tl.arange(0, C)
    place = partial_ptr + (image * chunks + chunk).to(tl.int64) * 2 * channels + channel
    tl.store(place, tl.sum(first, axis=0), mask=channel < channels)
    tl.store(place + channels, tl.sum(second, axis=0), mask=channel < channels)


@triton.jit(do_not_specialize=['parts', 'columns'])
def _combine_kernel(partial_ptr, result_ptr, parts, columns, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the parts (rows, parts, columns) of each row."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    total = tl.zeros((PARTS, BLOCK), tl.float64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (column < columns)[None, :]
        place = partial_ptr + (row * parts + part)[:, None] * columns + column[None, :]
        total += tl.load(place, mask=inside, other=0.0).to(tl.float64)
    tl.store(result_ptr + row * columns + column, tl.sum(total, axis=0).to(tl.float32), mask=column < columns)


def _combine(partial: Tensor, result: Tensor) -> None:
    """``partial`` (rows, parts, columns) summed into ``result`` (rows, columns)."""
    rows, parts, columns = partial.shape
    _combine_kernel[(triton.cdiv(columns, 32), rows)](partial, result, parts, columns, 64, 32, num_warps=8)


def apply(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, out: Tensor, gelu: bool = False
) -> None:
    """``out = f(x) * scale + shift + residual``, f being GELU or nothing.

    Args:
        x: (N, ..., C).
        scale: (N, C) or (C,) in float32; None for 1.
        shift: Like ``scale``; None for 0.
        residual: Like ``x``, or None.
        out: Like ``x``; may be ``x`` or ``residual``.
        gelu: Whether f is GELU.
    """
    tiling = tiling_of(x, False, X_PLANES=x, RESIDUAL_PLANES=residual, OUT_PLANES=out)
    (scale, scale_each), (shift, shift_each) = _rows(scale, tiling, 'scale'), _rows(shift, tiling, 'shift')
    with torch.cuda.device_of(x):
        _apply_kernel[tiling.grid](
            x, scale, shift, residual, out, scale_each, shift_each, *tiling.sizes, GELU=gelu, **tiling.constants
        )


def grad(
    grad: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, slope: Tensor | None, out: Tensor,
    gelu: bool = False, total: Tensor | None = None,
) -> None:  # fmt: skip
    """``out = (grad * scale + shift + f(x) * slope) * f'(x)``, see ``apply``.

    Args:
        grad: (N, ..., C).
        x: Like ``grad``.
        scale: (N, C) or (C,) in float32; None for 1.
        shift: Like ``scale``; None for 0.
        slope: Like ``scale``; None for 0.
        out: Like ``grad``; may be ``grad`` or ``x``.
        gelu: Whether f is GELU.
        total: (C,) in float32, for the sum of ``out`` over all pixels, before it is rounded; None for none.
    """
    tiling = tiling_of(x, total is not None, GRAD_PLANES=grad, X_PLANES=x, OUT_PLANES=out)
    (scale, scale_each), (shift, shift_each) = _rows(scale, tiling, 'scale'), _rows(shift, tiling, 'shift')
    slope, slope_each = _rows(slope, tiling, 'slope')
    partial = None
    if total is not None:
        partial = x.new_empty((1, tiling.images * tiling.chunks, tiling.channels), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _grad_kernel[tiling.grid](
            grad, x, scale, shift, slope, out, partial, scale_each, shift_each, slope_each, *tiling.sizes, GELU=gelu,
            **tiling.constants,
        )  # fmt: skip
        if partial is not None and total is not None:
            _combine(partial, total)


def sums(
    x: Tensor, grad: Tensor | None, pivot: Tensor | None, out: Tensor | None, result: Tensor, gelu: bool = False,
    scale: Tensor | None = None, shift: Tensor | None = None,
) -> None:  # fmt: skip
    """Sums over the pixels of each image: of a and a^2 or, with ``grad``, of grad a and grad, for a = f(x) - pivot.

    Args:
        x: (N, ..., C).
        grad: Like ``x``, or None.
        pivot: (C,) in float32; None for 0.
        out: Like ``x``, for ``f(x) * scale + shift``; may be ``x``; None where that is not needed.
        result: (N, 2, C) in float32, for the sums.
        gelu: Whether f is GELU.
        scale: (N, C) or (C,) in float32; None for 1.
        shift: Like ``scale``; None for 0.
    """
    tiling = tiling_of(x, True, X_PLANES=x, GRAD_PLANES=grad, OUT_PLANES=out)
    (scale, scale_each), (shift, shift_each) = _rows(scale, tiling, 'scale'), _rows(shift, tiling, 'shift')
    whole = tiling.chunks == 1
    partial = result if whole else x.new_empty((tiling.images, tiling.chunks, 2 * tiling.channels), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _sums_kernel[tiling.grid](
            x, grad, pivot, scale, shift, out, partial, scale_each, shift_each, *tiling.sizes, GELU=gelu,
            **tiling.constants,
        )  # fmt: skip
        if not whole:
            _combine(partial, result.flatten(1))
