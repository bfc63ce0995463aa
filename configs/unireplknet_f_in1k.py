# UniRepLKNet-F on ImageNet-1K from scratch, 224, 300 epochs. Published top-1: 78.6.
# Published on 4 GPUs x 128 x 8 accumulated batches.
_base_ = [
    './_base_/unireplknet_cls.py',
    './_base_/imagenet_224.py',
    './_base_/schedule_imagenet_300e.py',
    './_base_/runtime_cls.py',
]
model = dict(
    backbone=dict(arch='f', drop_path_rate=0.0),
    head=dict(in_channels=384),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.3), dict(type='CutMix', alpha=0.3)]),
)
