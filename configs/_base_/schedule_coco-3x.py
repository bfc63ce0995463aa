# The published schedule of detection: 36 epochs of 8 GPUs x 2 images.
# One small GPU: the batch is 2 instead of 16, so train with --auto-scale-lr (or auto_scale_lr.enable=True), which
# multiplies the learning rate by batch / 16, here to 1.25e-5; and expect another result than the published one.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(decay_rate=0.8, num_layers=12),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', milestones=[27, 33], gamma=0.1, by_epoch=True, begin=0, end=36),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=36, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
