# The detection demo: Mask R-CNN with small pyramid and heads, ten digits, from scratch on two CPU cores in minutes.
_base_ = ['./_base_/demo_mask-rcnn.py', './_base_/digit-scenes_det.py']
# From scratch the published layer scale of 1e-6 keeps the blocks shut for most of so short a run.
model = dict(
    backbone=dict(_delete_=True, type='UniRepLKNet', arch='a', layer_scale_init_value=0.5),
    neck=dict(in_channels=[40, 80, 160, 320]),
    roi_head=dict(bbox_head=dict(num_classes=10), mask_head=dict(num_classes=10)),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=50, end=800),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=800, val_interval=200)
auto_scale_lr = dict(enable=False, base_batch_size=8)
