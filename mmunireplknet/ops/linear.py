"""Matrix products of the pointwise layers, by the quicker of the two libraries that torch brings for the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ['autocast_device', 'linear', 'once_differentiable', 'product', 'without_autocast']

Function = TypeVar('Function', bound=Callable)


def autocast_device(x: Tensor) -> str:
    """Type of the device whose autocast applies to ``x``; 'cpu' for one that has none, such as meta."""
    return x.device.type if torch.amp.is_autocast_available(x.device.type) else 'cpu'


_TWICE = (
    b'The fused blocks of mmunireplknet cannot be differentiated twice (create_graph=True, gradient penalties): build '
    b'the backbone with fused=False, or use depthwise_conv2d and layers of torch instead of the fused operators.'
)


def once_differentiable(backward: Function) -> Function:
    """As torch's, for a backward that returns a tuple, with an error that says what to do.

    Nor does it depend on the incoming gradient: one of a constant, as that of ``y.sum()``, has a second derivative too.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        refuse = torch._C._functions.DelayedError(_TWICE, len(results))
        outputs: list[Any] = [None if t is None else t.detach().requires_grad_() for t in results]
        return refuse(*outputs)

    return cast(Function, wrapped)


def without_autocast(backward: Function) -> Function:
    """For the backward of an autograd function: what autocast had to cast, the forward pass has cast already."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, grad: Tensor, *rest: Any) -> Any:
        with torch.autocast(autocast_device(grad), enabled=False):
            return backward(ctx, grad, *rest)

    return cast(Function, wrapped)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')


@functools.cache
def _prefers_onednn() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than the library behind ``torch.mm``.

    MKL leaves AVX-512 unused on processors that are not Intel's: oneDNN is 2.0 to 2.4 times faster on an AMD EPYC
    (docs/benchmarks.md). Elsewhere both reach the machine's limit.
    """
    return _has_onednn() and torch.backends.cpu.get_cpu_capability().startswith('AVX512')


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` without autograd: x (P, I), weight (O, I), bias (O,) -> (P, O)."""
    # Inductor cannot lower oneDNN's operator, and chooses a library by itself.
    if x.device.type == 'cpu' and x.dtype == torch.float32 and not torch.compiler.is_compiling() and _prefers_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')
    return torch.nn.functional.linear(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a.T @ b`` without autograd: (P, I) and (P, J) -> (I, J); quickest where I is the smaller."""
    return linear(a.t(), b.t())


def _count_flops(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * x_shape[0] * x_shape[1] * weight_shape[0]


if _has_onednn():
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_count_flops)
