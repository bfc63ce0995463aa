# The demo: UperNet with a small head, trained from scratch on two CPU cores in minutes.
_base_ = ['./digit-scenes.py', './demo_runtime.py']
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(128, 128),
    ),
    decode_head=dict(
        type='UPerHead',
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=64,
        dropout_ratio=0.1,
        num_classes=11,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        # mmseg's std of 0.01 leaves the layers below almost without gradient (docs/benchmarks.md).
        init_cfg=dict(type='Normal', std=0.1, override=dict(name='conv_seg')),
        # Most of the pixels are background.
        loss_decode=dict(type='CrossEntropyLoss', class_weight=[0.5] + [1.0] * 10),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=50, end=1500),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1500, val_interval=300)
auto_scale_lr = dict(enable=False, base_batch_size=8)  # one process; on a GPU raise the batch and use --auto-scale-lr
default_hooks = dict(visualization=dict(type='SegVisualizationHook'))
visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
