# The published fine-tuning at 384: global batch 512 = 4 GPUs x 64 x 2, no warm-up, no mixup or cutmix, layer decay.
# The lowest learning rate, 1e-6 of 5e-5, is scaled by the layer decay like the highest: hence a ratio.
_base_ = './schedule_imagenet_300e.py'
optim_wrapper = dict(
    optimizer=dict(lr=5e-5, weight_decay=1e-8),
    accumulative_counts=2,
    paramwise_cfg=dict(decay_rate=0.8, num_layers=12),
)
param_scheduler = [dict(type='CosineAnnealingLR', eta_min_ratio=0.02, begin=0, end=30, convert_to_iter_based=True)]
auto_scale_lr = dict(base_batch_size=512)
train_cfg = dict(max_epochs=30)
