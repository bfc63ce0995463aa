# 12 epochs on one GPU with 4 images at a time. Our choice, not tuned: the optimizer of the published recipe without
# its layer decay, and its learning rate for 16 images times the square root of 4 / 16.
_base_ = './schedule_coco-3x.py'
optim_wrapper = dict(optimizer=dict(lr=5e-5), paramwise_cfg=dict(decay_rate=1.0, num_layers=12))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', milestones=[8, 11], gamma=0.1, by_epoch=True, begin=0, end=12),
]
auto_scale_lr = dict(base_batch_size=4)
train_cfg = dict(max_epochs=12)
