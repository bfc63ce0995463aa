"""The published ImageNet recipes, as data that the configs are compared with.

Sources, all of https://github.com/AILab-CVC/UniRepLKNet: the command lines in Image/README.md, the defaults of main.py,
datasets.py and optim_factory.py, and the tables of the README. Where those call timm, its version 0.6.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What a published command line sets, and what the tables say of the result."""

    arch: str
    dim: int  # channels of the last stage
    num_blocks: int
    size: int  # --input_size
    gpus: int
    batch_size: int  # of one GPU
    accumulate: int  # --update_freq
    lr: float
    epochs: int
    warmup: int  # --warmup_epochs
    drop_path: float
    mixup: tuple[float, float] | None  # --mixup, --cutmix
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    head_init_scale: float = 1.0
    smoothing: float = 0.1
    ema: bool = False  # --model_ema true --model_ema_eval true
    top1: str | None = None  # README

    @property
    def kind(self) -> str:
        """Training from scratch, pre-training or fine-tuning."""
        return {300: 'in1k', 90: 'in22k'}.get(self.epochs, '384')


def _finetune(arch: str, dim: int, gpus: int, batch_size: int, top1: str, large: bool) -> Recipe:
    epochs, drop_path, smoothing = (20, 0.3, 0.3) if large else (30, 0.2, 0.1)
    return Recipe(
        arch, dim, 36, 384, gpus, batch_size, 2, 5e-5, epochs, 0, drop_path, None,
        weight_decay=1e-8, layer_decay=0.8, head_init_scale=0.001, smoothing=smoothing, ema=large, top1=top1,
    )  # fmt: skip


RECIPES = {
    'unireplknet_a_in1k': Recipe('a', 320, 12, 224, 4, 128, 8, 4e-3, 300, 20, 0.0, (0.3, 0.3), top1='77.0'),
    'unireplknet_f_in1k': Recipe('f', 384, 12, 224, 4, 128, 8, 4e-3, 300, 20, 0.0, (0.3, 0.3), top1='78.6'),
    'unireplknet_p_in1k': Recipe('p', 512, 12, 224, 4, 128, 8, 4e-3, 300, 20, 0.1, (0.3, 0.3), top1='80.2'),
    'unireplknet_n_in1k': Recipe('n', 640, 14, 224, 4, 128, 8, 4e-3, 300, 20, 0.1, (0.5, 0.5), top1='81.6'),
    'unireplknet_t_in1k': Recipe('t', 640, 27, 224, 4, 128, 8, 4e-3, 300, 20, 0.2, (0.8, 1.0), top1='83.2'),
    'unireplknet_s_in1k': Recipe('s', 768, 36, 224, 8, 64, 8, 4e-3, 300, 20, 0.4, (0.8, 1.0), top1='83.9'),
    # Table 17 of arXiv 2410.08049 prints lr 4e-3 for L and XL too; the command lines say 1e-3.
    'unireplknet_s_in22k': Recipe('s', 768, 36, 224, 16, 32, 8, 4e-3, 90, 5, 0.1, (0.8, 1.0)),
    'unireplknet_b_in22k': Recipe('b', 1024, 36, 224, 16, 32, 8, 4e-3, 90, 5, 0.1, (0.8, 1.0)),
    'unireplknet_l_in22k': Recipe('l', 1536, 36, 192, 16, 64, 4, 1e-3, 90, 5, 0.1, (0.8, 1.0)),
    'unireplknet_xl_in22k': Recipe('xl', 2048, 36, 192, 32, 32, 4, 1e-3, 90, 5, 0.2, (0.8, 1.0)),
    'unireplknet_s-in22k_in1k-384': _finetune('s', 768, 4, 64, '86.4', large=False),
    'unireplknet_b-in22k_in1k-384': _finetune('b', 1024, 4, 64, '87.4', large=False),
    'unireplknet_l-in22k_in1k-384': _finetune('l', 1536, 4, 64, '87.9', large=True),
    'unireplknet_xl-in22k_in1k-384': _finetune('xl', 2048, 8, 32, '88.0', large=True),
}

# Counted with the official code, 1,000 classes: training form, deploy form; the README rounds the latter.
PARAMS = {
    'a': (4_649_060, 4_437_300),
    'f': (6_489_328, 6_235_216),
    'p': (11_080_520, 10_741_704),
    'n': (18_818_880, 18_318_560),
    't': (31_693_420, 31_037_980),
    's': (56_456_704, 55_645_984),
    'b': (99_089_416, 98_008_456),
    'l': (220_076_056, 218_454_616),
    'xl': (388_690_984, 386_529_064),
}

GLOBAL_BATCH = {'in1k': 4096, 'in22k': 4096, '384': 512}
CLASSES = {'in1k': 1000, 'in22k': 21841, '384': 1000}

# Defaults of main.py that hold in every run.
COMMON = {
    'default_scope': 'mmpretrain',
    'model.type': 'ImageClassifier',
    'model.backbone.type': 'UniRepLKNet',
    'model.backbone.out_indices': (3,),
    'model.backbone.gap_before_final_norm': True,
    'model.backbone.norm_cfg': None,  # BN, not synchronised
    'model.backbone.layer_scale_init_value': None,  # the default, 1e-6
    'model.backbone.with_cp': None,
    'model.head.type': 'LinearClsHead',
    'model.head.loss.type': 'LabelSmoothLoss',
    'model.head.loss.mode': 'original',  # timm: 1 - s + s / classes, and s / classes elsewhere
    'data_preprocessor.mean': [123.675, 116.28, 103.53],
    'data_preprocessor.std': [58.395, 57.12, 57.375],
    'data_preprocessor.to_rgb': True,
    'optim_wrapper.type': 'OptimWrapper',  # --use_amp false
    'optim_wrapper.clip_grad': None,
    'optim_wrapper.constructor': 'LayerDecayOptimWrapperConstructor',
    'train_dataloader.sampler': dict(type='DefaultSampler', shuffle=True),
    'train_dataloader.drop_last': True,
    'train_dataloader.num_workers': 10,
    'train_dataloader.pin_memory': True,
    'auto_scale_lr.enable': False,
    'default_hooks.checkpoint.type': 'AtomicCheckpointHook',
    'default_hooks.checkpoint.interval': 1,  # --save_ckpt_freq
    'default_hooks.checkpoint.max_keep_ckpts': 3,  # --save_ckpt_num
    'env_cfg.cudnn_benchmark': True,
}
MIN_LR = 1e-6
MEAN_BGR, STD_BGR = [103.53, 116.28, 123.675], [57.375, 57.12, 58.395]


def train_pipeline(size: int) -> list[dict]:
    """timm's create_transform with auto_augment='rand-m9-mstd0.5-inc1', which leaves the colour jitter of 0.4 out."""
    return [
        dict(type='LoadImageFromFile'),
        dict(type='RandomResizedCrop', scale=size, backend='pillow', interpolation='bicubic'),
        dict(type='RandomFlip', prob=0.5, direction='horizontal'),
        dict(
            type='RandAugment', policies='timm_increasing', num_policies=2, total_level=10, magnitude_level=9,
            magnitude_std=0.5, hparams=dict(pad_val=[round(x) for x in MEAN_BGR], interpolation='bicubic'),
        ),
        dict(
            type='RandomErasing', erase_prob=0.25, mode='rand', min_area_ratio=0.02, max_area_ratio=1 / 3,
            fill_color=MEAN_BGR, fill_std=STD_BGR,
        ),
        dict(type='PackInputs'),
    ]  # fmt: skip


def test_pipeline(size: int) -> list[dict]:
    """datasets.py: the square without cropping from 384 on, else the middle 224 / 256 of the short edge."""
    bicubic = dict(backend='pillow', interpolation='bicubic')
    if size >= 384:
        steps = [dict(type='Resize', scale=size, **bicubic)]
    else:
        edge = int(size / (224 / 256))
        steps = [
            dict(type='ResizeEdge', scale=edge, edge='short', **bicubic),
            dict(type='CenterCrop', crop_size=size),
        ]
    return [dict(type='LoadImageFromFile'), *steps, dict(type='PackInputs')]


test_pipeline.__test__ = False  # not a test, whatever its name


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """cosine_scheduler of utils.py at an optimizer step, of the group with the highest learning rate."""
    from math import cos, pi

    warmup, total = recipe.warmup * steps_per_epoch, recipe.epochs * steps_per_epoch
    if step < warmup:
        return recipe.lr * step / (warmup - 1)
    return MIN_LR + 0.5 * (recipe.lr - MIN_LR) * (1 + cos(pi * (step - warmup) / (total - warmup)))
