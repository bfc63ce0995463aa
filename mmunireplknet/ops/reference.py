"""Depthwise convolution and its gradients in pure torch: the backend ``torch``, right everywhere, and quick on CPUs.

torch's own kernels for large depthwise kernels are 10 to 80 times slower in one memory layout than in the other, and
which one depends on the kernel size and the processor (oneDNN, torch 2.13, measured in docs/benchmarks.md). These
functions choose the layout inside; what they return has the layout of what they were given.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['convolve', 'forward', 'input_grad', 'like', 'supports', 'weight_grad']


def supports(x: Tensor, kernel: int, dilation: int) -> str:
    """Why a map cannot be convolved: every one can."""
    return ''


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, flipped: bool = False) -> Tensor:
    """``convolve`` or, ``flipped``, ``input_grad``, as every backend has both."""
    return input_grad(x, weight, dilation) if flipped else convolve(x, weight, bias, dilation)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """``F.conv2d`` of x (N, C, H, W) with weight (C, 1, K, K), stride 1, same padding; the dtype of ``x``."""
    kernel = weight.shape[-1]
    dtype = _compute_dtype(x)
    values = x.to(dtype)
    if x.device.type == 'cpu':
        values = values.contiguous(memory_format=_fast_layout(kernel))
    bias = None if bias is None else bias.to(dtype)
    out = F.conv2d(values, weight.to(dtype), bias, 1, dilation * (kernel // 2), dilation, x.shape[1])
    return like(out, x)


def input_grad(grad: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """Gradient for the input, given that of the output (N, C, H, W)."""
    dtype = _compute_dtype(grad)
    values = grad.to(dtype)
    return like(_backward(values, values, weight.to(dtype), dilation, 0), grad)


def weight_grad(x: Tensor, grad: Tensor, kernel: int, dilation: int) -> Tensor:
    """Gradient for the weight, (C, 1, K, K), in float32, or float64 for float64 maps.

    On a CPU it is the convolution of every map of ``x`` with its map of ``grad`` as the kernel, which torch computes
    5 to 90 times faster than the weight gradient proper.
    """
    n, c, h, w = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.device.type != 'cpu' or kernel == 3:
        weight = x.new_zeros(c, 1, kernel, kernel)
        values, grad = (t.to(_compute_dtype(x)) for t in (x, grad.to(x.dtype)))
        if x.device.type == 'cpu':
            values, grad = (t.contiguous(memory_format=torch.channels_last) for t in (values, grad))
        return _backward(grad, values, weight.to(values.dtype), dilation, 1).to(dtype)
    padded = F.pad(x.to(dtype).reshape(1, n * c, h, w), [dilation * (kernel // 2)] * 4)
    maps = F.conv2d(padded, grad.to(dtype).reshape(n * c, 1, h, w), stride=dilation, groups=n * c)
    return maps.view(n, c, 1, kernel, kernel).sum(0)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, dilation: int, which: int) -> Tensor:
    padding = dilation * (weight.shape[-1] // 2)
    mask = [which == 0, which == 1, False]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [padding] * 2, [dilation] * 2, False, [0, 0], x.shape[1], mask
    )[which]


def _compute_dtype(x: Tensor) -> torch.dtype:
    # Without AVX512-BF16, torch's CPU convolutions in half precision are 40 to 180 times slower than in float32.
    return torch.promote_types(x.dtype, torch.float32) if x.device.type == 'cpu' else x.dtype


def _fast_layout(kernel: int) -> torch.memory_format:
    """Layout in which oneDNN's forward convolution is fast, given that of its instruction set."""
    largest = 13 if torch.backends.cpu.get_cpu_capability().startswith('AVX512') else 9
    return torch.contiguous_format if 7 <= kernel <= largest else torch.channels_last


def like(out: Tensor, x: Tensor) -> Tensor:
    """``out`` with the dtype and the strides that ``torch.empty_like(x)`` has."""
    wanted = torch.empty_like(x)
    return out if out.dtype == x.dtype and out.stride() == wanted.stride() else wanted.copy_(out)
