# Cascade Mask R-CNN with UniRepLKNet-T from ImageNet-1K on COCO, 3x. Published AP: 51.7 box, 44.9 mask.
# Its config averages no weights, its published file holds an average: the published figure may be with.
# One small GPU: --auto-scale-lr; see _base_/schedule_coco-3x.py and docs/detection.md.
_base_ = [
    './_base_/cascade-mask-rcnn_unireplknet.py',
    './_base_/coco_multi-scale.py',
    './_base_/schedule_coco-3x.py',
    './_base_/runtime_coco.py',
]
model = dict(
    backbone=dict(
        arch='t',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='unireplknet_t_in1k'),
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.8, num_layers=12))
