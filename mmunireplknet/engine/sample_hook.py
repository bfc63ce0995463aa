"""Errors that name the sample, also of a data pipeline that comes during the run."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..datasets.label_ranges import label_ranges
from ..datasets.sample_errors import name_samples

__all__ = ['SampleHook']


@HOOKS.register_module()
class SampleHook(Hook):
    """Looks after the pipelines that mmdet's PipelineSwitchHook and mmpretrain's SwitchRecipeHook put in.

    ``tools/train.py`` adds it; the first pipeline, whose workers may run before any hook does, is its own matter.

    Examples:
        >>> custom_hooks = [dict(type='SampleHook')]
    """

    priority = 'VERY_LOW'  # behind the hooks that switch

    def before_train_epoch(self, runner: Runner) -> None:
        """Let the pipeline of this epoch name its samples; the workers of a new one start behind this.

        Args:
            runner: The runner of the training process.
        """
        name_samples(runner.train_dataloader.dataset, label_ranges(runner.model))
