"""``load_from`` and ``--resume`` that refuse a checkpoint of another task, and take a published classifier."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..models.checkpoint_file import CheckpointError, unwrap
from ..models.layouts import from_published, other_task

__all__ = ['CheckpointFitHook']


@HOOKS.register_module()
class CheckpointFitHook(Hook):
    """Looks at a checkpoint before mmengine loads it non-strictly, which leaves all heads as they are without an error.

    Heads of another number of classes, or another head beside an equal neck, stay mmengine's matter: fine-tuning does
    that, and mmengine lists what did not fit. ``tools/train.py`` adds this hook.

    Examples:
        >>> custom_hooks = [dict(type='CheckpointFitHook')]
    """

    priority = 'VERY_HIGH'  # before EMAHook, which loads the weights too

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint, or give its weights the names of the model.

        Args:
            runner: The runner of the training process.
            checkpoint: What was read; changed in place.

        Raises:
            CheckpointError: It is of another task, or was not written by mmengine and is to be resumed.
        """
        if getattr(runner, '_resume', False) and 'message_hub' not in checkpoint:
            raise CheckpointError(
                f'the checkpoint holds {", ".join(list(checkpoint)[:4])}, but not the state of a run of mmengine, so '
                'it cannot be resumed: start from its weights by --cfg-options load_from=FILE.'
            )
        if 'message_hub' in checkpoint and 'state_dict' not in checkpoint:
            return  # a strategy of FlexibleRunner that keeps the weights elsewhere
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        state = unwrap(checkpoint)
        adapted = from_published(state)
        if message := other_task(adapted, (name for name, _ in model.named_parameters())):
            raise CheckpointError(message)
        if adapted.keys() != state.keys() or 'state_dict' not in checkpoint:
            meta = checkpoint.get('meta') or {}
            checkpoint.clear()
            checkpoint.update(meta=meta, state_dict=adapted)
