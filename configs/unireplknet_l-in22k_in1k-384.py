# UniRepLKNet-L from ImageNet-22K, fine-tuned on ImageNet-1K at 384 for 20 epochs. Published top-1: 87.9.
# Published on 4 GPUs x 64 x 2 accumulated batches; the head starts at 0.001 of its usual scale.
_base_ = [
    './_base_/unireplknet_cls.py',
    './_base_/imagenet_384.py',
    './_base_/schedule_imagenet_finetune.py',
    './_base_/runtime_cls.py',
]
model = dict(
    backbone=dict(arch='l', drop_path_rate=0.3, init_cfg=dict(type='Pretrained', checkpoint='unireplknet_l_in22k')),
    head=dict(in_channels=1536, loss=dict(label_smooth_val=0.3), init_cfg=dict(std=0.02 * 0.001)),
    train_cfg=dict(_delete_=True),
)
# The averaged weights are what is evaluated and saved. EMAHook counts iterations, timm's ModelEma optimizer steps.
custom_hooks = [
    dict(type='RandomStateHook'),
    dict(type='CheckpointFitHook'),
    dict(type='EMAHook', momentum=1e-4, update_buffers=True, interval=2, priority=49),
]
param_scheduler = [dict(type='CosineAnnealingLR', eta_min_ratio=0.02, begin=0, end=20, convert_to_iter_based=True)]
train_cfg = dict(max_epochs=20)
