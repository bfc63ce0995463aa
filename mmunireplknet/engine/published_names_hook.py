"""Let mmengine's Runner load published classification files into mmpretrain's ImageClassifier."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..models.checkpoint import classifier_state

__all__ = ['PublishedNamesHook']


@HOOKS.register_module()
class PublishedNamesHook(Hook):
    """Rename the entries of a published classification file as the ImageClassifier that loads it has them.

    The trunk gets its prefix ``backbone.``, and ``head`` becomes ``head.fc``. Wrapped files ('model', 'module.') are
    unwrapped. Files and models of any other kind stay as they are. It must run before EMAHook, which takes the entries
    too: hence the priority.
    """

    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Replace ``checkpoint['state_dict']`` where the file is a published one."""
        model = runner.model
        while is_model_wrapper(model):
            model = model.module
        model = getattr(model, 'module', model)  # test-time augmentation is no registered wrapper
        state = classifier_state(model, checkpoint)
        if state is not None:
            checkpoint['state_dict'] = state
