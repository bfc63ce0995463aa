"""Batch normalization: one that synchronises on every device, and what the fused operators ask of a BN layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.module_tracker import ModuleTracker

from ..ops.moments import share_moments, var_mean
from ..ops.pointwise import Statistics

__all__ = [
    'FrozenRunningStatistics', 'SyncBatchNorm', 'beta_of', 'gamma_of', 'is_hooked', 'is_plain_bn', 'is_watched',
    'process_group_of', 'statistics_of', 'update_running_statistics',
]  # fmt: skip


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
        if process_group_of(self) is None:
            return super().forward(x)
        return nn.SyncBatchNorm.forward(cast(Any, self), x) if x.is_cuda else self._forward_synchronised(x)

    def _forward_synchronised(self, x: Tensor) -> Tensor:
        dims = [d for d in range(x.dim()) if d != 1]
        dtype = torch.promote_types(x.dtype, torch.float32)
        values, count = x.to(dtype), x.numel() // x.size(1)
        var, mean = var_mean(values, dims)
        mean, var, total = share_moments(mean, var, count, self.process_group)
        # Rounded as the fused operators do: in a process without values the layer may stand beside them.
        update_running_statistics([self], [mean.detach().to(dtype)], [var.detach().to(dtype)], total)
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale = torch.rsqrt(var + self.eps)
        shift = -mean * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        return torch.addcmul(shift.to(dtype).view(shape), values, scale.to(dtype).view(shape)).to(x.dtype)


@torch.no_grad()
def update_running_statistics(
    norms: Sequence[_BatchNorm], means: Sequence[Tensor], variances: Sequence[Tensor], count: int | Tensor
) -> None:
    """Update the running statistics of BN layers as their own forward passes do.

    Args:
        norms: Layers; those in evaluation, or without running statistics, are left alone.
        means: (C,) each, of the batch.
        variances: (C,) each, of the batch, biased.
        count: From how many values a channel; of 0 there is nothing to learn, but the batch is counted. A tensor stays
            where it is: nobody waits for it.
    """
    unbiased = count.double() / (count - 1).clamp_min(1) if isinstance(count, Tensor) else count / max(count - 1, 1)
    together = zip(norms, means, variances, strict=True)
    tracking = [t for t in together if t[0].training and t[0].track_running_stats and t[0].running_mean is not None]
    if counters := [norm.num_batches_tracked for norm, *_ in tracking if norm.num_batches_tracked is not None]:
        torch._foreach_add_(counters, 1)
    groups: dict[float, list[tuple[Any, Tensor, Tensor]]] = {}
    for norm, mean, var in tracking if isinstance(count, Tensor) or count else ():
        factor = norm.momentum
        if factor is None:
            factor = 0.0 if norm.num_batches_tracked is None else 1.0 / float(norm.num_batches_tracked)
        groups.setdefault(factor, []).append((norm, mean.to(cast(Tensor, norm.running_mean).dtype), var))
    for factor, group in groups.items():
        _approach([norm.running_mean for norm, *_ in group], [mean for _, mean, _ in group], factor, count)
        variances = torch._foreach_mul([var for *_, var in group], unbiased)
        variances = [var.to(norm.running_var.dtype) for (norm, *_), var in zip(group, variances, strict=True)]
        _approach([norm.running_var for norm, *_ in group], variances, factor, count)


def _approach(kept: list[Tensor], found: list[Tensor], factor: float, count: int | Tensor) -> None:
    """Move each of ``kept`` towards what was ``found``, but not where that is of no values."""
    if not isinstance(count, Tensor):
        torch._foreach_lerp_(kept, found, factor)
        return
    step = (count > 0).to(kept[0].dtype) * factor
    torch._foreach_mul_(kept, 1 - step)
    torch._foreach_add_(kept, torch._foreach_mul(found, step))


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


def is_hooked(layer: nn.Module) -> bool:
    """Whether somebody wants to see what goes through ``layer``, or has given this one another ``forward``."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or 'forward' in vars(layer)


def is_watched() -> bool:
    """Whether somebody wants to see what goes through every layer of the process.

    ``FlopCounterMode`` does, by a ``ModuleTracker``, but for their names only: it counts what is computed otherwise.
    """
    kinds = (
        modules._global_forward_hooks,
        modules._global_forward_pre_hooks,
        modules._global_backward_hooks,
        modules._global_backward_pre_hooks,
    )
    hooks = (hook for kind in kinds for hook in kind.values())
    return any(not isinstance(getattr(hook, '__self__', None), ModuleTracker) for hook in hooks)


def is_plain_bn(norm: nn.Module) -> bool:
    """Whether ``norm`` computes what BN computes; an unknown subclass might compute anything."""
    known = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm)
    return isinstance(norm, _BatchNorm) and (type(norm) in known or type(norm).__name__ == '_BatchNormXd')


def gamma_of(norm: _BatchNorm, device: torch.device) -> Tensor:
    """Scale (C,) of ``norm``, ones on ``device`` where it has none."""
    return torch.ones(norm.num_features, device=device) if norm.weight is None else norm.weight


def beta_of(norm: _BatchNorm, device: torch.device) -> Tensor:
    """Shift (C,) of ``norm``, zeros on ``device`` where it has none."""
    return torch.zeros(norm.num_features, device=device) if norm.bias is None else norm.bias


def process_group_of(norm: _BatchNorm) -> dist.ProcessGroup | None:
    """The processes that ``norm`` takes its statistics over now; None for this one alone, as always in evaluation."""
    if not norm.training or not isinstance(norm, nn.SyncBatchNorm | SyncBatchNorm):
        return None
    if not (dist.is_available() and dist.is_initialized()):
        if not SyncBatchNorm._told:
            SyncBatchNorm._told = True
            print_log('SyncBN without a process group: it normalizes like BN.', logger='current')
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def statistics_of(norm: _BatchNorm) -> Statistics:
    """What ``norm`` normalizes with now: the batch in training, or its running statistics."""
    if norm.training or norm.running_mean is None:
        return Statistics(norm.eps, group=process_group_of(norm))
    return Statistics(norm.eps, norm.running_mean, norm.running_var)
