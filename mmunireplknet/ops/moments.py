"""Mean and variance over the values of several processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ['share_moments', 'sum_over_processes', 'var_mean']


class _AllReduceSum(torch.autograd.Function):
    """Sum over the processes, forward and backward; on every backend, gloo included."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return sum_over_processes(value, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over_processes(grad, ctx.group), None


def sum_over_processes(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum of the ``value`` of every process of ``group``, None for all; without gradient."""
    value = value.clone()
    dist.all_reduce(value, group=group)
    return value


def var_mean(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """Biased variance and mean over ``dims``; of no values zeros, with a gradient, and not NaN and a warning."""
    return torch.var_mean(x, dims, correction=0) if x.numel() else (x.sum(dims), x.sum(dims))


def share_moments(
    mean: Tensor, var: Tensor, count: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, int | Tensor]:
    """Mean, biased variance and count over all processes, by one all-reduce; differentiable, by another one.

    A process without values takes part in both. What crosses the processes are 2 n + 1 values: sums, sums of squares
    and the count, and in the backward pass their gradients. ``pointwise`` reduces the same in its own backward pass, so
    that one process may compute a norm by a fused operator and another one by its layer.

    Nobody waits for a GPU: the count stays there, a whole number of no dimensions. The variance of a single value in
    all processes is 0 there. (``torch.nn.SyncBatchNorm`` normalizes to the same, but divides by 0 for its running
    variance.)

    Args:
        mean: Of the values of this process, n of them; finite, see ``var_mean``.
        var: Like ``mean``, biased.
        count: How many values each is of; 0 where this process has none.
        group: The processes; None for all.

    Returns:
        Mean and variance in float64, of the shape of ``mean``, zeros where nobody has a value; and the count.

    Raises:
        ValueError: The count over all processes is 1, of which no variance can be taken; in every process. On a GPU
            only where there is but one process.
    """
    # float64 for what crosses the processes: E[x^2] - E[x]^2 cancels in float32.
    mean, var = mean.double(), var.double()
    sums, squares = mean * count, (var + mean.square()) * count
    packed = torch.cat([sums.flatten(), squares.flatten(), sums.new_full((1,), count)])
    packed = _AllReduceSum.apply(packed, group)
    total: int | Tensor = int(packed[-1]) if _is_at_hand(packed) else packed[-1].detach().long()
    if total == 1 if isinstance(total, int) else count == dist.get_world_size(group) == 1:
        raise ValueError('Expected more than 1 value per channel when training, got 1 in all processes together.')
    divisor = max(total, 1) if isinstance(total, int) else total.clamp_min(1)
    mean, square = packed[:-1].div(divisor).view(2, *mean.shape)
    return mean, (square - mean.square()).clamp_min(0), total


def _is_at_hand(values: Tensor) -> bool:
    """Whether ``values`` can be looked at without waiting for a device."""
    return values.device.type == 'cpu'
