# UperNet with UniRepLKNet-XL from ImageNet-22K on ADE20K, crop 640.
# Published mIoU: 55.2 single-scale, 55.6 multi-scale. Its recipe is missing upstream: this follows that of variant L.
# It starts from the weights fine-tuned on ImageNet-1K at 384, like the others.
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
        arch='xl',
        drop_path_rate=0.4,
        with_cp=True,
        init_cfg=dict(type='Pretrained', checkpoint='unireplknet_xl_in22k_in1k-384'),
    ),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.85, num_layers=12))
