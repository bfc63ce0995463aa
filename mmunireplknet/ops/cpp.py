"""The backend ``cpp``: the compiled CPU kernels of ``csrc/cpu``, which write into what they are given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    'block_backward', 'block_forward', 'block_stats', 'block_sums', 'block_supports', 'forward', 'load', 'supports',
    'weight_grad',
]  # fmt: skip

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_BRANCHES = 12
_OPERATORS = ('forward', 'weight_grad', 'block_forward', 'block_backward', 'apply', 'grad', 'sums')


def load(file: str) -> None:
    """Load the library, which registers ``torch.ops.mmuni_cpu``.

    Raises:
        OSError: It is none that can be loaded here.
        RuntimeError: It does not have the operators.
    """
    torch.ops.load_library(file)
    for name in _OPERATORS:
        torch.library.register_fake(f'mmuni_cpu::{name}', lambda *_: None)


def supports(x: Tensor, kernel: int, dilation: int) -> str:
    """Why a map ``x`` (N, C, H, W) cannot be convolved; empty where it can."""
    if x.device.type != 'cpu':
        return f'it computes on the CPU, but the input is on {x.device}.'
    return '' if x.dtype in DTYPES else f'it has no kernels for {x.dtype}.'


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, flipped: bool = False) -> Tensor:
    """Convolution of x (N, C, H, W) with weight (C, 1, K, K) or, ``flipped``, with the kernel turned by 180 degrees."""
    out = torch.empty_like(x)
    bias = None if bias is None else bias.float().contiguous()
    weight = weight.float().contiguous()
    torch.ops.mmuni_cpu.forward(x, weight, bias, out, weight.shape[-1], dilation, flipped)
    return out


def weight_grad(x: Tensor, grad: Tensor, kernel: int, dilation: int) -> Tensor:
    """Gradient for the weight, (C, 1, K, K), in float32."""
    out = x.new_empty((x.shape[1], 1, kernel, kernel), dtype=torch.float32)
    torch.ops.mmuni_cpu.weight_grad(x, grad.to(x.dtype), out, kernel, dilation)
    return out


def block_supports(x: Tensor, kernel: Sequence[int], dilation: Sequence[int]) -> str:
    """Why a Dilated Reparam Block of such branches cannot be computed; empty where it can."""
    if len(kernel) > _MAX_BRANCHES:
        return f'it has no kernels for more than {_MAX_BRANCHES} branches.'
    return supports(x, max(kernel), 1)


def block_forward(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, kernel: list[int], dilation: list[int], eps: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``mmuni::dilated_reparam_forward``: y, mean and variance."""
    y, mean, var = torch.empty_like(x), gamma.new_empty(gamma.shape), gamma.new_empty(gamma.shape)
    torch.ops.mmuni_cpu.block_forward(x, kernel, dilation, eps, weight, gamma.contiguous(), beta, mean, var, y)
    return y, mean, var


def block_stats(
    x: Tensor, weight: Tensor, branches: int, kernel: list[int], dilation: list[int], eps: list[float]
) -> tuple[Tensor, Tensor]:
    """As ``mmuni::dilated_reparam_stats``: mean and variance of the outputs of the branches."""
    mean, var = (weight.new_empty(branches, x.shape[1]) for _ in range(2))  # operators return no views of one tensor
    one = torch.ones_like(mean)
    torch.ops.mmuni_cpu.block_forward(x, kernel, dilation, eps, weight, one, mean[0], mean, var, None)
    return mean, var


def block_sums(
    grad: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, mean: Tensor, var: Tensor,
    kernel: list[int], dilation: list[int], eps: list[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``mmuni::dilated_reparam_sums``: the gradients for gamma and beta."""
    sum_gamma, sum_beta = gamma.new_empty(gamma.shape), gamma.new_empty(gamma.shape[1])
    torch.ops.mmuni_cpu.block_backward(
        grad, x, kernel, dilation, eps, weight, gamma.contiguous(), mean, var, None, None, sum_gamma, sum_beta, False,
        1.0,
    )  # fmt: skip
    return sum_gamma, sum_beta


def block_backward(
    grad: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, mean: Tensor, var: Tensor,
    sum_gamma: Tensor | None, sum_beta: Tensor | None, count: float, needs_x: bool,
    kernel: list[int], dilation: list[int], eps: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As ``mmuni::dilated_reparam_backward``: the gradients for x, the weights, gamma and beta."""
    grad_x, grad_weight = torch.empty_like(x) if needs_x else x.new_empty(0), torch.empty_like(weight)
    grad_gamma = torch.empty_like(mean) if sum_gamma is None else sum_gamma.clone()
    grad_beta = torch.empty_like(mean[0]) if sum_beta is None else sum_beta.clone()
    torch.ops.mmuni_cpu.block_backward(
        grad, x, kernel, dilation, eps, weight, gamma.contiguous(), mean, var, grad_x if needs_x else None,
        grad_weight, grad_gamma, grad_beta, sum_gamma is not None, count,
    )  # fmt: skip
    return grad_x, grad_weight, grad_gamma, grad_beta
