"""The depthwise convolution with a large kernel, as operators of torch.

``mmuni::depthwise_conv2d`` and its two gradients. Each is linear in both of its arguments, and the derivative of each
is made of the other two, so that gradients of any order are built of the same three.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from .. import compat
from . import backends, reference
from .linear import autocast_device

__all__ = ['DepthwiseConv2d', 'depthwise_conv2d']


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1, backend: str = 'auto'
) -> Tensor:
    """Depthwise convolution of stride 1 that keeps the size of the map.

    The same as ``F.conv2d(x, weight, bias, padding=dilation * (K // 2), dilation=dilation, groups=C)``. Sums are made
    in float32, for float64 maps in float64. Under autocast ``x`` is cast, the weight is not. While a model is traced or
    exported, and under torch.func, it is just that convolution, with the weight cast to the dtype of ``x``.

    Args:
        x: (N, C, H, W) in float32, float64, bfloat16 or float16, of any size and memory layout.
        weight: (C, 1, K, K), K odd, in any floating dtype.
        bias: (C,) or None.
        dilation: Distance of neighbouring taps in pixels.
        backend: 'auto', 'torch', 'cpp', 'triton' or 'cuda'. 'auto' obeys the environment variable
            ``MMUNI_DW_BACKEND`` and otherwise takes the fastest that works here.

    Returns:
        (N, C, H, W) in the dtype and memory layout of ``x``.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or an unknown backend.
        RuntimeError: The backend that is asked for cannot be used here.
    """
    if compat.needs_standard_operators():
        if not torch.jit.is_tracing():  # which takes every comparison of sizes for an operation on tensors
            _check(x, weight, bias, dilation)
        device = autocast_device(x)
        if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        padding = dilation * (weight.shape[-1] // 2)
        return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=x.shape[1])
    _check(x, weight, bias, dilation)
    return torch.ops.mmuni.depthwise_conv2d(x, weight, bias, dilation, backend)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> None:
    if x.dim() != 4 or not x.is_floating_point() or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f'x must be a floating (N, C, H, W) map with H and W above 0, got {x.dtype} {tuple(x.shape)}.')
    c, kernel = x.shape[1], weight.shape[-1] if weight.dim() == 4 else 0
    if tuple(weight.shape) != (c, 1, kernel, kernel) or kernel % 2 == 0:
        raise ValueError(
            f'weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}: it must be ({c}, 1, K, K) with an odd K.'
        )
    if bias is not None and tuple(bias.shape) != (c,):
        raise ValueError(f'bias {tuple(bias.shape)} must be ({c},).')
    for name, tensor in (('weight', weight), ('bias', bias)):
        if tensor is not None and not (tensor.is_floating_point() and tensor.device == x.device):
            raise ValueError(f'{name} is {tensor.dtype} on {tensor.device}: it must be floating, on {x.device} like x.')
    if dilation < 1:
        raise ValueError(f'dilation={dilation} must be at least 1.')


_library = torch.library.Library('mmuni', 'DEF')
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(
    'depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, int dilation, str backend) -> Tensor',
    tags=_tags,
)
_library.define(
    'depthwise_conv2d_input_grad(Tensor grad, Tensor weight, int dilation, str backend) -> Tensor', tags=_tags
)
_library.define(
    'depthwise_conv2d_weight_grad(Tensor x, Tensor grad, SymInt kernel_size, int dilation, str backend) -> Tensor',
    tags=_tags,
)


def _size_of_kernel(weight: Tensor) -> int:
    """K of a weight (C, 1, K, K): whoever calls the operators themselves gets no other check."""
    *_, height, width = weight.shape
    if height != width or width % 2 == 0:
        raise ValueError(f'weight {tuple(weight.shape)} must be (C, 1, K, K) with an odd K.')
    return width


@torch.library.impl(_library, 'depthwise_conv2d', 'CompositeExplicitAutograd')
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, backend: str) -> Tensor:
    kernel = _size_of_kernel(weight)
    if not x.numel():
        return torch.empty_like(x)
    out = backends.compute(
        lambda module: module.forward(x, weight, bias, dilation), backend, 'forward', x, kernel, dilation
    )
    return _laid_out_like(out, x)


@torch.library.impl(_library, 'depthwise_conv2d_input_grad', 'CompositeExplicitAutograd')
def _input_grad(grad: Tensor, weight: Tensor, dilation: int, backend: str) -> Tensor:
    kernel = _size_of_kernel(weight)
    if not grad.numel():
        return torch.empty_like(grad)
    out = backends.compute(
        lambda module: module.forward(grad, weight, None, dilation, True), backend, 'input_grad', grad, kernel, dilation
    )
    return _laid_out_like(out, grad)


@torch.library.impl(_library, 'depthwise_conv2d_weight_grad', 'CompositeExplicitAutograd')
def _weight_grad(x: Tensor, grad: Tensor, kernel_size: int, dilation: int, backend: str) -> Tensor:
    if not x.numel():
        return _weight_grad_fake(x, grad, kernel_size, dilation, backend).zero_()
    grad = grad.to(x.dtype)
    return backends.compute(
        lambda module: module.weight_grad(x, grad, kernel_size, dilation),
        backend, 'weight_grad', x, kernel_size, dilation,
    )  # fmt: skip


def _laid_out_like(out: Tensor, x: Tensor) -> Tensor:
    """``out`` as promised: kernels for a GPU give maps of any other layout back in NCHW."""
    return out if out.stride() == x.stride() else reference.like(out, x)


@torch.library.register_fake('mmuni::depthwise_conv2d', lib=_library)
def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, backend: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake('mmuni::depthwise_conv2d_input_grad', lib=_library)
def _input_grad_fake(grad: Tensor, weight: Tensor, dilation: int, backend: str) -> Tensor:
    return torch.empty_like(grad)


@torch.library.register_fake('mmuni::depthwise_conv2d_weight_grad', lib=_library)
def _weight_grad_fake(x: Tensor, grad: Tensor, kernel_size: int, dilation: int, backend: str) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((x.shape[1], 1, kernel_size, kernel_size), dtype=dtype)


def _save_forward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.dilation, ctx.backend = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate_forward(ctx: Any, grad: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    ops, rest = torch.ops.mmuni, (ctx.dilation, ctx.backend)
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_x = ops.depthwise_conv2d_input_grad(grad, weight, *rest) if needs_x else None
    grad_weight = None
    if needs_weight:
        grad_weight = ops.depthwise_conv2d_weight_grad(x, grad, weight.shape[-1], *rest).to(weight.dtype)
    grad_bias = grad.sum((0, 2, 3), dtype=ctx.bias_dtype) if needs_bias else None
    return grad_x, grad_weight, grad_bias, None, None


def _save_input_grad(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad, weight, ctx.dilation, ctx.backend = inputs
    ctx.save_for_backward(grad, weight)


def _differentiate_input_grad(ctx: Any, value: Tensor) -> tuple:
    grad, weight = ctx.saved_tensors
    ops, rest = torch.ops.mmuni, (ctx.dilation, ctx.backend)
    needs_grad, needs_weight = ctx.needs_input_grad[:2]
    grad_grad = ops.depthwise_conv2d(value, weight, None, *rest) if needs_grad else None
    grad_weight = None
    if needs_weight:
        grad_weight = ops.depthwise_conv2d_weight_grad(value, grad, weight.shape[-1], *rest).to(weight.dtype)
    return grad_grad, grad_weight, None, None


def _save_weight_grad(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, grad, _, ctx.dilation, ctx.backend = inputs
    ctx.save_for_backward(x, grad)


def _differentiate_weight_grad(ctx: Any, value: Tensor) -> tuple:
    x, grad = ctx.saved_tensors
    ops, rest = torch.ops.mmuni, (ctx.dilation, ctx.backend)
    needs_x, needs_grad = ctx.needs_input_grad[:2]
    grad_x = ops.depthwise_conv2d_input_grad(grad, value, *rest).to(x.dtype) if needs_x else None
    grad_grad = ops.depthwise_conv2d(x, value, None, *rest).to(grad.dtype) if needs_grad else None
    return grad_x, grad_grad, None, None, None


for _name, _backward, _save in (
    ('depthwise_conv2d', _differentiate_forward, _save_forward),
    ('depthwise_conv2d_input_grad', _differentiate_input_grad, _save_input_grad),
    ('depthwise_conv2d_weight_grad', _differentiate_weight_grad, _save_weight_grad),
):
    torch.library.register_autograd(f'mmuni::{_name}', _backward, setup_context=_save, lib=_library)


def _register_autocast(device: str, key: torch._C.DispatchKey) -> None:
    without = torch._C.DispatchKeySet(key)

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, backend: str) -> Tensor:
        if x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        with torch._C._ExcludeDispatchKeyGuard(without):
            return torch.ops.mmuni.depthwise_conv2d(x, weight, bias, dilation, backend)

    def input_grad(*args: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(without):
            return torch.ops.mmuni.depthwise_conv2d_input_grad(*args)

    def weight_grad(*args: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(without):
            return torch.ops.mmuni.depthwise_conv2d_weight_grad(*args)

    _library.impl('depthwise_conv2d', forward, key.name)
    _library.impl('depthwise_conv2d_input_grad', input_grad, key.name)
    _library.impl('depthwise_conv2d_weight_grad', weight_grad, key.name)


_register_autocast('cpu', torch._C.DispatchKey.AutocastCPU)
_register_autocast('cuda', torch._C.DispatchKey.AutocastCUDA)


@register_flop_formula(
    [torch.ops.mmuni.depthwise_conv2d, torch.ops.mmuni.depthwise_conv2d_input_grad],
)
def _count_flops(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    n, c, h, w = x_shape
    return 2 * n * c * h * w * weight_shape[-1] ** 2


@register_flop_formula(torch.ops.mmuni.depthwise_conv2d_weight_grad)
def _count_weight_grad_flops(
    x_shape: Any, grad_shape: Any, kernel: int, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    n, c, h, w = x_shape
    return 2 * n * c * h * w * kernel**2


@MODELS.register_module('LargeKernelDW')
class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` for large depthwise kernels, with the same state dict: (N, C, H, W) -> (N, C, H, W).

    In any mmcv ``ConvModule``: ``conv_cfg=dict(type='LargeKernelDW')``, with ``groups`` equal to the channels and
    ``padding`` equal to ``dilation * (kernel_size // 2)``.

    Args:
        in_channels: Channels C.
        out_channels: Channels C.
        kernel_size: Size K of the square kernel, odd.
        stride: 1, as for every argument that is not explained: they are those of ``nn.Conv2d``.
        padding: ``dilation * (kernel_size // 2)``.
        dilation: Distance of neighbouring taps.
        groups: C.
        bias: Whether there is one.
        padding_mode: 'zeros'.
        backend: See ``depthwise_conv2d``.
        device: Where the parameters are made.
        dtype: Of the parameters.

    Raises:
        ValueError: Anything but a depthwise convolution that keeps the size of the map.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal['zeros'] = 'zeros',
        backend: str = 'auto',
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        kernel, step = self.kernel_size[0], self.dilation[0]
        same = (step * (kernel // 2),) * 2
        wrong = {
            f'groups={groups} (must be the channels, {in_channels})': groups != in_channels,
            f'out_channels={out_channels} (must be in_channels, {in_channels})': out_channels != in_channels,
            f'stride={stride} (must be 1)': self.stride != (1, 1),
            f'kernel_size={kernel_size} (must be square and odd)': self.kernel_size != (kernel,) * 2 or kernel % 2 == 0,
            f'dilation={dilation} (must be the same both ways)': self.dilation != (step,) * 2,
            f'padding={padding} (must be {same[0]}, which keeps the size)': self.padding not in (same, 'same'),
            f'padding_mode={padding_mode!r} (must be zeros)': padding_mode != 'zeros',
        }
        if problems := [text for text, holds in wrong.items() if holds]:
            raise ValueError(f'LargeKernelDW cannot have {", ".join(problems)}; use Conv2d for this layer.')
        if backend != 'auto':
            backends.require(backend)
        self.padding = same
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x`` (N, C, H, W)."""
        return depthwise_conv2d(x, self.weight, self.bias, self.dilation[0], self.backend)
