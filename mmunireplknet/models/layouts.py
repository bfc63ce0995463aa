"""Two layouts of a whole model's weights: the published files' and that of OpenMMLab 2.x models.

Detectors and segmentors were published by mmdet 2.28.1 and mmseg 0.27.0, whose names of FPN, RPN, box, mask and decode
heads are those of mmdet 3 and mmseg 1; only mmdet 2's EMA hook adds entries. Classifiers were published without a
prefix, with a head of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

__all__ = ['drop_ema_copies', 'from_published', 'other_task', 'parts', 'task_of', 'to_published']

STEM = 'downsample_layers.0.0.weight'
TASKS = {
    'classification': {'head'},
    'segmentation': {'decode_head', 'auxiliary_head'},
    'detection': {'neck', 'rpn_head', 'roi_head', 'bbox_head', 'mask_head'},
}


def drop_ema_copies(state: dict[str, Tensor]) -> list[str]:
    """Remove what mmdet 2's EMA hook adds, in place; the plain entries hold the averages.

    The hook registers a copy of every entry as a buffer of the model, ``ema_`` and the name with underscores for dots,
    and swaps both before saving. An ``ema_`` entry that is nobody's copy stays.

    Returns:
        The removed names.
    """
    names = {f'ema_{name.replace(".", "_")}' for name in state}
    copies = [name for name in state if name in names]
    for name in copies:
        del state[name]
    return copies


def parts(names: Iterable[str]) -> list[str]:
    """Parts of a whole model that hold weights, such as backbone, neck and roi_head, in order."""
    return list(dict.fromkeys(name.partition('.')[0] for name in names))


def task_of(names: Iterable[str]) -> str:
    """'classification', 'segmentation', 'detection', or 'unknown' for a backbone alone and other heads."""
    found = set(parts(names))
    return next((task for task, heads in TASKS.items() if found & heads), 'unknown')


def other_task(given: Iterable[str], own: Iterable[str]) -> str | None:
    """Say that weights are of another kind of model, or None if both share more than the backbone or lack one.

    Args:
        given: Names of the weights.
        own: Names of the model's.
    """
    given, own = parts(given), parts(own)
    heads, own_heads = (set(names) - {'backbone', 'data_preprocessor'} for names in (given, own))
    if 'backbone' not in given or 'backbone' not in own or not heads or not own_heads or heads & own_heads:
        return None
    return (
        f'the checkpoint is of another task: it holds {task_of(given)} weights ({", ".join(given)}), but the model is '
        f'for {task_of(own)} ({", ".join(own)}). Take the config of its task, or only its backbone: '
        'model.backbone.init_cfg=dict(type="Pretrained", checkpoint=FILE).'
    )


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of an OpenMMLab 2.x model for published weights; others stay as they are."""
    if STEM not in state:
        return dict(state)
    return {
        name.replace('head.', 'head.fc.', 1) if name.startswith('head.') else f'backbone.{name}': value
        for name, value in state.items()
    }


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``from_published``."""
    if 'head.fc.weight' not in state:
        return dict(state)
    return {
        name.replace('head.fc.', 'head.', 1) if name.startswith('head.fc.') else name.removeprefix('backbone.'): value
        for name, value in state.items()
    }
