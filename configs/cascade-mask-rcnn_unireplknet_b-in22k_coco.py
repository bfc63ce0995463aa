# Cascade Mask R-CNN with UniRepLKNet-B from ImageNet-22K on COCO, 3x. Published AP: 54.8 box, 47.4 mask.
# The published config leaves its starting weights open; ours starts from those of the pre-training on ImageNet-22K.
# Its config averages the weights, its published file holds no average: the published figure may be without.
# One small GPU: --auto-scale-lr; see _base_/schedule_coco-3x.py and docs/detection.md.
_base_ = [
    './_base_/cascade-mask-rcnn_unireplknet.py',
    './_base_/coco_multi-scale.py',
    './_base_/schedule_coco-3x.py',
    './_base_/runtime_coco-ema.py',
]
model = dict(
    backbone=dict(
        arch='b',
        drop_path_rate=0.6,
        init_cfg=dict(type='Pretrained', checkpoint='unireplknet_b_in22k'),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.8, num_layers=12))
