"""How the work of a kernel is divided into programs, for which map.

There are few divisions to choose from. A rule, from the size of the map alone, says which are worth a try, best first;
``fastest`` times those on the first map of a kind, and remembers them. Where nothing was timed the rule decides.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import fastest

__all__ = ['Config', 'candidates', 'choose', 'splits', 'worth_timing']

WORTH = 1.5  # times the work of the best division by rule, up to which another one is timed


class Config(NamedTuple):
    """A division of the work.

    Attributes:
        rows: Rows of a patch.
        columns: Columns of a patch.
        block: Patches of a program; for the weight gradient, of one product.
        step: Pixels of the window in one product.
        warps: Of a program.
    """

    rows: int
    columns: int
    block: int
    step: int
    warps: int

    @property
    def label(self) -> str:
        """By which ``fastest`` knows it: no two for the same map have the same block."""
        return str(self.block)


def candidates(function: str, width: int, dtype: torch.dtype) -> list[Config]:
    """The divisions for maps of this width; there are no others.

    Args:
        function: 'weight_grad', or any other, which are the same kernel: 'forward', 'input_grad', 'pooled'.
        width: Of the map.
        dtype: Of the map.
    """
    rows, columns = (8, 8) if width <= 8 else (4, 16)
    if function == 'weight_grad':
        # Products of 32 patches in float32 need more registers than a GPU of compute capability 12 has.
        return [Config(rows, columns, block, 128, 4) for block in ((16, 32) if dtype.itemsize == 2 else (16,))]
    step = 128 // dtype.itemsize
    return [Config(rows, columns, block, step, warps) for block, warps in ((16, 2), (32, 4), (64, 4), (128, 8))]


def choose(function: str, x: Tensor, kernel: int, dilation: int) -> Config:
    """The division for a map ``x`` (N, C, H, W): what was the fastest for such maps, or else by rule.

    Args:
        function: As ``backends.choose`` names it.
        x: What is convolved.
        kernel: Size K of the kernel.
        dilation: Pixels between neighbouring taps.
    """
    label = fastest.division(fastest.kind_of(function, x, kernel, dilation), 'triton')
    if label:
        for config in candidates(function, x.shape[3], x.dtype):
            if config.label == label:
                return config
    return worth_timing(function, tuple(x.shape), dilation, x.dtype)[0]


@functools.lru_cache(maxsize=4096)
def worth_timing(function: str, shape: tuple[int, ...], dilation: int, dtype: torch.dtype) -> tuple[Config, ...]:
    """The divisions with little work, and with enough programs to fill a GPU; that with the least work first."""
    n, c, h, w = shape

    def cost(config: Config) -> float:
        patches = n * dilation * -(-h // (config.rows * dilation)) * -(-w // config.columns)
        blocks = -(-patches // config.block)
        if function == 'weight_grad':
            return blocks * (config.block + 2)  # a product costs as much as 2 patches more
        # Reading the matrix of the kernel costs as much as 24 patches; a GPU has some 128 multiprocessors to fill.
        return max(1.0, c * blocks / 128) * (config.block + 24)

    ranked = sorted(candidates(function, w, dtype), key=cost)
    return tuple(config for config in ranked if cost(config) <= WORTH * cost(ranked[0]))


def splits(programs: int, steps: int) -> int:
    """Into how many parts the sum over ``steps`` is divided: enough to fill a GPU, but of four steps at least."""
    return max(1, min(-(-512 // programs), steps // 4))
