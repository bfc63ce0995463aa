# mypy: allow-untyped-defs
"""Mean and variance of a map over its pixels, in one pass that cannot cancel, in Triton.

Every lane of a tile keeps mean and squared deviations of the values that it has seen; a program puts its lanes together
and writes both for its part of the pixels; a second kernel puts these together in float64, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pointwise import SIZES, place_of, tile_at, tiling_of

__all__ = ['moments']

_ELEMENTS = 4096  # partial results that are put together at a time


@triton.jit(do_not_specialize=SIZES)
def _moments_kernel(
    x_ptr, partial_ptr, pixels_units, channels_units, chunks, trips, X_PLANES: tl.constexpr,
    ALIGN_P: tl.constexpr, ALIGN_C: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    pixels, channels, image, chunk, c0 = place_of(pixels_units, channels_units, chunks, ALIGN_P, ALIGN_C, C)
    mean, square = tl.zeros((P, C), tl.float32), tl.zeros((P, C), tl.float32)
    for trip in range(trips):
        p0 = (chunk * trips + trip) * P
        inside = (p0 + tl.arange(0, P) < pixels)[:, None] & (c0 + tl.arange(0, C) < channels)[None, :]
        value = tl.load(tile_at(x_ptr, image, p0, c0, pixels, channels, X_PLANES, P, C), mask=inside, other=0.0)
        shift = tl.where(inside, value.to(tl.float32) - mean, 0.0)
        share = shift / (trip + 1)
        mean += share
        square += shift * (shift - share)
    # Of each lane: it is inside of the map in its first so many trips.
    left = pixels - chunk * trips * P - tl.arange(0, P)
    count = tl.minimum(tl.maximum((left + P - 1) // P, 0), trips).to(tl.float32)[:, None]
    whole = tl.minimum(pixels - chunk * trips * P, trips * P).to(tl.float32)
    of_chunk = tl.sum(count * mean, axis=0) / whole
    of_chunk += tl.sum(count * (mean - of_chunk[None, :]), axis=0) / whole  # what the first sum has lost by rounding
    shift = mean - of_chunk[None, :]
    channel = c0 + tl.arange(0, C)
    place = partial_ptr + (image * chunks + chunk).to(tl.int64) * 2 * channels + channel
    tl.store(place, of_chunk, mask=channel < channels)
    tl.store(place + channels, tl.sum(square + count * shift * shift, axis=0), mask=channel < channels)


@triton.jit(do_not_specialize=['images', 'chunks', 'channels', 'pixels', 'span'])
def _merge_kernel(
    partial_ptr, image_mean_ptr, mean_ptr, var_ptr, images, chunks, channels, pixels, span,
    IMAGES: tl.constexpr, CHUNKS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * C + tl.arange(0, C)
    within = channel < channels
    chunk = tl.arange(0, CHUNKS)
    count = tl.minimum(tl.maximum(pixels - chunk * span, 0), span).to(tl.float64)[None, :, None]
    total, squares = tl.zeros((C,), tl.float64), tl.zeros((C,), tl.float64)
    for start in range(0, images, IMAGES):
        image = start + tl.arange(0, IMAGES)
        inside = ((image < images)[:, None] & (chunk < chunks)[None, :])[:, :, None] & within[None, None, :]
        row = (image[:, None] * chunks + chunk[None, :]).to(tl.int64)[:, :, None]
        place = partial_ptr + row * 2 * channels + channel[None, None, :]
        mean = tl.load(place, mask=inside, other=0.0).to(tl.float64)
        square = tl.load(place + channels, mask=inside, other=0.0).to(tl.float64)
        of_images = tl.sum(count * mean, axis=1)
        place = image.to(tl.int64)[:, None] * channels + channel[None, :]
        inside = (image < images)[:, None] & within[None, :]
        tl.store(image_mean_ptr + place, (of_images / pixels).to(tl.float32), mask=inside)
        total += tl.sum(of_images, axis=0)
        squares += tl.sum(tl.sum(square + count * mean * mean, axis=1), axis=0)
    values = images.to(tl.float64) * pixels
    mean = total / values
    tl.store(mean_ptr + channel, mean.to(tl.float32), mask=within)
    # The squares of means in float32, in float64: what cancels here leaves 29 bits.
    tl.store(var_ptr + channel, tl.maximum(squares / values - mean * mean, 0.0).to(tl.float32), mask=within)


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means of each image (N, C), and mean and biased variance (C,) of all, in float32.

    Args:
        x: (N, ..., C) in one of the layouts of ``pointwise``.
    """
    tiling = tiling_of(x, True, X_PLANES=x)
    n, c, chunks, trips = tiling.images, tiling.channels, tiling.chunks, tiling.trips
    partial = x.new_empty((n * chunks, 2, c), dtype=torch.float32)
    image_mean = partial.new_empty((n, c))
    mean, var = partial.new_empty(c), partial.new_empty(c)
    wide = triton.next_power_of_2(chunks)
    with torch.cuda.device_of(x):
        _moments_kernel[tiling.grid](x, partial, *tiling.sizes, **tiling.constants)
        _merge_kernel[(triton.cdiv(c, 16),)](
            partial, image_mean, mean, var, n, chunks, c, tiling.pixels, trips * tiling.constants['P'],
            max(1, _ELEMENTS // (16 * wide)), wide, 16, num_warps=8,
        )  # fmt: skip
    return image_mean, mean, var
