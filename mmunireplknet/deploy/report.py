"""The parity report of an export: differences and latencies, as JSON and as a table."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..analysis.timing import interleave, thread_count
from .exportable import Exportable
from .formats import Run
from .parity import Difference, compare
from .run import preprocess

__all__ = ['make_report', 'parity_shapes', 'plain', 'to_markdown', 'worst']

LARGEST = 640  # pixels of a side: larger maps show nothing new
WITHOUT_TRAINING = 'The checkpoint is in deploy form, so there is no training form to compare with.'
DETECTIONS = (
    'Lists of detections are not compared one by one: a score that is rounded past a threshold adds or removes some. '
    'What counts is the metric.'
)
ROUNDING = (
    'What rounding to 8 bits costs is for the metric to say. A difference above the tolerance is none of rounding: '
    'values are cut off that the calibration images do not have.'
)
PACKAGES = ('torch', 'onnx', 'onnxruntime', 'openvino', 'nncf')


def parity_shapes(meta: Mapping[str, Any], image: np.ndarray, batches: bool) -> list[tuple[int, int, int]]:
    """Batch, height and width to compare at: one size for a model of fixed size, else three.

    These are about the size that the config tests at, a smaller one with two images, and one that is no multiple of 32.

    Args:
        meta: What is in meta.json.
        image: A test image (H, W, 3).
        batches: Whether the model takes more than one image.
    """
    n, _, height, width = meta['input']['shape']
    if height is not None:
        return [(n or 1, height, width)]
    height, width = _tested_size(meta, image)
    half = (_multiple(height * 3 // 4), _multiple(width // 2))
    odd = (_odd(height * 5 // 8 + 3), _odd(width * 7 // 8 - 5))
    return [(1, height, width), (2 if batches else 1, *half), (1, *odd)]


def _tested_size(meta: Mapping[str, Any], image: np.ndarray) -> tuple[int, int]:
    """Size that the test pipeline makes of an image (H, W, 3), or in proportion the largest that is compared at."""
    rules = meta['preprocess']
    resize = {**rules['resize'], 'interpolation': 'bilinear', 'backend': 'cv2'}  # what run.py has always
    made, _ = preprocess(image, {**meta, 'preprocess': {**rules, 'resize': resize}})
    height, width = made.shape[2:]
    factor = min(1.0, LARGEST / max(height, width))
    return max(64, int(height * factor)), max(64, int(width * factor))


def _multiple(size: int) -> int:
    return max(64, 32 * math.ceil(size / 32))


def _odd(size: int) -> int:
    return size + (size % 32 == 0)


def make_report(
    models: Mapping[str, Exportable],
    run: Run,
    inputs: Sequence[Tensor],
    tolerance: float,
    threads: int,
    facts: Mapping[str, Any],
    seconds: float = 2.0,
) -> dict[str, Any]:
    """Compare and time the forms of a model on every input.

    Args:
        models: 'deploy form' and, if there is one, 'training form'.
        run: The exported model.
        inputs: Each (N, 3, H, W).
        tolerance: Largest relative difference that passes.
        threads: Threads to compute with.
        facts: Entries to put before the others.
        seconds: About how long to time each input; 0 leaves it out.
    """
    with thread_count(threads), torch.no_grad():
        cases = [_case(models, run, image, seconds) for image in inputs]
    report = dict(
        **facts,
        tolerance=tolerance,
        passed=False,
        threads=threads,
        machine=_machine(),
        date=date.today().isoformat(),
        versions={name: found for name in PACKAGES if (found := _version(name))},
        cases=cases,
    )
    report['passed'] = worst(report) <= tolerance
    return report


def _case(models: Mapping[str, Exportable], run: Run, image: Tensor, seconds: float) -> dict[str, Any]:
    outputs: dict[str, Sequence[Tensor | np.ndarray]] = {name: model(image) for name, model in models.items()}
    outputs['exported'] = run(image.numpy())
    names = list(outputs)
    differences = {
        f'{b} - {a}': compare(models['deploy form'], outputs[a], outputs[b])
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
    case: dict[str, Any] = dict(shape=list(image.shape), differences=plain(differences))
    if seconds:
        functions: dict[str, Callable[[], object]] = {name: partial(model, image) for name, model in models.items()}
        functions['exported'] = partial(run, image.numpy())
        case['latency_ms'] = {name: asdict(timing) for name, timing in interleave(functions, seconds).items()}
    return case


def plain(differences: Mapping[str, Mapping[str, Difference]]) -> dict[str, Any]:
    """For JSON, which knows no infinity."""
    return {
        pair: {
            output: {k: v if math.isfinite(v) else str(v) for k, v in asdict(difference).items()}
            for output, difference in outputs.items()
        }
        for pair, outputs in differences.items()
    }


def worst(report: Mapping[str, Any]) -> float:
    """Largest relative difference in a report."""
    return max(
        float(difference['relative'])
        for case in report['cases']
        for outputs in case['differences'].values()
        for difference in outputs.values()
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine() -> str:
    model = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as file:
            model = next((line.partition(':')[2].strip() for line in file if line.startswith('model name')), model)
    return f'{model}, {os.cpu_count()} logical cores'


def to_markdown(report: Mapping[str, Any]) -> str:
    """A report as tables."""
    verdict = 'passed' if report['passed'] else 'FAILED'
    trained = any('training' in pair for pair in report['cases'][0]['differences'])
    note = report.get('note', '' if trained else WITHOUT_TRAINING)
    lines = [
        f'# Parity of {report["file"]}: {verdict}',
        '',
        f'Config {report["config"]}, format {report["format"]}; images: {report["images"]}. '
        f'Tolerance {report["tolerance"]:g} of the relative difference, which is L2 norm of the difference over that '
        'of the reference (of integers the share of entries that differ); max and mean are those of the absolute '
        'difference over those of the absolute value of the reference.',
        '',
        *([note, ''] if note else []),
        '| input | what - of what | output | relative | max | mean |',
        '|---|---|---|---|---|---|',
    ]
    for case in report['cases']:
        for pair, outputs in case['differences'].items():
            lines += [f'| {_size(case)} | {pair} | {name} | {_numbers(d)} |' for name, d in outputs.items()]
    lines += ['', *_latencies(report, report['cases'], ' Both forms are PyTorch without compilation.')]
    if 'int8' in report:
        lines += ['', *_int8_lines(report['int8']), *_latencies(report, report['int8']['cases'], '')]
    return '\n'.join(lines).rstrip() + '\n'


def _int8_lines(found: Mapping[str, Any]) -> list[str]:
    """What there is to say about the int8 model in the folder."""
    before, after = (f'{found["bytes"][name] / 1e6:.1f}' for name in ('float', 'int8'))
    lines = [
        '## The int8 model, and the float model that it was made of',
        '',
        f'{found["layers"]} layers compute in int8, in the ranges that {found["images"]} calibration images gave; the '
        f'others in float. The files went from {before} to {after} MB.',
        '',
        *_int8_metrics(found),
        '',
    ]
    if found['tolerance'] is None:
        return [*lines, DETECTIONS, '']
    lines += [
        f'Difference of int8 - float; tolerance {found["tolerance"]:g} of the relative one. {ROUNDING}',
        '',
        '| input | output | relative | max | mean |',
        '|---|---|---|---|---|',
    ]
    for case in found['cases']:
        lines += [f'| {_size(case)} | {name} | {_numbers(d)} |' for name, d in case['differences'].items()]
    return [*lines, '']


def _int8_metrics(found: Mapping[str, Any]) -> list[str]:
    if found['without_metrics']:
        return [f'No metric of both: {found["without_metrics"]}']
    pairs = [(name, value, found['metrics']['int8'][name]) for name, value in found['metrics']['float'].items()]
    rows = [f'| {name} | {before:.4g} | {after:.4g} | {after - before:+.3g} |' for name, before, after in pairs]
    return ["On the config's test data:", '', '| metric | float | int8 | change |', '|---|---|---|---|', *rows]


def _latencies(report: Mapping[str, Any], cases: Sequence[Mapping[str, Any]], what: str) -> list[str]:
    if 'latency_ms' not in cases[0]:
        return []
    versions = ', '.join(f'{name} {value}' for name, value in report['versions'].items())
    lines = [
        f'Latency in ms, median (quartiles), {report["threads"]} thread(s), measured {report["date"]} on '
        f'{report["machine"]}; {versions}.{what}',
        '',
        f'| input | {" | ".join(cases[0]["latency_ms"])} |',
        f'|---|{"---|" * len(cases[0]["latency_ms"])}',
    ]
    for case in cases:
        cells = (f'{t["median"]:.1f} ({t["low"]:.1f} to {t["high"]:.1f})' for t in case['latency_ms'].values())
        lines.append(f'| {_size(case)} | {" | ".join(cells)} |')
    return lines


def _numbers(difference: Mapping[str, Any]) -> str:
    return ' | '.join(f'{float(difference[key]):.1e}' for key in ('relative', 'maximum', 'mean'))


def _size(case: Mapping[str, Any]) -> str:
    return ' x '.join(map(str, case['shape']))
