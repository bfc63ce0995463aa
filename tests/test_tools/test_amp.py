"""A segmentor, a detector and a classifier, trained and resumed in bfloat16 on the CPU by tools/train.py."""

import json
import math
from statistics import mean

import mmcv
import numpy as np
import pytest
import torch

from mmunireplknet.datasets.digit_scenes import generate

from .. import coco_stand_in, imagenet_stand_in
from .test_command_line import CONFIG, RUNS, run_tool

pytestmark = pytest.mark.slow
FLAGS = ['--amp', 'bf16', '--auto-scale-lr', '--seed', 0]
STEPS = 12


def segmentor(folder):
    """Batches of 2 where the learning rate is for 8."""
    generate(folder / 'scenes', dict(train=2, val=1), size=(64, 64))
    values = dict(
        model=dict(
            data_preprocessor=dict(size=(64, 64)), decode_head=dict(in_channels=list(coco_stand_in.ARCH['dims'])),
            backbone=dict(type='UniRepLKNet', _delete_=True, arch=coco_stand_in.ARCH, layer_scale_init_value=0.5),
        ),
        train_dataloader=dict(batch_size=2, dataset=dict(data_root=str(folder / 'scenes'))),
        val_dataloader=dict(dataset=dict(data_root=str(folder / 'scenes'))),
        param_scheduler=[], train_cfg=dict(max_iters=STEPS, val_interval=100),
        default_hooks=dict(logger=dict(interval=1), checkpoint=dict(interval=STEPS)),
    )  # fmt: skip
    lines = [f'{key} = {value!r}' for key, value in values.items()]
    (folder / 'config.py').write_text('\n'.join([f'_base_ = {str(CONFIG)!r}', *lines]))
    return folder / 'config.py', 'iter', 2e-3 * 2 / 8


def detector(folder):
    pytest.importorskip('mmdet.models')
    data = coco_stand_in.generate(folder / 'coco', train=2)
    more = dict(
        auto_scale_lr=dict(base_batch_size=8), optim_wrapper=dict(optimizer=dict(type='AdamW', lr=8e-3)),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=STEPS, val_interval=100),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=STEPS, by_epoch=False),
            logger=dict(type='LoggerHook', interval=1),
        ),
    )  # fmt: skip
    return coco_stand_in.config(folder / 'config.py', data, **more), 'iter', 8e-3 * 2 / 8


def classifier(folder):
    """Batches of 2, of which two make a step, where the learning rate is for 4096."""
    pytest.importorskip('mmpretrain.models')
    data = imagenet_stand_in.generate(folder / 'imagenet')
    for path in data.glob('train/*/*'):  # noise with nothing to learn becomes a colour (of BGR)
        picture = np.zeros((48, 64, 3), np.uint8)
        picture[..., imagenet_stand_in.CLASSES.index(path.parent.name)] = 255
        mmcv.imwrite(picture, str(path))
    trunk = dict(imagenet_stand_in.TRUNK, layer_scale_init_value=0.5, drop_path_rate=0.0)
    pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 48)), dict(type='PackInputs')]
    dataset = dict(data_root=str(data), metainfo=dict(classes=['blue', 'green', 'red']), pipeline=pipeline)
    more = dict(
        train_dataloader=dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset),
        model=dict(backbone=trunk, head=dict(num_classes=3, in_channels=64), train_cfg=dict(_delete_=True)),
        optim_wrapper=dict(accumulative_counts=2, optimizer=dict(lr=4.0)), train_cfg=dict(max_epochs=STEPS // 6),
        param_scheduler=[], default_hooks=dict(logger=dict(interval=1), checkpoint=dict(save_best=None)),
    )  # fmt: skip
    return imagenet_stand_in.shrunk(folder / 'config.py', data, **more), 'epoch', 4.0 * 4 / 4096


def losses(work_dir):
    """Of every iteration, in the order of the runs."""
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [record['loss'] for record in records if 'loss' in record]


@pytest.mark.parametrize('case', [segmentor, detector, classifier])
def test_training_and_resuming(case, tmp_path):
    config, unit, learning_rate = case(tmp_path)
    run = ['train.py', config, '--work-dir', tmp_path / 'run', *FLAGS]
    assert run_tool(*run, '--cfg-options', f'visualizer.name=amp{next(RUNS)}') is None
    found = losses(tmp_path / 'run')
    assert len(found) == STEPS
    assert all(math.isfinite(loss) for loss in found)
    assert mean(found[-3:]) < 0.9 * mean(found[:3]), found
    assert 'BF16OptimWrapper' in (tmp_path / 'run' / config.name).read_text()

    last = torch.load(tmp_path / 'run' / f'{unit}_{STEPS if unit == "iter" else STEPS // 6}.pth', weights_only=False)
    assert last['optimizer']['param_groups'][-1]['lr'] == pytest.approx(learning_rate)
    assert {v.dtype for v in last['state_dict'].values()} == {torch.float32, torch.int64}
    steps = {int(state['step']) for state in last['optimizer']['state'].values()}
    assert steps == {STEPS // 2 if case is classifier else STEPS}

    end = STEPS + 1 if unit == 'iter' else STEPS // 6 + 1
    more = ['--cfg-options', f'visualizer.name=amp{next(RUNS)}', f'train_cfg.max_{unit}s={end}']
    assert run_tool(*run, '--resume', *more) is None
    assert len(losses(tmp_path / 'run')) == STEPS + (1 if unit == 'iter' else 6)
