_base_ = './_base_/camvid_upernet.py'
model = dict(
    backbone=dict(type='mmseg.ResNet', depth=18, out_indices=(0, 1, 2, 3), norm_cfg=dict(type='BN'), norm_eval=False),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
)
