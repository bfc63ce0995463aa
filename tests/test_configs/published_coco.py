"""The published Cascade Mask R-CNN recipes on COCO, as data that the configs are compared with.

Sources, all of https://github.com/AILab-CVC/UniRepLKNet at commit b5677d8: the configs under detection/configs, the
tables of the README, and, where those are silent, the defaults of mmdet 2.28.1 and mmcv 1.5.0 that they ran on.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What a published config sets beyond the common settings, and what the README says of its result."""

    arch: str
    dims: tuple[int, int, int, int]  # backbone.dims; also neck.in_channels
    num_blocks: int  # sum of backbone.depths
    drop_path: float  # backbone.drop_path_rate
    decay_rate: float  # optimizer.paramwise_cfg.decay_rate
    ema: bool  # custom_hooks holds ExpMomentumEMAHook
    checkpoint: str  # pre-training that the name tells; the file itself is to be filled in (pretrained = None)
    ap: str  # box / mask
    params: float  # millions
    flops: float  # 10^9 multiply-adds at 1280 x 800


RECIPES = {
    'cascade-mask-rcnn_unireplknet_t_coco': Recipe(
        't', (80, 160, 320, 640), 27, 0.3, 0.8, False, 'unireplknet_t_in1k_224_acc83.21.pth', '51.7 / 44.9', 89, 749
    ),
    'cascade-mask-rcnn_unireplknet_s_coco': Recipe(
        's', (96, 192, 384, 768), 36, 0.5, 0.8, False, 'unireplknet_s_in1k_224_acc83.91.pth', '53.0 / 45.9', 113, 835
    ),
    'cascade-mask-rcnn_unireplknet_s-in22k_coco': Recipe(
        's', (96, 192, 384, 768), 36, 0.5, 0.8, True, 'unireplknet_s_in22k_pretrain.pth', '54.3 / 47.1', 113, 835
    ),
    'cascade-mask-rcnn_unireplknet_b-in22k_coco': Recipe(
        'b', (128, 256, 512, 1024), 36, 0.6, 0.8, True, 'unireplknet_b_in22k_pretrain.pth', '54.8 / 47.4', 155, 978
    ),
    'cascade-mask-rcnn_unireplknet_l-in22k_coco': Recipe(
        'l', (192, 384, 768, 1536), 36, 0.7, 0.7, True, 'unireplknet_l_in22k_pretrain.pth', '55.8 / 48.4', 276, 1385
    ),
    'cascade-mask-rcnn_unireplknet_xl-in22k_coco': Recipe(
        'xl', (256, 512, 1024, 2048), 36, 0.7, 0.7, True, 'unireplknet_xl_in22k_pretrain.pth', '56.4 / 49.0', 443, 1952
    ),
}

# optimizer, optimizer_config, runner, checkpoint_config, evaluation, log_config and data of every config.
COMMON = {
    'optim_wrapper.type': 'OptimWrapper',  # no fp16, no accumulation
    'optim_wrapper.constructor': 'LayerDecayOptimWrapperConstructor',
    'optim_wrapper.optimizer': dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    'optim_wrapper.clip_grad': None,
    'train_cfg': dict(type='EpochBasedTrainLoop', max_epochs=36, val_interval=1),
    'train_dataloader.batch_size': 2,
    'train_dataloader.num_workers': 2,
    'train_dataloader.sampler': dict(type='DefaultSampler', shuffle=True),
    'train_dataloader.dataset.type': 'CocoDataset',
    'train_dataloader.dataset.ann_file': 'annotations/instances_train2017.json',
    'train_dataloader.dataset.data_prefix.img': 'train2017/',
    'train_dataloader.dataset.filter_cfg': dict(filter_empty_gt=True, min_size=32),  # CocoDataset of mmdet 2
    'auto_scale_lr.base_batch_size': 16,  # 8 GPUs x 2 images
    'auto_scale_lr.enable': False,
    'default_hooks.checkpoint.type': 'AtomicCheckpointHook',
    'default_hooks.checkpoint.interval': 1,
    'default_hooks.checkpoint.by_epoch': None,  # not set: by epoch
    'default_hooks.checkpoint.max_keep_ckpts': 5,
    'default_hooks.checkpoint.save_last': True,
    'default_hooks.checkpoint.save_best': 'coco/bbox_mAP',  # 'auto': the first key, which was bbox_mAP in mmdet 2
    'default_hooks.logger.interval': 50,
    'env_cfg.cudnn_benchmark': False,
    **{
        f'{split}_{key}': value
        for split in ('val', 'test')
        for key, value in {
            'dataloader.batch_size': 1,
            'dataloader.dataset.ann_file': 'annotations/instances_val2017.json',
            'dataloader.dataset.data_prefix.img': 'val2017/',
            'evaluator.type': 'CocoMetric',
            'evaluator.metric': ['bbox', 'segm'],
            'evaluator.classwise': True,
        }.items()
    },
}

# lr_config: warm-up, then steps.
SCHEDULE = dict(warmup_iters=500, warmup_ratio=1e-3, steps=(27, 33), gamma=0.1)

# custom_hooks of the configs with EMA: ExpMomentumEMAHook, momentum=0.0001, priority=49, and by mmdet 2.28.1's
# default total_iter=2000, skip_buffers=False.
EMA = dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=1e-4, gamma=2000, update_buffers=True, priority=49)

# detection/configs/_base_/models/cascade_mask_rcnn_r50_fpn.py with what every config replaces.
MODEL = {
    'type': 'CascadeRCNN',
    'data_preprocessor.type': 'DetDataPreprocessor',
    'data_preprocessor.mean': [123.675, 116.28, 103.53],
    'data_preprocessor.std': [58.395, 57.12, 57.375],
    'data_preprocessor.bgr_to_rgb': True,
    'data_preprocessor.pad_mask': True,
    'data_preprocessor.pad_size_divisor': 32,
    'backbone.type': 'UniRepLKNet',
    'backbone.out_indices': (0, 1, 2, 3),
    'backbone.norm_cfg.type': 'SyncBN',
    'backbone.with_cp': True,
    'backbone.frozen_stages': None,  # not set: nothing is frozen
    'backbone.norm_eval': None,
    'backbone.init_cfg.type': 'Pretrained',
    'neck.type': 'FPN',
    'neck.out_channels': 256,
    'neck.num_outs': 5,
    'neck.add_extra_convs': None,  # not set: P6 is subsampled
    'rpn_head.type': 'RPNHead',
    'rpn_head.in_channels': 256,
    'rpn_head.feat_channels': 256,
    'rpn_head.anchor_generator.type': 'AnchorGenerator',
    'rpn_head.anchor_generator.scales': [8],
    'rpn_head.anchor_generator.ratios': [0.5, 1.0, 2.0],
    'rpn_head.anchor_generator.strides': [4, 8, 16, 32, 64],
    'rpn_head.bbox_coder.target_stds': [1.0, 1.0, 1.0, 1.0],
    'rpn_head.loss_cls': dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
    'rpn_head.loss_bbox': dict(type='SmoothL1Loss', beta=1 / 9, loss_weight=1.0),
    'roi_head.type': 'CascadeRoIHead',
    'roi_head.num_stages': 3,
    'roi_head.stage_loss_weights': [1, 0.5, 0.25],
    'roi_head.bbox_roi_extractor.roi_layer': dict(type='RoIAlign', output_size=7, sampling_ratio=0),
    'roi_head.bbox_roi_extractor.out_channels': 256,
    'roi_head.bbox_roi_extractor.featmap_strides': [4, 8, 16, 32],
    'roi_head.mask_roi_extractor.roi_layer': dict(type='RoIAlign', output_size=14, sampling_ratio=0),
    'roi_head.mask_roi_extractor.out_channels': 256,
    'roi_head.mask_roi_extractor.featmap_strides': [4, 8, 16, 32],
    'roi_head.bbox_head': [
        dict(
            type='ConvFCBBoxHead',
            num_shared_convs=4,
            num_shared_fcs=1,
            in_channels=256,
            conv_out_channels=256,
            fc_out_channels=1024,
            roi_feat_size=7,
            num_classes=80,
            bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=target_stds),
            reg_class_agnostic=False,
            reg_decoded_bbox=True,
            norm_cfg=dict(type='SyncBN', requires_grad=True),
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type='GIoULoss', loss_weight=10.0),
        )
        for target_stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
    ],
    'roi_head.mask_head': dict(  # one a stage
        type='FCNMaskHead',
        num_convs=4,
        in_channels=256,
        conv_out_channels=256,
        num_classes=80,
        loss_mask=dict(type='CrossEntropyLoss', use_mask=True, loss_weight=1.0),
    ),
    'train_cfg.rpn.assigner.type': 'MaxIoUAssigner',
    'train_cfg.rpn.assigner.pos_iou_thr': 0.7,
    'train_cfg.rpn.assigner.neg_iou_thr': 0.3,
    'train_cfg.rpn.assigner.min_pos_iou': 0.3,
    'train_cfg.rpn.sampler.num': 256,
    'train_cfg.rpn.sampler.pos_fraction': 0.5,
    'train_cfg.rpn.allowed_border': 0,
    'train_cfg.rpn_proposal': dict(
        nms_pre=2000, max_per_img=2000, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0
    ),
    'test_cfg.rpn': dict(nms_pre=1000, max_per_img=1000, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0),
    'test_cfg.rcnn': dict(
        score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=100, mask_thr_binary=0.5
    ),
}

# train_cfg.rcnn: assigner and sampler of the three stages.
RCNN_IOU_THRESHOLDS = (0.5, 0.6, 0.7)
RCNN_SAMPLER = dict(type='RandomSampler', num=512, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True)

SIZES = [(480, 1333), (512, 1333), (544, 1333), (576, 1333), (608, 1333), (640, 1333),
         (672, 1333), (704, 1333), (736, 1333), (768, 1333), (800, 1333)]  # fmt: skip

# AutoAugment of mmdet 2 chooses one of its policies as RandomChoice does; Resize with multiscale_mode='value' is
# RandomChoiceResize. Normalisation and padding to multiples of 32 follow in the data preprocessor.
TRAIN_PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandomChoice',
        transforms=[
            [dict(type='RandomChoiceResize', scales=SIZES, keep_ratio=True)],
            [
                dict(type='RandomChoiceResize', scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True),
                dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600), allow_negative_crop=True),
                dict(type='RandomChoiceResize', scales=SIZES, keep_ratio=True),
            ],
        ],
    ),
    dict(type='PackDetInputs'),
]
TEST_SCALE = (1333, 800)  # one scale, no flip
