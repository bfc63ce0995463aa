"""The backend ``cuda``: the compiled kernels of ``csrc/cuda``, for GPUs from Ampere (8.0) on.

Maps and weights in float16 and bfloat16 are multiplied on tensor cores with sums in float32. Those in float32 are in
TF32 where torch may use it for convolutions (``torch.backends.cudnn.conv.fp32_precision``, once ``allow_tf32``), and
otherwise split into two TF32 numbers each, which is nearly float32's accuracy: tensor cores cut sums off instead of
rounding them, so that they sum a few rows of a map at a time. As zeros beside the kernel are multiplied too, an
infinity or NaN makes NaN of up to 39 pixels of its row, where the convolution proper makes K of them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import compat

__all__ = ['forward', 'supports', 'weight_grad', 'why_not']

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_EXTENT = 31


@functools.cache
def why_not() -> str:
    """Why the kernels are not there; empty where they are, and loaded. GPUs are not asked for."""
    from . import build  # not at the top: python -m mmunireplknet.ops.build warns of a module that is there already

    if torch.version.cuda is None:
        return f'the CUDA kernels need a torch for CUDA, and this one, {torch.__version__}, has none.'
    file = build.library_file('cuda')
    if file is None:
        return f'the CUDA kernels are not built: {build.why_not("cuda") or "run python -m mmunireplknet.ops.build."}'
    try:
        load(str(file))
    except (OSError, RuntimeError) as error:
        return f'{file} does not work: {error.__cause__ or error}'
    return ''


def load(file: str) -> None:
    """Load the library, which registers ``torch.ops.mmuni_cuda``.

    Raises:
        OSError: It is none that can be loaded here.
        RuntimeError: It does not have the operators.
    """
    torch.ops.load_library(file)
    for name in ('forward', 'weight_grad'):  # they write into what they are given
        torch.library.register_fake(f'mmuni_cuda::{name}', lambda *_: None)


def supports(x: Tensor, kernel: int, dilation: int) -> str:
    """Why a map ``x`` (N, C, H, W) cannot be convolved; empty where it can."""
    extent = (kernel - 1) * dilation + 1
    if x.dtype not in DTYPES:
        return f'it has no kernels for {x.dtype}.'
    if extent > MAX_EXTENT:
        return f'{kernel}x{kernel} taps with dilation {dilation} reach over {extent} pixels, more than {MAX_EXTENT}.'
    if max(x.shape) >= 2**24 or x.shape[0] * -(-x.shape[2] // 16) * -(-x.shape[3] // 32) >= 2**30:
        return f'a map of {tuple(x.shape)} is too large.'
    return ''


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    flipped: bool = False,
    pooled: bool = False,
    layout: torch.memory_format | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise convolution of stride 1 that keeps the size of the map.

    Args:
        x: (N, C, H, W) in float32, bfloat16 or float16.
        weight: (C, 1, K, K), K odd, in any floating dtype.
        bias: (C,) or None.
        dilation: Distance of neighbouring taps in pixels.
        flipped: Turn the kernel by 180 degrees, which makes the gradient of the input from that of the output.
        pooled: Also return the sums of the maps, from before they are rounded.
        layout: Of the output; None for that of ``x``.

    Returns:
        (N, C, H, W) in the dtype of ``x``; with ``pooled`` also (N, C) in float32.
    """
    x = _dense(x)
    out = torch.empty_like(x) if layout is None else torch.empty_like(x, memory_format=layout)
    sums = x.new_empty(x.shape[:2], dtype=torch.float32) if pooled else None
    weight, bias = _numbers(weight), None if bias is None else _numbers(bias)
    torch.ops.mmuni_cuda.forward(x, weight, bias, out, sums, weight.shape[-1], dilation, flipped, _may_use_tf32(x))
    return out if sums is None else (out, sums)


def weight_grad(x: Tensor, grad: Tensor, kernel: int, dilation: int) -> Tensor:
    """Gradient for the weight, (C, 1, K, K) in float32, the same at every call.

    Both maps are copied where they are channels_last: a block has one channel, which it would read by single numbers.
    """
    x, grad = x.contiguous(), grad.to(x.dtype).contiguous()
    out = x.new_empty((x.shape[1], 1, kernel, kernel), dtype=torch.float32)
    torch.ops.mmuni_cuda.weight_grad(x, grad, out, kernel, dilation, _may_use_tf32(x))
    return out


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _numbers(values: Tensor) -> Tensor:
    """In a dtype that the kernels read."""
    return (values if values.dtype in DTYPES else values.float()).contiguous()


def _may_use_tf32(x: Tensor) -> bool:
    return x.dtype == torch.float32 and compat.convolutions_may_use_tf32()
