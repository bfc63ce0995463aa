"""Configs of small real data sets and of the detection demo: one recipe a data set, labels as the data has them."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData

from mmunireplknet.datasets.digit_scenes import metainfo

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
VOID = 11
PEERS = {
    'upernet_unireplknet_a_camvid': ['upernet_resnet18_camvid', 'upernet_convnext-atto_camvid'],
    'mask-rcnn_unireplknet_a_nuclei': ['mask-rcnn_resnet18_nuclei'],
}


def load(name):
    return Config.fromfile(CONFIGS / f'{name}.py')


def built(name):
    cfg = load(name)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.init_weights()
    return cfg, model


@pytest.mark.parametrize('name', PEERS)
def test_the_recipe_is_the_same_for_every_backbone(name):
    def without_backbone(name):
        cfg = load(name)
        channels = (cfg.model.get('neck') or cfg.model.decode_head).pop('in_channels')
        assert cfg.model.pop('backbone').type
        assert len(channels) == 4
        return cfg.to_dict()

    ours = without_backbone(name)
    for peer in PEERS[name]:
        assert without_backbone(peer) == ours


def test_void_is_neither_trained_nor_counted():
    from mmseg.evaluation import IoUMetric

    cfg, model = built('upernet_unireplknet_a_camvid')
    head = model.decode_head
    assert head.num_classes == len(cfg.train_dataloader.dataset.metainfo.classes) == VOID
    crop = next(step for step in cfg.train_pipeline if step.type == 'RandomCrop')
    assert crop.ignore_index == cfg.model.data_preprocessor.seg_pad_val == VOID
    logits = torch.randn(1, VOID, 8, 8, requires_grad=True)
    labels = torch.full((1, 32, 32), VOID)
    labels[:, :8, :8] = 3
    sample = type('Sample', (), dict(gt_sem_seg=PixelData(data=labels)))()
    head.loss_by_feat(logits, [sample])['loss_ce'].backward()
    reached = logits.grad.abs().sum((0, 1)) > 0
    assert reached[:2, :2].all()
    assert not reached[4:, 4:].any()
    metric = IoUMetric(**{key: value for key, value in cfg.val_evaluator.items() if key != 'type'})
    union = metric.intersect_and_union(torch.full((32, 32), 3), labels[0], VOID, metric.ignore_index)[1]
    assert float(union.sum()) == 64


def test_names_of_the_detection_demo_are_those_of_the_data():
    cfg = load('demo_mask-rcnn_unireplknet_a_digit-scenes')
    heads = cfg.model.roi_head
    assert heads.bbox_head.num_classes == heads.mask_head.num_classes == 10
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.metainfo.to_dict() == metainfo(10, background=False)


@pytest.mark.parametrize(
    'name', ['demo_mask-rcnn_unireplknet_a_digit-scenes', *PEERS['mask-rcnn_unireplknet_a_nuclei']]
)
def test_detector_computes_a_loss(name):
    from mmdet.testing import demo_mm_inputs

    cfg, model = built(name)
    data = demo_mm_inputs(1, (3, 64, 96), num_items=[2], num_classes=2, with_mask=True)
    data['data_samples'][0].gt_instances.labels.fill_(len(cfg.train_dataloader.dataset.metainfo.classes) - 1)
    data = model.data_preprocessor(data, True)
    losses = model.loss(data['inputs'], data['data_samples'])
    total = sum(value.sum() for value in (*losses['loss_rpn_cls'], losses['loss_cls'], losses['loss_mask']))
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.backbone.parameters())
    assert any(p.grad.abs().sum() > 0 for p in model.backbone.parameters())
