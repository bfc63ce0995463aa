"""COCO 2017 (https://cocodataset.org): check, fetch, unpack.

The layout is the one of mmdet::

    root/{train2017,val2017}/*.jpg
    root/annotations/instances_{train2017,val2017}.json
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import files
from .annotations import Findings, check_annotations
from .files import Progress, fetch, spread, unreadable

__all__ = ['COUNTS', 'ROOT', 'URL', 'Report', 'SplitReport', 'check', 'check_split', 'download', 'text_of']

ROOT = 'data/coco'
# The bucket behind images.cocodataset.org, which has no certificate for that name.
URL = 'https://s3.amazonaws.com/images.cocodataset.org'
ARCHIVES: Mapping[str, tuple[str, str]] = {  # folder: path below URL and size
    'annotations': ('annotations/annotations_trainval2017.zip', '0.25 GB'),
    'val2017': ('zips/val2017.zip', '0.8 GB'),
    'train2017': ('zips/train2017.zip', '18 GB'),
}
COUNTS: Mapping[str, int] = {'train2017': 118_287, 'val2017': 5_000}
CATEGORIES = 80
SHOWN = 10  # faults of one split in the report


@dataclass
class SplitReport:
    """What one split holds.

    Attributes:
        found: what its annotation file holds.
        opened: number of images that were decoded.
        faults: one sentence for each kind of thing that is wrong, with what to do.
    """

    found: Findings
    opened: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """What a folder holds of COCO 2017."""

    root: Path
    splits: Mapping[str, SplitReport]

    @property
    def whole(self) -> bool:
        """Whether every split is there and no fault was seen."""
        return not any(split.faults for split in self.splits.values())

    def __str__(self) -> str:
        lines = [f'COCO 2017 in {self.root}:']
        for name, split in self.splits.items():
            lines += text_of(name, split)
        lines.append('  complete' if self.whole else '  NOT complete')
        return '\n'.join(lines)


def text_of(name: str, split: SplitReport) -> list[str]:
    """Lines about one split: counts, what is wrong, what mmdet leaves out."""
    found = split.found
    lines = [
        f'  {name}: {found.images:,} images, {found.usable:,} of them with a usable box, {found.annotations:,} '
        f'annotations of {len(found.categories):,} classes, {split.opened:,} images opened'
    ]
    lines += [f'    {fault}' for fault in split.faults[:SHOWN]]
    if len(split.faults) > SHOWN:
        lines.append(f'    and {len(split.faults) - SHOWN:,} more')
    return [*lines, *(f'    note: {note}' for note in found.notes)]


def check(
    root: str | os.PathLike[str] = ROOT, samples: int = 8, deep: bool = False, counts: Mapping[str, int] = COUNTS
) -> Report:
    """Read the annotation files in ``root`` and look for their images. What is wrong is reported, not raised.

    Args:
        root: the folder that holds ``annotations`` and the images.
        samples: number of images to decode in each split, evenly spread.
        deep: decode every image.
        counts: number of images that each split should have.
    """
    root = Path(root)
    splits = {}
    for name, count in counts.items():
        file = root / 'annotations' / f'instances_{name}.json'
        split = splits[name] = check_split(file, root / name, samples, deep)
        if split.found.images and split.found.images != count:
            split.faults.append(f'{file} lists {split.found.images:,} images instead of {count:,}; fetch it again')
        if split.found.categories and len(split.found.categories) != CATEGORIES:
            split.faults.append(
                f'{file} has {len(split.found.categories)} categories instead of {CATEGORIES}; fetch it again'
            )
    return Report(root, splits)


def check_split(file: Path, folder: Path, samples: int = 8, deep: bool = False) -> SplitReport:
    """Check an annotation file in COCO's format, the images that it lists and some of their content.

    Args:
        file: the annotation file.
        folder: where its images lie.
        samples: number of images to decode, evenly spread.
        deep: decode every image.
    """
    split = SplitReport(check_annotations(file, folder))
    split.faults += split.found.faults
    paths = [os.path.join(folder, name) for name in split.found.file_names]
    there = [path for path in paths if os.path.isfile(path)]
    chosen = there if deep else spread(there, samples)
    split.opened = len(chosen)
    split.faults += [f'{fault}; fetch it again' for path in chosen if (fault := unreadable(Path(path)))]
    return split


def download(
    root: str | os.PathLike[str] = ROOT,
    url: str = URL,
    progress: Progress | None = None,
    timeout: float = 30.0,
    archives: Mapping[str, tuple[str, str]] = ARCHIVES,
) -> list[Path]:
    """Fetch the archives of the folders that are not there, and unpack them; each folder appears whole or not at all.

    A download that breaks off goes on where it stopped at the next call.

    Args:
        root: folder to fill.
        url: where the archives are.
        progress: called with (bytes done, bytes in all; 0 if the server does not say).
        timeout: longest silence of the server, in seconds.
        archives: for each folder its archive below ``url`` and the size of it.

    Returns:
        The archives, which are kept; they may be deleted.

    Raises:
        ConnectionError: an archive cannot be fetched; the message says what to do without a network.
        ValueError: an archive is damaged or holds something else.
    """
    root = Path(root)
    fetched = []
    for folder, (path, size) in archives.items():
        target = root / folder
        if target.exists() and any(target.iterdir()):
            continue
        archive = root / os.path.basename(path)
        fetch([f'{url}/{path}'], archive, size, f'unpack it to {target}', progress, timeout)
        files.unpack(archive, target, _folder(folder), f'{folder}; expected {archive.name} of COCO')
        fetched.append(archive)
    return fetched


def _folder(name: str) -> Callable[[Path], Path | None]:
    return lambda unpacked: unpacked / name if (unpacked / name).is_dir() else None
