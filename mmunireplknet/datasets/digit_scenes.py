"""Digit Scenes: a small data set for segmentation and detection that needs no download.

Handwritten digits lie, turned and overlapping, on photographs; :mod:`mmunireplknet.datasets.digit_painting` has
the sources and the painter. :func:`generate` writes them so that mmseg and mmdet read the same images::

    root/meta.json                               how the data set was made
    root/images/{training,validation}/*.jpg
    root/annotations/{training,validation}/*.png   0 background, 1 + digit elsewhere (ADE20K layout)
    root/annotations/instances_{train,val}.json    COCO; file_name is relative to images/{training,validation}
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .digit_painting import DIFFICULTIES, DIGIT_NAMES, DIGIT_SPLIT, PHOTOGRAPHS, SPLITS, Difficulty, Scene, paint

FOLDERS: Mapping[str, str] = {'train': 'training', 'val': 'validation'}
CLASSES: tuple[str, ...] = ('background', *DIGIT_NAMES)
PALETTE: tuple[tuple[int, int, int], ...] = (
    (0, 0, 0),
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
    (240, 50, 230),
    (170, 255, 195),
    (170, 110, 40),
)
FORMAT = 1  # raise it when the same parameters give other files
LEAST_SIDE = 64
# JPEG, because .jpg is what mmseg and ADE20K expect unless told otherwise, and a third of PNG's size. At quality
# 95 with full colour resolution the edges of the digits stay where the masks have them.
JPEG: Mapping[str, Any] = {'quality': 95, 'subsampling': 0}


@dataclass(frozen=True)
class DigitScenes:
    """A data set on disk.

    Args:
        root: its folder.
        meta: the content of ``meta.json``.
        reused: whether it was there already.
    """

    root: Path
    meta: dict[str, Any]
    reused: bool

    def __str__(self) -> str:
        made = self.meta['parameters']
        counts = ' + '.join(
            f'{count} {split} images ({self.meta["instances"][split]} digits)'
            for split, count in made['split_counts'].items()
        )
        height, width = made['size']
        verb = 'is there already' if self.reused else 'was made'
        return (
            f'{self.root} {verb}: {counts}, height {height}, width {width}, '
            f'{made["difficulty"]["num_classes"]} digit classes, seed {made["seed"]}'
        )


def metainfo(num_classes: int = 5, background: bool = True) -> dict[str, list]:
    """Names and colours, as ``metainfo`` of an mmseg or mmdet data set.

    Args:
        num_classes: number of digit classes, 1 to 10.
        background: True for mmseg's ``BaseSegDataset(reduce_zero_label=False)``, whose class 0 is the background;
            False for mmdet's ``CocoDataset``, which has no such class.

    Raises:
        ValueError: ``num_classes`` is not 1 to 10.
    """
    if not 1 <= num_classes <= len(DIGIT_NAMES):
        raise ValueError(f'num_classes is {num_classes}; Digit Scenes has 1 to {len(DIGIT_NAMES)} digit classes')
    chosen = slice(0 if background else 1, num_classes + 1)
    return {'classes': list(CLASSES[chosen]), 'palette': [list(colour) for colour in PALETTE[chosen]]}


def generate(
    root: str | os.PathLike[str],
    split_counts: Mapping[str, int],
    size: tuple[int, int] = (128, 128),
    seed: int = 0,
    difficulty: str | Difficulty = 'easy',
    progress: Callable[[int, int], object] | None = None,
    overwrite: bool = False,
) -> DigitScenes:
    """Write a data set, or find that it is there.

    Image i of a split depends on ``seed``, the split, i, ``size`` and ``difficulty`` alone, so a larger data set
    begins with the images of a smaller one. The same versions of numpy, OpenCV and Pillow give the same bytes.
    The data set appears under ``root`` whole or not at all; a killed run leaves nothing but a folder
    ``.NAME.*`` beside it, which may be deleted.

    Args:
        root: folder to make.
        split_counts: number of images of 'train', of 'val' or of both.
        size: (height, width) in pixels, each at least 64.
        seed: >= 0.
        difficulty: 'easy', 'medium', 'hard' or one's own.
        progress: called with (images done, images in all) after every image.
        overwrite: whether to make it anew where ``root`` holds Digit Scenes. Anything else is never replaced.

    Raises:
        ValueError: an argument is out of its range.
        FileExistsError: ``root`` holds something else: a data set of other parameters, an incomplete one, or
            files that are no Digit Scenes.
        ImportError: scikit-learn or scikit-image is missing.
    """
    parameters = _parameters(split_counts, size, seed, difficulty)
    root = Path(root).resolve()
    if (meta := _reusable(root, parameters, overwrite)) is not None:
        return DigitScenes(root, meta, reused=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = root.with_name(f'.{root.name}.{uuid.uuid4().hex[:8]}.partial')
    try:
        meta = _write(partial, parameters, _preset(difficulty), progress)
        # Somebody else may have made it meanwhile, or, what is refused, something else.
        if (theirs := _reusable(root, parameters, overwrite)) is not None:
            return DigitScenes(root, theirs, reused=True)
        _swap(partial, root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return DigitScenes(root, meta, reused=False)


def _preset(difficulty: str | Difficulty) -> Difficulty:
    if isinstance(difficulty, Difficulty):
        return difficulty
    if difficulty not in DIFFICULTIES:
        raise ValueError(f'difficulty is {difficulty!r}; expected one of {sorted(DIFFICULTIES)} or a Difficulty')
    return DIFFICULTIES[difficulty]


def _parameters(
    split_counts: Mapping[str, int], size: tuple[int, int], seed: int, difficulty: str | Difficulty
) -> dict[str, Any]:
    """All that decides the files, checked, as JSON gives it back."""
    if not split_counts or not set(split_counts) <= set(SPLITS):
        raise ValueError(f'split_counts has the splits {list(split_counts)}; expected some of {list(SPLITS)}')
    if any(count < 1 for count in split_counts.values()):
        raise ValueError(f'split_counts is {dict(split_counts)}; expected at least 1 image in each split named')
    if len(size) != 2 or min(size) < LEAST_SIDE:
        raise ValueError(f'size is {size}; expected (height, width), each at least {LEAST_SIDE} pixels')
    if seed < 0:
        raise ValueError(f'seed is {seed}; expected 0 or more')
    parameters = {
        'format': FORMAT,
        'split_counts': {split: int(split_counts[split]) for split in SPLITS if split in split_counts},
        'size': [int(side) for side in size],
        'seed': int(seed),
        'difficulty': asdict(_preset(difficulty)),
    }
    return json.loads(json.dumps(parameters))


def _reusable(root: Path, parameters: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The meta of the data set at ``root`` if it is the one wanted, None if one can be written there."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    try:
        meta = json.loads((root / 'meta.json').read_text())
        found = meta['parameters'] if meta['kind'] == 'digit_scenes' else None
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found is None:
        raise FileExistsError(
            f'{root} exists and is no Digit Scenes data set, so it is left alone; name another folder'
        )
    if overwrite:
        return None
    if found != parameters:
        old, new = _flat(found), _flat(parameters)
        other = [f'{key} {old.get(key)} instead of {new.get(key)}' for key in new if old.get(key) != new[key]]
        raise FileExistsError(
            f'{root} holds a Digit Scenes data set made with {"; ".join(other)}; '
            'name another folder, or allow it to be replaced (overwrite=True, --overwrite)'
        )
    lacking = [path for path in _files(root, parameters['split_counts']) if not path.is_file()]
    if lacking:
        raise FileExistsError(
            f'{root} lacks {len(lacking)} of its files, {lacking[0]} first; '
            'have it made anew (overwrite=True, --overwrite)'
        )
    return meta


def _flat(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in parameters.items() if k != 'difficulty'}, **parameters.get('difficulty', {})}


def _files(root: Path, split_counts: Mapping[str, int]) -> list[Path]:
    files = []
    for split, count in split_counts.items():
        files.append(root / 'annotations' / f'instances_{split}.json')
        for index in range(count):
            files.append(root / 'images' / FOLDERS[split] / f'{_stem(split, index)}.jpg')
            files.append(root / 'annotations' / FOLDERS[split] / f'{_stem(split, index)}.png')
    return files


def _stem(split: str, index: int) -> str:
    return f'{split}_{index:06d}'


def _swap(partial: Path, root: Path) -> None:
    """Put ``partial`` in the place of ``root``; what was there goes once the new one stands."""
    if not root.exists():
        partial.rename(root)
        return
    old = partial.with_suffix('.old')
    root.rename(old)
    try:
        partial.rename(root)
    except BaseException:
        old.rename(root)
        raise
    shutil.rmtree(old)


def _write(
    folder: Path,
    parameters: Mapping[str, Any],
    difficulty: Difficulty,
    progress: Callable[[int, int], object] | None,
) -> dict[str, Any]:
    total, done = sum(parameters['split_counts'].values()), 0
    instances = {}
    for split, count in parameters['split_counts'].items():
        images, annotations = folder / 'images' / FOLDERS[split], folder / 'annotations' / FOLDERS[split]
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        coco = _coco(difficulty.num_classes)
        for index in range(count):
            stem = _stem(split, index)
            scene = paint(parameters['seed'], split, index, tuple(parameters['size']), difficulty)
            Image.fromarray(scene.image).save(images / f'{stem}.jpg', **JPEG)
            Image.fromarray(scene.semantic).save(annotations / f'{stem}.png')
            _add(coco, scene, index + 1, f'{stem}.jpg')
            done += 1
            if progress is not None:
                progress(done, total)
        (folder / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco))
        instances[split] = len(coco['annotations'])
    meta = _meta(parameters, instances)
    (folder / 'meta.json').write_text(json.dumps(meta, indent=1) + '\n')
    return meta


def _meta(parameters: Mapping[str, Any], instances: Mapping[str, int]) -> dict[str, Any]:
    versions = {'python': platform.python_version()}
    for package in ('numpy', 'opencv-python', 'opencv-python-headless', 'Pillow', 'scikit-learn', 'scikit-image'):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    sources = {
        split: {
            'digits': f'load_digits() samples {DIGIT_SPLIT[split].start} to {DIGIT_SPLIT[split].stop - 1}',
            'photographs': [f'{photo.package}/{photo.file}' for photo in PHOTOGRAPHS[split]],
        }
        for split in parameters['split_counts']
    }
    return {
        'kind': 'digit_scenes',
        'parameters': dict(parameters),
        'instances': dict(instances),
        'metainfo': metainfo(parameters['difficulty']['num_classes']),
        'sources': sources,
        'versions': versions,
    }


def _coco(num_classes: int) -> dict[str, list]:
    """A COCO file without images. Category ids are those of the semantic masks."""
    categories = [
        {'id': digit + 1, 'name': DIGIT_NAMES[digit], 'supercategory': 'digit'} for digit in range(num_classes)
    ]
    return {'images': [], 'annotations': [], 'categories': categories}


def _add(coco: dict[str, list], scene: Scene, image_id: int, file_name: str) -> None:
    height, width = scene.semantic.shape
    coco['images'].append({'id': image_id, 'file_name': file_name, 'height': height, 'width': width})
    for instance in scene.instances:
        ys, xs = np.nonzero(instance.mask)
        left, top = int(xs.min()), int(ys.min())
        coco['annotations'].append(
            {
                'id': len(coco['annotations']) + 1,
                'image_id': image_id,
                'category_id': instance.digit + 1,
                'bbox': [left, top, int(xs.max()) + 1 - left, int(ys.max()) + 1 - top],
                'area': len(xs),
                'iscrowd': 0,
                'segmentation': run_lengths(instance.mask),
            }
        )


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """The COCO run-length code, uncompressed, of a (H, W) bool mask: exact, with holes and separate parts."""
    pixels = np.concatenate([[False], mask.ravel(order='F')])
    changes = np.flatnonzero(pixels[1:] != pixels[:-1])
    counts = np.diff(np.concatenate([[0], changes, [mask.size]]))
    return {'size': list(mask.shape), 'counts': counts.tolist()}
