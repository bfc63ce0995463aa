# UniRepLKNet-S: pre-training on ImageNet-22K at 224, 90 epochs. No accuracy is published.
# Published on 16 GPUs x 32 x 8 accumulated batches.
_base_ = [
    './_base_/unireplknet_cls.py',
    './_base_/imagenet22k_224.py',
    './_base_/schedule_imagenet22k_90e.py',
    './_base_/runtime_cls.py',
]
model = dict(backbone=dict(arch='s', drop_path_rate=0.1), head=dict(num_classes=21841, in_channels=768))
