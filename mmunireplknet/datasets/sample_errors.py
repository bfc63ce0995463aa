"""Errors of a data pipeline that name the sample: what only shows when an image is opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mmcv.transforms
from mmengine.dataset import Compose

from .label_ranges import LabelRange, label_fault

__all__ = ['NamingCompose', 'SampleError', 'name_samples']


class SampleError(RuntimeError):
    """A sample that cannot be used; the message says which, why, and what to do.

    A worker process hands an error on as the text of its traceback: ``sentence`` is the same in both processes.
    """

    @property
    def sentence(self) -> str:
        """The message without a traceback."""
        return str(self).rpartition(f'{type(self).__name__}: ')[2].strip()


class NamingCompose(Compose):
    """A pipeline like ``pipeline``, sharing its transforms, whose errors are a ``SampleError``.

    It also stops at what the transforms of mm* let pass: labels of another size than the image, of which masks would
    be scaled and boxes misplaced, and labels that the model has no class for.

    Args:
        pipeline: the pipeline of a data set.
        ranges: which labels a segmentation mask may have at its end; none to leave them alone.
    """

    def __init__(self, pipeline: Compose | mmcv.transforms.Compose, ranges: tuple[LabelRange, ...] = ()) -> None:
        self.transforms = pipeline.transforms
        self.ranges = ranges

    def __call__(self, data: dict[str, Any]) -> dict[str, Any] | None:
        """Apply the transforms; None, as theirs, asks for another sample.

        Raises:
            SampleError: A transform fails, or image and labels do not go together.
        """
        sample, labels = _describe(data), None
        for transform in self.transforms:
            before = frozenset(data)
            try:
                result = transform(data)
            except SampleError:  # of an image that this one is mixed with
                raise
            except Exception as error:
                text = ' '.join(str(error).split()) or type(error).__name__
                raise SampleError(
                    f'{sample} cannot be loaded, {type(transform).__name__} says: {text}; repair it, or remove it '
                    'from the data set'
                ) from error
            if result is None:
                return None
            data = result
            if isinstance(data, dict):
                labels = data.get('gt_seg_map', labels)  # the last are those that were packed
                if fault := _fault(data, before):
                    raise SampleError(f'{sample} {fault}')
        if labels is not None and (fault := label_fault(labels, self.ranges)):
            raise SampleError(f'{sample} {fault}')
        return data


def name_samples(dataset: Any, ranges: tuple[LabelRange, ...] = ()) -> None:
    """Let the errors of a data set's pipeline, and of those it wraps, name the sample.

    Args:
        dataset: a built data set of mmengine, mmdet, mmseg or mmpretrain; changed in place.
        ranges: which labels a segmentation mask may have; none to leave them alone.
    """
    for inner in [*(getattr(dataset, 'datasets', None) or []), getattr(dataset, 'dataset', None)]:
        if inner is not None:
            name_samples(inner, ranges)
    if type(getattr(dataset, 'pipeline', None)) in (Compose, mmcv.transforms.Compose):  # mmcv's by hooks that switch
        dataset.pipeline = NamingCompose(dataset.pipeline, ranges)


def _describe(data: Mapping[str, Any]) -> str:
    image = data.get('img_path') or f'sample {data.get("sample_idx", "of unknown index")}'
    number = f' (image id {data["img_id"]})' if 'img_id' in data else ''
    labels = f' with {data["seg_map_path"]}' if data.get('seg_map_path') else ''
    return f'{image}{number}{labels}'


def _fault(data: Mapping[str, Any], before: frozenset[str]) -> str | None:
    """What is wrong with the image or the mask that the last transform brought."""
    if 'img' in data and 'img' not in before:
        listed = data.get('height'), data.get('width')
        size = tuple(data['img'].shape[:2])
        if 'instances' in data and None not in listed and listed != size:
            return (
                f'is {size[0]} by {size[1]} pixels (height by width), but its annotations are for {listed[0]} by '
                f'{listed[1]}; write them for the image as it is, turned as its EXIF says'
            )
    if 'gt_seg_map' in data and 'gt_seg_map' not in before and 'img' in data:
        # Test pipelines read the truth behind the resizing, which the image alone goes through.
        mask, size = data['gt_seg_map'].shape[:2], tuple(data.get('ori_shape', data['img'].shape)[:2])
        if mask != size:
            return f'has a mask of {mask[0]} by {mask[1]} pixels, but is {size[0]} by {size[1]}; write it for the image'
    return None
