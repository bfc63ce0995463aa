"""The Dilated Reparam Block in training, on a GPU, in Triton: what ``ops.dilated_reparam`` has as four operators.

Forward, the block is one convolution, merged by the statistics of the batch: one pass over the map for these, one
convolution. Backward, the gradient of the output of branch b is

    a_b e_b,  e_b = g - sum(g) / M - (sum(g n_b) / M) n_b,  n_b = (z_b - mean_b) / s_b,  a_b = gamma_b / s_b

for M values a channel and s_b = sqrt(var_b + eps_b), so that

    dx = sum_b a_b conv^T(e_b, w_b),  dw_b = a_b <x, e_b>

The z_b are computed again, for some channels at a time, summed up with g, and written, less their means, to memory
that stays in the L2 cache: there they become a_b e_b, in place, while the gradient of the weights is taken, and are
convolved back. What is rounded is a_b e_b, which has the size of the gradient and is rounded like it, and before that
the centred z_b, of which e_b takes a small part only: that of g in the direction of n_b. Where there are so few values
that it is not small, and where the sums are known because processes have put them together, a_b e_b is written at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from . import convolution, gradients, layouts, statistics
from .branches import Plan, lay_out, plan_of, to_rows, unsupported
from .outputs import Norm, collect, outputs

__all__ = ['block_backward', 'block_forward', 'block_stats', 'block_sums', 'block_supports']

# Bytes for outputs of branches, which the L2 cache of an A100 or H100 holds; more where a single channel has more.
_SCRATCH = 2**25
_FEW = 1024  # values of a channel up to which outputs of branches are not rounded to 16 bits


def block_supports(x: Tensor, kernel: Sequence[int], dilation: Sequence[int]) -> str:
    """Why there are no kernels for maps like ``x`` (N, C, H, W) and such branches; empty where there are."""
    if reason := unsupported(kernel, dilation) or convolution.supports(x, kernel[0], 1):
        return reason
    return ''


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
        sums = torch.empty_like(mean), torch.empty_like(mean[0])
        table = lay_out(weight, x.shape[1], plan, x.dtype)
        partial = outputs(grad, x, width, table, mean, plan, 0, x.shape[1], None)
        collect(partial, Norm(gamma, var, 1.0, (*eps,)), sums, 0, x.shape[1], None)
        return sums


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
        n, c, h, pitch = x.shape
        branches = len(plan.kernels)
        norm = Norm(gamma.contiguous(), var, count, (*eps,))
        known = sum_gamma is not None and sum_beta is not None
        twice = n * h * width < _FEW and x.element_size() == 2
        if sum_gamma is not None and sum_beta is not None:
            sums = sum_gamma.clone(), sum_beta.clone()
        else:
            sums = torch.empty_like(mean), torch.empty_like(mean[0])
        table = lay_out(weight, c, plan, x.dtype)
        turned = lay_out(weight, c, plan, x.dtype, flipped=True) if needs_x else table
        some = triton.cdiv(c, triton.cdiv(c, max(1, _SCRATCH // (branches * n * h * pitch * x.element_size()))))
        held = x.new_empty((some, branches, n, h, pitch))  # the next channels take the same memory
        lines = x.new_empty((c, 2 * branches + 1), dtype=torch.float32)
        parts = x.new_empty((gradients.gram_parts(x, width, some, plan), weight.numel()), dtype=torch.float32)
        grad_x = x.new_empty((n, c, h, width) if needs_x else 0)
        for first in range(0, c, some):
            now = min(some, c - first)
            at = (x, width, table, mean, plan, first, now)
            partial = None if known else outputs(grad, *at, None if twice else held)
            collect(partial, norm, sums, first, now, lines)
            if known or twice:
                outputs(grad, *at, held, lines)
            gradients.weight_grad(grad, x, width, held, lines, plan, first, now, parts, known or twice)
            if needs_x:
                gradients.input_grad(held, x, width, turned, plan, first, now, grad_x)
        grad_weight = parts.sum(0).to(weight.dtype)
    return layouts.like(grad_x, like) if needs_x else grad_x, grad_weight, *sums


def _plan(kernel: Sequence[int], dilation: Sequence[int]) -> Plan:
    return plan_of((*kernel,), (*dilation,))
