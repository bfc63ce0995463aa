"""The published UperNet recipes on ADE20K, as data that the configs are compared with.

Sources, all of https://github.com/AILab-CVC/UniRepLKNet at commit b5677d8: the configs under segmentation/configs, the
tables of the README, and, where those are silent, the defaults of mmseg 0.27.0 and mmcv 1.5.0 that they ran on.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What a published config sets beyond the common settings."""

    arch: str
    dims: tuple[int, int, int, int]  # backbone.dims; also in_channels of both heads
    num_blocks: int  # sum of backbone.depths
    crop: int  # crop_size; the images are resized to (4 * crop, crop) before
    drop_path: float  # backbone.drop_path_rate
    with_cp: bool  # backbone.with_cp
    decay_rate: float  # optimizer.paramwise_cfg.decay_rate
    num_layers: int  # optimizer.paramwise_cfg.num_layers
    checkpoint: str  # file that the config initialises the backbone from
    params: float  # millions, deploy form without auxiliary head; the README prints them rounded
    miou: str  # README: single-scale / multi-scale


# One row per config of segmentation/configs; the decay of T is off, with a comment on 0.9.
RECIPES = {
    'upernet_unireplknet_t_ade20k': Recipe(
        't', (80, 160, 320, 640), 27, 512, 0.2, False, 1.0, 9,
        'unireplknet_t_in1k_224_acc83.21.pth', 60.99, '48.6 / 49.1',
    ),
    'upernet_unireplknet_s_ade20k': Recipe(
        's', (96, 192, 384, 768), 36, 512, 0.3, True, 0.9, 12,
        'unireplknet_s_in1k_224_acc83.91.pth', 86.38, '50.5 / 51.0',
    ),
    'upernet_unireplknet_s-in22k_ade20k-512': Recipe(
        's', (96, 192, 384, 768), 36, 512, 0.3, True, 0.9, 12,
        'unireplknet_s_in22k_to_in1k_384_acc86.44.pth', 86.38, '51.9 / 52.7',
    ),
    'upernet_unireplknet_s-in22k_ade20k-640': Recipe(
        's', (96, 192, 384, 768), 36, 640, 0.3, True, 0.9, 12,
        'unireplknet_s_in22k_to_in1k_384_acc86.44.pth', 86.38, '52.3 / 52.7',
    ),
    'upernet_unireplknet_b-in22k_ade20k-640': Recipe(
        'b', (128, 256, 512, 1024), 36, 640, 0.3, True, 0.9, 12,
        'unireplknet_b_in22k_to_in1k_384_acc87.40.pth', 130.30, '53.5 / 53.9',
    ),
    'upernet_unireplknet_l-in22k_ade20k-640': Recipe(
        'l', (192, 384, 768, 1536), 36, 640, 0.4, True, 0.85, 12,
        'unireplknet_l_in22k_to_in1k_384_acc87.88.pth', 253.87, '54.5 / 55.0',
    ),
    # Weights and results are published, the config is not: the row of L with the shape and the file of XL.
    'upernet_unireplknet_xl-in22k_ade20k-640': Recipe(
        'xl', (256, 512, 1024, 2048), 36, 640, 0.4, True, 0.85, 12,
        'unireplknet_xl_in22k_to_in1k_384_acc87.96.pth', 425.07, '55.2 / 55.6',
    ),
}  # fmt: skip

# README, table "UperNet on ADE20K", column params.
PARAMS_IN_README = {'t': '61M', 's': '86M', 'b': '130M', 'l': '254M', 'xl': '425M'}

# optimizer, lr_config, runner, checkpoint_config, evaluation, log_config, data and cudnn_benchmark of every config.
COMMON = {
    'optim_wrapper.type': 'OptimWrapper',  # no fp16, no clipping, no accumulation
    'optim_wrapper.constructor': 'LayerDecayOptimWrapperConstructor',
    'optim_wrapper.optimizer': dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    'optim_wrapper.clip_grad': None,
    'train_cfg': dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=4000),
    'train_dataloader.batch_size': 2,
    'auto_scale_lr.base_batch_size': 16,  # 8 GPUs x 2 images
    'auto_scale_lr.enable': False,
    'default_hooks.checkpoint.interval': 4000,
    'default_hooks.checkpoint.by_epoch': False,
    'default_hooks.checkpoint.max_keep_ckpts': 20,
    'default_hooks.checkpoint.save_best': 'mIoU',
    'default_hooks.logger.interval': 50,
    'custom_hooks': [dict(type='RandomStateHook')],
    'env_cfg.cudnn_benchmark': True,
    'test_evaluator': dict(type='IoUMetric', iou_metrics=['mIoU']),
}

# lr_config, for the formula of mmcv 1.5.0's PolyLrUpdaterHook with a linear warm-up.
SCHEDULE = dict(power=1.0, min_lr=0.0, warmup_iters=1500, warmup_ratio=1e-6, max_iters=160000)

# segmentation/configs/_base_/models: UperNet with SyncBN everywhere, whole-image testing.
MODEL = {
    'type': 'EncoderDecoder',
    'data_preprocessor.type': 'SegDataPreProcessor',
    'data_preprocessor.mean': [123.675, 116.28, 103.53],
    'data_preprocessor.std': [58.395, 57.12, 57.375],
    'data_preprocessor.bgr_to_rgb': True,
    'data_preprocessor.pad_val': 0,
    'data_preprocessor.seg_pad_val': 255,
    'backbone.type': 'UniRepLKNet',
    'backbone.out_indices': (0, 1, 2, 3),
    'backbone.norm_cfg.type': 'SyncBN',
    'backbone.frozen_stages': None,  # not set: nothing is frozen
    'backbone.norm_eval': None,
    'decode_head.type': 'UPerHead',
    'decode_head.in_index': [0, 1, 2, 3],
    'decode_head.pool_scales': (1, 2, 3, 6),
    'decode_head.channels': 512,
    'decode_head.dropout_ratio': 0.1,
    'decode_head.num_classes': 150,
    'decode_head.norm_cfg.type': 'SyncBN',
    'decode_head.align_corners': False,
    'decode_head.loss_decode': dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    'auxiliary_head.type': 'FCNHead',
    'auxiliary_head.in_index': 2,
    'auxiliary_head.channels': 256,
    'auxiliary_head.num_convs': 1,
    'auxiliary_head.concat_input': False,
    'auxiliary_head.dropout_ratio': 0.1,
    'auxiliary_head.num_classes': 150,
    'auxiliary_head.norm_cfg.type': 'SyncBN',
    'auxiliary_head.align_corners': False,
    'auxiliary_head.loss_decode': dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4),
    'test_cfg': dict(mode='whole'),
}

# test.py --aug-test sets these for every config, and a flip.
TTA_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def train_pipeline(crop: int) -> list[dict]:
    """Pipeline of training. Normalisation and padding to the crop follow in the data preprocessor."""
    return [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', reduce_zero_label=True),
        dict(type='RandomResize', scale=(4 * crop, crop), ratio_range=(0.5, 2.0), keep_ratio=True),
        dict(type='RandomCrop', crop_size=(crop, crop), cat_max_ratio=0.75),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PhotoMetricDistortion'),
        dict(type='PackSegInputs'),
    ]


def test_pipeline(crop: int) -> list[dict]:
    """Pipeline of testing: keep-ratio resize, then to multiples of 32; the truth is loaded behind it, unscaled."""
    return [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(4 * crop, crop), keep_ratio=True),
        dict(type='ResizeToMultiple', size_divisor=32),
        dict(type='LoadAnnotations', reduce_zero_label=True),
        dict(type='PackSegInputs'),
    ]


test_pipeline.__test__ = False  # not a test, whatever its name
