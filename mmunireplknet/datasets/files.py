"""What the checks of data sets have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

__all__ = ['few', 'spread', 'unreadable']

Item = TypeVar('Item')


def few(names: Sequence[str], shown: int = 5) -> str:
    """The first of ``names`` and the number of the others, for a message."""
    more = f' and {len(names) - shown} more' if len(names) > shown else ''
    return ', '.join(names[:shown]) + more


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """``count`` of ``items``, the first and the last among them, evenly spread; all where there are no more."""
    chosen = np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)
    return [items[index] for index in chosen]


def unreadable(path: Path) -> str | None:
    """One sentence where the image cannot be decoded to its end, else None."""
    try:
        with Image.open(path) as file:
            file.convert('RGB')
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:  # Pillow raises each for damaged files
        return f'{path} ({path.stat().st_size:,} bytes) cannot be read: {error}' if path.exists() else f'{path} is gone'
    return None
