_base_ = './_base_/nuclei_mask-rcnn.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdet.ResNet',
        depth=18,
        out_indices=(0, 1, 2, 3),
        norm_cfg=dict(type='BN'),
        norm_eval=False,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
