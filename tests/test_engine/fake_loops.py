"""The data side of mmengine's train loops, old and new, without the rest of a runner."""

import logging
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from mmengine.dataset import worker_init_fn
from torch.utils.data import DataLoader, Dataset


def draw():
    """Numbers from every generator; an odd number of normal ones leaves a second one in their caches."""
    torch_numbers = torch.cat([torch.rand(3), torch.randn(1)]).tolist()
    return [random.random(), random.gauss(0, 1), *np.random.rand(3), np.random.standard_normal(), *torch_numbers]


def seed(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


class Noise(Dataset):
    """Each item has its index and what the generators gave when it was loaded."""

    loaded = 0

    def __len__(self):
        return 10

    def __getitem__(self, index):
        Noise.loaded += 1
        return torch.tensor([index, *draw()], dtype=torch.float64)


class LegacyIterator:
    """How mmengine 0.10.7 iterates: the loader's iterator exists at once, and there is no ``skip_iter``."""

    def __init__(self, dataloader):
        self._dataloader = dataloader
        self._iterator = iter(dataloader)
        self._epoch = 0

    def __next__(self):
        try:
            return next(self._iterator)
        except StopIteration:
            self._epoch += 1
            self._dataloader.sampler.set_epoch(self._epoch)
            self._iterator = iter(self._dataloader)
            return next(self._iterator)


class IterLoop:
    """What ``IterBasedTrainLoop.run`` of both families does around the data."""

    def __init__(self, sampler, iterator, num_workers=0, done=0, own_seeds=True):
        self.dataset = Noise()
        self.dataloader = DataLoader(
            self.dataset,
            batch_size=4,
            sampler=sampler(self.dataset, shuffle=True, seed=5),
            num_workers=num_workers,
            worker_init_fn=partial(worker_init_fn, num_workers=num_workers, rank=0, seed=5) if own_seeds else None,
        )
        self.dataloader_iterator = iterator(self.dataloader)
        self.done = done

    def skip(self):
        if hasattr(self.dataloader_iterator._inner, 'skip_iter'):
            self.dataloader_iterator.skip_iter(self.done)
        else:
            for _ in range(self.done):
                next(self.dataloader_iterator)

    def train(self):
        """One batch, and the draws of a training step."""
        batch = next(self.dataloader_iterator)
        return [*batch.flatten().tolist(), *draw()]


def fake_runner(loop=None, hooks=(), **kwargs):
    values = dict(iter=0, epoch=0, max_iters=10, max_epochs=3, seed=5, deterministic=False)
    return SimpleNamespace(
        train_loop=loop,
        train_dataloader=getattr(loop, 'dataloader', None),
        hooks=list(hooks),
        logger=logging.getLogger('fake'),
        **dict(values, **kwargs),
    )
