"""bfloat16 mixed precision on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner.amp import autocast
from torch import nn


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """What ``AmpOptimWrapper`` is on a GPU, which refuses a CPU: autocast, in bfloat16, without loss scaling.

    Args:
        dtype: 'bfloat16', the only one that needs no loss scaling.
        **kwargs: As for ``OptimWrapper``.

    Raises:
        ValueError: Another dtype.
    """

    def __init__(self, dtype: str = 'bfloat16', **kwargs: Any) -> None:
        if dtype != 'bfloat16':
            raise ValueError(f'dtype={dtype!r}: mixed precision on the CPU is bfloat16 only.')
        super().__init__(**kwargs)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Context of the forward pass."""
        with super().optim_context(model), autocast(device_type='cpu', dtype=torch.bfloat16):
            yield
