"""Layer-wise learning-rate decay by the published rule, for detectors, segmentors and classifiers alike.

Rule: https://github.com/AILab-CVC/UniRepLKNet, optimizer constructors of its detection and segmentation code. The
learning rate of a parameter is ``base * decay_rate ** (num_layers + 1 - depth)``, where depth 0 is the stem and
``num_layers + 1`` everything behind the stages (norms of the outputs, neck, heads). Weight decay is left out for
parameters with one dimension and for every ``*.bias``.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ..models.layers import GRN

__all__ = ['LayerDecayOptimWrapperConstructor']

OPTIONS = ('decay_rate', 'num_layers', 'decay_grn')
# What FSDP, activation checkpointing and torch.compile put into the names of parameters.
WRAPPER_PARTS = re.compile(r'(?<![^.])(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Builds an optimizer whose learning rates decay from the heads down to the stem.

    The depth of each parameter is what ``model.backbone.get_layer_depth`` says; a bare backbone and wrapped models
    (DDP, FSDP) work too. Frozen parameters are left out. There are at most two parameter groups a depth, with and
    without weight decay.

    Args:
        optim_wrapper_cfg: The optimizer wrapper, with ``optimizer`` and its ``lr``.
        paramwise_cfg: A dict with

            - ``decay_rate``: Learning-rate factor from one depth to the one below it, above 0 and at most 1.
              1 gives every parameter the same learning rate, with the published weight decay.
            - ``num_layers`` (optional): Depths of the backbone between its stem and what follows it. Published are
              12, and 9 where the decay is off (UperNet with variant T). None takes the backbone's own.
            - ``decay_grn`` (optional): Whether weight decay applies to the affine of GRN. True, the default, is as
              published: it has the shape (1, 1, 1, C), so that the rule on dimensions does not exempt it.

    Example:
        >>> optim_wrapper = dict(
        >>>     type='OptimWrapper',
        >>>     constructor='LayerDecayOptimWrapperConstructor',
        >>>     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        >>>     paramwise_cfg=dict(decay_rate=0.9, num_layers=12))
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        self._shapes: dict[str, torch.Size] = {}

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        known = f'Known are {", ".join(OPTIONS)}.'
        unknown = [key for key in self.paramwise_cfg if key not in OPTIONS]
        if unknown:
            raise ValueError(f'paramwise_cfg has the unknown keys {", ".join(map(repr, unknown))}. {known}')
        if 'decay_rate' not in self.paramwise_cfg:
            raise ValueError(
                f'paramwise_cfg={dict(self.paramwise_cfg)} lacks decay_rate, e.g. dict(decay_rate=0.9, num_layers=12). '
                f'{known} decay_rate=1 applies the published weight decay alone.'
            )
        self.decay_rate = self.paramwise_cfg['decay_rate']
        self.num_layers = self.paramwise_cfg.get('num_layers')
        self.decay_grn = self.paramwise_cfg.get('decay_grn', True)
        if not _is_number(self.decay_rate) or not 0 < self.decay_rate <= 1:
            raise ValueError(f'decay_rate={self.decay_rate!r} must be a number above 0 and at most 1.')
        if self.num_layers is not None and (type(self.num_layers) is not int or self.num_layers < 1):
            raise ValueError(f"num_layers={self.num_layers!r} must be a positive int, or None for the backbone's own.")
        if not isinstance(self.decay_grn, bool):
            raise ValueError(f'decay_grn={self.decay_grn!r} must be True (as published) or False.')
        if not _is_number(self.base_lr):
            raise ValueError(f'lr={self.base_lr!r} of the optimizer must be a number: layer decay scales it.')

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper of ``model``.

        Args:
            model: A model with ``backbone``, or a backbone; in a model wrapper or not.

        Raises:
            TypeError: The backbone has no ``get_layer_depth``.
            ValueError: ``num_layers`` is not the backbone's, or the parameters are flattened by FSDP.
        """
        self._shapes = _shapes_before_sharding(model)
        return super().__call__(model)

    def add_params(self, params: list[dict], module: nn.Module, **_: Any) -> None:
        """Add the parameter groups of ``module`` to ``params``.

        Args:
            params: The list of groups, extended in place.
            module: The model, out of its wrapper.
        """
        module = _unwrap(module)
        backbone, prefix = _find_backbone(module)
        grn = {id(p) for m in module.modules() if isinstance(m, GRN) for p in m.parameters(recurse=False)}
        groups: dict[tuple[int, bool], dict] = {}
        sizes: Counter[tuple[int, bool]] = Counter()
        for full_name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            name = WRAPPER_PARTS.sub('', full_name)
            depth, num_depths = self._depth(backbone, name, prefix)
            shape = self._shapes.get(name, parameter.shape)
            exempt = len(shape) == 1 or name.endswith('.bias') or (not self.decay_grn and id(parameter) in grn)
            if (depth, exempt) not in groups:
                groups[depth, exempt] = self._new_group(depth, num_depths, exempt)
            groups[depth, exempt]['params'].append(parameter)
            sizes[depth, exempt] += shape.numel()
        params.extend(groups[key] for key in sorted(groups))
        self._report(groups, sizes)

    def _new_group(self, depth: int, num_depths: int, exempt: bool) -> dict:
        scale = self.decay_rate ** (num_depths - 1 - depth)
        group = dict(
            params=[],
            group_name=f'layer_{depth}_{"no_decay" if exempt else "decay"}',
            lr_scale=scale,
            lr=self.base_lr * scale,
        )
        if exempt:
            group['weight_decay'] = 0.0
        elif self.base_wd is not None:
            group['weight_decay'] = self.base_wd
        return group

    def _depth(self, backbone: nn.Module, name: str, prefix: str) -> tuple[int, int]:
        """Depth of a parameter, and the number of depths: the backbone's layers, its stem, and what follows it."""
        method: Any = backbone.get_layer_depth
        if self.num_layers is not None and 'num_layers' in inspect.signature(method).parameters:
            return method(name, prefix, num_layers=self.num_layers)
        depth, num_depths = method(name, prefix)
        if self.num_layers is not None and num_depths != self.num_layers + 2:
            raise ValueError(
                f'num_layers={self.num_layers}, but {type(backbone).__name__} always counts {num_depths - 2} layers: '
                'leave num_layers out of paramwise_cfg.'
            )
        return depth, num_depths

    def _report(self, groups: Mapping[tuple[int, bool], dict], sizes: Mapping[tuple[int, bool], int]) -> None:
        rows = [f'{"depth":>5} {"lr scale":>9} {"lr":>10} {"decayed":>12} {"not decayed":>12}']
        for depth in sorted({depth for depth, _ in groups}):
            one = groups.get((depth, False)) or groups[depth, True]
            decayed, exempt = sizes[depth, False], sizes[depth, True]
            rows.append(f'{depth:>5} {one["lr_scale"]:>9.4f} {one["lr"]:>10.3e} {decayed:>12,} {exempt:>12,}')
        title = (
            f'Layer decay {self.decay_rate}, base lr {self.base_lr}, weight decay {self.base_wd} '
            f'(GRN {"decayed" if self.decay_grn else "not decayed"}); numbers of parameters by depth:'
        )
        print_log('\n'.join([title, *rows]), logger='current')
        if any(group['lr_scale'] > 1 for group in groups.values()):
            print_log(
                f'num_layers={self.num_layers} is less than the backbone has: by the published rule some layers now '
                'have a learning rate above the base. Use 12 for UniRepLKNet.',
                logger='current',
                level=logging.WARNING,
            )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _unwrap(module: Any) -> nn.Module:
    while is_model_wrapper(module):
        module = module.module
    return module


def _find_backbone(model: nn.Module) -> tuple[nn.Module, str]:
    """The module to ask for depths, and what the names of its parameters start with in ``model``."""
    backbone = _unwrap(getattr(model, 'backbone', model))
    if not hasattr(backbone, 'get_layer_depth'):
        where = 'The model' if backbone is model else f'The backbone of {type(model).__name__}'
        raise TypeError(
            f'{where} is a {type(backbone).__name__}, which has no get_layer_depth(param_name, prefix): layer decay '
            'needs UniRepLKNet or another backbone that has it, such as those of mmpretrain. For others use '
            "constructor='DefaultOptimWrapperConstructor' with paramwise_cfg=dict(custom_keys=...)."
        )
    name = next(name for name, module in model.named_modules() if module is backbone)
    return backbone, WRAPPER_PARTS.sub('', f'{name}.') if name else ''


def _shapes_before_sharding(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes of the parameters that FSDP holds as one-dimensional shards; empty without FSDP."""
    if not torch.distributed.is_available():
        return {}
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    if not FSDP.fsdp_modules(model):
        return {}
    if any(name.rpartition('.')[2] == '_flat_param' for name, _ in model.named_parameters()):
        raise ValueError(
            'FSDP has flattened the parameters, so that layer decay cannot tell them apart: set '
            "strategy=dict(type='FSDPStrategy', model_wrapper=dict(use_orig_params=True))."
        )
    with FSDP.summon_full_params(model, writeback=False):
        return {WRAPPER_PARTS.sub('', name): p.shape for name, p in _unwrap(model).named_parameters()}
