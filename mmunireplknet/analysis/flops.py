"""Multiply-adds and parameters of a detector, segmentor or classifier, counted on meta tensors.

Counted are convolutions and matrix products, by torch's ``FlopCounterMode``, for one image in the deploy form. Norms,
activations, pooling, resizing, RoIAlign and NMS are not, as they are small or depend on the image. What runs is what a
test runs, but with fixed boxes, as mmdet counts: 1,000 proposals pass every box stage and 100 every mask stage.
Segmentors are counted without their auxiliary heads, which only training has. The published figures are multiply-adds
counted like this.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['Complexity', 'build_on_meta', 'complexity', 'count_parameters', 'default_shape', 'multiply_adds']

NUM_BOXES, NUM_MASKS = 1000, 100
DETECTION_SHAPE = (800, 1280)  # of the published figures, and of most of the literature
ROI_HEADS = ('StandardRoIHead', 'CascadeRoIHead')
TRAINING_ONLY = ('auxiliary_head',)


@dataclass(frozen=True)
class Complexity:
    """Size and cost of the model of a config.

    Attributes:
        shape: Height and width of the image.
        train_params: Parameters in the training form, without auxiliary heads.
        deploy_params: Parameters in the deploy form, without auxiliary heads; the published counts.
        auxiliary_params: Parameters of the auxiliary heads.
        multiply_adds: Multiply-adds of each part in the deploy form, in the order in which they run.
    """

    shape: tuple[int, int]
    train_params: int
    deploy_params: int
    auxiliary_params: int
    multiply_adds: Mapping[str, int]

    @property
    def total(self) -> int:
        """Multiply-adds of one image."""
        return sum(self.multiply_adds.values())


def complexity(cfg: Config, shape: tuple[int, int] | None = None) -> Complexity:
    """Count parameters of both forms and multiply-adds of the deploy form.

    Args:
        cfg: Config of an mmdet, mmseg or mmpretrain model; unchanged. A backbone other than UniRepLKNet has one form.
        shape: Height and width of the image; None takes ``default_shape``.

    Raises:
        ValueError: The shape is unknown or too small, or the model has parts that cannot be counted.
    """
    model = build_on_meta(cfg, deploy=True)
    deploy, auxiliary = count_parameters(model)
    shape = default_shape(cfg) if shape is None else shape
    return Complexity(
        shape=shape,
        train_params=count_parameters(build_on_meta(cfg, deploy=False))[0],
        deploy_params=deploy,
        auxiliary_params=auxiliary,
        multiply_adds=multiply_adds(model, shape),
    )


def default_shape(cfg: Config) -> tuple[int, int]:
    """Height and width by which the literature compares models of the config's task.

    800 x 1280 for detectors. For segmentors and classifiers it is in the test pipeline: the size of its crop, or else
    that of its first resizing, e.g. 512 x 2048 for ADE20K; where it has neither, to which the data preprocessor pads.

    Raises:
        ValueError: None of these is there.
    """
    if 'roi_head' in cfg.model or 'bbox_head' in cfg.model:
        return DETECTION_SHAPE
    loader = cfg.get('test_dataloader') or cfg.get('val_dataloader') or {}
    steps = [*loader.get('dataset', {}).get('pipeline', []), cfg.model.get('data_preprocessor') or {}]
    for key, height_first in (('crop_size', True), ('scale', False), ('size', True)):
        for size in (step[key] for step in steps if step.get(key)):
            pair = (size, size) if isinstance(size, int) else tuple(size)
            return (pair[0], pair[1]) if height_first else (pair[1], pair[0])
    raise ValueError(
        'Neither the test pipeline nor the data preprocessor of this config names a size: give --shape H W.'
    )


def build_on_meta(cfg: Config, deploy: bool) -> nn.Module:
    """The model of ``cfg`` in evaluation mode, in the deploy form if asked and possible, without memory for weights.

    Raises:
        ValueError: The config has no model with a backbone.
    """
    if 'backbone' not in cfg.get('model', {}):
        raise ValueError('The config has no model.backbone: give the config of a detector, segmentor or classifier.')
    model = copy.deepcopy(cfg.model)
    kind = model.backbone.type
    if getattr(kind, '__name__', kind).rpartition('.')[2] == 'UniRepLKNet':
        model.backbone.deploy = deploy
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmengine'):
        with MODELS.switch_scope_and_registry(None) as registry:
            registry.import_from_location()  # here, so that no constant of a module gets onto the meta device
        with torch.device('meta'):
            return MODELS.build(model).eval()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of parameters: of what a test runs, and of auxiliary heads."""
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    auxiliary = sum(parts.get(name, 0) for name in TRAINING_ONLY)
    return sum(p.numel() for p in model.parameters()) - auxiliary, auxiliary


def multiply_adds(model: nn.Module, shape: tuple[int, int]) -> dict[str, int]:
    """Multiply-adds of each part for one image.

    Args:
        model: A detector, segmentor or classifier on the meta device, in evaluation mode.
        shape: Height and width of the image.

    Raises:
        ValueError: An image below 32x32, or a model with parts that cannot be counted.
    """
    if min(shape) < 32:
        raise ValueError(
            f'The image is {shape[0]} x {shape[1]}, but the backbone divides it by 32: give at least that.'
        )
    counts: dict[str, int] = {}

    def run(name: str, part: Callable, *inputs: Any) -> Any:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            outputs = part(*inputs)
        counts[name] = counts.get(name, 0) + counter.get_total_flops() // 2
        return outputs

    channels = getattr(model.backbone, 'in_channels', 3)
    features: Any = torch.empty(1, channels, *shape, device='meta')
    for name in ('backbone', 'neck'):
        if isinstance(part := getattr(model, name, None), nn.Module):
            features = run(name, part, features)
    for name, part, inputs in _heads(model, features):
        try:
            run(name, part, *inputs)
        except (NotImplementedError, TypeError) as error:  # a head that takes more than features, or has no forward
            raise ValueError(
                f'{name}, a {type(part).__name__}, cannot be counted on features alone: {error}'
            ) from error
    _check_complete(model, {name.partition('.')[0] for name in counts})
    return counts


def _heads(model: nn.Module, features: Any) -> Iterator[tuple[str, nn.Module, tuple]]:
    """What follows the neck at test time: name, module and inputs."""
    for name in ('rpn_head', 'bbox_head', 'decode_head', 'head'):
        part = getattr(model, name, None)
        if isinstance(part, nn.Module):
            yield name, part, (features,)
    roi_head = getattr(model, 'roi_head', None)
    if roi_head is None:
        return
    if type(roi_head).__name__ not in ROI_HEADS:
        raise ValueError(f'roi_head is a {type(roi_head).__name__}: only {" and ".join(ROI_HEADS)} can be counted.')
    for kind, number in (('bbox', NUM_BOXES), ('mask', NUM_MASKS)):
        if getattr(roi_head, f'with_{kind}'):
            heads, extractors = (_stages(getattr(roi_head, f'{kind}_{what}')) for what in ('head', 'roi_extractor'))
            for head, extractor in zip(heads, extractors, strict=True):
                size = extractor.roi_layers[0].output_size
                regions = torch.empty(number, extractor.out_channels, *size, device='meta')
                yield f'roi_head.{kind}_head', head, (regions,)


def _stages(part: nn.Module) -> list[Any]:
    return list(part) if isinstance(part, nn.ModuleList) else [part]


def _check_complete(model: nn.Module, counted: set[str]) -> None:
    """Refuse a total that would leave out a part."""
    parts = [name for name, part in model.named_children() if next(part.parameters(), None) is not None]
    left_out = [name for name in parts if name not in counted and name not in TRAINING_ONLY]
    if left_out:
        raise ValueError(
            f'{type(model).__name__} has parts that this count does not know: {", ".join(left_out)}. It knows backbone '
            'and neck with a decode head, a classification head, or the heads of one- and two-stage detectors.'
        )
