"""ImageNet-1K (ILSVRC2012) and ImageNet-22K (https://image-net.org): check of a folder.

The layouts are those of mmpretrain; each split has one of the two::

    root/{train,val}/n01440764/*.JPEG            a folder a class, named by its WordNet id
    root/{train,val}/*.JPEG  root/meta/{train,val}.txt   lines of a file name and a label from 0, by sorted WordNet id

There is no download: image-net.org gives the images to registered users only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .files import few, spread, unreadable

__all__ = ['DATA', 'Report', 'SplitReport', 'check']

PAGE = 'https://image-net.org/download.php'
HOW = f'download it from {PAGE}, which takes an account, and unpack it there'
SHOWN = 10  # faults of one split in the report
SUFFIXES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')  # what mmpretrain takes for images


@dataclass(frozen=True)
class Data:
    """One of the two data sets: its folder, its classes, and the images of each split (None: not checked)."""

    name: str
    root: str
    classes: int
    splits: Mapping[str, int | None]


DATA: Mapping[str, Data] = {
    '1k': Data('ImageNet-1K', 'data/imagenet', 1000, {'train': 1_281_167, 'val': 50_000}),
    '22k': Data('ImageNet-22K', 'data/imagenet21k', 21_841, {'train': None}),  # copies differ by a few images
}


@dataclass
class SplitReport:
    """What one split holds.

    Attributes:
        images: number of images.
        classes: names of the class folders, or the labels of the list.
        opened: number of images that were decoded.
        by_folder: whether the classes are folders.
        faults: one sentence for each thing that is not as it should be, with what to do.
    """

    images: int = 0
    classes: list[str] = field(default_factory=list)
    opened: int = 0
    by_folder: bool = False
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """What a folder holds of ``data``."""

    root: Path
    data: Data
    splits: Mapping[str, SplitReport]

    @property
    def whole(self) -> bool:
        """Whether every split is there and no fault was seen."""
        return not any(split.faults for split in self.splits.values())

    def __str__(self) -> str:
        lines = [f'{self.data.name} in {self.root}:']
        for name, split in self.splits.items():
            expected = self.data.splits[name]
            of = f' of {expected:,}' if expected else ''
            lines.append(
                f'  {name}: {split.images:,} images{of} in {len(split.classes):,} classes of {self.data.classes:,}, '
                f'{split.opened:,} opened'
            )
            lines += [f'    {fault}' for fault in split.faults[:SHOWN]]
            if len(split.faults) > SHOWN:
                lines.append(f'    and {len(split.faults) - SHOWN:,} more')
        lines.append('  complete' if self.whole else '  NOT complete')
        return '\n'.join(lines)


def check(
    root: str | os.PathLike[str] | None = None, data: Data = DATA['1k'], samples: int = 8, deep: bool = False
) -> Report:
    """Count classes and images in ``root`` and decode some. What is wrong is reported, not raised.

    Args:
        root: the folder that holds ``train`` and ``val``; by default that of the configs.
        data: what should lie there.
        samples: number of images to decode in each split, evenly spread.
        deep: decode every image.
    """
    root = Path(root or data.root)
    splits = {name: SplitReport() for name in data.splits}
    for name, split in splits.items():
        listed = root / 'meta' / f'{name}.txt'
        files = _by_list(listed, root / name, split, data) if listed.is_file() else _by_folder(root / name, split, data)
        split.images = len(files)
        expected = data.splits[name]
        if files and expected and len(files) != expected:
            split.faults.append(f'{len(files):,} images instead of {expected:,}; unpack the archive of {name} again')
        chosen = files if deep else spread(files, samples)
        split.opened = len(chosen)
        split.faults += [fault for path in chosen if (fault := unreadable(Path(path)))]
    folders = [set(split.classes) for split in splits.values() if split.by_folder and split.classes]
    if len(folders) == 2 and (lone := sorted(folders[0] ^ folders[1])):
        splits['val'].faults.append(
            f'{few(lone)} is a class of one split but not of the other, so that labels differ; complete both'
        )
    return Report(root, data, splits)


def _by_folder(folder: Path, split: SplitReport, data: Data) -> list[str]:
    """The images of a split with a folder a class; mmpretrain numbers the classes by the sorted names."""
    split.by_folder = True
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name) if folder.is_dir() else []
    split.classes = [entry.name for entry in entries if entry.is_dir()]
    if not split.classes:
        split.faults.append(_without_classes(folder, [entry.name for entry in entries]))
        return []
    images, empty = [], []
    for name in split.classes:
        inside = [
            os.path.join(where, file)
            for where, _, files in os.walk(folder / name)
            for file in files
            if file.lower().endswith(SUFFIXES)
        ]
        images += sorted(inside)
        if not inside:
            empty.append(name)
    if len(split.classes) != data.classes:
        split.faults.append(
            f'{folder} has {len(split.classes):,} class folders instead of {data.classes:,}; unpack what is missing, '
            'and move away what is no class'
        )
    if empty:
        split.faults.append(f'no image in {few(empty)} of {folder}; unpack them again')
    if odd := [name for name in split.classes if not re.fullmatch(r'n\d{8}', name)]:
        split.faults.append(
            f'{few(odd)} of {folder} is no WordNet id such as n01440764; rename it, for the sorted ids are the order '
            'of the classes in published weights'
        )
    return images


def _without_classes(folder: Path, names: Sequence[str]) -> str:
    if not names:
        return f'{folder} {"is empty" if folder.is_dir() else "does not exist"}; {HOW}'
    if tars := [name for name in names if name.endswith('.tar')]:
        return f'{folder} holds archives ({few(tars)}); unpack each into a folder of its name without .tar'
    return (
        f'{folder} holds {len(names):,} files and no class folders; move each image into the folder of its class, or '
        f'write {folder.parent / "meta" / folder.name}.txt with a line "{names[0]} LABEL" for each, LABEL from 0 by '
        'sorted WordNet id'
    )


def _by_list(file: Path, folder: Path, split: SplitReport, data: Data) -> list[str]:
    """The images of a split with a list of names and labels, which wins over folders in mmpretrain."""
    images: list[str] = []
    missing: list[str] = []
    labels: set[int] = set()
    for number, line in enumerate(file.read_text().splitlines(), 1):
        name, _, label = line.strip().rpartition(' ')
        if not name or not label.isdecimal() or int(label) >= data.classes:
            split.faults.append(
                f'{file}, line {number}: {line[:60]!r} is no file name and label from 0 to {data.classes - 1}; '
                'correct it, or delete the file to have class folders read'
            )
            return []
        labels.add(int(label))
        path = os.path.join(folder, name)
        (images if os.path.isfile(path) else missing).append(path)
    split.classes = [str(label) for label in sorted(labels)]
    if missing:
        split.faults.append(f'{few(missing)} of {file} does not exist; unpack it, or delete the line')
    if len(labels) != data.classes:
        split.faults.append(
            f'{file} has {len(labels):,} labels instead of {data.classes:,}; write the classes that are missing'
        )
    return images
