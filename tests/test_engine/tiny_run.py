"""A small training in a process of its own, which can be killed at a chosen moment and resumed.

    python tests/test_engine/tiny_run.py WORK_DIR [--by-epoch] [--workers 2] [--kill iter:6] [--resume]

Everything random is in it: augmentation with python, numpy and torch, dropout, validation that draws.
The tests start it with :func:`start` and compare what it leaves with :func:`differences`.
"""

import argparse
import os
import random
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

import mmunireplknet.engine.random_state_hook  # noqa: F401
from mmunireplknet.engine.atomic_checkpoint_hook import latest_checkpoint
from mmunireplknet.engine.launch import leave_process_group

NUM_ITERS = 10
NUM_SAMPLES, BATCH_SIZE = 10, 4  # an epoch of 3 batches; the infinite sampler crosses its end within a batch
NUM_EPOCHS = 4
SAVE_EVERY = 4
COMPARED = ('state_dict', 'optimizer', 'param_schedulers', 'random_state')


def start(work_dir, *args, ranks=1, script=__file__):
    """Start a training (a file or a module) in a process per rank; returns a function that waits for the exit codes."""
    root = Path(__file__).parents[2]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(root), os.environ.get('PYTHONPATH', '')]))
    env.update(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            env.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(probe.getsockname()[1]), WORLD_SIZE=str(ranks))
    Path(work_dir).mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(ranks):
        with open(Path(work_dir) / f'output_{rank}.txt', 'a') as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *([script] if script.endswith('.py') else ['-m', script]), str(work_dir), *args],
                    env=dict(env, RANK=str(rank), LOCAL_RANK=str(rank)),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )

    def wait():
        try:
            return [process.wait(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.kill()

    return wait


def output_of(work_dir):
    return (Path(work_dir) / 'output_0.txt').read_text()


def differences(file_a, file_b):
    """Names of the values that are not bit-equal in two checkpoints."""
    a, b = (torch.load(file, weights_only=False) for file in (file_a, file_b))
    flat_a, flat_b = (dict(flatten({key: c[key] for key in COMPARED})) for c in (a, b))
    assert len(flat_a) > 50
    same = {
        name
        for name in flat_a.keys() & flat_b.keys()
        if (torch.equal(flat_a[name], flat_b[name]) if torch.is_tensor(flat_a[name]) else flat_a[name] == flat_b[name])
    }
    return sorted((flat_a.keys() | flat_b.keys()) - same)


def flatten(tree, name=''):
    if isinstance(tree, dict):
        tree = list(tree.items())
    elif isinstance(tree, (list, tuple)):
        tree = list(enumerate(tree))
    else:
        yield name, tree
        return
    for key, value in tree:
        yield from flatten(value, f'{name}/{key}')


class Samples(Dataset):
    """Images whose augmentation draws from all three generators."""

    metainfo = dict(classes=('a', 'b'))

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, index):
        image = torch.full((3, 8, 8), index / NUM_SAMPLES)
        for _ in range(index % 4):  # how much is drawn depends on the sample
            image[:, random.randrange(8)] += random.gauss(0, 1)
        image += torch.from_numpy(np.random.standard_normal((3, 8, 8)).astype(np.float32))
        return dict(inputs=image + torch.randn(3, 8, 8), label=torch.tensor(index % 2))


class TinyModel(BaseModel):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(288, 2)
        )

    def forward(self, inputs, label, mode='tensor'):
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(self.body(inputs), label))
        return self.body(inputs + torch.randn_like(inputs)).argmax(1)


class Accuracy(BaseMetric):
    default_prefix = 'tiny'

    def process(self, data_batch, data_samples):
        self.results.append((torch.stack(data_samples) == data_batch['label']).float().mean())

    def compute_metrics(self, results):
        return dict(accuracy=float(sum(results) / len(results)) + random.random() + np.random.rand())


class KillHook(Hook):
    """Kills the process: ``iter:N`` before training on batch N, ``write:N``, ``rename:N`` while saving step N.

    - ``write``: the kernel kills it in the middle of the file, through the limit on file sizes.
    - ``rename``: SIGKILL when the content is on the disk and the file has not its name yet.
    """

    priority = 'LOWEST'

    def __init__(self, kill):
        self.moment, number = kill.split(':')
        self.number = int(number)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if self.moment == 'iter' and runner.iter == self.number:
            os.kill(os.getpid(), signal.SIGKILL)

    def before_save_checkpoint(self, runner, checkpoint):
        unit = 'iter' if hasattr(runner.train_loop, 'dataloader_iterator') else 'epoch'
        if checkpoint['meta'][unit] != self.number or 'optimizer' not in checkpoint:
            return
        if self.moment == 'write':
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))
        elif self.moment == 'rename':
            os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


class DrawAtResume(Hook):
    """Something that consumes random numbers when a run starts, and only in a resumed one."""

    def before_train(self, runner):
        if runner.iter > 0:
            torch.rand(3), np.random.rand(5), random.random()


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('work_dir')
    parser.add_argument('--by-epoch', action='store_true')
    parser.add_argument('--workers', type=int, default=0)
    parser.add_argument('--max-keep-ckpts', type=int, default=1)
    parser.add_argument('--kill')
    parser.add_argument('--resume', action='store_true')
    return parser.parse_args()


def build_runner(args):
    hooks = [DrawAtResume(), dict(type='RandomStateHook')]
    if args.kill:
        hooks.append(KillHook(args.kill))
    collate = dict(type='default_collate')
    loader = dict(
        batch_size=BATCH_SIZE, collate_fn=collate, num_workers=args.workers, persistent_workers=args.workers > 0
    )
    if args.by_epoch:
        train_cfg = dict(by_epoch=True, max_epochs=NUM_EPOCHS, val_interval=1)
        sampler, interval = 'DefaultSampler', 1
    else:
        train_cfg = dict(by_epoch=False, max_iters=NUM_ITERS, val_interval=SAVE_EVERY)
        sampler, interval = 'InfiniteSampler', SAVE_EVERY
    torch.manual_seed(0)
    model = TinyModel()
    if dist.is_initialized():
        model = MMDistributedDataParallel(module=model, broadcast_buffers=False)
    return Runner(
        model=model,
        work_dir=args.work_dir,
        train_dataloader=dict(dataset=Samples(), sampler=dict(type=sampler, shuffle=True), **loader),
        val_dataloader=dict(
            dataset=Samples(),
            batch_size=BATCH_SIZE,
            collate_fn=collate,
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        val_evaluator=[Accuracy()],
        val_cfg=dict(),
        train_cfg=train_cfg,
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        param_scheduler=dict(type='PolyLR', by_epoch=args.by_epoch),
        default_hooks=dict(
            checkpoint=dict(
                type='AtomicCheckpointHook',
                by_epoch=args.by_epoch,
                interval=interval,
                max_keep_ckpts=args.max_keep_ckpts,
            )
        ),
        custom_hooks=hooks,
        randomness=dict(seed=3, diff_rank_seed=dist.is_initialized(), deterministic=True),
        load_from=latest_checkpoint(args.work_dir) if args.resume else None,
        resume=args.resume,
        cfg=dict(),
        experiment_name='tiny',
    )


if __name__ == '__main__':
    if 'WORLD_SIZE' in os.environ:  # mmengine's own launchers ask for an accelerator
        dist.init_process_group('gloo')
    torch.set_num_threads(1)
    build_runner(parse_args()).train()
    leave_process_group()
