"""What tests/test_configs/test_any_config.py does with a config as mmdet, mmseg or mmpretrain ships it."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmunireplknet import UniRepLKNet, switch_to_deploy
from mmunireplknet.engine import swap_backbone

from ..procedural import randomise, relative_error

TOLERANCE = 1e-4
BATCH = dict(mmdet=1, mmseg=2, mmpretrain=2)


@dataclass(frozen=True)
class Row:
    """One config of the matrix.

    Attributes:
        library: mmdet, mmseg or mmpretrain.
        head: What the row stands for.
        config: Below the library's own configs.
        size: Height and width of the images, the smallest that the head can do something with.
        slow: Longer than a few seconds.
    """

    library: str
    head: str
    config: str
    size: tuple[int, int] = (64, 64)
    slow: bool = False


@functools.cache
def _read(file: Path) -> Config:
    return Config.fromfile(file)


def shipped(library: str, config: str) -> Config:
    """A config as it lies in the installed library."""
    return copy.deepcopy(_read(shipped_file(library, config)))


def shipped_file(library: str, config: str) -> Path:
    """Where that is."""
    pytest.importorskip(f'{library}.models')
    return Path(find_spec(library).origin).parent / '.mim' / 'configs' / config


def small_data(row: Row, cfg: Config, model: nn.Module) -> Callable[[bool], dict]:
    """Images and truth for ``model``, preprocessed by it for training or testing, of the row's size."""
    make = dict(mmdet=_detection, mmseg=_segmentation, mmpretrain=_classification)[row.library]
    if getattr(model.data_preprocessor, 'batch_augments', None) is not None and row.library != 'mmpretrain':
        model.data_preprocessor.batch_augments = None  # they would enlarge the images to those of the recipe
    if row.library == 'mmseg':
        model.data_preprocessor.size = row.size

    def preprocessed(training: bool) -> dict:
        torch.manual_seed(0)
        return model.data_preprocessor(make(row, cfg, training), training)

    return preprocessed


def _images(row: Row) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 256, (3, *row.size), generator=generator, dtype=torch.uint8) for _ in range(BATCH[row.library])
    ]


def _detection(row: Row, cfg: Config, training: bool) -> dict:
    from mmdet.testing import demo_mm_inputs

    data = demo_mm_inputs(BATCH['mmdet'], (3, *row.size), num_items=[3], num_classes=80, with_mask=True)
    for sample in data['data_samples']:
        sample.set_metainfo(dict(scale_factor=(1.0, 1.0)))
    return data


def _segmentation(row: Row, cfg: Config, training: bool) -> dict:
    from mmseg.structures import SegDataSample

    classes = torch.arange(row.size[0] * row.size[1]).view(1, *row.size) // 300 % 7  # bands of seven classes
    meta = dict(img_shape=row.size, ori_shape=row.size, pad_shape=row.size, scale_factor=(1.0, 1.0), flip=False)
    samples = [SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=classes.clone())) for _ in range(BATCH['mmseg'])]
    return dict(inputs=_images(row), data_samples=samples)


def _classification(row: Row, cfg: Config, training: bool) -> dict:
    from mmpretrain.structures import DataSample

    images = torch.stack(_images(row))
    if cfg.model.data_preprocessor.get('type') == 'SelfSupDataPreprocessor':
        samples = [DataSample() for _ in range(BATCH['mmpretrain'])]
        return dict(inputs=[images, images.flip(-1)] if training else images, data_samples=samples)
    samples = [DataSample().set_gt_label([i + 1]) for i in range(BATCH['mmpretrain'])]
    return dict(inputs=images, data_samples=samples)


def outcome(model: nn.Module, data: dict) -> dict[str, Tensor]:
    """Everything that the model predicts, in evaluation."""
    with torch.no_grad():
        if not hasattr(model, 'predict'):  # self-supervision gives a feature
            return dict(feature=model.neck(model.extract_feat(data['inputs']))[0])
        samples = model(**data, mode='predict')
    found: dict[str, Tensor] = {}
    for i, sample in enumerate(samples):
        if 'pred_instances' in sample:
            found.update({f'{name} {i}': torch.as_tensor(value) for name, value in sample.pred_instances.items()})
        elif 'seg_logits' in sample:
            found[f'logits {i}'] = sample.seg_logits.data
        else:
            found[f'scores {i}'] = sample.pred_score
    return found


def keep_something(test_cfg: object) -> None:
    """Have an untrained detector find ten boxes, with soft masks: a threshold would turn rounding into other pixels."""
    for key, value in test_cfg.items() if isinstance(test_cfg, dict) else ():
        if key in ('score_thr', 'filter_thr'):
            test_cfg[key] = 0.0
        elif key == 'mask_thr_binary':
            test_cfg[key] = -1
        elif key == 'max_per_img':
            test_cfg[key] = 10
        elif key != 'rpn':
            keep_something(value)


def build(row: Row) -> tuple[Config, nn.Module]:
    """The row's config with UniRepLKNet-A, and its model: heads as initialised, the backbone random in everything."""
    cfg = swap_backbone(shipped(row.library, row.config), arch='a')
    if 'data_preprocessor' not in cfg.model:  # what mmengine's Runner does
        cfg.model.data_preprocessor = cfg.data_preprocessor
    keep_something(cfg.model.get('test_cfg'))
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.init_weights()
    for value in model.state_dict().values():
        if value.is_floating_point():  # as initialised, the scores are nearly equal, and their order is rounding
            value.add_(0.02 * torch.randn_like(value))
    for module in model.modules():
        if isinstance(module, _BatchNorm):  # those of heads take the batch's statistics, and let the maps through
            module.momentum = 1.0
    for module in model.modules():
        if isinstance(module, UniRepLKNet):
            randomise(module)
            for norm in module.modules():
                if isinstance(norm, _BatchNorm):
                    norm.momentum = 0.0
    if hasattr(model, 'prototype'):  # a retriever compares with the features of its gallery
        model.prototype = torch.randn(7, 320)
    return cfg, model


def train_one_step(cfg: Config, model: nn.Module, data: dict, wrapper_type: str = 'OptimWrapper') -> None:
    """One step of the config's optimizer; every parameter of the backbone gets a finite gradient, and moves."""
    cfg = cfg.optim_wrapper
    cfg.update(type=wrapper_type)  # mmengine's mixed precision refuses a CPU
    for key in ('loss_scale', 'dtype', 'use_fp16'):
        cfg.pop(key, None)
    wrapper = build_optim_wrapper(model, cfg)
    model.train()
    MessageHub.get_current_instance().update_info('epoch', 0)  # as the Runner does, which TOOD asks
    with wrapper.optim_context(model):
        losses = model(**data, mode='loss')
    loss, _ = model.parse_losses(losses)
    assert loss.isfinite(), f'loss {loss}'
    wrapper.backward(loss)
    before = {}
    for name, parameter in backbone_of(model).named_parameters():
        assert parameter.grad is not None, f'{name} has no gradient'
        assert parameter.grad.isfinite().all(), f'the gradient of {name} is not finite'
        before[name] = parameter.detach().clone()
    assert any(p.grad.abs().max() > 0 for p in backbone_of(model).parameters())
    wrapper.step()
    for name, parameter in backbone_of(model).named_parameters():
        assert parameter.isfinite().all(), f'{name} is not finite after the step'
    assert any(not torch.equal(p, before[name]) for name, p in backbone_of(model).named_parameters())


def backbone_of(model: nn.Module) -> UniRepLKNet:
    """The one that is trained, which comes first: MoCo has a second, by momentum."""
    return next(module for module in model.modules() if isinstance(module, UniRepLKNet))


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Equal numbers of everything, and equal within the tolerance; labels and binary masks exactly."""
    assert expected
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.numel() > 0, f'there are no {name}'
        assert actual[name].shape == value.shape, name
        assert value.double().isfinite().all(), name
        difference = (actual[name].double() - value.double()).abs()
        if value.dtype == torch.uint8:  # soft masks, cut to 1 / 255: a value at the edge of a step falls on either side
            assert difference.max() <= 1, name
            assert difference.mean() / 255 < tolerance, name
        elif difference.any():
            assert value.is_floating_point(), (name, difference.count_nonzero())
            assert relative_error(actual[name], value) < tolerance, (name, relative_error(actual[name], value))
    assert any(value.double().std() > 0 for value in expected.values()), 'there is nothing to compare'


def check(row: Row) -> list[str]:
    """Build, one training step, prediction, and the same prediction in deploy form; the row's cells of the table.

    The training form computes in the memory layout that it chooses by itself, the deploy form in that of its input.
    """
    with DefaultScope.overwrite_default_scope(row.library):
        cfg, model = build(row)
        data = small_data(row, cfg, model)
        start = [value.detach().clone() for value in model.parameters()]
        train_one_step(cfg, model, data(True))
        with torch.no_grad():  # one step at the learning rate of a recipe leads an untrained model anywhere
            for value, before in zip(model.parameters(), start, strict=True):
                value.copy_(before)
        model.eval()
        expected = outcome(model, data(False))
        parameters = list(backbone_of(model).parameters())
        assert all(p.requires_grad for p in parameters)
        size = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        switch_to_deploy(model)
        assert backbone_of(model).deploy
        backbone_of(model).channels_last = False
        compare(outcome(model, data(False)), expected)
        other = data(False)
        other['inputs'] = other['inputs'].flip(-1, 1)
        with pytest.raises(AssertionError):  # else the backbone had no part in it
            compare(outcome(model, other), expected, 100 * TOLERANCE)
    predicted = ', '.join(sorted({name.partition(' ')[0] for name in expected}))
    return [f'yes, {size:.1f}M', f'yes, {len(parameters)} gradients', f'yes: {predicted}', 'yes']
