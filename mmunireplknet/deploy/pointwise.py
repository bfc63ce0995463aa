"""The layers of UniRepLKNet that transpose their maps, written without, for the runtimes that read ONNX.

A block computes its MLP on (N, H, W, C) maps, between two transpositions, and so does LayerNorm. As 1x1 convolutions
and reductions over the channels they stay in the layout that the runtime has chosen for the depthwise convolutions:
docs/deployment.md has the figures.
"""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from ..models.block import UniRepLKNetBlock
from ..models.layers import GRN, LayerNorm2d

__all__ = ['ChannelsFirstGRN', 'ChannelsFirstLayerNorm', 'with_convolutions', 'with_reductions']

Module = TypeVar('Module', bound=nn.Module)


class ChannelsFirstGRN(nn.Module):
    """``GRN`` of a (N, C, H, W) map in deploy form, with its parameter.

    Args:
        grn: Without ``beta``.
    """

    def __init__(self, grn: GRN) -> None:
        super().__init__()
        self.gamma = grn.gamma

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` (N, C, H, W); the norm is taken in float32 at least."""
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(y, dim=(2, 3), keepdim=True)
        scale = self.gamma.view(1, -1, 1, 1) * (norm / (norm.mean(dim=1, keepdim=True) + 1e-6)) + 1
        return x * scale.to(x.dtype)


class ChannelsFirstLayerNorm(nn.Module):
    """``LayerNorm2d`` by reductions over the channels, with its parameters.

    Args:
        norm: The layer.
    """

    def __init__(self, norm: LayerNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` (N, C, H, W); the statistics are taken in float32 at least."""
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y - y.mean(1, keepdim=True)
        y = y / torch.sqrt((y * y).mean(1, keepdim=True) + self.eps)
        return (y * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)


def _convolution(linear: nn.Linear) -> nn.Conv2d:
    conv = nn.Conv2d(linear.in_features, linear.out_features, 1, device='meta')
    conv.weight = nn.Parameter(linear.weight[:, :, None, None], linear.weight.requires_grad)
    conv.bias = linear.bias
    return conv.train(linear.training)


def with_convolutions(model: Module) -> Module:
    """A copy of ``model`` whose blocks, all in deploy form, have 1x1 convolutions; their names are those of the linear
    layers and ``GRN``.
    """
    model = copy.deepcopy(model)
    for block in model.modules():
        if isinstance(block, UniRepLKNetBlock):
            block.pwconv1 = nn.Sequential(nn.Identity(), _convolution(cast(nn.Linear, block.pwconv1[1])))
            block.act = nn.Sequential(block.act[0], ChannelsFirstGRN(cast(GRN, block.act[1])))
            block.pwconv2 = nn.Sequential(_convolution(cast(nn.Linear, block.pwconv2[0])), nn.Identity())
            block.fused = False
    return model.eval()


def with_reductions(model: Module) -> Module:
    """A copy of ``model`` with ``ChannelsFirstLayerNorm``: for OpenVINO, which fuses what it is made of.

    onnxruntime does not; it computes LayerNormalization faster, transpositions included.
    """
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LayerNorm2d):
                setattr(parent, name, ChannelsFirstLayerNorm(child).eval())
    return model
