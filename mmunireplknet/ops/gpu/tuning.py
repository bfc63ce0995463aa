"""How the work of a kernel is divided into programs, for which map."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

__all__ = ['Config', 'candidates', 'choose']


class Config(NamedTuple):
    """A division of the work.

    Attributes:
        rows: Rows of a patch.
        columns: Columns of a patch.
        block: Patches of a program.
        step: Pixels of the window in one product.
        warps: Of a program.
    """

    rows: int
    columns: int
    block: int
    step: int
    warps: int


def candidates(operation: str, width: int, dtype: torch.dtype) -> list[Config]:
    """The divisions that are worth a try for maps of this width; there are no others."""
    rows, columns = (8, 8) if width <= 8 else (4, 16)
    step = 64 if dtype.itemsize == 2 else 32
    if operation == 'weight_grad':
        return [Config(rows, columns, block, 128, 4) for block in (16, 32)]
    return [Config(rows, columns, block, step, warps) for block, warps in ((16, 4), (64, 4), (128, 8))]


def choose(operation: str, shape: tuple[int, ...], kernel: int, dilation: int, dtype: torch.dtype) -> Config:
    """The division for a map of ``shape`` (N, C, H, W)."""
    return _choose(operation, tuple(shape), kernel, dilation, dtype)


@functools.lru_cache(maxsize=4096)
def _choose(operation: str, shape: tuple[int, ...], kernel: int, dilation: int, dtype: torch.dtype) -> Config:
    n, c, h, w = shape

    def cost(config: Config) -> float:
        groups = dilation * -(-h // (config.rows * dilation))
        patches = n * groups * -(-w // config.columns)
        programs = c * -(-patches // config.block)
        # Reading the matrix of the kernel costs as much as 24 patches; a GPU has some 128 multiprocessors to fill.
        return max(1.0, programs / 128) * (config.block + 24)

    return min(candidates(operation, w, dtype), key=cost)


def splits(programs: int, steps: int) -> int:
    """Into how many parts the sum over ``steps`` is divided: enough to fill a GPU, but of four steps at least."""
    return max(1, min(-(-512 // programs), steps // 4))
