"""The demo's configs: one recipe, several backbones; names and colours agree with the data set."""

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from mmunireplknet.datasets.digit_scenes import metainfo

from .comparing import NAMES, load

DEMOS = [name for name in NAMES if name.startswith('demo_upernet_')]


@pytest.mark.parametrize('name', DEMOS)
def test_builds_and_computes_a_loss(name):
    cfg = load(name)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.init_weights()
    classes = cfg.train_dataloader.dataset.metainfo['classes']
    with torch.no_grad():
        logits = model.decode_head(model.backbone(torch.randn(2, 3, 64, 64)))
    assert logits.shape == (2, len(classes), 16, 16)
    assert len(cfg.model.decode_head.loss_decode.class_weight) == len(classes)
    assert float(model.decode_head.conv_seg.weight.std()) == pytest.approx(0.1, rel=0.3)


@pytest.mark.parametrize('name', DEMOS)
def test_names_are_those_of_the_data(name):
    cfg = load(name)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        info = loader.dataset.metainfo
        assert info.to_dict() == metainfo(len(info['classes']) - 1)


def test_the_recipe_is_the_same_for_every_backbone():
    ours = load('demo_upernet_unireplknet_a_digit-scenes')
    for name in ('resnet18', 'convnext-atto'):
        peer = load(f'demo_upernet_{name}_digit-scenes')
        for cfg in (ours, peer):
            cfg.model.pop('backbone', None)
            cfg.model.decode_head.pop('in_channels', None)
        assert peer.to_dict() == ours.to_dict()


def test_no_demo_only_parts():
    cfg = load('demo_upernet_unireplknet_a_digit-scenes')
    assert cfg.model.backbone.type == 'UniRepLKNet'
    assert cfg.train_dataloader.dataset.type == 'BaseSegDataset'
    assert cfg.val_evaluator.type == 'IoUMetric'
    assert cfg.auto_scale_lr.base_batch_size == cfg.train_dataloader.batch_size
