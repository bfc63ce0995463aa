"""Adaptive average pooling to a fixed grid, of maps of any size, in operators that every format has.

ONNX has no adaptive pooling, and torch's exporters write it only where the size of the map is known and a multiple of
the grid. It is linear and separable, though: the mean over the cells is ``A_h @ x @ A_w^T`` with one averaging matrix
for each direction, and these can be computed in the graph from the size of the map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ['MatrixPool2d', 'averaging_matrix', 'replace_pooling']


def averaging_matrix(cells: int, length: int, like: Tensor) -> Tensor:
    """Matrix (cells, length) whose product with a vector gives its adaptive average pooling.

    Cell i averages the entries from ``floor(i * length / cells)`` to before ``ceil((i + 1) * length / cells)``, as
    ``torch.nn.AdaptiveAvgPool1d`` does.

    Args:
        cells: Entries of the result.
        length: Entries of the input; symbolic or a tensor while a model is exported.
        like: Gives the device and, at least float32, the dtype.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    cell = torch.arange(cells, device=like.device).unsqueeze(1)
    position = torch.arange(length, device=like.device).unsqueeze(0)
    # The two bounds multiplied out: no division, which ONNX makes in floating point.
    inside = (cell * length < (position + 1) * cells) & (position * cells < (cell + 1) * length)
    inside = inside.to(dtype)
    return inside / inside.sum(1, keepdim=True)


class MatrixPool2d(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as two small matrix products: (N, C, H, W) -> (N, C, h, w).

    Args:
        output_size: (h, w), both known.
    """

    def __init__(self, output_size: tuple[int, int]) -> None:
        super().__init__()
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        """Pool ``x`` (N, C, H, W); sums are made in float32 at least."""
        rows = averaging_matrix(self.output_size[0], x.shape[2], x)
        columns = averaging_matrix(self.output_size[1], x.shape[3], x)
        return (rows @ (x.to(rows.dtype) @ columns.transpose(0, 1))).to(x.dtype)


def replace_pooling(model: nn.Module) -> None:
    """Put a ``MatrixPool2d`` in place of every adaptive average pooling to more than one cell, in place."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if not isinstance(child, nn.AdaptiveAvgPool2d):
                continue
            size = child.output_size
            height, width = size if isinstance(size, tuple) else (size, size)
            if height is None or width is None or (height, width) == (1, 1):
                continue  # None keeps that size; one cell is a mean, which every exporter writes
            setattr(parent, name, MatrixPool2d((height, width)))
