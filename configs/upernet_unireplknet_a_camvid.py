_base_ = './_base_/camvid_upernet.py'
# From scratch the published layer scale of 1e-6 keeps the blocks shut for most of so short a run.
model = dict(
    backbone=dict(type='UniRepLKNet', arch='a', layer_scale_init_value=0.5),
    decode_head=dict(in_channels=[40, 80, 160, 320]),
)
