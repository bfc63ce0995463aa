"""Pictures of results: predictions beside their truth, and the curves of a training run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS

from ..datasets.files import spread
from ..engine.inference import Predictor

__all__ = ['Comparison', 'compare', 'draw_results', 'paint_instances', 'paint_labels', 'read_scalars']

LEAST_SCORE = 0.5  # of an instance that is drawn
# What the evaluators of a task are read for: (name of the metric, title, largest value).
HEADLINES: Mapping[str, Sequence[tuple[str, str, float]]] = {
    'mmseg': [('mIoU', 'mIoU', 100.0)],
    'mmdet': [
        ('coco/bbox_mAP', 'box AP', 1.0),
        ('coco/bbox_mAP_50', 'box AP50', 1.0),
        ('coco/segm_mAP', 'mask AP', 1.0),
        ('coco/segm_mAP_50', 'mask AP50', 1.0),
    ],
}


def read_scalars(work_dir: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Logged values by name as (step, value), over all runs of a work dir; a resumed step counts once.

    Raises:
        FileNotFoundError: The work dir holds no log of mmengine's LocalVisBackend.
    """
    files = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
    if not files:
        raise FileNotFoundError(f'{work_dir} holds no */vis_data/scalars.json: nothing was logged there.')
    series: dict[str, dict[int, float]] = {}
    for file in files:
        for line in file.read_text().splitlines():
            record = json.loads(line)
            for name, value in record.items():
                if isinstance(value, (int, float)) and name not in ('step', 'iter', 'epoch'):
                    series.setdefault(name, {})[int(record['step'])] = float(value)
    return {name: sorted(values.items()) for name, values in series.items()}


def percentages(scope: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that a task is read for, by title, in percent.

    Args:
        scope: 'mmseg' or 'mmdet'.
        metrics: What its evaluator returned.
    """
    return {title: 100 * metrics[name] / largest for name, title, largest in HEADLINES[scope] if name in metrics}


def paint_labels(labels: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    """Label map (H, W) -> RGB (H, W, 3); labels beyond the palette are white."""
    table = np.full((256, 3), 255, np.uint8)
    table[: len(palette)] = palette
    return table[labels]


def paint_instances(
    image: np.ndarray, labels: np.ndarray, boxes: np.ndarray, masks: np.ndarray, palette: Sequence[Sequence[int]]
) -> np.ndarray:
    """Masks and boxes over an image, in the colours of their classes.

    Args:
        image: RGB uint8 (H, W, 3), which is left as it is.
        labels: (N,) classes.
        boxes: (N, 4) as x1, y1, x2, y2 in pixels.
        masks: (N, H, W) bool.
        palette: RGB of the classes.

    Returns:
        RGB uint8 (H, W, 3).
    """
    height, width = image.shape[:2]
    out = image.astype(np.float32)
    for label, mask in zip(labels, masks, strict=True):
        out[mask] = 0.4 * out[mask] + 0.6 * np.asarray(palette[label])
    for label, box in zip(labels, boxes, strict=True):
        x1, y1 = np.maximum(np.floor(box[:2]).astype(int), 0)
        x2, y2 = np.minimum(np.ceil(box[2:]).astype(int), (width, height)) - 1
        if x1 <= x2 and y1 <= y2:
            out[y1 : y2 + 1, [x1, x2]] = palette[label]
            out[[y1, y2], x1 : x2 + 1] = palette[label]
    return out.round().astype(np.uint8)


@dataclass(frozen=True)
class Comparison:
    """Images of a validation set with truth and prediction painted.

    Attributes:
        rows: Name of the row to RGB pictures (H, W, 3), one an image.
        legend: Names and RGB colours.
    """

    rows: Mapping[str, Sequence[np.ndarray]]
    legend: Sequence[tuple[str, Sequence[int]]]


def compare(cfg: Config, checkpoint: str, deploy: bool = False, count: int = 8) -> Comparison:
    """Predict on images from all over the validation set and paint truth and prediction.

    Args:
        cfg: Config of mmseg or mmdet with ``val_dataloader``.
        checkpoint: File, https address or short name of a published file.
        deploy: Reparameterize the backbone first.
        count: Number of images.

    Raises:
        ValueError: The config is of another library.
    """
    predictor = Predictor(cfg, checkpoint, deploy=deploy)
    if predictor.scope not in HEADLINES:
        raise ValueError(f'default_scope={predictor.scope!r}: expected a config of {" or ".join(HEADLINES)}.')
    segments = predictor.scope == 'mmseg'
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', **({} if segments else dict(with_bbox=True, with_mask=True))),
        dict(type='PackSegInputs' if segments else 'PackDetInputs', meta_keys=('img_path',)),
    ]
    dataset = DATASETS.build({**cfg.val_dataloader.dataset, 'pipeline': pipeline})
    palette = dataset.metainfo['palette']
    rows: dict[str, list[np.ndarray]] = {'image': [], 'truth': [], 'prediction': []}
    for item in (dataset[i] for i in spread(range(len(dataset)), count)):
        image = np.ascontiguousarray(item['inputs'].numpy()[::-1].transpose(1, 2, 0))
        truth, prediction = item['data_samples'], predictor(item['data_samples'].img_path).cpu()
        rows['image'].append(image)
        if segments:
            rows['truth'].append(paint_labels(truth.gt_sem_seg.data[0].numpy(), palette))
            rows['prediction'].append(paint_labels(prediction.pred_sem_seg.data[0].numpy(), palette))
        else:
            rows['truth'].append(_painted(image, truth.gt_instances, truth.gt_instances.masks.masks, palette))
            found = prediction.pred_instances
            found = found[found.scores > LEAST_SCORE]
            rows['prediction'].append(_painted(image, found, found.masks.numpy(), palette))
    return Comparison(rows, list(zip(dataset.metainfo['classes'], palette, strict=True)))


def _painted(image: np.ndarray, instances: Any, masks: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    boxes = instances.bboxes.tensor if hasattr(instances.bboxes, 'tensor') else instances.bboxes
    return paint_instances(image, instances.labels.numpy(), boxes.numpy(), masks.astype(bool), palette)


def draw_results(
    comparison: Comparison,
    scope: str,
    scalars: Mapping[str, Sequence[tuple[int, float]]],
    out: str | Path,
    title: str = '',
) -> None:
    """Write one picture: a column an image, the legend, and below the curves of the loss and of the metrics.

    Args:
        comparison: From ``compare``.
        scope: 'mmseg' or 'mmdet': which metrics to draw.
        scalars: From ``read_scalars``; empty for no curves.
        out: File to write.
        title: Above everything.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pictures = list(comparison.rows.values())
    columns = len(pictures[0])
    height, width = pictures[0][0].shape[:2]
    tall = 1.6 * len(pictures) * height / width + 1
    figure = Figure(figsize=(1.6 * columns, tall + (2.7 if scalars else 0)), layout='constrained')
    FigureCanvasAgg(figure)
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=(tall, 2.7))) if scalars else (figure, None)
    grid = top.subplots(len(pictures), columns, squeeze=False)
    for row, (name, line) in enumerate(comparison.rows.items()):
        grid[row][0].set_ylabel(name, fontsize=11)
        for axes, picture in zip(grid[row], line, strict=True):
            axes.imshow(picture)
            axes.set_xticks([])
            axes.set_yticks([])
    _legend(top, comparison.legend, max(1, int(1.2 * columns)))
    if title:
        top.suptitle(title, fontsize=12)
    if bottom is not None:
        left, right = bottom.subplots(1, 2)
        _curves(left, {'training loss': scalars.get('loss', [])}, '')
        _curves(right, {
            f'validation {name} (%)': [(step, 100 * value / largest) for step, value in scalars.get(key, [])]
            for key, name, largest in HEADLINES[scope]
        }, 'o')  # fmt: skip
        right.set_ylim(0, 100)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def _legend(figure: Any, names: Sequence[tuple[str, Sequence[int]]], columns: int) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=(red / 255, green / 255, blue / 255), edgecolor='grey', label=name)
        for name, (red, green, blue) in names
    ]
    figure.legend(
        handles=handles, loc='outside lower center', ncols=min(len(handles), columns), frameon=False, fontsize=9
    )


def _curves(axes: Any, series: Mapping[str, Sequence[tuple[int, float]]], marker: str) -> None:
    for name, points in series.items():
        axes.plot([step for step, _ in points], [value for _, value in points], marker=marker, label=name)
    axes.set_xlabel('iteration')
    axes.set_title(next(iter(series)) if len(series) == 1 else 'validation', fontsize=11)
    if len(series) > 1:
        axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
