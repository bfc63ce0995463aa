# UperNet with UniRepLKNet-S from ImageNet-22K on ADE20K, crop 640. Published mIoU: 52.3 single-scale, 52.7 multi-scale.
# It starts from the weights fine-tuned on ImageNet-1K at 384, as published.
# One small GPU: norm_cfg.type=BN for SyncBN, and --auto-scale-lr; see _base_/upernet_unireplknet.py, schedule_160k.py.
_base_ = [
    './_base_/upernet_unireplknet.py',
    './_base_/ade20k_640.py',
    './_base_/schedule_160k.py',
    './_base_/runtime.py',
]
model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(
        arch='s',
        drop_path_rate=0.3,
        with_cp=True,
        init_cfg=dict(type='Pretrained', checkpoint='unireplknet_s_in22k_in1k-384'),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.9, num_layers=12))
