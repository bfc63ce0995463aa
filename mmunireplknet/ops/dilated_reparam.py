"""Dilated Reparam Block in training: the sum of batch-normalized depthwise convolutions, as one operation.

Its branches never leave the cache: each is convolved, its statistics are taken, and it is added up, for a few channels
at a time. Only the input is kept for the backward pass, which convolves it again: that costs no more than to write and
read the outputs of the branches (docs/benchmarks.md). The block is that of https://arxiv.org/abs/2311.15599. Its sum is
one large convolution, merged by the statistics of the batch, and that is what the synchronised form computes:

    y = conv(x, W) + c,  W = sum_b a_b embed(w_b),  c = sum_b (beta_b - a_b mean_b),
    a_b = gamma_b / sqrt(var_b + eps_b)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .block_backends import compute_block
from .depthwise import _library, _tags
from .linear import autocast_device, once_differentiable, without_autocast
from .moments import share_moments, sum_over_processes, var_mean

__all__ = ['dilated_reparam_conv', 'merge_branches']


def dilated_reparam_conv(
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    eps: Sequence[float],
    process_group: dist.ProcessGroup | None = None,
    backend: str = 'auto',
) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:
    """``sum_b batch_norm(depthwise_conv2d(x, w_b, dilation_b), gamma_b, beta_b)`` with the statistics of the batch.

    Gradients are exact for ``x``, every weight, gamma and beta; they cannot be differentiated again.

    Args:
        x: (N, C, H, W); under autocast it is cast.
        weights: One (C, 1, K, K) a branch, K odd; the first is the largest.
        dilations: One a branch, of the first 1.
        gammas: One (C,) a branch.
        betas: One (C,) a branch.
        eps: One a branch.
        process_group: Take the statistics over these processes: one all-reduce forward and one backward for all
            branches together. None for this process alone.
        backend: See ``depthwise_conv2d``.

    Returns:
        y (N, C, H, W) like ``x``; mean and biased variance, (branches, C), without gradient; how many values of a
        channel they were taken from, which over several processes with GPUs is a tensor there.

    Raises:
        ValueError: Arguments that do not fit; or there is one value a channel in all processes, of which no variance
            can be taken; see ``share_moments``. (None at all gives an empty map.)
    """
    _check(x, weights, dilations, gammas, betas, eps)
    device = autocast_device(x)
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    if process_group is None and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f'Expected more than 1 value per channel when training, got input size {tuple(x.shape)}.')
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = torch.cat([w.flatten() for w in weights]).to(dtype)
    gamma, beta = torch.stack([*gammas]).to(dtype), torch.stack([*betas]).sum(0).to(dtype)
    kernels = [w.shape[-1] for w in weights]
    with torch.autocast(device, enabled=False):
        return _DilatedReparam.apply(x, weight, gamma, beta, kernels, [*dilations], [*eps], process_group, backend)


def _check(
    x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], gammas: Sequence[Tensor], betas: Sequence[Tensor],
    eps: Sequence[float],
) -> None:  # fmt: skip
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f'x must be a floating (N, C, H, W) map, got {x.dtype} {tuple(x.shape)}.')
    counts = {
        'weights': len(weights), 'dilations': len(dilations), 'gammas': len(gammas), 'betas': len(betas),
        'eps': len(eps),
    }  # fmt: skip
    if len(set(counts.values())) > 1 or not weights:
        given = ', '.join(f'{count} {name}' for name, count in counts.items())
        raise ValueError(f'weights, dilations, gammas, betas and eps must have one entry for each branch, got {given}.')
    c = x.shape[1]
    for b, (weight, dilation) in enumerate(zip(weights, dilations, strict=True)):
        kernel = weight.shape[-1] if weight.dim() == 4 else 0
        if tuple(weight.shape) != (c, 1, kernel, kernel) or kernel % 2 == 0:
            raise ValueError(f'weights[{b}] is {tuple(weight.shape)}: it must be ({c}, 1, K, K) with an odd K.')
        if dilation < 1:
            raise ValueError(f'dilations[{b}] is {dilation}: it must be at least 1.')
    for name, tensors in (('gammas', gammas), ('betas', betas)):
        for b, tensor in enumerate(tensors):
            if tuple(tensor.shape) != (c,):
                raise ValueError(f'{name}[{b}] is {tuple(tensor.shape)}: it must be ({c},).')
    _check_first(dilations)


def _check_first(dilations: Sequence[int]) -> None:
    if dilations[0] != 1:
        raise ValueError(f'dilations={[*dilations]} must begin with 1: the first branch is the dense large kernel.')


def merge_branches(weights: Sequence[Tensor], dilations: Sequence[int], scales: Sequence[Tensor] | Tensor) -> Tensor:
    """``sum_b scale_b * embed(w_b)``, (C, 1, K, K) with the K of the first weight; differentiable.

    Args:
        weights: (C, 1, K, K) each, the first with dilation 1.
        dilations: One a branch.
        scales: (C,) each.

    Raises:
        ValueError: A branch covers more than K, or the first is dilated.
    """
    _check_first(dilations)
    merged = weights[0] * scales[0].view(-1, 1, 1, 1)
    size = merged.shape[-1]
    for weight, dilation, scale in zip(weights[1:], dilations[1:], scales[1:], strict=True):
        extent = (weight.shape[-1] - 1) * dilation + 1
        if extent > size:
            raise ValueError(f'a branch of size {extent} does not fit into a {size}x{size} kernel.')
        taps = slice((size - extent) // 2, (size + extent) // 2, dilation)
        merged[..., taps, taps] += weight * scale.view(-1, 1, 1, 1)
    return merged


class _DilatedReparam(torch.autograd.Function):
    """Autograd of the four operators below."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gamma: Tensor,
        beta: Tensor,
        kernels: list[int],
        dilations: list[int],
        eps: list[float],
        group: dist.ProcessGroup | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:
        static = (kernels, dilations, eps, backend)
        count: int | Tensor = _values(x)
        if group is None:
            y, mean, var = torch.ops.mmuni.dilated_reparam_forward(x, weight, gamma, beta, *static)
        else:
            mean, var = torch.ops.mmuni.dilated_reparam_stats(x, weight, gamma.shape[0], *static)
            mean, var, count = share_moments(mean, var, _values(x), group)
            mean, var = mean.to(gamma.dtype), var.to(gamma.dtype)
            # Without a tensor made of a list: a GPU would be waited for.
            scales = gamma * torch.rsqrt(torch.cat(torch._foreach_add(var.split(1), eps)))
            merged = merge_branches(_split(weight, kernels), dilations, scales)
            y = torch.ops.mmuni.depthwise_conv2d(x, merged, beta - (scales * mean).sum(0), 1, backend)
        ctx.save_for_backward(x, weight, gamma, mean, var)
        ctx.static, ctx.group, ctx.count = static, group, count
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var, count

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
        x, weight, gamma, mean, var = ctx.saved_tensors
        tensors = (grad, x, weight, gamma, mean, var)
        sums: tuple[Tensor | None, Tensor | None] = (None, None)
        count: int | Tensor = ctx.count
        if ctx.group is not None:
            local = torch.ops.mmuni.dilated_reparam_sums(*tensors, *ctx.static)
            flat = sum_over_processes(torch.cat([t.flatten() for t in local]), ctx.group)
            if isinstance(count, Tensor):  # the operator divides the sums by a number that is at hand
                here = max(_values(x), 1)
                flat = flat * (here / count.double().clamp_min(1))
                count = here
            sums = (flat[: gamma.numel()].view_as(gamma), flat[gamma.numel() :])
        grad_x, grad_weight, grad_gamma, grad_beta = torch.ops.mmuni.dilated_reparam_backward(
            *tensors, *sums, float(count), ctx.needs_input_grad[0], *ctx.static
        )
        if ctx.group is not None:
            # What the others contribute to these parameters, they hold themselves: DDP adds it.
            grad_gamma, grad_beta = local
        return (grad_x if ctx.needs_input_grad[0] else None, grad_weight, grad_gamma, grad_beta, *(None,) * 5)


def _values(x: Tensor) -> int:
    """How many values a channel of ``x`` has in this process."""
    return x.numel() // x.shape[1]


def _split(weight: Tensor, kernels: Sequence[int]) -> list[Tensor]:
    """The flat weights as (C, 1, K, K) each."""
    channels = weight.numel() // sum(k * k for k in kernels)
    return [
        w.view(channels, 1, k, k)
        for w, k in zip(weight.split([channels * k * k for k in kernels]), kernels, strict=True)
    ]


_STATIC = 'int[] kernel, int[] dilation, float[] eps, str backend'
for _schema in (
    f'dilated_reparam_forward(Tensor x, Tensor weight, Tensor gamma, Tensor beta, {_STATIC}) '
    '-> (Tensor y, Tensor mean, Tensor var)',
    f'dilated_reparam_stats(Tensor x, Tensor weight, int branches, {_STATIC}) -> (Tensor mean, Tensor var)',
    'dilated_reparam_sums(Tensor grad, Tensor x, Tensor weight, Tensor gamma, Tensor mean, '
    f'Tensor var, {_STATIC}) -> (Tensor grad_gamma, Tensor grad_beta)',
    'dilated_reparam_backward(Tensor grad, Tensor x, Tensor weight, Tensor gamma, Tensor mean, '
    f'Tensor var, Tensor? sum_gamma, Tensor? sum_beta, float count, bool needs_x, {_STATIC}) '
    '-> (Tensor grad_x, Tensor grad_weight, Tensor grad_gamma, Tensor grad_beta)',
):
    _library.define(_schema, tags=_tags)


def _widen(x: Tensor) -> Tensor:
    """In the precision of the statistics on a CPU, which rounds the output of no branch; on others, as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.device.type == 'cpu' else x


def _convolve(x: Tensor, weights: list[Tensor], dilation: Sequence[int], b: int, backend: str) -> Tensor:
    """Output of branch b in the precision of its statistics."""
    z = torch.ops.mmuni.depthwise_conv2d(x, weights[b], None, dilation[b], backend)
    return z.to(torch.promote_types(x.dtype, torch.float32))


@torch.library.impl(_library, 'dilated_reparam_forward', 'CompositeExplicitAutograd')
def _forward(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor,
    kernel: list[int], dilation: list[int], eps: list[float], backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    def plain() -> tuple[Tensor, Tensor, Tensor]:
        y, mean, var = _forward_fake(x, weight, gamma, beta, kernel, dilation, eps, backend)
        weights, values = _split(weight, kernel), _widen(x)
        total: Tensor | float = 0.0
        for b in range(len(kernel)):
            z = _convolve(values, weights, dilation, b, backend)
            var[b], mean[b] = var_mean(z, [0, 2, 3])
            total = total + F.batch_norm(z, mean[b], var[b], gamma[b], beta if b == 0 else None, eps=eps[b])
        return y.copy_(total), mean, var

    arguments = (x, weight, gamma, beta, kernel, dilation, eps)
    return compute_block('block_forward', plain, backend, x, kernel, dilation, arguments)


@torch.library.register_fake('mmuni::dilated_reparam_forward', lib=_library)
def _forward_fake(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor,
    kernel: list[int], dilation: list[int], eps: list[float], backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x), gamma.new_empty(gamma.shape), gamma.new_empty(gamma.shape)


@torch.library.impl(_library, 'dilated_reparam_stats', 'CompositeExplicitAutograd')
def _stats(
    x: Tensor, weight: Tensor, branches: int,
    kernel: list[int], dilation: list[int], eps: list[float], backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    def plain() -> tuple[Tensor, Tensor]:
        mean, var = _stats_fake(x, weight, branches, kernel, dilation, eps, backend)
        weights, values = _split(weight, kernel), _widen(x)
        for b in range(branches):
            z = _convolve(values, weights, dilation, b, backend)
            var[b], mean[b] = var_mean(z, [0, 2, 3])
        return mean, var

    arguments = (x, weight, branches, kernel, dilation, eps)
    return compute_block('block_stats', plain, backend, x, kernel, dilation, arguments)


@torch.library.register_fake('mmuni::dilated_reparam_stats', lib=_library)
def _stats_fake(
    x: Tensor, weight: Tensor, branches: int,
    kernel: list[int], dilation: list[int], eps: list[float], backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return weight.new_empty(branches, x.shape[1]), weight.new_empty(branches, x.shape[1])


@torch.library.impl(_library, 'dilated_reparam_sums', 'CompositeExplicitAutograd')
def _sums(
    grad: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, mean: Tensor, var: Tensor,
    kernel: list[int], dilation: list[int], eps: list[float], backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    def plain() -> tuple[Tensor, Tensor]:
        sum_gamma, sum_beta = _sums_fake(grad, x, weight, gamma, mean, var, kernel, dilation, eps, backend)
        weights, wide = _split(weight, kernel), _widen(x)
        values = grad.to(gamma.dtype)
        for b in range(len(kernel)):
            z = _convolve(wide, weights, dilation, b, backend)
            sum_gamma[b] = (values * (z - mean[b].view(-1, 1, 1))).sum((0, 2, 3)) * torch.rsqrt(var[b] + eps[b])
        return sum_gamma, sum_beta.copy_(values.sum((0, 2, 3)))

    arguments = (grad, x, weight, gamma, mean, var, kernel, dilation, eps)
    return compute_block('block_sums', plain, backend, x, kernel, dilation, arguments)


@torch.library.register_fake('mmuni::dilated_reparam_sums', lib=_library)
def _sums_fake(
    grad: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, mean: Tensor, var: Tensor,
    kernel: list[int], dilation: list[int], eps: list[float], backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return gamma.new_empty(gamma.shape), gamma.new_empty(gamma.shape[1])


@torch.library.impl(_library, 'dilated_reparam_backward', 'CompositeExplicitAutograd')
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, mean: Tensor, var: Tensor,
    sum_gamma: Tensor | None, sum_beta: Tensor | None, count: float, needs_x: bool,
    kernel: list[int], dilation: list[int], eps: list[float], backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    sums = (sum_gamma, sum_beta)
    arguments = (grad, x, weight, gamma, mean, var, *sums, count, needs_x, kernel, dilation, eps)
    plain = functools.partial(_backward_by_branch, *arguments, backend)
    return compute_block('block_backward', plain, backend, x, kernel, dilation, arguments)


def _backward_by_branch(
    grad: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, mean: Tensor, var: Tensor,
    sum_gamma: Tensor | None, sum_beta: Tensor | None, count: float, needs_x: bool,
    kernel: list[int], dilation: list[int], eps: list[float], backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_x, grad_weight = torch.empty_like(x) if needs_x else x.new_empty(0), torch.empty_like(weight)
    if sum_gamma is None or sum_beta is None:
        sum_gamma, sum_beta = _sums(grad, x, weight, gamma, mean, var, kernel, dilation, eps, backend)
    weights, grads = _split(weight, kernel), _split(grad_weight, kernel)
    ops, total = torch.ops.mmuni, torch.zeros_like(x, dtype=gamma.dtype) if needs_x else None
    values = _widen(x)
    centred = grad.to(gamma.dtype) - (sum_beta / count).view(-1, 1, 1)
    for b in range(len(kernel)):
        z = _convolve(values, weights, dilation, b, backend)
        inverse = torch.rsqrt(var[b] + eps[b])
        slope = (sum_gamma[b] * inverse / count).view(-1, 1, 1)
        grad_z = (gamma[b] * inverse).view(-1, 1, 1) * (centred - slope * (z - mean[b].view(-1, 1, 1)))
        grad_z = grad_z.to(values.dtype)  # off the CPU in 16 bits, as batch normalization there gives it back
        grads[b].copy_(ops.depthwise_conv2d_weight_grad(values, grad_z, kernel[b], dilation[b], backend))
        if total is not None:
            total += ops.depthwise_conv2d_input_grad(grad_z, weights[b], dilation[b], backend)
    return grad_x if total is None else grad_x.copy_(total), grad_weight, sum_gamma.clone(), sum_beta.clone()


@torch.library.register_fake('mmuni::dilated_reparam_backward', lib=_library)
def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, mean: Tensor, var: Tensor,
    sum_gamma: Tensor | None, sum_beta: Tensor | None, count: float, needs_x: bool,
    kernel: list[int], dilation: list[int], eps: list[float], backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_x = torch.empty_like(x) if needs_x else x.new_empty(0)
    return grad_x, torch.empty_like(weight), gamma.new_empty(gamma.shape), gamma.new_empty(gamma.shape[1])


@register_flop_formula([torch.ops.mmuni.dilated_reparam_forward, torch.ops.mmuni.dilated_reparam_stats])
def _count_forward(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * x[0] * x[2] * x[3] * weight[0]


@register_flop_formula(torch.ops.mmuni.dilated_reparam_backward)
def _count_backward(
    grad: Any, x: Any, weight: Any, gamma: Any, mean: Any, var: Any, sum_gamma: Any, sum_beta: Any, count: float,
    needs_x: bool, *_: Any, out_shape: Any = None, **__: Any,
) -> int:  # fmt: skip
    return 2 * (1 + needs_x) * x[0] * x[2] * x[3] * weight[0]
