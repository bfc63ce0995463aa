"""The smallest models that still hold every kind of block: for tests that compare, not for tests of figures."""

import pytest
import torch
from mmengine.config import ConfigDict

from mmunireplknet import UniRepLKNet

from ..procedural import image, randomise

# A plain block first, then Dilated Reparam Blocks of several sizes, one of them outside of the published table.
TINY = dict(depths=(1, 2, 2, 1), dims=(8, 12, 16, 20), kernel_sizes=((3,), (7, 5), (13, 3), (19,)))
CLASSES = 5


def tiny(**options):
    """A randomised backbone."""
    return randomise(UniRepLKNet(TINY, **options))


def _build(scope, config):
    pytest.importorskip(scope)
    if scope == 'mmseg':
        from mmseg.registry import MODELS
        from mmseg.utils import register_all_modules
    elif scope == 'mmdet':
        from mmdet.registry import MODELS
        from mmdet.utils import register_all_modules
    else:
        from mmpretrain.registry import MODELS
        from mmpretrain.utils import register_all_modules
    register_all_modules(init_default_scope=True)
    return randomise(MODELS.build(ConfigDict(config)))


def segmentor(**backbone):
    """UperNet's parts in small: a decode head on all maps and an auxiliary head."""
    head = dict(type='FCNHead', channels=8, num_convs=1, concat_input=False, num_classes=CLASSES, align_corners=False)
    return _build(
        'mmseg',
        dict(
            type='EncoderDecoder',
            data_preprocessor=dict(type='SegDataPreProcessor', mean=[0.0] * 3, std=[1.0] * 3, size=(64, 64)),
            backbone=dict(type='UniRepLKNet', arch=TINY, **backbone),
            decode_head=dict(
                type='UPerHead', in_channels=TINY['dims'], in_index=(0, 1, 2, 3), pool_scales=(1, 2), channels=8,
                num_classes=CLASSES, align_corners=False, norm_cfg=dict(type='BN'),
            ),
            auxiliary_head=dict(head, in_channels=TINY['dims'][2], in_index=2, norm_cfg=dict(type='BN')),
            test_cfg=dict(mode='whole'),
        ),
    )  # fmt: skip


def detector(**backbone):
    """RetinaNet in small."""
    return _build(
        'mmdet',
        dict(
            type='RetinaNet',
            data_preprocessor=dict(type='DetDataPreprocessor', mean=[0.0] * 3, std=[1.0] * 3, pad_size_divisor=32),
            backbone=dict(type='UniRepLKNet', arch=TINY, **backbone),
            neck=dict(type='FPN', in_channels=list(TINY['dims']), out_channels=8, num_outs=5),
            bbox_head=dict(
                type='RetinaHead', num_classes=CLASSES, in_channels=8, stacked_convs=1, feat_channels=8,
                anchor_generator=dict(
                    type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1, ratios=[1.0],
                    strides=[4, 8, 16, 32, 64],
                ),
                bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
            ),
            test_cfg=dict(
                nms_pre=100, min_bbox_size=0, score_thr=0.01, nms=dict(type='nms', iou_threshold=0.5), max_per_img=20
            ),
        ),
    )  # fmt: skip


def classifier(**backbone):
    """The published classifier as mmpretrain's ImageClassifier."""
    return _build(
        'mmpretrain',
        dict(
            type='ImageClassifier',
            data_preprocessor=dict(mean=[0.0] * 3, std=[1.0] * 3),
            backbone=dict(type='UniRepLKNet', arch=TINY, out_indices=(3,), gap_before_final_norm=True, **backbone),
            head=dict(type='LinearClsHead', num_classes=CLASSES, in_channels=TINY['dims'][3]),
        ),
    )


def blocks(model):
    """All blocks of a backbone, in order."""
    return [block for stage in model.stages for block in stage]


def step(model, x, seed=0):
    """One backward pass of a loss that weights every output differently; the outputs."""
    torch.manual_seed(seed)
    outs = model(x)
    sum((out * image(tuple(out.shape), i)).mean() for i, out in enumerate(outs)).backward()
    return [out.detach() for out in outs]
