"""Evaluate an exported model by its config's own test data and evaluators; the torch model is never built."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.logging import print_log
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData
from rich.progress import track
from torch import nn

from ..compat import ensure_detection_operators
from ..datasets.sample_errors import name_samples
from .exportable import ExportError
from .formats import Run, format_of, open_exported
from .run import postprocess

__all__ = ['evaluate_exported', 'is_exported', 'read_meta']

TASKS = {
    'mmseg': ('segmentation',),
    'mmdet': ('detection', 'instance-segmentation'),
    'mmpretrain': ('classification',),
}
RUNTIMES = ('onnxruntime', 'openvino')


def is_exported(name: str) -> bool:
    """Whether ``name`` is the folder of an export, or a file with the ending of one that runs by itself."""
    path = Path(name)
    if path.is_dir():
        return (path / 'meta.json').is_file()
    return path.name.endswith(('.onnx', '.xml', '.torchscript.pt', '.pt2'))


def read_meta(name: str | Path) -> tuple[Path, dict[str, Any]]:
    """File and facts of an exported model.

    Args:
        name: The folder of an export, or a model in it.

    Raises:
        ExportError: It is not there, or there is no meta.json that says what it is.
    """
    path = Path(name)
    folder = path if path.is_dir() else path.parent
    try:
        meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        missing = {'file', 'task', 'input', 'preprocess', 'outputs', 'thresholds'} - meta.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise ExportError(
            f'{folder / "meta.json"} cannot be used ({type(error).__name__}: {error}). tools/export.py writes it '
            'beside the model, and both belong together.'
        ) from error
    if missing:
        raise ExportError(f'{folder / "meta.json"} lacks {", ".join(sorted(missing))}: export the model again.')
    file = folder / meta['file'] if path.is_dir() else path
    if not file.is_file():
        raise ExportError(f'there is no {file}.')
    return file, meta


def evaluate_exported(
    cfg: Config, name: str | Path, runtime: str | None = None, threads: int | None = None
) -> dict[str, float]:
    """Test an exported model.

    Args:
        cfg: Config with a test loop; changed in place.
        name: The folder of an export, or a model in it.
        runtime: 'onnxruntime' or 'openvino' (which reads ONNX, too); by default what the file is for.
        threads: Threads of the runtime; torch's number by default.

    Returns:
        The metrics.

    Raises:
        ExportError: The model is of another task or other classes than the config, cannot be opened, or does not take
            the images that the config's test pipeline makes.
    """
    file, meta = read_meta(name)
    _check_task(cfg, meta)
    init_default_scope(cfg.default_scope)
    run = _open(file, runtime, threads or torch.get_num_threads(), meta['task'] in TASKS['mmdet'])
    cfg.test_dataloader.batch_size = 1
    loader = Runner.build_dataloader(cfg.test_dataloader)
    facts = loader.dataset.metainfo
    _check_classes(meta, facts.get('classes'))
    name_samples(loader.dataset)
    evaluator = Evaluator(cfg.test_evaluator)
    evaluator.dataset_meta = facts
    prepare = _preprocessor(cfg)
    for batch in track(loader, description=f'Testing {file.name}'):
        with torch.no_grad():
            ready = prepare(batch, False)
        evaluator.process([_predict(run, meta, ready['inputs'], ready['data_samples'][0])], batch)
    return evaluator.evaluate(len(loader.dataset))


def _check_task(cfg: Config, meta: Mapping[str, Any]) -> None:
    scope, task = cfg.get('default_scope'), meta['task']
    if task not in TASKS.get(scope, ()):
        raise ExportError(
            f'the exported model does {task}, the config ({cfg.filename}) is one of {scope}: give the config that it '
            f'was exported with ({meta.get("config")}).'
        )
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    if task == 'detection' and any('segm' in np.atleast_1d(e.get('metric', ())) for e in evaluators):
        raise ExportError(
            'the exported model gives boxes alone, while test_evaluator asks for masks (segm): add '
            '--cfg-options test_evaluator.metric=bbox.'
        )
    if cfg.model.get('test_cfg', {}).get('mode') == 'slide':
        print_log('test_cfg.mode=slide: the exported model is tested on whole images instead.', 'current', 30)


def _check_classes(meta: Mapping[str, Any], classes: Iterable[str] | None) -> None:
    ours, theirs = list(meta.get('classes') or ()), list(classes or ())
    if not ours or not theirs or ours == theirs:
        return
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    a, b = (repr(names[place]) if place < len(names) else 'nothing' for names in (ours, theirs))
    raise ExportError(
        f'the exported model knows {len(ours)} classes and the test data {len(theirs)}; the first difference is at '
        f'{place}: {a} and {b}. Give the config and the data that it was trained for.'
    )


def _open(file: Path, runtime: str | None, threads: int, detector: bool) -> Run:
    format = format_of(file)
    if runtime is not None:
        if (format, runtime) not in (('onnx', 'onnxruntime'), ('onnx', 'openvino'), ('openvino', 'openvino')):
            raise ExportError(f'{runtime} cannot run {file.name}: it is of the format {format}.')
        format = 'openvino' if runtime == 'openvino' else 'onnx'
    package = dict(onnx='onnxruntime', openvino='openvino').get(format, 'torch')
    if find_spec(package) is None:
        raise ExportError(f'{file.name} needs {package}, which is not installed: pip install {package}')
    if package == 'torch':
        torch.set_num_threads(threads)
        if detector:
            ensure_detection_operators()  # what is in the file calls torchvision's
    try:
        return open_exported(file, threads=threads, format=format)
    except Exception as error:  # onnxruntime's and OpenVINO's have no other base
        raise ExportError(f'{package} cannot open {file}: {str(error).strip().splitlines()[-1]}') from error


def _preprocessor(cfg: Config) -> nn.Module:
    """What a model of this config would do to a batch."""
    given = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    return MODELS.build({'type': 'ClsDataPreprocessor', **given})  # mmpretrain's default, and nobody else's


def _predict(run: Run, meta: Mapping[str, Any], inputs: torch.Tensor, sample: Any) -> Any:
    """``sample`` with what the model finds on ``inputs`` (1, 3, H, W)."""
    shape = tuple(sample.img_shape[:2])
    values = run(_fit(inputs.numpy()[:, :, : shape[0], : shape[1]], meta))  # the exported model may pad by itself
    outputs = {output['name']: value for output, value in zip(meta['outputs'], values, strict=True)}
    if meta['task'] == 'segmentation' and 'logits' in outputs and outputs['logits'].shape[1] == 1:
        raise ExportError('the exported model gives the logit of one class: export it again, with this version.')
    found = postprocess(outputs, dict(meta), tuple(sample.ori_shape[:2]), shape)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found.items() if name != 'masks'}
    if meta['task'] == 'classification':
        return sample.set_pred_score(tensors['scores']).set_pred_label(tensors['scores'].argmax(0, keepdim=True))
    if meta['task'] == 'segmentation':
        sample.pred_sem_seg = PixelData(data=tensors['map'][None])
        return sample
    sample.pred_instances = InstanceData(
        bboxes=tensors['boxes'], scores=tensors['scores'], labels=tensors['labels'], **_masks(found, meta, sample)
    )
    return sample


def _masks(found: Mapping[str, Any], meta: Mapping[str, Any], sample: Any) -> dict[str, torch.Tensor]:
    if meta['task'] != 'instance-segmentation':
        return {}
    return {'masks': torch.from_numpy(np.reshape(found['masks'], (-1, *sample.ori_shape[:2])).astype(bool))}


def _fit(image: np.ndarray, meta: Mapping[str, Any]) -> np.ndarray:
    """Pad an input (1, 3, H, W) as meta.json says, below and to the right."""
    count, _, *limits = meta['input']['shape']
    if count not in (1, None):
        raise ExportError(f'the exported model takes {count} images at once: export it for one.')
    divisor = meta['preprocess'].get('size_divisor') or 1
    sizes = image.shape[2:]
    pads = [(limit or -(-side // divisor) * divisor) - side for limit, side in zip(limits, sizes, strict=True)]
    if min(pads) < 0:
        raise ExportError(
            f'the exported model takes {limits[0]}x{limits[1]} alone, and the test pipeline made an image of '
            f'{sizes[0]}x{sizes[1]}: export with --dynamic, or give the test pipeline that Resize.'
        )
    value = meta['preprocess'].get('pad_value', 0)
    padded = np.pad(image, [(0, 0), (0, 0), *((0, pad) for pad in pads)], constant_values=value)
    return padded.astype(meta['input']['dtype'])
