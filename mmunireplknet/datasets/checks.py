"""Say before a run starts, and in one sentence, that its data is not there or not as it should be."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import ade20k, coco, imagenet
from .annotations import Findings, check_annotations
from .digit_painting import DIFFICULTIES

# Data sets of mmpretrain that fetch themselves.
_SELF_FETCHING = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')


def missing_data_message(dataset: str | os.PathLike[str] | Mapping[str, Any] | None) -> str | None:
    """What is missing of a data set, where it must lie and how to get it; None if all is there.

    Args:
        dataset: config of an mmseg, mmdet or mmpretrain data set, of a wrapper (``dataset`` or ``datasets``) or of
            a data loader, or a data root. Data that is not on a local disk is taken to be there.

    Returns:
        One sentence, or None.
    """
    if dataset is None:
        return None
    if not isinstance(dataset, Mapping):
        return _message([Path(dataset)], str(dataset), '', {})
    for cfg in _innermost(dataset):
        kind = _kind(cfg)
        if kind not in _SELF_FETCHING and _local(cfg):
            root = str(cfg.get('data_root') or '')
            if message := _message(_paths(root, cfg), root, kind, cfg):
                return message
    return None


def wrong_data_message(
    dataset: Mapping[str, Any] | None, notes: list[str] | None = None, unlabelled: bool = False
) -> str | None:
    """What is missing of a data set, or else what is wrong with its annotation file in COCO's format; None if nothing.

    Args:
        dataset: as for ``missing_data_message``.
        notes: takes a sentence for each kind of thing that mmdet passes over without a word, such as a box of no size.
        unlabelled: whether the file may list images without annotations.

    Returns:
        One sentence, or None.
    """
    if message := missing_data_message(dataset):
        return message
    for cfg in _innermost(dataset or {}):
        file = _annotation_file(cfg)
        if file is None:
            continue
        folder = _image_folder(cfg)
        found = check_annotations(file, folder, _classes(cfg), _uses_masks(cfg), unlabelled)
        if not found.of_boxes and _kind(cfg) != 'CocoDataset':
            continue
        if found.faults:
            return _first_fault(found, folder)
        if not found.usable and (cfg.get('filter_cfg') or {}).get('filter_empty_gt'):
            return f'{file} has no image with a box of a class of the config; name its classes in metainfo, or fill it.'
        if notes is not None:
            notes += found.notes
    return None


def wrong_test_message(
    dataset: Mapping[str, Any] | None, evaluator: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
) -> str | None:
    """The same for an evaluation, whose metric may read an annotation file of its own, or none when it only writes.

    Args:
        dataset: as for ``missing_data_message``.
        evaluator: ``test_evaluator`` of the config.

    Returns:
        One sentence, or None.
    """
    metrics = _metrics(evaluator)
    unlabelled = bool(metrics) and all(metric.get('format_only') for metric in metrics)
    if message := wrong_data_message(dataset, unlabelled=unlabelled):
        return message
    return missing_truth_message(dataset, evaluator, 'test_evaluator')


def missing_truth_message(
    dataset: Mapping[str, Any] | None,
    evaluator: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    name: str,
) -> str | None:
    """Which annotation file that a metric compares with is not there; None if all are.

    Args:
        dataset: as for ``missing_data_message``; its own file is proposed instead.
        evaluator: one metric or several, of a config.
        name: what it is called there.

    Returns:
        One sentence, or None.
    """
    for metric in _metrics(evaluator):
        file = _annotation_file(metric)
        if file is not None and not os.path.exists(file):
            own = next(filter(None, map(_annotation_file, _innermost(dataset or {}))), 'FILE')
            return (
                f'The data is not there: {file}, which {_kind(metric)} of {name} compares with, does not '
                f'exist; put it there, or name another with --cfg-options {name}.ann_file={own}.'
            )
    return None


def _metrics(evaluator: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
    return [evaluator] if isinstance(evaluator, Mapping) else list(evaluator or [])


def _innermost(dataset: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The data sets in a wrapper or a data loader; a data set itself is the only one."""
    if 'datasets' not in dataset and 'dataset' not in dataset:
        yield dataset
        return
    for cfg in [*(dataset.get('datasets') or []), dataset.get('dataset')]:
        if isinstance(cfg, Mapping):
            yield from _innermost(cfg)


def _kind(dataset: Mapping[str, Any]) -> str:
    kind = dataset.get('type', '')
    kind = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
    return kind.rpartition('.')[2]


def _local(dataset: Mapping[str, Any]) -> bool:
    return (dataset.get('backend_args') or {}).get('backend', 'local') in ('local', 'LocalBackend')


def _annotation_file(dataset: Mapping[str, Any]) -> str | None:
    file = dataset.get('ann_file')
    if not isinstance(file, str) or not file.endswith('.json') or not _local(dataset):
        return None
    path = os.path.join(str(dataset.get('data_root') or ''), file)
    return None if '://' in path else path


def _image_folder(dataset: Mapping[str, Any]) -> str:
    prefix = dataset.get('data_prefix') or {}
    inner = prefix.get('img') or prefix.get('img_path') or '' if isinstance(prefix, Mapping) else str(prefix)
    return os.path.join(str(dataset.get('data_root') or ''), inner)


def _classes(dataset: Mapping[str, Any]) -> Sequence[str] | None:
    """Names of the classes, where the config or the data set's own type tells them."""
    if classes := (dataset.get('metainfo') or {}).get('classes'):
        return [classes] if isinstance(classes, str) else classes
    if _kind(dataset) != 'CocoDataset':
        return None
    from mmdet.datasets import CocoDataset  # what builds the data set a moment later

    return CocoDataset.METAINFO['classes']


def _uses_masks(dataset: Mapping[str, Any]) -> bool:
    return any(step.get('with_mask') for step in dataset.get('pipeline') or [] if isinstance(step, Mapping))


def _first_fault(found: Findings, folder: str) -> str:
    if len(found.faults) == 1:
        return f'{found.faults[0]}.'
    return (
        f'{found.faults[0]}, and there are {len(found.faults) - 1} other kinds of faults, which '
        f'python tools/dataset_preparation/coco.py --annotations {found.file} --images {folder or "."} lists.'
    )


def _paths(root: str, dataset: Mapping[str, Any]) -> list[Path]:
    """What the data set reads: its annotation file and the folders of ``data_prefix``, else its root."""
    prefix = dataset.get('data_prefix') or dataset.get('split') or ''
    parts = [dataset.get('ann_file') or '', *(prefix.values() if isinstance(prefix, Mapping) else [prefix])]
    found = [os.path.join(root, part) for part in parts if part] or [root]
    return [Path(path) for path in found if path and '://' not in path]


def _message(paths: list[Path], root: str, kind: str, dataset: Mapping[str, Any]) -> str | None:
    lacking = [path for path in paths if not _there(path)]
    if not lacking or '://' in root:
        return None
    state = 'is empty' if lacking[0].exists() else 'does not exist'
    where = '' if lacking[0].is_absolute() else f' in {Path.cwd()}'
    more = f', nor do {len(lacking) - 1} more that the config names' if len(lacking) > 1 else ''
    return f'The data is not there: {lacking[0]} {state}{where}{more}; {_remedy(root, kind, dataset)}.'


def _there(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _remedy(root: str, kind: str, dataset: Mapping[str, Any]) -> str:
    name = root.lower()
    if 'digit_scenes' in name:
        classes = (dataset.get('metainfo') or {}).get('classes') or ()
        digits = len([label for label in classes if label != 'background'])
        difficulty = next((name for name in DIFFICULTIES if root.rstrip('/').endswith(f'_{name}')), '')
        option = f' --difficulty {difficulty}' if difficulty else ''
        option += '' if digits in (0, 10) else f' --num-classes {digits}'
        return f'python tools/dataset_preparation/digit_scenes.py --out {root.rstrip("/")}{option} makes it'
    if 'adechallengedata2016' in name or kind == 'ADE20KDataset':
        place = root.rstrip('/')
        option = '' if place in ('', ade20k.ROOT) else f' --root {place}'
        return (
            f'ADE20K must lie in {place or ade20k.ROOT}, and '
            f'python tools/dataset_preparation/ade20k.py{option} --download brings it there from {ade20k.URLS[0]}'
        )
    if 'coco' in name:
        option = '' if root.rstrip('/') in ('', coco.ROOT) else f' --root {root.rstrip("/")}'
        return (
            f'COCO 2017 must lie in {root or coco.ROOT}, and python tools/dataset_preparation/coco.py{option} '
            f'--download brings it there from {coco.URL} (https://cocodataset.org/#download)'
        )
    if 'imagenet' in name or kind in ('ImageNet', 'ImageNet21k'):
        key = '22k' if '21k' in name + kind or '22k' in name else '1k'
        data = imagenet.DATA[key]
        options = ('' if key == '1k' else ' --data 22k') + ('' if root in ('', data.root) else f' --root {root}')
        return (
            f'{data.name} must lie in {root or data.root}, from {imagenet.PAGE}, which takes an account, and '
            f'python tools/dataset_preparation/imagenet.py{options} says whether it is whole'
        )
    return f'put it there, or name its place: --cfg-options data_root=PLACE (now {root or "not set"!r})'
