"""From the float model in the folder of an export to an int8 one, and what that costs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from torch import Tensor

from ..analysis.timing import interleave
from ..datasets.checks import wrong_test_message
from .evaluate import evaluate_exported
from .exportable import Exportable, ExportError
from .formats import Run, open_exported
from .parity import compare
from .quantize import Calibration, quantize
from .report import plain

__all__ = ['TOLERANCE', 'replace_by_int8']

TOLERANCE = 0.25
"""Largest relative difference of an output. Measured are 0.010 to 0.054 with fitting calibration images (UperNet-A
trained on Digit Scenes and on CamVid, small randomised models), and 0.55 to 1.3 with black ones: above this it is no
rounding, but values that the calibration has not seen are cut off."""


def replace_by_int8(
    cfg: Config,
    folder: Path,
    meta: Mapping[str, Any],
    exportable: Exportable,
    images: Calibration,
    inputs: Sequence[Tensor],
    threads: int,
    seconds: float,
    metric: bool,
) -> dict[str, Any]:
    """Quantize the model in ``folder`` in place, and compare both.

    Args:
        cfg: Config of the model; not changed.
        folder: Folder of the export, with its meta.json.
        meta: What is in meta.json.
        exportable: What the float model was made of.
        images: Calibration images; of a detector's, those in which it finds something are kept.
        inputs: What to compare on, each (N, 3, H, W).
        threads: Threads to compute with.
        seconds: About how long to time each of the inputs; 0 leaves that out.
        metric: Test both models on the config's test data.

    Returns:
        The entry 'int8' of the report.

    Raises:
        ExportError: See ``quantize.quantize``.
    """
    file, format = folder / meta['file'], 'onnx' if meta['file'].endswith('.onnx') else 'openvino'
    reason = _without_metric(cfg, meta) if metric else 'Not asked for.'
    runs = {'float': open_exported(file, threads=threads)}
    sizes, metrics = {'float': _bytes(file)}, {}
    if not reason:
        metrics['float'], reason = _test(cfg, folder, threads)
    detects = exportable.task in ('detection', 'instance-segmentation')
    if detects:
        images.keep_detections(runs['float'], meta)
    layers = quantize(format, file, exportable, images, meta)
    runs['int8'], sizes['int8'] = open_exported(file, threads=threads), _bytes(file)
    if not reason:
        metrics['int8'], reason = _test(cfg, folder, threads)
    cases = [_case(exportable, runs, image, not detects, seconds) for image in inputs]
    found = [d['relative'] for case in cases for d in case['differences'].values()]
    return dict(
        images=len(images.files),
        layers=layers,
        bytes=sizes,
        tolerance=None if detects else TOLERANCE,
        passed=all(float(value) <= TOLERANCE for value in found),
        cases=cases,
        metrics=metrics if not reason else {},
        without_metrics=reason,
    )


def _bytes(file: Path) -> int:
    weights = file.with_suffix('.bin')
    return file.stat().st_size + (weights.stat().st_size if weights.exists() else 0)


def _without_metric(cfg: Config, meta: Mapping[str, Any]) -> str:
    """Why there is no metric, '' if there is one."""
    if meta['task'] == 'features':
        return 'Feature maps have none.'
    if not cfg.get('test_evaluator'):
        return 'The config has no test_evaluator.'
    return wrong_test_message(cfg.test_dataloader.dataset, cfg.test_evaluator) or ''


def _test(cfg: Config, folder: Path, threads: int) -> tuple[dict[str, float], str]:
    try:
        metrics = evaluate_exported(copy.deepcopy(cfg), folder, threads=threads)
    except ExportError as error:  # it was exported for one size, say, that the test data has not
        print_log(f'no metric: {error}', 'current', 30)
        return {}, str(error)
    return {name: float(value) for name, value in metrics.items()}, ''


def _case(
    exportable: Exportable, runs: Mapping[str, Run], image: Tensor, comparable: bool, seconds: float
) -> dict[str, Any]:
    case: dict[str, Any] = dict(shape=list(image.shape), differences={})
    if comparable:  # detections are lists, of which a score that is rounded adds and removes some
        outputs = {name: [torch.as_tensor(value) for value in run(image.numpy())] for name, run in runs.items()}
        case['differences'] = plain(dict(int8=compare(exportable, outputs['float'], outputs['int8'])))['int8']
    if seconds:
        functions: dict[str, Callable[[], object]] = {name: partial(run, image.numpy()) for name, run in runs.items()}
        case['latency_ms'] = {name: asdict(timing) for name, timing in interleave(functions, seconds).items()}
    return case
