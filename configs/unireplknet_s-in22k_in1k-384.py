# UniRepLKNet-S from ImageNet-22K, fine-tuned on ImageNet-1K at 384 for 30 epochs. Published top-1: 86.4.
# Published on 4 GPUs x 64 x 2 accumulated batches; the head starts at 0.001 of its usual scale.
_base_ = [
    './_base_/unireplknet_cls.py',
    './_base_/imagenet_384.py',
    './_base_/schedule_imagenet_finetune.py',
    './_base_/runtime_cls.py',
]
model = dict(
    backbone=dict(arch='s', drop_path_rate=0.2, init_cfg=dict(type='Pretrained', checkpoint='unireplknet_s_in22k')),
    head=dict(in_channels=768, init_cfg=dict(std=0.02 * 0.001)),
    train_cfg=dict(_delete_=True),
)
