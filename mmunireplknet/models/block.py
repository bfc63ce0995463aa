"""The block that UniRepLKNet is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import cast

import torch
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .. import compat
from ..ops import DepthwiseConv2d, backends, depthwise_conv2d_pooled, pointwise, pointwise_kernels
from ..ops.linear import autocast_device
from .dilated_reparam import DilatedReparamBlock, build_norm, default_branches, depthwise_conv, with_weights
from .layers import GRN, NCHWtoNHWC, NHWCtoNCHW, SEBlock
from .norms import (
    FrozenRunningStatistics,
    beta_of,
    gamma_of,
    is_hooked,
    is_plain_bn,
    is_watched,
    process_group_of,
    statistics_of,
    update_running_statistics,
)
from .reparam import check_foldable, float64, fold_scale, norm_scale

__all__ = ['UniRepLKNetBlock']

FUSED_LAYERS = [SEBlock, nn.Conv2d, nn.Conv2d, NCHWtoNHWC, nn.Linear, nn.GELU, GRN, nn.Linear, NHWCtoNCHW]
"""What the fused operators stand for, in the order of a block; the training form has its last BN behind them."""
DROP_PATHS = (DropPath, nn.Identity)


class UniRepLKNetBlock(BaseModule):
    """One block, (N, C, H, W) -> (N, C, H, W): ``x + DropPath(gamma * branch(x))``.

    branch: depthwise convolution (a Dilated Reparam Block for large kernels) - BN - SE - linear C -> 4C - GELU -
    GRN - linear 4C -> C - BN. Figure 3 of https://arxiv.org/abs/2410.08049; the layer scale ``gamma`` is in the
    official code only.

    Args:
        dim: Channels C.
        kernel_size: Size of the depthwise kernel, odd.
        drop_path_rate: Probability of dropping the branch of a sample.
        layer_scale_init_value: Initial ``gamma``; None or 0 for no layer scale.
        branches: Dilated branches; None takes the published ones, 3 and 5 then have none and are plain.
        norm_cfg: Norm after the depthwise convolution, in its branches, and at the end.
        with_cp: Recompute the block in the backward pass instead of storing its activations.
        deploy: Build the deploy form.
        fused: Compute by fused operators where there are any; False computes every layer by itself, as published.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float | None = 1e-6,
        branches: Sequence[tuple[int, int]] | None = None,
        norm_cfg: Mapping | None = None,
        with_cp: bool = False,
        deploy: bool = False,
        fused: bool = True,
    ) -> None:
        super().__init__()
        norm_cfg = norm_cfg or dict(type='BN')
        self.with_cp = with_cp
        self.deploy = deploy
        self.fused = fused
        if branches is not None or default_branches(kernel_size):
            self.dwconv: nn.Module = DilatedReparamBlock(dim, kernel_size, branches, norm_cfg, deploy, fused)
        else:
            self.dwconv = depthwise_conv(dim, kernel_size, bias=deploy)
        self.norm = nn.Identity() if deploy else build_norm(norm_cfg, dim)
        self.se = SEBlock(dim)
        self.pwconv1 = nn.Sequential(NCHWtoNHWC(), nn.Linear(dim, 4 * dim))
        self.act = nn.Sequential(nn.GELU(), GRN(4 * dim, use_bias=not deploy))
        pwconv2: list[nn.Module] = [nn.Linear(4 * dim, dim, bias=deploy), NHWCtoNCHW()]
        if not deploy:
            pwconv2.append(build_norm(norm_cfg, dim))
        self.pwconv2 = nn.Sequential(*pwconv2)
        self.gamma = None
        if layer_scale_init_value and not deploy:
            self.gamma = nn.Parameter(torch.full((dim,), float(layer_scale_init_value)))
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``x`` (N, C, H, W)."""
        fused = self.fused and not compat.needs_standard_operators()
        fusible = fused and self._is_fusible(x)
        if self.with_cp and x.requires_grad and torch.is_grad_enabled():
            contexts = (nullcontext(), FrozenRunningStatistics(self))
            # Asked once: kernels that fail in between must not change which tensors the recomputation saves.
            return checkpoint(self._forward, x, fused, fusible, use_reentrant=False, context_fn=lambda: contexts)
        return self._forward(x, fused, fusible)

    def _forward(self, x: Tensor, fused: bool, fusible: bool) -> Tensor:
        if fusible:
            return self._forward_fused(x)
        y = self._convolve_pooled(x) if fused and self._is_pooled(x) else self.se(self.norm(self.dwconv(x)))
        y = self.pwconv2(self.act(self.pwconv1(y)))
        if self.gamma is not None:
            y = y * self.gamma.view(1, -1, 1, 1)
        return x + self.drop_path(y)

    def _is_fusible(self, x: Tensor) -> bool:
        """Whether the fused operators compute this: on the CPU channels_last, BN as norm, nobody listening inside."""
        is_last = x.is_contiguous(memory_format=torch.channels_last)
        norms = [cast(_BatchNorm, norm) for norm in (self.norm, self.pwconv2[-1])]
        synchronised = any(process_group_of(norm) is not None for norm in norms)
        on_gpu = pointwise_kernels.suits(x, synchronised) and _is_dense(x)
        if not x.numel() or not ((backends.suits_cpp(x) and is_last) or on_gpu):
            return False
        layers = [self.se, *self.se.children(), *self.pwconv1, *self.act, *self.pwconv2]
        types = [type(layer) for layer in (layers if self.deploy else layers[:-1])]
        if types != FUSED_LAYERS or layers[5].approximate != 'none' or type(self.drop_path) not in DROP_PATHS:
            return False  # somebody has put another one in its place
        layers += [self.norm, self.pwconv1, self.act, self.pwconv2, self.drop_path]
        if is_watched() or any(is_hooked(layer) for layer in layers):
            return False
        return self.deploy or (is_plain_bn(self.norm) and is_plain_bn(self.pwconv2[2]))

    def _is_pooled(self, x: Tensor) -> bool:
        """Whether the convolution also sums its maps for the SE: on a GPU, in deploy form, nobody listening inside."""
        if not self.deploy or not backends.is_on_gpu(x) or is_watched():
            return False
        types = type(self._convolution()), type(self.norm), type(self.se)
        watched = (self.dwconv, self._convolution(), self.norm)
        return types == (DepthwiseConv2d, nn.Identity, SEBlock) and not any(is_hooked(layer) for layer in watched)

    def _convolution(self) -> nn.Module:
        return self.dwconv.lk_origin if isinstance(self.dwconv, DilatedReparamBlock) else self.dwconv

    def _convolve_pooled(self, x: Tensor) -> Tensor:
        """``se(dwconv(x))`` in channels_last memory."""
        conv = cast(DepthwiseConv2d, self._convolution())
        return self.se(*depthwise_conv2d_pooled(x, conv.weight, conv.bias, conv.dilation[0], conv.backend))

    def _forward_fused(self, x: Tensor) -> Tensor:
        device = autocast_device(x)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            if not torch.is_grad_enabled() and self._is_pooled(x):
                return self._deployed(x, x.to(dtype))
            y = self._gate(self.dwconv(x.to(dtype)).permute(0, 2, 3, 1))
            return self._finish(x, self._mlp(y))

    def _deployed(self, x: Tensor, rounded: Tensor) -> Tensor:
        """The deploy form on a GPU, without gradients, of ``x`` and of what the convolution gets of it."""
        conv = cast(DepthwiseConv2d, self._convolution())
        y, sums = depthwise_conv2d_pooled(rounded, conv.weight, conv.bias, conv.dilation[0], conv.backend, False)
        y = self._mlp(pointwise.excite(y.permute(0, 2, 3, 1), sums, *self._se_weights()))
        y = self.drop_path(y) if self.training else y
        return pointwise.add(y, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _se_weights(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        down, up = self.se.down, self.se.up
        return (down.weight.flatten(1), cast(Tensor, down.bias)), (up.weight.flatten(1), cast(Tensor, up.bias))

    def _gate(self, y: Tensor) -> Tensor:
        """``se(norm(y))`` for y (N, H, W, C)."""
        down, up = self._se_weights()
        if self.deploy:
            one, zero = y.new_ones(y.shape[-1]), y.new_zeros(y.shape[-1])
            return pointwise.gate(y, one, zero, pointwise.Statistics(0.0, zero, one), down, up)[0]
        norm = cast(_BatchNorm, self.norm)
        y, mean, var, count = pointwise.gate(
            y, gamma_of(norm, y.device), beta_of(norm, y.device), statistics_of(norm), down, up
        )
        update_running_statistics([norm], [mean], [var], count)
        return y

    def _mlp(self, y: Tensor) -> Tensor:
        """``pwconv2(act(pwconv1(y)))`` without its norm, for y (N, H, W, C)."""
        linear1, linear2 = cast(nn.Linear, self.pwconv1[1]), cast(nn.Linear, self.pwconv2[0])
        grn = cast(GRN, self.act[1])
        bias2 = None if linear2.bias is None else linear2.bias.to(y.dtype)
        beta = None if grn.beta is None else grn.beta.flatten()
        weight1, bias1, weight2 = (t.to(y.dtype) for t in (linear1.weight, linear1.bias, linear2.weight))
        return pointwise.grn_mlp(y, weight1, bias1, grn.gamma.flatten(), beta, weight2, bias2)

    def _finish(self, x: Tensor, y: Tensor) -> Tensor:
        """``x + drop_path(gamma * norm(y))``, for y (N, H, W, C)."""
        scale = self.drop_path(x.new_ones(len(x), 1, 1, 1, dtype=torch.float32))  # 1 / keep would be rounded
        if self.deploy:
            y = ((y * scale).to(x.dtype) if self.training else y.to(x.dtype)).permute(0, 3, 1, 2)
            return y.add_(x) if not torch.is_grad_enabled() and y.stride() == x.stride() else x + y
        norm = cast(_BatchNorm, self.pwconv2[2])
        scale = scale.flatten(1).expand(-1, x.shape[1])
        if self.gamma is not None:
            scale = scale * self.gamma
        y, mean, var, count = pointwise.normalize(
            y,
            gamma_of(norm, y.device),
            beta_of(norm, y.device),
            statistics_of(norm),
            scale,
            x.permute(0, 2, 3, 1),
        )
        update_running_statistics([norm], [mean], [var], count)
        return y.permute(0, 3, 1, 2)

    def switch_to_deploy(self) -> None:
        """Fold BN, GRN bias and layer scale into the convolution and the last linear layer, in place.

        A second call changes nothing. Device, dtype and ``requires_grad`` are kept.

        Raises:
            RuntimeError: The block is in training mode.
            TypeError: The norm is not BN.
        """
        if self.deploy:
            return
        self.check_foldable()
        self._fold_depthwise()
        self._fold_linear()
        self.deploy = True

    def check_foldable(self) -> None:
        """Raise what ``switch_to_deploy`` would raise, and change nothing."""
        if self.deploy:
            return
        for norm in (self.norm, self.pwconv2[2]):
            check_foldable(norm, self)
        if isinstance(self.dwconv, DilatedReparamBlock):
            self.dwconv.check_foldable()

    def _fold_depthwise(self) -> None:
        scale, shift = norm_scale(self.norm)
        if isinstance(self.dwconv, DilatedReparamBlock):
            self.dwconv.store_merged(*fold_scale(*self.dwconv.merged(), scale, shift))
        else:
            conv = cast(nn.Conv2d, self.dwconv)
            self.dwconv = with_weights(conv, *fold_scale(conv.weight, None, scale, shift))
        self.norm = nn.Identity()

    def _fold_linear(self) -> None:
        grn, linear = cast(GRN, self.act[1]), cast(nn.Linear, self.pwconv2[0])
        scale, shift = norm_scale(self.pwconv2[2])
        if self.gamma is not None:
            scale, shift = scale * float64(self.gamma), shift * float64(self.gamma)
        weight = float64(linear.weight)
        bias = weight @ float64(cast(Tensor, grn.beta)).flatten()
        self.pwconv2 = nn.Sequential(with_weights(linear, *fold_scale(weight, bias, scale, shift)), NHWCtoNCHW())
        grn.beta = None
        self.gamma = None


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
