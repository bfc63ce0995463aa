# The published pre-training: 90 epochs with a warm-up of 5, without evaluation; lr and GPUs differ by variant.
_base_ = './schedule_imagenet_300e.py'
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=5, end=90, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=90)
val_cfg = None
default_hooks = dict(checkpoint=dict(save_best=None))
