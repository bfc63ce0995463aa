"""Say before a run starts, and in one sentence, that its data is not there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import ade20k, imagenet

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
    if 'datasets' in dataset or 'dataset' in dataset:
        inner = [*(dataset.get('datasets') or []), dataset.get('dataset')]
        messages = (missing_data_message(cfg) for cfg in inner if isinstance(cfg, Mapping))
        return next((message for message in messages if message), None)
    kind = dataset.get('type', '')
    kind = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
    backend = (dataset.get('backend_args') or {}).get('backend', 'local')
    if kind.rpartition('.')[2] in _SELF_FETCHING or backend not in ('local', 'LocalBackend'):
        return None
    root = str(dataset.get('data_root') or '')
    return _message(_paths(root, dataset), root, kind, dataset)


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
        option = {0: '', 5: '', 10: ' --difficulty hard'}.get(digits, f' --num-classes {digits}')
        return f'python tools/dataset_preparation/digit_scenes.py --out {root.rstrip("/")}{option} makes it'
    if 'adechallengedata2016' in name or kind.rpartition('.')[2] == 'ADE20KDataset':
        place = root.rstrip('/')
        option = '' if place in ('', ade20k.ROOT) else f' --root {place}'
        return (
            f'ADE20K must lie in {place or ade20k.ROOT}, and '
            f'python tools/dataset_preparation/ade20k.py{option} --download brings it there from {ade20k.URLS[0]}'
        )
    if 'coco' in name:
        return f'the 2017 images and annotations from https://cocodataset.org/#download must lie in {root}'
    if 'imagenet' in name or kind.rpartition('.')[2] in ('ImageNet', 'ImageNet21k'):
        key = '22k' if '21k' in name + kind or '22k' in name else '1k'
        data = imagenet.DATA[key]
        options = ('' if key == '1k' else ' --data 22k') + ('' if root in ('', data.root) else f' --root {root}')
        return (
            f'{data.name} must lie in {root or data.root}, from {imagenet.PAGE}, which takes an account, and '
            f'python tools/dataset_preparation/imagenet.py{options} says whether it is whole'
        )
    return f'put it there, or name its place with --cfg-options (data_root, now {root or "not set"!r})'
