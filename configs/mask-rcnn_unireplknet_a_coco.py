# Mask R-CNN with UniRepLKNet-A from ImageNet-1K on COCO, 1x, for one GPU. Not published, and not trained by us.
# Our choice, not tuned: mmdet's Mask R-CNN with the drop path of this variant's published ImageNet training.
_base_ = [
    './_base_/mask-rcnn_unireplknet.py',
    'mmdet::_base_/datasets/coco_instance.py',
    './_base_/schedule_coco-1x.py',
    './_base_/runtime_coco.py',
]
model = dict(
    backbone=dict(
        arch='a',
        drop_path_rate=0.0,
        init_cfg=dict(type='Pretrained', checkpoint='unireplknet_a_in1k'),
    ),
    neck=dict(in_channels=[40, 80, 160, 320]),
)
train_dataloader = dict(batch_size=4)
