"""A depthwise convolution that also sums each of its maps, as Squeeze-and-Excitation needs, in the same pass.

``mmuni::depthwise_conv2d_pooled``, whose output lies in channels_last memory, ready for the linear layers that follow,
or in that of its input, for whoever reads it anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import backends
from .depthwise import _check, _library, _size_of_kernel, _tags

__all__ = ['depthwise_conv2d_pooled']


def depthwise_conv2d_pooled(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1, backend: str = 'auto',
    channels_last: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``y = depthwise_conv2d(x, weight, bias)`` and the sums of its maps.

    Args:
        x: (N, C, H, W); under autocast it is cast.
        weight: (C, 1, K, K), K odd.
        bias: (C,) or None.
        dilation: Distance of neighbouring taps in pixels.
        backend: See ``depthwise_conv2d``.
        channels_last: Whether y is to lie in channels_last memory; otherwise it has the layout of ``x``.

    Returns:
        y (N, C, H, W) in the dtype of ``x``, and its sums over H and W, (N, C), in float32 (float64 of float64).

    Raises:
        ValueError: Shapes or dtypes that do not fit, or an unknown backend.
        RuntimeError: The backend that is asked for cannot be used here.
    """
    _check(x, weight, bias, dilation)
    return torch.ops.mmuni.depthwise_conv2d_pooled(x, weight, bias, dilation, backend, channels_last)


_library.define(
    'depthwise_conv2d_pooled(Tensor x, Tensor weight, Tensor? bias, int dilation, str backend, '
    'bool channels_last=True) -> (Tensor y, Tensor sums)',
    tags=_tags,
)


@torch.library.impl(_library, 'depthwise_conv2d_pooled', 'CompositeExplicitAutograd')
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, backend: str, channels_last: bool = True
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _size_of_kernel(weight)
    if not x.numel():
        y, sums = _forward_fake(x, weight, bias, dilation, backend, channels_last)
        return y, sums.zero_()
    return backends.compute_pooled(x, weight, bias, dilation, backend, _layout(x, channels_last))


def _layout(x: Tensor, channels_last: bool) -> torch.memory_format:
    dense = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last or dense else torch.contiguous_format


@torch.library.register_fake('mmuni::depthwise_conv2d_pooled', lib=_library)
def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, backend: str, channels_last: bool = True
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sums = x.new_empty(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x, memory_format=_layout(x, channels_last)), sums


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, ctx.dilation, ctx.backend, *_ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx: Any, grad: Tensor, grad_sums: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    ops, rest = torch.ops.mmuni, (ctx.dilation, ctx.backend)
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad = grad + grad_sums.to(grad.dtype)[..., None, None]
    grad_weight = None
    if needs_weight:
        grad_weight = ops.depthwise_conv2d_weight_grad(x, grad, weight.shape[-1], *rest).to(weight.dtype)
    grad_x = ops.depthwise_conv2d_input_grad(grad, weight, *rest) if needs_x else None
    grad_bias = grad.sum((0, 2, 3), dtype=ctx.bias_dtype) if needs_bias else None
    return grad_x, grad_weight, grad_bias, None, None, None


torch.library.register_autograd('mmuni::depthwise_conv2d_pooled', _differentiate, setup_context=_save, lib=_library)


def _register_autocast(device: str, key: torch._C.DispatchKey) -> None:
    without = torch._C.DispatchKeySet(key)

    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, backend: str, channels_last: bool = True
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        with torch._C._ExcludeDispatchKeyGuard(without):
            return torch.ops.mmuni.depthwise_conv2d_pooled(x, weight, bias, dilation, backend, channels_last)

    _library.impl('depthwise_conv2d_pooled', forward, key.name)


_register_autocast('cpu', torch._C.DispatchKey.AutocastCPU)
_register_autocast('cuda', torch._C.DispatchKey.AutocastCUDA)


@register_flop_formula(torch.ops.mmuni.depthwise_conv2d_pooled)
def _count_flops(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    n, c, h, w = x_shape
    return 2 * n * c * h * w * weight_shape[-1] ** 2
