_base_ = './_base_/camvid_upernet.py'
model = dict(
    backbone=dict(
        type='mmpretrain.ConvNeXt',
        arch='atto',
        out_indices=(0, 1, 2, 3),
        layer_scale_init_value=0.5,
        gap_before_final_norm=False,
    ),
    decode_head=dict(in_channels=[40, 80, 160, 320]),
)
