"""Folding of trained layers into fewer ones: pure functions, computed in float64 on the CPU.

The transformations are those of UniRepLKNet, https://arxiv.org/abs/2311.15599 (Dilated Reparam Block), and of
RepVGG, https://arxiv.org/abs/2101.03697 (BN into convolution). Every function returns float64 tensors; whoever
stores them casts once, at the end, so that the result is the nearest in the model's own precision.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    'check_foldable',
    'float64',
    'fold_scale',
    'norm_scale',
    'switch_to_deploy',
]


def float64(x: Tensor) -> Tensor:
    """``x`` without gradient, in float64, on the CPU: some devices have none."""
    return x.detach().to('cpu', torch.float64)


def check_foldable(norm: nn.Module, owner: nn.Module) -> None:
    """Refuse what cannot be folded exactly.

    Raises:
        TypeError: ``norm`` is not a BatchNorm: GN and LN depend on the input at inference.
        RuntimeError: ``owner`` or ``norm`` is in training mode, or the BN keeps no running statistics.
    """
    if not isinstance(norm, _BatchNorm):
        raise TypeError(
            f'{type(norm).__name__} cannot be folded into a convolution: its statistics depend on the input. '
            "Only BN can; train with norm_cfg=dict(type='BN') or 'SyncBN', or keep the training form."
        )
    if owner.training or norm.training:
        raise RuntimeError('The model is in training mode, where BN uses batch statistics. Call model.eval() first.')
    if norm.running_mean is None:
        raise RuntimeError('This BN keeps no running statistics (track_running_stats=False) and cannot be folded.')


def norm_scale(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,), float64, such that ``norm(x) == scale * x + shift`` in evaluation.

    Args:
        norm: A norm that ``check_foldable`` lets pass.
    """
    norm = cast(_BatchNorm, norm)
    scale = torch.rsqrt(float64(cast(Tensor, norm.running_var)) + norm.eps)
    if norm.weight is not None:
        scale = scale * float64(norm.weight)
    shift = -float64(cast(Tensor, norm.running_mean)) * scale
    if norm.bias is not None:
        shift = shift + float64(norm.bias)
    return scale, shift


def fold_scale(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias, float64, of the layer ``scale * layer(x) + shift``.

    Args:
        weight: (C_out, ...), of a convolution or a linear layer.
        bias: (C_out,) or None for zero.
        scale: (C_out,).
        shift: (C_out,).
    """
    folded = float64(weight) * scale.view(-1, *[1] * (weight.dim() - 1))
    return folded, shift if bias is None else float64(bias) * scale + shift


def switch_to_deploy(model: nn.Module) -> nn.Module:
    """Turn every UniRepLKNet inside ``model`` into its deploy form, in place.

    ``model`` is any module tree (detector, segmentor, classifier, backbone, block). Other layers are left
    as they are. Calling it again changes nothing, and neither does a call that raises.
    ``switch_to_deploy(copy.deepcopy(model))`` keeps the original.

    Returns:
        ``model`` itself.

    Raises:
        RuntimeError: A backbone is in training mode.
        TypeError: A backbone's norm cannot be folded (GN, LN).
        ValueError: There is no UniRepLKNet in ``model``.
    """
    from .unireplknet import UniRepLKNet, UniRepLKNetBlock

    backbones = [m for m in model.modules() if isinstance(m, UniRepLKNet)]
    inside = {id(m) for backbone in backbones for m in backbone.modules()}
    blocks = [m for m in model.modules() if isinstance(m, UniRepLKNetBlock) and id(m) not in inside]
    if not backbones and not blocks:
        raise ValueError(f'{type(model).__name__} holds no UniRepLKNet, so there is nothing to reparameterize.')
    found: list[UniRepLKNet | UniRepLKNetBlock] = [*backbones, *blocks]
    for module in found:
        module.check_foldable()
    for module in found:
        module.switch_to_deploy()
    return model
