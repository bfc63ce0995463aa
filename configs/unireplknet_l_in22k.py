# UniRepLKNet-L: pre-training on ImageNet-22K at 192, 90 epochs. No accuracy is published.
# Published on 16 GPUs x 64 x 4 accumulated batches.
# The learning rate is that of the published command line; Table 17 of arXiv 2410.08049 says 4e-3.
_base_ = [
    './_base_/unireplknet_cls.py',
    './_base_/imagenet22k_192.py',
    './_base_/schedule_imagenet22k_90e.py',
    './_base_/runtime_cls.py',
]
model = dict(backbone=dict(arch='l', drop_path_rate=0.1), head=dict(num_classes=21841, in_channels=1536))
train_dataloader = dict(batch_size=64)
optim_wrapper = dict(optimizer=dict(lr=1e-3), accumulative_counts=4)
