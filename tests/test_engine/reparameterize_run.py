"""A training of a few iterations with a UniRepLKNet, averaged weights, best and rotating checkpoints.

    python -m tests.test_engine.reparameterize_run WORK_DIR

Started like this it is one of several processes, and the third of five conversions goes wrong.
"""

import itertools
import random
import sys
import uuid

import mmengine.runner.runner
import numpy as np
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel, ImgDataPreprocessor, MMDistributedDataParallel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from mmunireplknet import UniRepLKNet
from mmunireplknet.engine import reparameterize
from mmunireplknet.engine.atomic_checkpoint_hook import latest_checkpoint
from mmunireplknet.engine.launch import leave_process_group
from mmunireplknet.models.norms import SyncBatchNorm

from ..procedural import randomise

ARCH = dict(depths=(1, 1, 2, 1), dims=(8, 8, 12, 12), kernel_sizes=((3,), (7,), (9, 3), (5,)))
SIZE = (40, 48)


class Samples(Dataset):
    """Images whose augmentation draws from all three generators."""

    metainfo = dict(classes=('a', 'b'), palette=[[0, 0, 0], [9, 9, 9]])
    drawn = True

    def __len__(self):
        return 8

    def __getitem__(self, index):
        image = torch.full((3, *SIZE), 20 * index, dtype=torch.uint8)
        if self.drawn:
            image += torch.randint(0, 50, image.shape, dtype=torch.uint8)
            image[random.randrange(3), np.random.randint(SIZE[0])] = 255
        return dict(inputs=image, data_samples=torch.tensor(index % 2))


class Fixed(Samples):
    drawn = False


class Segmentor(BaseModel):
    """A backbone and a head with a norm and dropout."""

    def __init__(self, **backbone):
        super().__init__(ImgDataPreprocessor(mean=[100.0] * 3, std=[50.0] * 3, bgr_to_rgb=True))
        self.backbone = UniRepLKNet(**dict(dict(arch=ARCH), **backbone))
        self.head = nn.Sequential(
            SyncBatchNorm(12), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 2)
        )

    def forward(self, inputs, data_samples=None, mode='tensor'):
        weight = self.head[-1].weight
        maps = self.backbone(inputs.to(weight.dtype))
        # Every map takes part: a parameter without gradient stops DDP.
        logits = self.head(maps[-1]) + sum(one.mean() for one in maps)
        if mode == 'loss':
            target = torch.stack(list(data_samples)).to(weight.device)
            return dict(loss=nn.functional.cross_entropy(logits.float(), target))
        return list(logits.float())


class Score(BaseMetric):
    """Says what is next in a list, and keeps the predictions."""

    default_prefix = 'tiny'

    def __init__(self, scores=()):
        super().__init__()
        self.scores = list(scores)
        self.predictions = []

    def process(self, data_batch, data_samples):
        self.results.append(torch.stack(data_samples))

    def compute_metrics(self, results):
        self.predictions.append(torch.cat(results))
        return dict(accuracy=self.scores.pop(0) if self.scores else 0.0)


def make_runner(
    work_dir,
    hook=None,
    iters=6,
    scores=(),
    ema=True,
    dtype=None,
    by_epoch=False,
    checkpoint=None,
    hooks=(),
    resume=False,
    val=True,
    optim=None,
    backbone=None,
):
    """A Runner; ``hook`` are the arguments of ReparameterizeHook, None for a run without it."""
    torch.manual_seed(0)
    model = randomise(Segmentor(**(backbone or {})))
    if dtype is not None:
        model.to(dtype)
    if dist.is_initialized():
        model = MMDistributedDataParallel(module=model, broadcast_buffers=False)
    custom = [dict(type='RandomStateHook'), *hooks]
    if ema:
        custom.append(dict(type='EMAHook', momentum=0.4))
    if hook is not None:
        custom.append(dict(type='ReparameterizeHook', **hook))
    loader = dict(batch_size=4, num_workers=0, collate_fn=dict(type='pseudo_collate'))
    fixed = dict(dataset=Fixed(), sampler=dict(type='DefaultSampler', shuffle=False), **loader)
    train_cfg = dict(by_epoch=True, max_epochs=iters) if by_epoch else dict(by_epoch=False, max_iters=iters)
    sampler = 'DefaultSampler' if by_epoch else 'InfiniteSampler'
    evaluation = dict(val_dataloader=fixed, val_evaluator=[Score(scores)], val_cfg=dict()) if val else {}
    return Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=dict(dataset=Samples(), sampler=dict(type=sampler, shuffle=True), **loader),
        train_cfg=dict(**train_cfg, val_interval=2 if val else 100),
        **evaluation,
        test_dataloader=fixed,
        test_evaluator=[Score()],
        test_cfg=dict(),
        optim_wrapper=dict(
            dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.5, momentum=0.9)), **(optim or {})
        ),
        param_scheduler=dict(type='PolyLR', by_epoch=by_epoch),
        default_hooks=dict(
            checkpoint=dict(
                dict(type='AtomicCheckpointHook', by_epoch=by_epoch, interval=2, max_keep_ckpts=1), **(checkpoint or {})
            )
            if checkpoint is not False
            else None
        ),
        custom_hooks=custom,
        randomness=dict(seed=3, deterministic=True),
        load_from=latest_checkpoint(work_dir) if resume else None,
        resume=resume,
        cfg=Config(dict(experiment='tiny')),
        experiment_name=uuid.uuid4().hex,  # mmengine keeps message hubs by name
    )


def break_folding(patch, only=None):
    """Have the folding forget the bias of a block's last layer, in every conversion or only in one."""
    right, calls = reparameterize.switch_to_deploy, itertools.count(1)

    def wrong(model):
        right(model)
        if only in (None, next(calls)):
            with torch.no_grad():
                model.stages[1][0].pwconv2[0].bias.zero_()

    patch(reparameterize, 'switch_to_deploy', wrong)


if __name__ == '__main__':
    dist.init_process_group('gloo')
    torch.set_num_threads(1)
    mmengine.runner.runner.collect_env = dict  # takes longer than the run
    break_folding(setattr, only=3)
    make_runner(
        sys.argv[1], dict(interval=2), scores=[0.5, 0.4, 0.6], checkpoint=dict(save_best='tiny/accuracy')
    ).train()
    leave_process_group()
