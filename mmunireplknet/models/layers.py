"""Layers that UniRepLKNet is made of, with statistics in single precision.

Half precision overflows in a sum of squares long before the values themselves are large: the L2 norm
of a 200x304 map leaves float16 once its values exceed 266. Every reduction here therefore
accumulates in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import compat

__all__ = ['GRN', 'LayerNorm2d', 'NCHWtoNHWC', 'NHWCtoNCHW', 'SEBlock']


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
        return y if is_channels_last(x) else y.contiguous()


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x`` (N, C, H, W) lies in channels_last memory and not, as a map of one pixel does, in both layouts."""
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
        # torch's older ONNX exporter drops the dtype of a norm, so that a float16 model would overflow; the cast stays.
        y = x.to(dtype) if compat.needs_standard_operators() else x
        norm = torch.linalg.vector_norm(y, ord=2, dim=(1, 2), keepdim=True, dtype=dtype)
        scale = self.gamma * (norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)) + 1
        scale = scale.to(x.dtype)
        return x * scale if self.beta is None else torch.addcmul(self.beta.to(x.dtype), x, scale)


class SEBlock(nn.Module):
    """Squeeze-and-Excitation with reduction 4: (N, C, H, W) -> (N, C, H, W), https://arxiv.org/abs/1709.01507."""

    def __init__(self, dim: int, reduction: int = 4) -> None:
        super().__init__()
        self.down = nn.Conv2d(dim, dim // reduction, 1)
        self.up = nn.Conv2d(dim // reduction, dim, 1)

    def forward(self, x: Tensor, sums: Tensor | None = None) -> Tensor:
        """Scale the channels of ``x`` (N, C, H, W), whose ``sums`` over H and W, (N, C), may be known already."""
        if sums is None:
            weight = F.adaptive_avg_pool2d(x, 1)
        else:
            weight = (sums / (x.shape[2] * x.shape[3])).to(x.dtype)[..., None, None]
        weight = F.relu(self.down(weight))
        return x * torch.sigmoid(self.up(weight))
