"""Annotation files in COCO's format (https://cocodataset.org/#format-data): what would stop or spoil a training."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import few

__all__ = ['Findings', 'check_annotations']

ANNOTATION_KEYS = ('id', 'image_id', 'category_id', 'bbox', 'area')  # what mmdet reads of every entry
IMAGE_KEYS = ('id', 'file_name', 'height', 'width')

Fault = tuple[str, str]  # its kind, and what is wrong with an entry


@dataclass
class Findings:
    """What an annotation file holds.

    Attributes:
        file: the file.
        images: number of images that it lists.
        annotations: number of its annotations.
        usable: number of images with a box that mmdet keeps.
        of_boxes: whether it is a file of images with boxes; others in this format (captions, panoptic) are not judged.
        file_names: of the images that are listed as they should be.
        categories: names of its classes, in its order.
        faults: one sentence for each kind of thing that is wrong: which entry, how many more, what to do.
        notes: the same for what mmdet leaves out without a word; a training is none the worse for it.
    """

    file: Path
    images: int = 0
    annotations: int = 0
    usable: int = 0
    of_boxes: bool = False
    file_names: list[str] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class _Kinds(dict[str, tuple[str, int]]):
    """The first sentence of each kind, and how many there are."""

    def add(self, kind: str, text: str) -> None:
        first, count = self.get(kind, (text, 0))
        self[kind] = first, count + 1

    def sentences(self) -> list[str]:
        return [text + (f' (and {count - 1:,} more like it)' if count > 1 else '') for text, count in self.values()]


def check_annotations(
    file: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None,
    classes: Sequence[str] | None = None,
    masks: bool = True,
    unlabelled: bool = False,
) -> Findings:
    """Look at every entry of an annotation file, and whether its images are there; none is opened.

    Args:
        file: the annotation file.
        folder: where its images lie; None leaves them out.
        classes: names of the classes that a config trains, in its order; None for those of the file.
        masks: whether masks are used.
        unlabelled: whether a file without a list of annotations will do, as COCO has it for test-dev.
    """
    found = Findings(Path(file))
    content = _read(found, unlabelled)
    if content is None:
        return found
    faults, notes = _Kinds(), _Kinds()
    images = _check_images(found, content['images'], faults)
    found.file_names = [image['file_name'] for image in images.values()]
    if folder is not None:
        _check_files(found, images, Path(folder), faults)
    kept = _check_categories(found, content['categories'], classes, faults, notes)
    with_box = _check_entries(found, content['annotations'], images, kept, masks, faults, notes)
    found.usable = len(with_box)
    if empty := [image for key, image in images.items() if key not in with_box]:
        first = f'image {empty[0]["id"]} ({empty[0]["file_name"]})'
        notes.add(
            'empty',
            f'{found.file}: {len(empty):,} of {len(images):,} images have no box, the first is {first}; '
            'filter_cfg=dict(filter_empty_gt=True) leaves them out of a training',
        )
    found.faults += faults.sentences()
    found.notes += notes.sentences()
    return found


def _read(found: Findings, unlabelled: bool) -> dict[str, Any] | None:
    try:
        content = json.loads(found.file.read_bytes())
    except OSError as error:
        found.faults.append(f'{found.file} cannot be read ({error.strerror}); put the annotation file there')
        return None
    except ValueError as error:
        found.faults.append(f'{found.file} is no whole JSON file ({error}); fetch or write it again')
        return None
    if unlabelled and isinstance(content, dict):
        content.setdefault('annotations', [])
    lists = ('images', 'annotations', 'categories')
    lacking = [key for key in lists if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if lacking:
        found.faults.append(
            f'{found.file} has no list of {" and ".join(lacking)}; expected an annotation file in the format of COCO'
        )
        return None
    found.images, found.annotations = len(content['images']), len(content['annotations'])
    firsts = [*content['images'][:1], *content['annotations'][:1]]
    found.of_boxes = len(firsts) == 2 and 'file_name' in firsts[0] and 'bbox' in firsts[1]
    return content


def _check_images(found: Findings, images: Sequence[Mapping[str, Any]], faults: _Kinds) -> dict[Any, Mapping[str, Any]]:
    """Returns the images that are as they should be by id."""
    good: dict[Any, Mapping[str, Any]] = {}
    for number, image in enumerate(images):
        where = f'{found.file}: image {image.get("id", f"number {number}")} ({image.get("file_name", "no file name")})'
        if lacking := [key for key in IMAGE_KEYS if key not in image]:
            faults.add('image keys', f'{where} has no {few(lacking)}; write it')
        elif image['id'] in good:
            faults.add('image id', f'{where} has the id of {good[image["id"]]["file_name"]}; give it one of its own')
        elif not all(isinstance(image[key], int) and image[key] > 0 for key in ('height', 'width')):
            faults.add(
                'image size',
                f'{where} is {image["height"]} high and {image["width"]} wide; write the size of the image, or remove '
                'it and its annotations',
            )
        else:
            good[image['id']] = image
    return good


def _check_files(found: Findings, images: Mapping[Any, Mapping[str, Any]], folder: Path, faults: _Kinds) -> None:
    """Look for the images by listing each of their folders once, which is faster than asking for each of them."""
    listings: dict[str, dict[str, os.DirEntry[str]]] = {}
    for image in images.values():
        path = os.path.join(folder, image['file_name'])
        parent, name = os.path.split(path)
        if parent not in listings:
            listings[parent] = {entry.name: entry for entry in os.scandir(parent)} if os.path.isdir(parent) else {}
        entry = listings[parent].get(name)
        remedy = 'put it there, or remove it and its annotations from the file'
        if entry is None or not entry.is_file():
            faults.add('file', f'{path}, image {image["id"]} of {found.file}, does not exist; {remedy}')
        elif entry.stat().st_size == 0:
            faults.add('empty file', f'{path}, image {image["id"]} of {found.file}, has no content; {remedy}')


def _check_categories(
    found: Findings,
    categories: Sequence[Mapping[str, Any]],
    classes: Sequence[str] | None,
    faults: _Kinds,
    notes: _Kinds,
) -> dict[Any, bool]:
    """Returns for each category id whether the config trains it."""
    if broken := [entry for entry in categories if not {'id', 'name'} <= entry.keys()]:
        faults.add('category', f'{found.file}: the category {broken[0]} has no id and name; write both')
    names = {entry['id']: str(entry['name']) for entry in categories if {'id', 'name'} <= entry.keys()}
    found.categories = list(names.values())
    if classes is None:
        return dict.fromkeys(names, True)
    if unknown := [name for name in classes if name not in found.categories]:
        faults.add(
            'classes',
            f'{found.file} has no category {few(unknown)}, which is among the {len(classes)} classes of the config; '
            f'its categories are {few(found.categories)}: name them in metainfo=dict(classes=...) of the data set',
        )
    elif (order := [name for name in found.categories if name in set(classes)]) != list(classes):
        notes.add(
            'order',
            f'{found.file} has the categories in another order than the classes of the config, and mmdet labels by '
            f'the file; write metainfo=dict(classes=...) as {few(order)} or results bear wrong names',
        )
    return {key: name in classes for key, name in names.items()}


def _check_entries(
    found: Findings,
    annotations: Sequence[Mapping[str, Any]],
    images: Mapping[Any, Mapping[str, Any]],
    kept: Mapping[Any, bool],
    masks: bool,
    faults: _Kinds,
    notes: _Kinds,
) -> set[Any]:
    """Returns the ids of the images with a box that mmdet keeps."""
    seen: set[Any] = set()
    with_box: set[Any] = set()
    for number, entry in enumerate(annotations):
        image = images.get(entry.get('image_id'))
        fault = _entry_fault(entry, image, kept, seen)
        if fault is None and image is not None and kept[entry['category_id']] and not entry.get('ignore'):
            if left_out := _left_out(entry['bbox'], entry['area'], image):
                kind, text = left_out
                notes.add(kind, f'{_name(found, entry, number, image)} {text}, so mmdet leaves it out; correct it')
            else:
                with_box.add(entry['image_id'])
                fault = _mask_fault(entry.get('segmentation'), image) if masks else None
        if fault is not None:
            kind, text = fault
            faults.add(kind, f'{_name(found, entry, number, image)} {text}')
        seen.add(entry.get('id'))
    return with_box


def _name(found: Findings, entry: Mapping[str, Any], number: int, image: Mapping[str, Any] | None) -> str:
    of = f' of {image["file_name"]}' if image else ''
    return f'{found.file}: annotation {entry.get("id", f"number {number}")}{of}'


def _entry_fault(
    entry: Mapping[str, Any], image: Mapping[str, Any] | None, kept: Mapping[Any, bool], seen: set[Any]
) -> Fault | None:
    if lacking := [key for key in ANNOTATION_KEYS if key not in entry]:
        return 'keys', f'has no {few(lacking)}; write it'
    if entry['id'] in seen:
        return 'id', 'has the id of another one; give it one of its own'
    if image is None:
        return (
            'image',
            f'belongs to image {entry["image_id"]}, which is not listed as it should be; list it, or remove it',
        )
    if entry['category_id'] not in kept:
        ids = list(kept)
        span = (
            f'{min(ids)} to {max(ids)}'
            if ids and all(isinstance(key, int) for key in ids)
            else few(list(map(str, ids)))
        )
        return 'category id', (
            f'has the category id {entry["category_id"]}, but the {len(ids)} categories of the file have {span}; '
            'correct the id, or list the category'
        )
    bbox = entry['bbox']
    if len(bbox) != 4 or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in bbox):
        return 'box', f'has the box {bbox}; expected four finite numbers [x, y, width, height]'
    if bbox[2] < 0 or bbox[3] < 0:
        return 'box size', f'has the box {bbox} of negative size; expected [x, y, width, height], not two corners'
    return None


def _left_out(bbox: Sequence[float], area: float, image: Mapping[str, Any]) -> Fault | None:
    """Why mmdet's CocoDataset would leave a box out."""
    x, y, width, height = bbox
    if width < 1 or height < 1:
        return 'small', f'has a box of {width} by {height} pixels'
    if area <= 0:
        return 'area', f'has the area {area}'
    if min(x + width, image['width']) <= max(x, 0) or min(y + height, image['height']) <= max(y, 0):
        return 'outside', 'has a box outside of its image'
    return None


def _mask_fault(mask: Any, image: Mapping[str, Any]) -> Fault | None:
    size = [image['height'], image['width']]
    remedy = 'write its mask for the image as it is'
    if not mask:
        return 'no mask', 'has no mask, which the config trains; write its segmentation, or remove it'
    if isinstance(mask, list):
        return None  # polygons have no size
    if not isinstance(mask, dict) or not {'counts', 'size'} <= mask.keys():
        return 'mask', f'has a mask that is neither polygons nor an RLE of size and counts; {remedy}'
    if list(mask['size']) != size:
        given = ' by '.join(map(str, mask['size']))
        return (
            'mask size',
            f'has a mask of {given} pixels, but its image is {size[0]} by {size[1]} (height by width); {remedy}',
        )
    if isinstance(mask['counts'], list) and (total := sum(mask['counts'])) != math.prod(size):
        return 'mask counts', f'has a mask whose counts make {total:,} pixels instead of {math.prod(size):,}; {remedy}'
    return None
