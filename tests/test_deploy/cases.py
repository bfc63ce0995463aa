"""Configs and checkpoints of the smallest whole models, and exports of them."""

from __future__ import annotations

import torch
from mmengine.config import Config

from ..test_models.tiny import CLASSES, TINY, classifier, segmentor

NAMES = [f'class {i}' for i in range(CLASSES)]
PALETTE = [[i, 2 * i, 3 * i] for i in range(CLASSES)]
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
FAST = dict(exporter='torchscript', seconds=0)
"""Options of an export of a second or two: torch's newer exporter takes half a minute for the smallest model."""


def segmentor_config(**model):
    """UperNet in small, with the pools of the published one, on images of any size."""
    head = dict(
        type='UPerHead', in_channels=TINY['dims'], in_index=(0, 1, 2, 3), pool_scales=(1, 2, 3, 6), channels=8,
        num_classes=CLASSES, align_corners=False, norm_cfg=dict(type='BN'),
    )  # fmt: skip
    return _config(
        'upernet_tiny.py',
        default_scope='mmseg',
        model=dict(
            type='EncoderDecoder',
            data_preprocessor=dict(type='SegDataPreProcessor', mean=MEAN, std=STD, bgr_to_rgb=True, size=(64, 64)),
            backbone=dict(type='UniRepLKNet', arch=TINY),
            decode_head=head,
            test_cfg=dict(mode='whole'),
            **model,
        ),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(96, 64), keep_ratio=False),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
        dataset='BaseSegDataset',
    )


def classifier_config():
    """mmpretrain's ImageClassifier in small."""
    cfg = _config(
        'classifier_tiny.py',
        default_scope='mmpretrain',
        model=dict(
            type='ImageClassifier',
            backbone=dict(type='UniRepLKNet', arch=TINY, out_indices=(3,), gap_before_final_norm=True),
            head=dict(type='LinearClsHead', num_classes=CLASSES, in_channels=TINY['dims'][3]),
        ),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='ResizeEdge', scale=80, edge='short', backend='pillow', interpolation='bicubic'),
            dict(type='CenterCrop', crop_size=64),
            dict(type='PackInputs'),
        ],
        dataset='CustomDataset',
    )
    cfg.data_preprocessor = dict(mean=MEAN, std=STD, to_rgb=True)
    return cfg


def _config(name, pipeline, dataset, **entries):
    metainfo = dict(classes=NAMES, palette=PALETTE)
    cfg = Config(
        dict(test_dataloader=dict(dataset=dict(type=dataset, metainfo=metainfo, pipeline=pipeline)), **entries)
    )
    object.__setattr__(cfg, '_filename', f'/somewhere/{name}')
    return cfg


def build(cfg):
    """The randomised model of a config."""
    from mmengine.registry import MODELS, init_default_scope

    from ..procedural import randomise

    (classifier if cfg.default_scope == 'mmpretrain' else segmentor)()  # registers the modules of the task
    init_default_scope(cfg.default_scope)
    return randomise(MODELS.build(cfg.model)).eval()


def checkpoint(cfg, file, **meta):
    """A training checkpoint for ``cfg``."""
    meta = dict(dataset_meta=dict(classes=NAMES, palette=PALETTE), **meta)
    torch.save(dict(meta=meta, state_dict=build(cfg).state_dict()), file)
    return file
