"""Stop a run whose loss is NaN or infinite, before it overwrites its last good checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..datasets.files import few

__all__ = ['NonFiniteLossError', 'NonFiniteLossHook']


class NonFiniteLossError(RuntimeError):
    """The loss or the weights are NaN or infinite; the message says since when, and what to do."""


@HOOKS.register_module()
class NonFiniteLossHook(Hook):
    """Ends the run at the first loss that is NaN or infinite, and never lets such weights be saved.

    The loss is the one before loss scaling: a step that ``AmpOptimWrapper`` leaves out since its *gradients* overflowed
    goes by. mmengine's RuntimeInfoHook has read the loss already, so that looking at it again costs no waiting for
    the GPU. In a distributed run the loss is that of this process; the weights, which are equal in all, are looked at
    before a checkpoint is written, so that none of a bad step remains whichever process writes it.

    mmdet's CheckInvalidLossHook ends with an AssertionError without a text, and by default after up to 50 iterations.
    ``tools/train.py`` adds this hook.

    Args:
        interval: Number of iterations from one look at the loss to the next.

    Examples:
        >>> custom_hooks = [dict(type='NonFiniteLossHook')]
    """

    priority = 'ABOVE_NORMAL'  # before EMAHook averages the weights, and CheckpointHook saves them

    def __init__(self, interval: int = 1) -> None:
        self.interval = interval

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Mapping[str, Any] | None = None
    ) -> None:
        """Look at the loss.

        Args:
            runner: The runner of the training process.
            batch_idx: Index of the batch in the epoch.
            data_batch: What the data loader gave; the message names its images.
            outputs: Losses by name.

        Raises:
            NonFiniteLossError: It is NaN or infinite.
        """
        if not self.every_n_train_iters(runner, self.interval) or not outputs:
            return
        # The sum is not finite where a term is not.
        looked_at = {'loss': outputs['loss']} if 'loss' in outputs else outputs
        if all(math.isfinite(value) for value in _scalars(looked_at).values()):
            return
        bad = [f'{name} {value}' for name, value in _scalars(outputs).items() if not math.isfinite(value)]
        images = few(_images(data_batch), 4)
        raise NonFiniteLossError(
            f'the loss of iteration {runner.iter + 1} is not finite ({few(bad)}){f" for {images}" if images else ""}: '
            f'{_advice(runner)}'
        )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Look at the weights.

        Args:
            runner: The runner of the training process.
            checkpoint: What is about to be saved.

        Raises:
            NonFiniteLossError: A parameter is NaN or infinite.
        """
        bad = [
            name for name, value in runner.model.named_parameters() if not bool(torch.isfinite(value.detach()).all())
        ]
        if bad:
            raise NonFiniteLossError(f'the weights are not finite ({few(bad)}) and are not saved: {_advice(runner)}')


def _scalars(outputs: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among ``outputs``."""
    tensors = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor) and value.numel() == 1}
    numbers = {name: float(value) for name, value in outputs.items() if isinstance(value, (int, float))}
    return {name: value.item() for name, value in tensors.items()} | numbers


def _images(batch: Any) -> list[str]:
    """Paths of the images of a batch, where it is one of mm*."""
    samples = batch.get('data_samples') if isinstance(batch, Mapping) else None
    if not isinstance(samples, Sequence):
        return []
    paths = (getattr(sample, 'img_path', None) for sample in samples)
    return [str(path) for path in paths if path is not None]


def _advice(runner: Runner) -> str:
    last = runner.message_hub.runtime_info.get('last_ckpt')
    kept = f'{last} is kept, go on from it by --resume' if last else 'no checkpoint is there yet, start again'
    return (
        f'the run ends; {kept} with a smaller learning rate, a longer warm-up, gradient clipping or without --amp, and '
        'look at these images if it ends here again'
    )
