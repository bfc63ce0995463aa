# ruff: noqa: RUF005 - Triton knows no starred tuples
# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
"""The Dilated Reparam Block in training, on a GPU, in Triton: what ``ops.dilated_reparam`` has as four operators.

Forward, the block is one convolution, merged by the statistics of the batch: one pass over the map for these, one
convolution. Backward, the gradient of the output of branch b is

    a_b e_b,  e_b = g - sum(g) / M - (sum(g n_b) / M) n_b,  n_b = (z_b - mean_b) / s_b,  a_b = gamma_b / s_b

for M values a channel and s_b = sqrt(var_b + eps_b), so that

    dx = sum_b a_b conv^T(e_b, w_b),  dw_b = a_b <x, e_b>

and all that is ever rounded is e_b, which has the size of g and is rounded like g itself. The outputs z_b are computed
again, tile by tile, in each of the three passes of the backward; none of them is written. Only the input gradient needs
the neighbours of a tile, so that it keeps e_b of some rows of one image in memory that the caches hold.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import convolution, layouts, statistics
from .branches import (
    Plan,
    branch_values,
    in_map,
    load_band,
    load_bands,
    load_window,
    plan_of,
    tile_at,
    tile_of,
    to_rows,
    unsupported,
)

__all__ = ['block_backward', 'block_forward', 'block_stats', 'block_sums', 'block_supports']

_WARPS = 4
_RESIDENT = 528  # programs of the input gradient at a time, four for each of 132 multiprocessors
_SCRATCH = 2**25  # bytes of e_b in all of them together, which the L2 cache of an A100 or H100 holds
_SHARED_90 = 227 * 2**10  # of compute capability 9.0, where there is no GPU to ask
_TILE = 12 * 2**10  # bytes for the operands of a tile
_GRAMS = 13 * 32  # columns of Gram matrices that fit into the registers of a program


def block_supports(x: Tensor, kernel: Sequence[int], dilation: Sequence[int]) -> str:
    """Why there are no kernels for maps like ``x`` (N, C, H, W) and such branches; empty where there are."""
    if reason := unsupported(kernel, dilation) or convolution.supports(x, kernel[0], 1):
        return reason
    needed, held = _plan(kernel, dilation).shared_bytes(x) + _TILE, _shared_memory(x)
    if needed > held:
        return f'the branches take {needed} bytes of shared memory, of which there are {held}.'
    return ''


def _shared_memory(x: Tensor) -> int:
    """Bytes that a program may have."""
    if not x.is_cuda:
        return _SHARED_90
    return triton.runtime.driver.active.utils.get_device_properties(x.device.index)['max_shared_mem']


def block_forward(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor,
    kernel: Sequence[int], dilation: Sequence[int], eps: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``mmuni::dilated_reparam_forward``: y like ``x``, mean and biased variance (branches, C).

    Args:
        x: (N, C, H, W), not empty.
        weight: Of all branches, flat: one (C, 1, K, K) after the other. Rounded to the dtype of ``x``.
        gamma: (branches, C).
        beta: (C,), the sum over the branches.
        kernel: Size of each branch.
        dilation: Of each branch.
        eps: Of each branch.
    """
    plan, planes = _plan(kernel, dilation), layouts.to_planes(x)
    with torch.cuda.device_of(x):
        partial = statistics.moments(to_rows(planes), x.shape[3], weight, plan)
        mean, var, merged, bias = statistics.merge(partial, weight, gamma.contiguous(), beta, plan, (*eps,))
    y = convolution.forward(planes, merged, bias, 1)
    return layouts.like(y, x), mean, var


def block_stats(
    x: Tensor, weight: Tensor, branches: int, kernel: Sequence[int], dilation: Sequence[int], eps: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """``mmuni::dilated_reparam_stats``: the statistics alone, see ``block_forward``."""
    plan = _plan(kernel, dilation)
    with torch.cuda.device_of(x):
        partial = statistics.moments(to_rows(x), x.shape[3], weight, plan)
        return statistics.finish(partial, plan)


def block_sums(
    grad: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, mean: Tensor, var: Tensor,
    kernel: Sequence[int], dilation: Sequence[int], eps: Sequence[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``mmuni::dilated_reparam_sums``: the gradients of gamma (branches, C) and of beta (C,).

    Args:
        grad: Of the output, (N, C, H, W).
        x: The input.
        weight: See ``block_forward``.
        gamma: (branches, C).
        mean: (branches, C).
        var: (branches, C), biased.
        kernel: Size of each branch.
        dilation: Of each branch.
        eps: Of each branch.
    """
    plan, width = _plan(kernel, dilation), x.shape[3]
    with torch.cuda.device_of(x):
        grad, x = to_rows(grad.to(x.dtype)), to_rows(x)
        return statistics.gradient_sums(grad, x, width, weight, mean, var, plan, (*eps,))


def block_backward(
    grad: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, mean: Tensor, var: Tensor,
    sum_gamma: Tensor | None, sum_beta: Tensor | None, count: float, needs_x: bool,
    kernel: Sequence[int], dilation: Sequence[int], eps: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``mmuni::dilated_reparam_backward``: gradients of x (empty without ``needs_x``), weight, gamma and beta.

    Args:
        grad: Of the output, (N, C, H, W).
        x: The input.
        weight: See ``block_forward``.
        gamma: (branches, C).
        mean: (branches, C).
        var: (branches, C), biased.
        sum_gamma: What ``block_sums`` returns first, summed over all processes; None: of this process alone.
        sum_beta: What it returns second.
        count: Values of a channel in all processes.
        needs_x: Whether to compute the gradient of x.
        kernel: Size of each branch.
        dilation: Of each branch.
        eps: Of each branch.
    """
    plan, like, width = _plan(kernel, dilation), x, x.shape[3]
    with torch.cuda.device_of(x):
        grad, x = to_rows(grad.to(x.dtype)), to_rows(x)
        if sum_gamma is None or sum_beta is None:
            sum_gamma, sum_beta = statistics.gradient_sums(grad, x, width, weight, mean, var, plan, (*eps,))
        else:
            sum_gamma, sum_beta = sum_gamma.clone(), sum_beta.clone()
        norm = (gamma.contiguous(), mean, var, sum_gamma, sum_beta, count, (*eps,))
        grad_weight = _weight_grad(grad, x, width, weight, norm, plan)
        if not needs_x:
            return like.new_empty(0), grad_weight, sum_gamma, sum_beta
        grad_x = _input_grad(grad, x, width, weight, norm, plan)
    return layouts.like(grad_x, like), grad_weight, sum_gamma, sum_beta


def _plan(kernel: Sequence[int], dilation: Sequence[int]) -> Plan:
    return plan_of((*kernel,), (*dilation,))


@triton.jit
def _slopes(gamma_ptr, mean_ptr, var_ptr, sum_gamma_ptr, C, c, count, b: tl.constexpr, EPS: tl.constexpr):
    """Of branch b: its scale a_b, its mean, and by how much e_b falls for a unit of z_b."""
    place = b * C + c
    inverse = 1 / tl.sqrt_rn(tl.load(var_ptr + place) + EPS)
    slope = tl.load(sum_gamma_ptr + place) * inverse / count
    return tl.load(gamma_ptr + place) * inverse, tl.load(mean_ptr + place), slope


# ------------------------------------------------------------------------------------------ gradient of the input


def _input_grad(grad: Tensor, x: Tensor, width: int, weight: Tensor, norm: tuple, plan: Plan) -> Tensor:
    n, c, h, pitch = x.shape
    tile, branches, reach = tile_of(x, _WARPS), len(plan.kernels), len(plan.taps) // 2
    rows, splits = tile['ROWS'], min(statistics.splits_of(x, h), n)
    some = min(c, max(1, _RESIDENT // splits))  # channels at a time: those of the next launch take the same memory
    # An image is taken in strips where its e_b do not fit; the rows around a strip are computed twice.
    room = _SCRATCH // (some * splits * branches * pitch * x.element_size())
    strip = h if h <= room else max(1, (room - 2 * reach) // rows) * rows
    held = min(h, strip + 2 * reach)
    scratch = x.new_empty((some, splits, branches, held, pitch))
    out = x.new_empty((n, c, h, width))
    kept = 2 * plan.shared_bytes(x) + _TILE <= _shared_memory(x)
    for first in range(0, c, some):
        _input_grad_kernel[(min(some, c - first), splits)](
            grad, x, weight, scratch, out, *norm[:-1], first, n, c, h, width, pitch, splits, strip, held,
            EPS=norm[-1], KEPT=kept, **plan.constants(), **tile,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=['FIRST', 'N', 'C', 'H', 'W', 'pitch', 'SPLITS', 'STRIP', 'HELD'])
def _input_grad_kernel(
    grad_ptr, x_ptr, weight_ptr, scratch_ptr, out_ptr,
    gamma_ptr, mean_ptr, var_ptr, sum_gamma_ptr, sum_beta_ptr, count, FIRST, N, C, H, W, pitch, SPLITS, STRIP, HELD,
    EPS: tl.constexpr, KERNELS: tl.constexpr, DILATIONS: tl.constexpr, BEFORE: tl.constexpr, TAPS: tl.constexpr,
    LEAD: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    BRANCHES: tl.constexpr = len(TAPS[0])
    REACH: tl.constexpr = len(TAPS) // 2
    split = tl.program_id(1)
    c = FIRST + tl.program_id(0)
    pitch = pitch // ALIGN * ALIGN
    across = tl.cdiv(W, 16)
    strips = tl.cdiv(H, STRIP)
    scratch = scratch_ptr + (tl.program_id(0) * SPLITS + split).to(tl.int64) * BRANCHES * HELD * pitch
    bands, turned = (), ()
    if KEPT:
        bands = load_bands(weight_ptr, x_ptr, C, c, KERNELS, DILATIONS, BEFORE, TAPS, LEAD, DEPTH, False)
        turned = load_bands(weight_ptr, x_ptr, C, c, KERNELS, DILATIONS, BEFORE, TAPS, LEAD, DEPTH, True)
    offset = tl.load(sum_beta_ptr + c) / count
    scales, means, slopes = (), (), ()
    for b in tl.static_range(BRANCHES):
        scale, mean, slope = _slopes(gamma_ptr, mean_ptr, var_ptr, sum_gamma_ptr, C, c, count, b, EPS[b])
        scales, means, slopes = scales + (scale,), means + (mean,), slopes + (slope,)
    for part in range(split, N * strips, SPLITS):
        image = (part // strips * C + c).to(tl.int64) * H
        plane = image * pitch
        top = part % strips * STRIP
        bottom = tl.minimum(top + STRIP, H)
        first = tl.maximum(top - REACH, 0)
        last = tl.minimum(bottom + REACH, H)
        for index in range(tl.cdiv(last - first, ROWS) * across):
            y0 = first + index // across * ROWS
            x0 = index % across * 16
            values = branch_values(
                x_ptr + plane, bands, weight_ptr, C, c, y0, x0, H, pitch, KERNELS, DILATIONS, BEFORE, TAPS, LEAD,
                DEPTH, ROWS, PRECISION, KEPT,
            )  # fmt: skip
            y = y0 + tl.arange(0, ROWS)
            centred = load_window(grad_ptr + plane, y, x0, H, pitch, 0, 16).to(tl.float32) - offset
            inside = in_map(y0, x0, H, W, ROWS)
            held = in_map(y0, x0, last, pitch, ROWS)
            place = scratch + (y - first)[:, None] * pitch + (x0 + tl.arange(0, 16))[None, :]
            for b in tl.static_range(BRANCHES):
                e = tl.where(inside, centred - slopes[b] * (values[b] - means[b]), 0.0)
                tl.store(place + b * HELD * pitch, e.to(scratch_ptr.dtype.element_ty), mask=held)
        tl.debug_barrier()  # each tile reads what its neighbours wrote
        for index in range(tl.cdiv(bottom - top, ROWS) * across):
            y0 = top + index // across * ROWS
            x0 = index % across * 16
            total = tl.zeros((ROWS, 16), tl.float32)
            for b in tl.static_range(BRANCHES):
                sums = tl.zeros((ROWS, 16), tl.float32)
                for step in tl.static_range(len(TAPS)):
                    if TAPS[step][b] >= 0:
                        y = y0 - first + step - REACH + tl.arange(0, ROWS)
                        window = load_window(scratch + b * HELD * pitch, y, x0, last - first, pitch, LEAD, DEPTH)
                        if KEPT:
                            band = turned[TAPS[step][b]]
                        else:
                            band = load_band(
                                weight_ptr, x_ptr, C, c, b, step, KERNELS, DILATIONS, BEFORE, TAPS, LEAD, DEPTH,
                                True,
                            )  # fmt: skip
                        sums = tl.dot(window, band, sums, input_precision=PRECISION)
                total += scales[b] * sums
            place = out_ptr + image * W + (y0 + tl.arange(0, ROWS))[:, None] * W + (x0 + tl.arange(0, 16))[None, :]
            tl.store(place, total.to(out_ptr.dtype.element_ty), mask=in_map(y0, x0, bottom, W, ROWS))
        tl.debug_barrier()  # before the next strip overwrites it


# ------------------------------------------------------------------------------------------ gradient of the weights


@functools.lru_cache(maxsize=256)
def _groups(plan: Plan) -> list[tuple[tuple[int, ...], int, int]]:
    """Which Gram matrices, one for each row of a kernel, one program keeps: some branches, and rows of these."""
    limit = _GRAMS // plan.depth
    groups: list[tuple[tuple[int, ...], int, int]] = []
    for b, k in enumerate(plan.kernels):
        members, first, end = groups[-1] if groups else ((), 0, limit)
        if first == 0 and end + k <= limit:
            groups[-1] = ((*members, b), 0, end + k)
        else:  # a branch is cut only where it must be
            groups += [((b,), first, min(first + limit, k)) for first in range(0, k, limit)]
    return groups


def _weight_grad(grad: Tensor, x: Tensor, width: int, weight: Tensor, norm: tuple, plan: Plan) -> Tensor:
    n, c, h, pitch = x.shape
    tile = tile_of(x, _WARPS)
    splits = statistics.splits_of(x, tile['ROWS'])
    out = x.new_empty((splits, weight.numel()), dtype=torch.float32)
    for members, first, end in _groups(plan):
        part = plan_of(plan.kernels, plan.dilations, members)
        _weight_grad_kernel[(c, splits)](
            grad, x, weight, out, *norm[:-1], n, c, h, width, pitch, splits, weight.numel(),
            MEMBERS=members, FIRST=first, END=end, TALLEST=triton.next_power_of_2(max(part.kernels)), EPS=norm[-1],
            **part.constants(), **tile,
        )  # fmt: skip
    return out.sum(0).to(weight.dtype)


@triton.jit(do_not_specialize=['N', 'C', 'H', 'W', 'pitch', 'SPLITS', 'WEIGHTS'])
def _weight_grad_kernel(
    grad_ptr, x_ptr, weight_ptr, out_ptr, gamma_ptr, mean_ptr, var_ptr, sum_gamma_ptr, sum_beta_ptr, count,
    N, C, H, W, pitch, SPLITS, WEIGHTS, MEMBERS: tl.constexpr, FIRST: tl.constexpr, END: tl.constexpr,
    TALLEST: tl.constexpr, EPS: tl.constexpr, KERNELS: tl.constexpr, DILATIONS: tl.constexpr, BEFORE: tl.constexpr,
    TAPS: tl.constexpr, LEAD: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    split = tl.program_id(1)
    pitch = pitch // ALIGN * ALIGN
    bands = load_bands(weight_ptr, x_ptr, C, c, KERNELS, DILATIONS, BEFORE, TAPS, LEAD, DEPTH, False)
    offset = tl.load(sum_beta_ptr + c) / count
    scales, means, slopes, grams = (), (), (), ()
    for m in tl.static_range(len(MEMBERS)):
        scale, mean, slope = _slopes(
            gamma_ptr, mean_ptr, var_ptr, sum_gamma_ptr, C, c, count, MEMBERS[m], EPS[MEMBERS[m]]
        )
        scales, means, slopes = scales + (scale,), means + (mean,), slopes + (slope,)
    for _ in tl.static_range(FIRST, END):
        grams = grams + (tl.zeros((16, DEPTH), tl.float32),)
    for index in range(split, N * tl.cdiv(H, ROWS) * tl.cdiv(W, 16), SPLITS):
        n, y0, x0 = tile_at(index, H, W, ROWS)
        plane = (n * C + c).to(tl.int64) * H * pitch
        values = branch_values(
            x_ptr + plane, bands, weight_ptr, C, c, y0, x0, H, pitch, KERNELS, DILATIONS, BEFORE, TAPS, LEAD, DEPTH,
            ROWS, PRECISION, True,
        )  # fmt: skip
        y = y0 + tl.arange(0, ROWS)
        centred = load_window(grad_ptr + plane, y, x0, H, pitch, 0, 16).to(tl.float32) - offset
        inside = in_map(y0, x0, H, W, ROWS)
        turned = ()
        for m in tl.static_range(len(MEMBERS)):
            e = tl.where(inside, centred - slopes[m] * (values[m] - means[m]), 0.0)
            turned = turned + (tl.trans(e.to(x_ptr.dtype.element_ty)),)
        for step in tl.static_range(len(TAPS)):
            window = load_window(x_ptr + plane, y + step - len(TAPS) // 2, x0, H, pitch, LEAD, DEPTH)
            for m in tl.static_range(len(MEMBERS)):
                if TAPS[step][m] >= FIRST and TAPS[step][m] < END:
                    more = tl.dot(turned[m], window, grams[TAPS[step][m] - FIRST], input_precision=PRECISION)
                    grams = grams[: TAPS[step][m] - FIRST] + (more,) + grams[TAPS[step][m] - FIRST + 1 :]
    out = out_ptr + split.to(tl.int64) * WEIGHTS
    i = tl.arange(0, 16)[:, None]
    kx = tl.arange(0, TALLEST)
    for step in tl.static_range(len(TAPS)):
        for m in tl.static_range(len(MEMBERS)):
            if TAPS[step][m] >= FIRST and TAPS[step][m] < END:
                # The sum for a tap is a diagonal of a Gram matrix: (i, j) are columns of the tile and of the window.
                j = tl.minimum(i + LEAD + (kx - KERNELS[m] // 2)[None, :] * DILATIONS[m], DEPTH - 1)
                sums = tl.sum(tl.gather(grams[TAPS[step][m] - FIRST], j, axis=1), axis=0) * scales[m]
                ky = (step - len(TAPS) // 2) // DILATIONS[m] + KERNELS[m] // 2
                tap = BEFORE[m] * C + (c * KERNELS[m] + ky) * KERNELS[m] + kx
                tl.store(out + tap, sums, mask=kx < KERNELS[m])
