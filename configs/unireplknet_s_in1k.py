# UniRepLKNet-S on ImageNet-1K from scratch, 224, 300 epochs. Published top-1: 83.9.
# Published on 8 GPUs x 64 x 8 accumulated batches.
_base_ = [
    './_base_/unireplknet_cls.py',
    './_base_/imagenet_224.py',
    './_base_/schedule_imagenet_300e.py',
    './_base_/runtime_cls.py',
]
model = dict(
    backbone=dict(arch='s', drop_path_rate=0.4),
    head=dict(in_channels=768),
)
train_dataloader = dict(batch_size=64)
