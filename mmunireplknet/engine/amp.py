"""bfloat16 mixed precision, on a GPU and on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
_FLOAT32_LAYERS = {'fc_reg', 'reference_points_fc', 'reg_branches'}  # mmdet's DETRs add these to their references


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
        self._model: nn.Module | None = None
        self._takers: list[nn.Module] = []
        self._givers: list[nn.Module] = []

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Context of the forward pass."""
        device = next(model.parameters()).device.type
        if self._model is not model:
            self._model, (self._takers, self._givers) = model, _modules_with_coordinates(model)
        with ExitStack() as hooks:
            for module in self._takers:
                hooks.callback(module.register_forward_pre_hook(_cast_inputs, with_kwargs=True).remove)
            for module in self._givers:
                hooks.callback(module.register_forward_hook(_cast_outputs).remove)
            with super().optim_context(model), torch.autocast(device, torch.bfloat16):
                yield


def _modules_with_coordinates(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Modules that are to take float32, and those that are to give it."""
    takers, givers = [], []
    for name, module in model.named_modules():
        bases = {base.__name__ for base in type(module).__mro__}
        if bases & _FLOAT32_INPUTS:
            takers.append(module)
        # The layer itself, or one of a list of them.
        if bases & _FLOAT32_OUTPUTS or _FLOAT32_LAYERS.intersection(name.split('.')[-2:]):
            givers.append(module)
    return takers, givers


def _cast_inputs(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return compat.float32_of(args), compat.float32_of(kwargs)


def _cast_outputs(_: nn.Module, __: tuple, output: Any) -> Any:
    return compat.float32_of(output)
