"""Which labels a segmentation mask may have: those that the heads of an mmseg model have a class for, or ignore."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from mmengine.model import is_model_wrapper
from torch import nn

__all__ = ['LabelRange', 'label_fault', 'label_ranges']


class LabelRange(NamedTuple):
    """Labels that a head takes.

    Attributes:
        head: its name in the model.
        classes: it takes 0 to ``classes`` - 1,
        ignored: and this one, which is no class.
    """

    head: str
    classes: int
    ignored: int


def label_ranges(model: nn.Module) -> tuple[LabelRange, ...]:
    """What the heads of ``model`` take, each range once; nothing for a model that is none of mmseg's.

    Two kinds of heads are left out: STDC's, of boundaries, takes any label, and for those of one channel mmseg asserts.
    """
    inner: Any = model
    while is_model_wrapper(inner):
        inner = inner.module
    ranges: dict[tuple[int, int], LabelRange] = {}
    for name in ('auxiliary_head', 'decode_head'):  # of two with equal ranges the last is named
        head: Any = getattr(inner, name, None)
        parts: list[Any] = list(head) if isinstance(head, nn.ModuleList) else [head]
        for part in parts:
            left_out = getattr(part, 'out_channels', None) == 1 or hasattr(part, 'boundary_threshold')
            if not left_out and hasattr(part, 'num_classes') and hasattr(part, 'ignore_index'):
                ranges[part.num_classes, part.ignore_index] = LabelRange(name, part.num_classes, part.ignore_index)
    return tuple(ranges.values())


def label_fault(labels: np.ndarray, ranges: tuple[LabelRange, ...]) -> str | None:
    """What is wrong with a mask of class labels, and what to do; None if nothing.

    The loss of such a label is an IndexError that names no file, or on a GPU a device-side assert iterations later.

    Args:
        labels: integers of any shape, as a data pipeline packs them.
        ranges: of the heads that compute a loss of them.
    """
    for head, classes, ignored in ranges:
        wrong = labels >= classes
        if labels.dtype.kind == 'i':
            wrong |= labels < 0
        wrong &= labels != ignored
        if wrong.any():
            label = labels[wrong].max()
            return (
                f'has the label {label} in {wrong.sum():,} pixels, but the {classes} classes of {head} have 0 to '
                f'{classes - 1} and its ignore_index is {ignored}; if {label} is no class, set ignore_index of each '
                f'head and of the evaluators and seg_pad_val of the data preprocessor to {label}; if the first class '
                'has 1, set reduce_zero_label=True of the data set; if classes are missing, set its '
                'metainfo=dict(classes=...) and num_classes of each head'
            )
    return None
