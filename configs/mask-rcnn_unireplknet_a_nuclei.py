_base_ = './_base_/nuclei_mask-rcnn.py'
# From scratch the published layer scale of 1e-6 keeps the blocks shut for most of so short a run.
model = dict(
    backbone=dict(_delete_=True, type='UniRepLKNet', arch='a', layer_scale_init_value=0.5),
    neck=dict(in_channels=[40, 80, 160, 320]),
)
