"""bfloat16 mixed precision, on a GPU and on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

from .. import compat

# bfloat16 has 8 bits: between 1024 and 2048 pixels it tells only every eighth one apart.
_FLOAT32_INPUTS = {
    'BaseRoIExtractor',  # mmdet's casts the boxes to the dtype of the maps
    'NormProduct',  # mmpretrain's ArcFace disables autocast, but not before its input is bfloat16
}
_FLOAT32_OUTPUTS = {'BaseDenseHead'}  # mmdet makes anchors and points in the dtype of the scores


@OPTIM_WRAPPERS.register_module()
class BF16OptimWrapper(OptimWrapper):
    """Mixed precision in bfloat16: autocast without loss scaling, which its range makes needless, on any device.

    mmengine's ``AmpOptimWrapper`` refuses a CPU. Under it mmdet also computes boxes, anchors and points in half
    precision, which bfloat16 is too coarse for: here these stay in float32.

    Args:
        **kwargs: As for ``OptimWrapper``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        compat.let_mmcv_take_bfloat16()

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Context of the forward pass."""
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, torch.bfloat16), _float32_coordinates(model):
            yield


@contextmanager
def _float32_coordinates(model: nn.Module) -> Iterator[None]:
    """What the modules that deal with coordinates take and give is float32 inside of this context."""
    with ExitStack() as hooks:
        for module in model.modules():
            takes, gives = _wants_float32(type(module))  # type: ignore[arg-type]
            if takes:
                handle = module.register_forward_pre_hook(lambda _, *given: compat.float32_of(given), with_kwargs=True)
                hooks.callback(handle.remove)
            if gives:
                hooks.callback(module.register_forward_hook(lambda _, __, given: compat.float32_of(given)).remove)
        yield


@cache
def _wants_float32(cls: type[nn.Module]) -> tuple[bool, bool]:
    """Whether modules of this class get their inputs, and give their outputs, in float32."""
    names = {base.__name__ for base in cls.__mro__}
    return not names.isdisjoint(_FLOAT32_INPUTS), not names.isdisjoint(_FLOAT32_OUTPUTS)
