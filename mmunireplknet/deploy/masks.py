"""Masks on boxes into masks of the image. Needs numpy alone: the program beside an exported model holds a copy."""

from __future__ import annotations

import numpy as np

__all__ = ['paste']


def paste(masks: np.ndarray, dets: np.ndarray, height: int, width: int, threshold: float = 0.5) -> np.ndarray:
    """Masks of an image of ``height`` and ``width``, as mmdet's FCNMaskHead pastes them.

    Args:
        masks: (K, m, m) probabilities on a grid over each box.
        dets: (K, 4 or more), x1 y1 x2 y2 in pixels of that image.
        height: Of the image.
        width: Of the image.
        threshold: A pixel of at least this probability belongs to the object.

    Returns:
        (K, height, width) of bool.
    """

    def weights(low: np.float32, high: np.float32, length: int, cells: int) -> tuple[slice, np.ndarray]:
        part = slice(int(max(np.floor(low) - 1, 0)), int(min(np.ceil(high) + 1, length)))
        centres = np.arange(part.start, part.stop, dtype=np.float32) + np.float32(0.5)
        with np.errstate(divide='ignore', invalid='ignore'):  # a box without width: mmdet takes the middle
            position = ((centres - low) / (high - low) * 2 * cells - 1) / 2
        position[~np.isfinite(position)] = (cells - 1) / 2
        return part, np.maximum(1 - abs(position[:, None] - np.arange(cells, dtype=np.float32)), 0)

    pasted = np.zeros((len(masks), height, width), bool)
    for out, mask, (x1, y1, x2, y2) in zip(pasted, masks, np.asarray(dets, np.float32)[:, :4], strict=True):
        rows, down = weights(y1, y2, height, mask.shape[0])
        columns, across = weights(x1, x2, width, mask.shape[1])
        out[rows, columns] = down @ mask @ across.T >= threshold
    return pasted
