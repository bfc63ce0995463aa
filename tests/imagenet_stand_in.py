"""A few noise images in ImageNet's folders, and a config of ours shrunk to them."""

from pathlib import Path

import mmcv
import numpy as np

CONFIGS = Path(__file__).parents[1] / 'configs'
CLASSES = ('n01440764', 'n01443537', 'n01484850')
ARCH = dict(depths=(1, 1, 2, 1), dims=(8, 16, 32, 64), kernel_sizes=((3,), (7,), (13, 3), (7,)))
TRUNK = dict(
    type='UniRepLKNet', _delete_=True, arch=ARCH, out_indices=(3,), gap_before_final_norm=True, drop_path_rate=0.1
)


def generate(root, train=4, val=2):
    """Write ``train`` and ``val`` images of each class; returns ``root``."""
    rng = np.random.RandomState(0)
    for split, count in (('train', train), ('val', val)):
        for name in CLASSES:
            for i in range(count):
                picture = rng.randint(0, 256, (48, 64, 3), np.uint8)
                mmcv.imwrite(picture, str(Path(root, split, name, f'{name}_{i}.JPEG')))
    return root


def shrunk(file, data, base='unireplknet_a_in1k', **more):
    """Write a config like ``base`` with a small trunk, three classes and the images at ``data``; returns its path."""
    loader = dict(
        batch_size=2,
        num_workers=0,
        persistent_workers=False,
        pin_memory=False,
        dataset=dict(data_root=str(data), metainfo=dict(classes=['one', 'two', 'three'])),
    )
    values = dict(
        model=dict(backbone=TRUNK, head=dict(num_classes=3, in_channels=64)),
        data_preprocessor=dict(num_classes=3),
        **{f'{split}_dataloader': loader for split in ('train', 'val', 'test')},
        val_evaluator=dict(topk=(1,)),
        test_evaluator=dict(topk=(1,)),
        train_cfg=dict(max_epochs=2),
        default_hooks=dict(logger=dict(interval=1)),
    )
    values.update(more)
    lines = [f'_base_ = {str(CONFIGS / base)!r} + ".py"', *(f'{key} = {value!r}' for key, value in values.items())]
    Path(file).write_text('\n'.join(lines))
    return Path(file)
