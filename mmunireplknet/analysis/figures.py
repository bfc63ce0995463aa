"""Pictures of results: predictions beside their truth, and the curves of a training run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

__all__ = ['draw_results', 'read_scalars']


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


def colourize(labels: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    """Label map (H, W) -> RGB (H, W, 3); labels beyond the palette are white."""
    table = np.full((256, 3), 255, np.uint8)
    table[: len(palette)] = palette
    return table[labels]


def draw_results(
    images: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    scalars: dict[str, list[tuple[int, float]]],
    out: str | Path,
    title: str = '',
) -> None:
    """Write one picture: a column an image (image, truth, prediction), the legend, and loss and mIoU below.

    Args:
        images: RGB uint8 (H, W, 3).
        truths: Label maps (H, W).
        predictions: Label maps (H, W).
        classes: Names of the labels.
        palette: RGB of the labels.
        scalars: From ``read_scalars``.
        out: File to write.
        title: Above everything.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = len(images)
    figure = Figure(figsize=(1.6 * columns, 8.2), layout='constrained')
    FigureCanvasAgg(figure)
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=(3, 2)))
    rows = top.subplots(3, columns, squeeze=False)
    for column, (image, truth, prediction) in enumerate(zip(images, truths, predictions, strict=True)):
        for row, picture in enumerate((image, colourize(truth, palette), colourize(prediction, palette))):
            axes = rows[row][column]
            axes.imshow(picture)
            axes.set_xticks([])
            axes.set_yticks([])
    for row, name in enumerate(('image', 'truth', 'prediction')):
        rows[row][0].set_ylabel(name, fontsize=11)
    handles = [
        Patch(facecolor=(r / 255, g / 255, b / 255), edgecolor='grey', label=name)
        for name, (r, g, b) in zip(classes, palette, strict=True)
    ]
    top.legend(handles=handles, loc='outside lower center', ncols=min(len(handles), 11), frameon=False, fontsize=9)
    if title:
        top.suptitle(title, fontsize=12)
    left, right = bottom.subplots(1, 2)
    _curve(left, scalars.get('loss', []), 'training loss', 'tab:blue', '')
    _curve(right, scalars.get('mIoU', []), 'validation mIoU (%)', 'tab:green', 'o')
    right.set_ylim(0, 100)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def _curve(axes: object, points: Sequence[tuple[int, float]], name: str, colour: str, marker: str) -> None:
    axes.plot([s for s, _ in points], [v for _, v in points], color=colour, marker=marker)  # type: ignore[attr-defined]
    axes.set_xlabel('iteration')  # type: ignore[attr-defined]
    axes.set_title(name, fontsize=11)  # type: ignore[attr-defined]
    axes.grid(alpha=0.3)  # type: ignore[attr-defined]
