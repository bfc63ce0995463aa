"""ADE20K, scene parsing release (ADEChallengeData2016, http://sceneparsing.csail.mit.edu): check, fetch, unpack.

The layout is the one of mmseg::

    root/images/{training,validation}/*.jpg
    root/annotations/{training,validation}/*.png   0 unlabelled, 1 to 150 classes
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from . import files
from .files import Progress, fetch, few, spread

ROOT = 'data/ade/ADEChallengeData2016'
ARCHIVE = 'ADEChallengeData2016.zip'
URLS = (
    f'https://data.csail.mit.edu/places/ADEchallenge/{ARCHIVE}',
    f'http://data.csail.mit.edu/places/ADEchallenge/{ARCHIVE}',
)
COUNTS: Mapping[str, int] = {'training': 20210, 'validation': 2000}
NUM_CLASSES = 150


@dataclass(frozen=True)
class Report:
    """What a folder holds of ADE20K.

    Args:
        root: the folder.
        expected: number of pairs that each split should have.
        images: number of images of each split.
        masks: number of masks of each split.
        unpaired: names of each split, without suffix, of which only the image or only the mask is there.
        sampled: number of masks that were opened.
        faults: one sentence for each of them that is not as it should be.
    """

    root: Path
    expected: Mapping[str, int]
    images: Mapping[str, int]
    masks: Mapping[str, int]
    unpaired: Mapping[str, Sequence[str]]
    sampled: int
    faults: Sequence[str]

    @property
    def whole(self) -> bool:
        """Whether every pair is there and no fault was seen."""
        paired = not self.faults and not any(self.unpaired.values())
        return paired and all(self.images[split] == count for split, count in self.expected.items())

    def __str__(self) -> str:
        lines = [f'ADE20K in {self.root}:']
        for split, count in self.expected.items():
            lines.append(f'  {split}: {self.images[split]} images and {self.masks[split]} masks of {count}')
            if lone := self.unpaired[split]:
                lines.append(f'    without their image or mask: {few(lone)}')
        if self.sampled:
            lines.append(f'  {self.sampled} masks opened, {self.sampled - len(self.faults)} as they should be')
        lines += [f'    {fault}' for fault in self.faults]
        lines.append('  complete' if self.whole else '  NOT complete')
        return '\n'.join(lines)


def check(root: str | os.PathLike[str] = ROOT, samples: int = 8, expected: Mapping[str, int] = COUNTS) -> Report:
    """Count the pairs in ``root`` and open some masks. What is missing is reported, not raised.

    Args:
        root: the folder that holds ``images`` and ``annotations``.
        samples: number of masks to open in each split, evenly spread.
        expected: number of pairs that each split should have.
    """
    root = Path(root)
    images: dict[str, int] = {}
    masks: dict[str, int] = {}
    unpaired: dict[str, list[str]] = {}
    faults: list[str] = []
    sampled = 0
    for split in expected:
        image_stems = {path.stem for path in (root / 'images' / split).glob('*.jpg')}
        mask_stems = {path.stem for path in (root / 'annotations' / split).glob('*.png')}
        images[split], masks[split] = len(image_stems), len(mask_stems)
        unpaired[split] = sorted(image_stems ^ mask_stems)
        chosen = spread(sorted(image_stems & mask_stems), samples)
        sampled += len(chosen)
        for stem in chosen:
            fault = _fault(root / 'images' / split / f'{stem}.jpg', root / 'annotations' / split / f'{stem}.png')
            if fault is not None:
                faults.append(fault)
    return Report(root, dict(expected), images, masks, unpaired, sampled, faults)


def _fault(image: Path, mask: Path) -> str | None:
    try:
        with Image.open(image) as file:
            size = file.size[::-1]
        with Image.open(mask) as file:
            labels = np.asarray(file)
    except (UnidentifiedImageError, OSError) as error:
        return f'{mask} or its image cannot be read: {error}'
    if labels.ndim != 2 or labels.dtype != np.uint8:
        return f'{mask} is {labels.dtype} of shape {labels.shape}; expected (H, W) uint8'
    if labels.shape != size:
        return f'{mask} is {labels.shape} and its image {size}; expected the same height and width'
    if labels.max() > NUM_CLASSES:
        return f'{mask} has the label {labels.max()}; expected 0 to {NUM_CLASSES}'
    return None


def download(
    root: str | os.PathLike[str] = ROOT,
    urls: Sequence[str] = URLS,
    progress: Progress | None = None,
    timeout: float = 30.0,
) -> Path:
    """Fetch the archive, unless it lies beside ``root`` already, and unpack it to ``root``.

    A download that breaks off goes on where it stopped at the next call; ``root`` appears whole or not at all.

    Args:
        root: folder to make.
        urls: where to fetch from; each is tried until one works.
        progress: called with (bytes done, bytes in all; 0 if the server does not say).
        timeout: longest silence of the server, in seconds.

    Returns:
        The archive, which is kept; it may be deleted.

    Raises:
        FileExistsError: ``root`` is there and not empty.
        ConnectionError: no URL works; the message says what to do without a network.
        ValueError: the archive is damaged or holds something else.
    """
    root = Path(root)
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(f'{root} is there and not empty, so it is left alone; move it away or name another')
    archive = root.parent / ARCHIVE
    fetch(urls, archive, 'about 1 GB', f'unpack it to {root}', progress, timeout)
    unpack(archive, root)
    return archive


def unpack(archive: Path, root: Path) -> None:
    """Unpack ``archive`` so that its one folder becomes ``root``, whole or not at all.

    Raises:
        ValueError: the archive is damaged or holds something else.
    """
    files.unpack(archive, root, _inner, f'with images and annotations; expected {ARCHIVE} of ADE20K')


def _inner(folder: Path) -> Path | None:
    return next(
        (path.parent for path in sorted(folder.glob('*/images')) if (path.parent / 'annotations').is_dir()), None
    )
