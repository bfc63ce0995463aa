"""Layers that UniRepLKNet is made of, with statistics in single precision.

Half precision overflows in a sum of squares long before the values themselves are large: the L2 norm
of a 200x304 map leaves float16 once its values exceed 266. Every reduction here therefore
accumulates in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    'GRN', 'FrozenRunningStatistics', 'LayerNorm2d', 'NCHWtoNHWC', 'NHWCtoNCHW', 'SEBlock', 'SyncBatchNorm',
]  # fmt: skip


class NCHWtoNHWC(nn.Module):
    """(N, C, H, W) -> (N, H, W, C); a view, and contiguous where the input is channels_last."""

    def forward(self, x: Tensor) -> Tensor:
        """Permute ``x``."""
        return x.permute(0, 2, 3, 1)


class NHWCtoNCHW(nn.Module):
    """(N, H, W, C) -> (N, C, H, W); a view, channels_last where the input is contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        """Permute ``x``."""
        return x.permute(0, 3, 1, 2)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of every pixel: (N, C, H, W) -> (N, C, H, W), eps 1e-6.

    The memory layout of the input is kept. The statistics are those of ``F.layer_norm``, which
    accumulates half-precision inputs in float32.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__(num_channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` (N, C, H, W)."""
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        y = y.permute(0, 3, 1, 2)
        return y if _is_channels_last(x) else y.contiguous()


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class GRN(nn.Module):
    """Global Response Normalization of a (N, H, W, C) map, ConvNeXt V2 Eq. 1-3, https://arxiv.org/abs/2301.00808.

    ``y = (gamma * G / (mean_c(G) + 1e-6) + 1) * x + beta`` with ``G`` the L2 norm over H and W.

    Args:
        dim: Channels C.
        use_bias: Whether ``beta`` exists. The deploy form folds it into the layer that follows.
    """

    def __init__(self, dim: int, use_bias: bool = True) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim)) if use_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` (N, H, W, C)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, ord=2, dim=(1, 2), keepdim=True, dtype=dtype)
        scale = self.gamma * (norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)) + 1
        scale = scale.to(x.dtype)
        return x * scale if self.beta is None else torch.addcmul(self.beta.to(x.dtype), x, scale)


class SEBlock(nn.Module):
    """Squeeze-and-Excitation with reduction 4: (N, C, H, W) -> (N, C, H, W), https://arxiv.org/abs/1709.01507."""

    def __init__(self, dim: int, reduction: int = 4) -> None:
        super().__init__()
        self.down = nn.Conv2d(dim, dim // reduction, 1)
        self.up = nn.Conv2d(dim // reduction, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of ``x`` (N, C, H, W)."""
        weight = F.adaptive_avg_pool2d(x, 1)
        weight = F.relu(self.down(weight))
        return x * torch.sigmoid(self.up(weight))


class _AllReduceSum(torch.autograd.Function):
    """Sum over the processes, forward and backward; on every backend, gloo included."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        value = value.clone()
        dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


@MODELS.register_module('DeviceAgnosticSyncBN')
class SyncBatchNorm(_BatchNorm):
    """``torch.nn.SyncBatchNorm`` that works on every device, with the same arguments and state dict.

    torch's own raises for CPU tensors inside a process group, and DDP refuses a model on the CPU that holds an
    instance of it, so that this is no subclass; on CUDA it computes by torch's. Without a process group it is
    BatchNorm, and says so once.
    """

    _told = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.process_group = process_group

    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` (N, C, ...) with the statistics of all processes."""
        synchronised = dist.is_available() and dist.is_initialized()
        if self.training and not synchronised and not SyncBatchNorm._told:
            SyncBatchNorm._told = True
            print_log('SyncBN without a process group: it normalizes like BN.', logger='current')
        if not self.training or not synchronised or dist.get_world_size(self.process_group) == 1:
            return super().forward(x)
        return nn.SyncBatchNorm.forward(cast(Any, self), x) if x.is_cuda else self._forward_synchronised(x)

    def _forward_synchronised(self, x: Tensor) -> Tensor:
        dims = [d for d in range(x.dim()) if d != 1]
        dtype = torch.promote_types(x.dtype, torch.float32)
        values = x.to(dtype)
        # float64 for what crosses the processes: E[x^2] - E[x]^2 cancels in float32.
        local_var, local_mean = (s.double() for s in torch.var_mean(values, dims, correction=0))
        count = local_mean.new_full((1,), x.numel() // x.size(1))
        packed = torch.cat([local_mean * count, (local_var + local_mean.square()) * count, count])
        packed = _AllReduceSum.apply(packed, self.process_group)
        total = packed[-1].detach()
        mean, square = packed[:-1].div(total).chunk(2)
        var = (square - mean.square()).clamp_min(0)
        self._update_running_statistics(mean.detach(), var.detach(), total)
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale = torch.rsqrt(var + self.eps)
        shift = -mean * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        return torch.addcmul(shift.to(dtype).view(shape), values, scale.to(dtype).view(shape)).to(x.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        unbiased = var * (count / (count - 1).clamp_min(1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)


class FrozenRunningStatistics:
    """Context in which BN in training mode does not update its running statistics again.

    A momentum of zero keeps them as they are and, unlike switching the tracking off, saves the same tensors
    for backward as the first pass did, which non-reentrant checkpointing requires. It can be entered again.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        norms = [m for m in self.module.modules() if isinstance(m, _BatchNorm)]
        counts = [(m, m.num_batches_tracked) for m in norms if m.training]
        self.kept = [(m, m.momentum, count, count.clone()) for m, count in counts if count is not None]
        for norm, *_ in self.kept:
            norm.momentum = 0.0

    def __exit__(self, *_: object) -> None:
        for norm, momentum, count, value in self.kept:
            norm.momentum = momentum
            count.copy_(value)
