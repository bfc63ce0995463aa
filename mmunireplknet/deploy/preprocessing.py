"""What has to be done to an image before the network, read from a config's test pipeline; and images to try it on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor, nn

from ..engine.inference import find_images
from .exportable import ExportError

__all__ = ['read_preprocessing', 'real_images', 'to_input']

WITHOUT_EFFECT = ('LoadImageFromFile', 'LoadAnnotations', 'PackSegInputs', 'PackDetInputs', 'PackInputs')


def read_preprocessing(cfg: Config, model: nn.Module) -> tuple[dict[str, Any], str]:
    """Facts for meta.json.

    Args:
        cfg: Config with a test pipeline.
        model: Model with a ``data_preprocessor``, whose mean, std and padding count.

    Returns:
        ``preprocess``, and the order of channels, 'RGB' or 'BGR'.

    Raises:
        ExportError: The pipeline holds a step that there is no rule for.
    """
    rules: dict[str, Any] = dict(resize=dict(mode='none'), center_crop=None)
    for step in _pipeline(cfg):
        _add_step(rules, dict(step))
    given = getattr(model, 'data_preprocessor', None)
    mean, std = getattr(given, 'mean', None), getattr(given, 'std', None)
    padding = getattr(given, 'test_cfg', None) or {}
    if isinstance(padding, Mapping) and padding.get('size'):
        raise ExportError(f'data_preprocessor.test_cfg={dict(padding)}: export with size_divisor, or --shape, instead.')
    is_segmentor = hasattr(given, 'size_divisor')  # mmseg's pads by its other arguments in training only
    divisor = padding.get('size_divisor') if is_segmentor else getattr(given, 'pad_size_divisor', 1)
    values = dict(
        mean=[0.0] * 3 if mean is None else _decimals(mean),
        std=[1.0] * 3 if std is None else _decimals(std),
        **rules,
        size_divisor=int(divisor or 1),
        pad_value=float(getattr(given, 'pad_val', getattr(given, 'pad_value', 0))),  # mmseg's own name first
    )
    # mmseg 1.2.2's own, mmengine's, and mmpretrain's.
    swaps = any(getattr(given, name, False) for name in ('channel_conversion', '_channel_conversion', 'to_rgb'))
    return values, 'RGB' if swaps else 'BGR'


def _decimals(values: Tensor) -> list[float]:
    """Of float32 the numbers that somebody wrote down: 123.675, not 123.67500305175781."""
    return [float(str(value)) for value in values.flatten().float().numpy()]


def _pipeline(cfg: Config) -> Sequence[Mapping[str, Any]]:
    loader = cfg.get('test_dataloader') or {}
    dataset = loader.get('dataset', {})
    while 'pipeline' not in dataset and 'dataset' in dataset:  # wrapped
        dataset = dataset['dataset']
    pipeline = dataset.get('pipeline') or cfg.get('test_pipeline')
    if not pipeline:
        raise ExportError(
            'the config has no test pipeline to read the size rules from (test_dataloader or test_pipeline).'
        )
    return pipeline


def _add_step(rules: dict[str, Any], step: dict[str, Any]) -> None:
    kind = str(step.pop('type')).rpartition('.')[2]
    if kind in WITHOUT_EFFECT:
        return
    resize = rules['resize']
    if kind in ('Resize', 'ResizeEdge') and resize['mode'] == 'none' and not rules['center_crop']:
        rules['resize'] = _resize_rule(kind, step)
    elif kind == 'ResizeToMultiple' and 'multiple' not in resize and not rules['center_crop']:
        resize['multiple'] = int(step.get('size_divisor', 32))
    elif kind == 'CenterCrop' and not rules['center_crop'] and not step.get('auto_pad'):
        size = step['crop_size']  # (width, height)
        rules['center_crop'] = [size, size] if isinstance(size, int) else [int(size[1]), int(size[0])]
    else:
        raise ExportError(
            f'test pipeline: there is no rule for {kind} here ({step}). Known are Resize, ResizeEdge with the short '
            'edge, ResizeToMultiple and CenterCrop, each once and in this order; give the config such a test pipeline '
            '(--cfg-options test_dataloader.dataset.pipeline=...).'
        )


def _resize_rule(kind: str, step: Mapping[str, Any]) -> dict[str, Any]:
    how = dict(interpolation=step.get('interpolation', 'bilinear'), backend=step.get('backend', 'cv2'))
    scale = step.get('scale')
    if kind == 'ResizeEdge':
        if step.get('edge', 'short') != 'short':
            raise ExportError(f'test pipeline: ResizeEdge with edge={step["edge"]!r}; there is a rule for short alone.')
        return dict(mode='short_edge', scale=int(step['scale']), **how)
    if scale is None:
        factor = step['scale_factor']
        if not isinstance(factor, (int, float)):
            raise ExportError(
                f'test pipeline: Resize with scale_factor={factor}; there is a rule for one number alone.'
            )
        return dict(mode='exact', factor=float(factor), **how)
    scale = [scale, scale] if isinstance(scale, int) else [int(v) for v in scale]
    return dict(mode='keep_ratio' if step.get('keep_ratio') else 'exact', scale=scale, **how)


# ------------------------------------------------------------------------------------------ images


def real_images(cfg: Config, count: int = 2) -> tuple[list[np.ndarray], str]:
    """Photographs (H, W, 3), BGR, 0 to 255, and where they are from.

    Taken are the first of the config's test data if these are there, else one of scikit-image's, else noise.
    """
    dataset = (cfg.get('test_dataloader') or {}).get('dataset', {})
    prefix = dataset.get('data_prefix') or {}
    if isinstance(prefix, str):
        prefix = dict(img_path=prefix)
    folder = Path(dataset.get('data_root') or '', prefix.get('img_path') or prefix.get('img') or '')
    if folder != Path('') and folder.is_dir():
        try:
            files = find_images([str(folder)])[:count]
            return [mmcv.imread(str(file)) for file in files], "the first of the config's test images"
        except FileNotFoundError:
            pass  # a folder without images
    try:
        from skimage import data
    except ModuleNotFoundError:
        noise = np.random.default_rng(0).integers(0, 256, (count, 256, 320, 3), np.uint8)
        return list(noise), 'random numbers (no test images, no scikit-image)'
    photographs = [data.astronaut(), data.coffee()]
    return [np.ascontiguousarray(image[..., ::-1]) for image in photographs[:count]], 'photographs of scikit-image'


def to_input(images: Sequence[np.ndarray], shape: tuple[int, int, int], meta: Mapping[str, Any]) -> Tensor:
    """Photographs as a normalized input.

    Args:
        images: (H, W, 3), BGR; the first are repeated as often as needed.
        shape: Batch, height and width.
        meta: What is in meta.json.

    Returns:
        (N, 3, height, width) in float32.
    """
    batch, height, width = shape
    mean, std = (np.float32(meta['preprocess'][name]) for name in ('mean', 'std'))
    inputs = []
    for i in range(batch):
        image = mmcv.imresize(images[i % len(images)], (width, height))
        image = image[..., ::-1] if meta['input']['channels'] == 'RGB' else image
        inputs.append(((image - mean) / std).transpose(2, 0, 1))
    return torch.from_numpy(np.ascontiguousarray(inputs, np.float32))
