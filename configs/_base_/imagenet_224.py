# ImageNet-1K at 224. mmpretrain's Swin pipeline is the published one: RandAugment rand-m9-mstd0.5-inc1, erasing by
# random pixels with probability 0.25, bicubic, crop ratio 0.875 in tests. The colour jitter of 0.4 in the published
# command line is without effect: timm leaves it out where there is an auto-augment policy.
# One small GPU: batch_size=64 with optim_wrapper.accumulative_counts=64 is the same global batch.
_base_ = 'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py'
train_dataloader = dict(batch_size=128, num_workers=10, persistent_workers=True, pin_memory=True, drop_last=True)
val_dataloader = dict(batch_size=128, persistent_workers=True, pin_memory=True)
test_dataloader = val_dataloader
