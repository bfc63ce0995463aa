# Cascade Mask R-CNN with UniRepLKNet-XL from ImageNet-22K on COCO, 3x. Published AP: 56.4 box, 49.0 mask.
# The published config leaves its starting weights open; ours starts from those of the pre-training on ImageNet-22K.
# One small GPU: --auto-scale-lr; see _base_/schedule_coco-3x.py and docs/detection.md.
_base_ = [
    './_base_/cascade-mask-rcnn_unireplknet.py',
    './_base_/coco_multi-scale.py',
    './_base_/schedule_coco-3x.py',
    './_base_/runtime_coco-ema.py',
]
model = dict(
    backbone=dict(
        arch='xl',
        drop_path_rate=0.7,
        init_cfg=dict(type='Pretrained', checkpoint='unireplknet_xl_in22k'),
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.7, num_layers=12))
