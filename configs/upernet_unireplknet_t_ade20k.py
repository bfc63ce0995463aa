# UperNet with UniRepLKNet-T from ImageNet-1K on ADE20K, crop 512. Published mIoU: 48.6 single-scale, 49.1 multi-scale.
# The layer decay is off, as published; its authors saw almost no difference between 0.9 and 1.
# One small GPU: norm_cfg.type=BN for SyncBN, and --auto-scale-lr; see _base_/upernet_unireplknet.py, schedule_160k.py.
_base_ = [
    './_base_/upernet_unireplknet.py',
    './_base_/ade20k_512.py',
    './_base_/schedule_160k.py',
    './_base_/runtime.py',
]
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        arch='t',
        drop_path_rate=0.2,
        with_cp=False,
        init_cfg=dict(type='Pretrained', checkpoint='unireplknet_t_in1k'),
    ),
    decode_head=dict(in_channels=[80, 160, 320, 640]),
    auxiliary_head=dict(in_channels=320),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=1.0, num_layers=9))
