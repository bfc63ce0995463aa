"""Random number states in the checkpoint: a resumed run continues as if it had never stopped.

A checkpoint of mmengine holds the weights, the optimizer, the schedules and the seed, but not how far
the random number generators have come. A resumed run therefore repeats the augmentations and dropout
masks of the run's beginning and ends with other weights than the undisturbed run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any, Literal, cast

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

__all__ = ['RandomStateHook', 'capture_random_state', 'restore_random_state']

CHECKPOINT_KEY = 'random_state'
SECONDS_BETWEEN_REPORTS = 10

RandomState = dict[str, Any]


def capture_random_state() -> RandomState:
    """Read the states of the generators of python, numpy, torch (CPU) and all CUDA devices.

    Returns:
        Tensors, numbers and tuples only, so that ``torch.load(weights_only=True)`` accepts them.
    """
    version, internal, next_gauss = random.getstate()
    _, key, position, has_gauss, cached_gauss = cast(tuple[Any, ...], np.random.get_state())
    return dict(
        python=(version, torch.tensor(internal), next_gauss),
        numpy=(torch.from_numpy(key.astype(np.int64)), int(position), int(has_gauss), float(cached_gauss)),
        torch=torch.get_rng_state(),
        # Where CUDA is unused, asking for its state would start it.
        cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    )


def restore_random_state(state: RandomState) -> None:
    """Put the generators into the state that :func:`capture_random_state` has read.

    Args:
        state: The captured state; its tensors may be on any device. The states of CUDA devices that
            are not there are left out.
    """
    version, internal, next_gauss = state['python']
    random.setstate((version, tuple(internal.tolist()), next_gauss))
    key, position, has_gauss, cached_gauss = state['numpy']
    np.random.set_state(('MT19937', key.cpu().numpy().astype(np.uint32), position, has_gauss, cached_gauss))
    torch.set_rng_state(state['torch'].cpu())
    if state['cuda'] and torch.cuda.is_available():
        devices: list[Tensor] = state['cuda'][: torch.cuda.device_count()]
        torch.cuda.set_rng_state_all([device.cpu() for device in devices])


@HOOKS.register_module()
class RandomStateHook(Hook):
    """Saves the random states of every rank in each checkpoint and restores them on resume.

    With it a resumed run is bit-equal to the undisturbed one, as far as the operations are
    deterministic (``randomness=dict(seed=..., deterministic=True)``) and the sampler shuffles with a
    generator of its own (all of mmengine's do). Validation leaves no trace in the states: the
    validation that follows a checkpoint is not repeated on resume.

    Workers of the data loader have generators of their own, whose states nobody can ask for. Where
    they outlive the checkpoint (``IterBasedTrainLoop``, or ``persistent_workers``), the only way to get
    them there is to run the data pipeline again over everything before the checkpoint.

    Args:
        replay: Whether to run the data pipeline again up to the checkpoint where workers need that.
            ``'auto'`` does it if ``randomness.deterministic`` is set. Without it, resuming is quick,
            the order of the samples is the same, and the augmentations differ. With ``True``, an
            ``IterBasedTrainLoop`` without workers does it too: for pipelines that remember samples.

    Examples:
        >>> custom_hooks = [dict(type='RandomStateHook')]
    """

    # As late as possible, but before CheckpointHook (VERY_LOW, 90): only rank 0 takes part in saving.
    priority = 89

    def __init__(self, replay: bool | Literal['auto'] = 'auto') -> None:
        if replay not in (True, False, 'auto'):
            raise ValueError(f"replay must be True, False or 'auto', but got {replay!r}")
        self.replay = replay
        self._loaded: dict[str, Any] | None = None
        self._seeds: tuple[int | None, int | None] | None = None  # of the loaded checkpoint, of this run
        self._start: RandomState | None = None  # before the first batch of the whole run
        self._before_val: RandomState | None = None
        self._states: list[dict[str, RandomState | None]] | None = None  # of all ranks, for the next save
        self._training = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Keep the states; only ``before_train`` can tell resuming from loading weights.

        Args:
            runner: The runner of the training process.
            checkpoint: The loaded checkpoint.
        """
        self._loaded = checkpoint.get(CHECKPOINT_KEY)
        # mmengine adopts the seed of the checkpoint, but only after it has built the data loader.
        self._seeds = (checkpoint.get('meta', {}).get('seed'), runner.seed)

    def before_train(self, runner: Runner) -> None:
        """Restore the states of a resumed run, or arrange for it at its first batch.

        Args:
            runner: The runner of the training process.
        """
        self._training = True
        self._states = None
        seeds, self._seeds = self._seeds, None
        if seeds is None or (runner.iter == 0 and runner.epoch == 0):
            return
        own = self._state_of_this_rank(runner, *seeds)
        self._loaded = None
        if own is None:
            return
        self._start = own['start']
        loop = runner.train_loop
        if hasattr(loop, 'dataloader_iterator'):
            loop.dataloader_iterator = _ResumedIterator(runner, own, self._replays(runner))
            return
        loader = runner.train_dataloader
        if runner.iter != runner.epoch * len(loader):
            runner.logger.warning(
                'The checkpoint was saved within an epoch, which mmengine starts anew: the run differs from an '
                'undisturbed one. Save by epoch (CheckpointHook, by_epoch=True) to resume exactly.'
            )
        if loader.num_workers > 0 and loader.persistent_workers:
            if self._replays(runner):
                _replay_epochs(runner, own['start'])
            else:
                _tell_about_workers(runner)
        restore_random_state(own['current'])
        runner.logger.info(f'The random states of epoch {runner.epoch} are restored')

    def before_train_epoch(self, runner: Runner) -> None:
        """Note the states before the first batch: those that a replay starts from.

        Args:
            runner: The runner of the training process.
        """
        if self._start is None:
            self._start = capture_random_state()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Forget collected states: they are of the past from here on.

        Args:
            runner: The runner of the training process.
            batch_idx: Index of the batch.
            data_batch: The batch.
        """
        self._states = None

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Collect the states of all ranks if a checkpoint is saved now.

        Args:
            runner: The runner of the training process.
            batch_idx: Index of the batch.
            data_batch: The batch.
            outputs: What the model returned.
        """
        for hook in _checkpoint_hooks(runner, by_epoch=False):
            if hook.every_n_train_iters(runner, hook.interval, hook.save_begin) or (
                hook.save_last and hook.is_last_train_iter(runner)
            ):
                self._collect(capture_random_state())
                return

    def after_train_epoch(self, runner: Runner) -> None:
        """Collect the states of all ranks if a checkpoint is saved now.

        Args:
            runner: The runner of the training process.
        """
        for hook in _checkpoint_hooks(runner, by_epoch=True):
            if hook.every_n_epochs(runner, hook.interval, hook.save_begin) or (
                hook.save_last and hook.is_last_train_epoch(runner)
            ):
                self._collect(capture_random_state())
                return

    def before_val(self, runner: Runner) -> None:
        """Note the states, for ``after_val`` and for a best checkpoint.

        Args:
            runner: The runner of the validation process.
        """
        self._before_val = capture_random_state()
        if self._training:
            self._collect(self._before_val)

    def after_val(self, runner: Runner) -> None:
        """Undo what validation did to the states.

        Args:
            runner: The runner of the validation process.
        """
        if self._before_val is not None:
            restore_random_state(self._before_val)
            self._before_val = None

    def after_train(self, runner: Runner) -> None:
        """Note that a validation from now on is not part of a training.

        Args:
            runner: The runner of the training process.
        """
        self._training = False

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Add the states of all ranks to the checkpoint (called on rank 0 only).

        Args:
            runner: The runner of the training process.
            checkpoint: The checkpoint that is about to be written.
        """
        states = self._states
        if states is None and get_world_size() == 1:
            states = [dict(start=self._start, current=capture_random_state())]
        if states is None:
            runner.logger.warning(
                'This checkpoint gets no random states, since it is not saved by a CheckpointHook that runs '
                'after RandomStateHook: there is no moment to collect them from all ranks.'
            )
            return
        checkpoint[CHECKPOINT_KEY] = dict(world_size=len(states), ranks=states)

    def _collect(self, current: RandomState) -> None:
        states = all_gather_object(dict(start=self._start, current=current))
        self._states = states if is_main_process() else None

    def _state_of_this_rank(
        self, runner: Runner, saved_seed: int | None, seed: int | None
    ) -> dict[str, RandomState] | None:
        """What the loaded checkpoint holds for this rank; None, and a warning, if that is of no use."""
        if self._loaded is None:
            runner.logger.warning(
                'The checkpoint holds no random states (it was saved without RandomStateHook): the resumed '
                'run differs from an undisturbed one in augmentation, dropout and drop path.'
            )
            return None
        if self._loaded['world_size'] != get_world_size():
            runner.logger.warning(
                f'The checkpoint was saved by {self._loaded["world_size"]} processes and is resumed by '
                f'{get_world_size()}: its random states are not restored.'
            )
            return None
        if saved_seed != seed and is_main_process():  # with diff_rank_seed the other ranks have other seeds
            runner.logger.warning(
                f'The checkpoint was saved by a run with seed {saved_seed}, but the data loader was built '
                f'with seed {seed}: the order of the samples differs from an undisturbed run. '
                f'Set randomness=dict(seed={saved_seed}).'
            )
        return self._loaded['ranks'][get_rank()]

    def _replays(self, runner: Runner) -> bool:
        if self.replay == 'auto':
            return runner.deterministic and runner.train_dataloader.num_workers > 0
        return bool(self.replay)


class _ResumedIterator:
    """Stands in for the iterator of ``IterBasedTrainLoop`` until a resumed run asks for its first batch.

    Before that, the loop moves its iterator on to the checkpoint: mmengine 0.10.7 calls ``next`` once
    per batch, the maintained fork calls ``skip_iter``. Both are only noted here. The first ``next``
    after them moves the real iterator, restores the states and puts the real iterator back.
    """

    def __init__(self, runner: Runner, state: dict[str, RandomState], replay: bool) -> None:
        self._runner = runner
        self._state = state
        self._replay = replay
        self._inner = runner.train_loop.dataloader_iterator
        self._passes = 0 if hasattr(self._inner, 'skip_iter') else runner.iter
        self._num_batches = self._passes

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._passes > 0:
            self._passes -= 1
            return None
        self._advance()
        # Making an iterator draws a seed: it has to be there before the states are restored.
        if self._inner._iterator is None:
            self._inner._iterator = iter(self._runner.train_dataloader)
        restore_random_state(self._state['current'])
        self._runner.logger.info(f'The random states of iteration {self._runner.iter} are restored')
        self._runner.train_loop.dataloader_iterator = self._inner
        return next(self._inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def skip_iter(self, num_iters: int) -> None:
        """Note how many batches lie before the checkpoint."""
        self._num_batches = num_iters

    def _advance(self) -> None:
        """Move the real iterator behind the batches that have been trained on."""
        num_workers = self._runner.train_dataloader.num_workers
        if self._num_batches == 0:  # the fork's loop with fast_forward_on_resume=True
            return
        if self._replay:
            restore_random_state(self._state['start'])
            self._discard_batches()
        elif hasattr(self._inner, 'skip_iter'):
            if num_workers > 0:
                _tell_about_workers(self._runner)
            self._inner.skip_iter(self._num_batches)
        elif num_workers > 0:
            # mmengine 0.10.7 has started the workers already, and they have taken indices.
            self._discard_batches()
        else:
            for _ in range(self._num_batches):
                try:
                    self._inner._iterator._next_index()
                except StopIteration:
                    next(self._inner)  # starts the sampler anew and takes the first batch

    def _discard_batches(self) -> None:
        report = _Progress(self._runner, self._num_batches)
        for _ in range(self._num_batches):
            next(self._inner)
            report.batch_done()


class _Progress:
    """Log lines that tell how far a replay has come."""

    def __init__(self, runner: Runner, num_batches: int) -> None:
        self._logger = runner.logger
        self._num_batches = num_batches
        self._done = 0
        self._reported = time.monotonic()
        self._logger.info(
            f'The data pipeline runs again over the {num_batches} batches before the checkpoint, so that its '
            'random states are those of an undisturbed run (see RandomStateHook, replay)'
        )

    def batch_done(self) -> None:
        self._done += 1
        if time.monotonic() - self._reported > SECONDS_BETWEEN_REPORTS or self._done == self._num_batches:
            self._reported = time.monotonic()
            self._logger.info(f'Batches run again: {self._done}/{self._num_batches}')


def _replay_epochs(runner: Runner, start: RandomState) -> None:
    """Run the data pipeline of an ``EpochBasedTrainLoop`` again over all finished epochs."""
    loader = runner.train_dataloader
    restore_random_state(start)
    report = _Progress(runner, runner.epoch * len(loader))
    for epoch in range(runner.epoch):
        # What DistSamplerSeedHook does before each epoch.
        samplers: list[Any] = [loader.sampler, getattr(loader.batch_sampler, 'sampler', None)]
        for sampler in samplers:
            if hasattr(sampler, 'set_epoch'):
                sampler.set_epoch(epoch)
        for _ in loader:
            report.batch_done()


def _tell_about_workers(runner: Runner) -> None:
    runner.logger.info(
        'The order of the samples is that of an undisturbed run, but the workers of the data loader start new '
        'random streams: the augmentations differ. RandomStateHook(replay=True), or randomness with '
        'deterministic=True, makes them equal.'
    )


def _checkpoint_hooks(runner: Runner, by_epoch: bool) -> list[CheckpointHook]:
    return [hook for hook in runner.hooks if isinstance(hook, CheckpointHook) and hook.by_epoch == by_epoch]
