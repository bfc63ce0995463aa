"""From a config and a checkpoint to a folder that runs elsewhere, with the proof that it computes the same."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import save_checkpoint
from torch import Tensor, nn

from .. import __version__
from ..engine.inference import dataset_meta
from ..engine.reparameterize import MARK
from ..models.checkpoint import all_tensors, identify, load_checkpoint, read_checkpoint
from ..models.layouts import STEM, from_published
from . import folder as folders
from .exportable import Exportable, ExportError, make_exportable
from .formats import FORMATS, Options, check_packages, open_exported, write
from .int8 import replace_by_int8
from .onnx_file import OPSET
from .parity import TOLERANCES, first_difference, first_difference_of_forms
from .preprocessing import read_preprocessing, real_images, to_input
from .quantize import Calibration, check_int8
from .report import make_report, parity_shapes, to_markdown, worst
from .tensorrt_engine import profile_of, trtexec

__all__ = ['ParityError', 'build_model', 'export']


class ParityError(ExportError):
    """The exported model does not compute what it was made of; the message names the first layer that differs."""


def export(
    cfg: Config,
    checkpoint: str | Path,
    out_dir: str | Path,
    format: str = 'onnx',
    shape: Sequence[int] | None = None,
    half: bool = False,
    backbone_only: bool = False,
    argmax: bool = False,
    opset: int = OPSET,
    exporter: str | None = None,
    overwrite: bool = False,
    tolerance: float | None = None,
    threads: int | None = None,
    seconds: float = 2.0,
    int8: str | Path | None = None,
    calibration_images: int = 32,
    metric: bool = True,
) -> dict[str, Any]:
    """Export a model, reparameterized, and leave a folder with it, or nothing at all.

    Args:
        cfg: Config of the whole model; not changed.
        checkpoint: File, https address or short name of a published file, in training or deploy form.
        out_dir: Folder to make.
        format: One of ``formats.FORMATS``.
        shape: Batch, height and width of the only input that it will take; None leaves them open.
        half: Weights in float16; input and outputs stay in float32.
        backbone_only: Export the feature maps of the backbone.
        argmax: Of a segmentor, labels instead of logits.
        opset: Version of the ONNX operators.
        exporter: 'dynamo' or 'torchscript', which of torch's ONNX exporters; by default what suits the model.
        overwrite: Replace a folder that an export made.
        tolerance: Largest relative difference of any output; by default 1e-4, with ``half`` 1e-2.
        threads: Threads of the latencies; by default as many as torch has now.
        seconds: About how long to time each of the sizes; 0 leaves that out.
        int8: Folder with calibration images: quantize what has been exported and compared.
        calibration_images: How many of them to take.
        metric: Test the float and the int8 model on the config's test data, if it is there.

    Returns:
        The report (report.json).

    Raises:
        CheckpointError: The checkpoint does not fit the config.
        ExportError: Something else that was asked for cannot be done.
        ParityError: The result differs from the original by more than the tolerance.
    """
    check_packages(format)
    out_dir = Path(out_dir)
    folders.check_folder(out_dir, overwrite)
    _check_options(format, shape, exporter)
    calibration = None if int8 is None else check_int8(format, half, int8, calibration_images)
    model, form = build_model(cfg, checkpoint)
    training = None
    if form == 'training':
        training = make_exportable(copy.deepcopy(model), cfg, argmax, backbone_only, deploy=False)
    deploy = make_exportable(model, cfg, argmax, backbone_only)
    meta = _meta(cfg, checkpoint, model, deploy, format, shape, opset)
    images, source = real_images(cfg)
    batches = 0 in deploy.dynamic_axes[deploy.input_name]
    inputs = [to_input(images, size, meta) for size in parity_shapes(meta, images[0], batches)]
    with folders.build_folder(out_dir, overwrite) as new:
        _save_weights(model, checkpoint, new / 'deploy.pth')
        if half:
            model.half()
        height, width = (32 * math.ceil(side / 32) for side in inputs[0].shape[2:])  # no stage's map is cut off
        example = inputs[0] if shape else to_input(images, (2 if batches else 1, height, width), meta)
        facts = dict(dataset_meta=dict(classes=meta['classes'], palette=meta['palette']))
        options = Options(shape is None, half, opset, exporter, facts)
        file = write(format, deploy, example, new, options)
        meta['outputs'] = _outputs(deploy, example, shape is None)
        limit = TOLERANCES[half] if tolerance is None else tolerance
        count = threads or torch.get_num_threads()
        models = {'training form': training, 'deploy form': deploy}
        report = make_report(
            {name: found for name, found in models.items() if found is not None},
            open_exported(file, deploy, count),
            inputs,
            limit,
            count,
            dict(config=meta['config'], format=format, file=file.name, images=source),
            seconds,
        )
        if not report['passed']:
            raise ParityError(_blame(report, file, deploy, training, inputs))
        _add_papers(new, meta, report)
        if calibration is not None:
            report['int8'] = replace_by_int8(cfg, new, meta, deploy, calibration, inputs, count, seconds, metric)
            if not report['int8']['passed']:
                raise ParityError(_blame_int8(report, calibration))
            meta['int8'] = dict(calibration_images=report['int8']['images'])
            _add_papers(new, meta, report)
        if format == 'openvino':  # what it was converted from
            for path in new.glob(f'{FORMATS["onnx"].file}*'):
                path.unlink()
    print_log(f'{out_dir}: {file.name}, largest relative difference {worst(report):.1e}', logger='current')
    return report


def _check_options(format: str, shape: Sequence[int] | None, exporter: str | None) -> None:
    if shape is not None and (len(shape) != 3 or min(shape) < 1):
        raise ExportError(f'shape={tuple(shape)}: expected batch, height and width, all above 0.')
    if exporter not in (None, 'dynamo', 'torchscript'):
        raise ExportError(f'exporter={exporter!r} is not known: expected dynamo or torchscript.')
    if exporter and format not in ('onnx', 'openvino'):
        raise ExportError(f'exporter={exporter!r} is for the formats onnx and openvino, not for {format}.')


def build_model(cfg: Config, checkpoint: str | Path) -> tuple[nn.Module, str]:
    """Build the model of a config in the form of a checkpoint, and load it.

    Returns:
        The model in evaluation mode, and its form, 'training' or 'deploy'.

    Raises:
        CheckpointError: The checkpoint does not fit the config.
        ExportError: The config has no UniRepLKNet as backbone.
    """
    cfg = copy.deepcopy(cfg)
    if 'backbone' not in cfg.get('model', {}):
        raise ExportError('the config has no model.backbone: expected the config of a whole model.')
    if 'data_preprocessor' in cfg:  # beside the model, as mmpretrain's configs have it
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    state = from_published(all_tensors(read_checkpoint(checkpoint)))
    prefix = next((name.removesuffix(STEM) for name in state if name.endswith(STEM)), '')
    form = identify({name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}).form
    if cfg.model.backbone.type == 'UniRepLKNet':
        cfg.model.backbone.deploy = form == 'deploy'
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    with torch.random.fork_rng(devices=[]):  # who exports while training draws no other numbers for it
        model = MODELS.build(cfg.model)
    load_checkpoint(model, checkpoint)
    model = revert_sync_batchnorm(model)
    model.eval()
    return model, form


def _save_weights(model: nn.Module, checkpoint: str | Path, file: Path) -> None:
    mark = dict(form='deploy', source=Path(checkpoint).name, writer='export', version=__version__)
    meta = {**(read_checkpoint(checkpoint).get('meta') or {}), MARK: mark}
    save_checkpoint(dict(meta=meta, state_dict=model.state_dict()), str(file))


def _meta(
    cfg: Config,
    checkpoint: str | Path,
    model: nn.Module,
    exportable: Exportable,
    format: str,
    shape: Sequence[int] | None,
    opset: int,
) -> dict[str, Any]:
    """meta.json, without the shapes of the outputs."""
    preprocess, channels = read_preprocessing(cfg, model)
    if exportable.pads:
        preprocess['size_divisor'] = 1
    test = getattr(model, 'test_cfg', None) or {}
    if test.get('mode') == 'slide':
        print_log('test_cfg.mode=slide: exported is the network, which takes whole images or crops alike', 'current')
    instances = test.get('rcnn') or test
    axes = exportable.dynamic_axes[exportable.input_name]
    n, height, width = shape or (None if 0 in axes else 1, None, None)
    facts = dataset_meta(cfg, str(checkpoint))
    return {
        'format': 1,
        'task': exportable.task,
        'config': Path(cfg.filename or 'config.py').name,
        'package': f'mmunireplknet {__version__}',
        'file': FORMATS[format].file,
        'input': dict(
            name=exportable.input_name, dtype='float32', layout='NCHW', shape=[n, 3, height, width], channels=channels
        ),
        'preprocess': preprocess,
        'outputs': [],
        'classes': list(facts.get('classes') or ()),
        'palette': [list(colour) for colour in facts.get('palette') or ()],
        'thresholds': dict(score=instances.get('score_thr', 0.05), mask=instances.get('mask_thr_binary', 0.5)),
        'opset': opset if format in ('onnx', 'openvino') else None,
    }


@torch.no_grad()
def _outputs(exportable: Exportable, image: Tensor, dynamic: bool) -> list[dict[str, Any]]:
    known = set(exportable.dynamic_axes[exportable.input_name].values())
    found = []
    for name, value in zip(exportable.output_names, exportable(image), strict=True):
        open_axes = exportable.dynamic_axes.get(name, {})
        shape = [
            None if i in open_axes and (dynamic or open_axes[i].partition('/')[0] not in known) else n
            for i, n in enumerate(value.shape)
        ]
        found.append(dict(name=name, shape=shape, meaning=exportable.meanings[name]))
    return found


def _blame(
    report: dict[str, Any], file: Path, deploy: Exportable, training: Exportable | None, inputs: Sequence[Tensor]
) -> str:
    """What to say of a report that has not passed, by the input that differs most."""
    limit, format = report['tolerance'], report['format']
    image = max(zip(inputs, report['cases'], strict=True), key=lambda pair: worst(dict(cases=[pair[1]])))[0]

    def differ(pair: str) -> bool:
        values = [d['relative'] for case in report['cases'] for d in case['differences'].get(pair, {}).values()]
        return any(not float(value) <= limit for value in values)

    if training is not None and differ('deploy form - training form'):
        what, layer = 'deploy form', first_difference_of_forms(training, deploy, image, limit)
    else:
        graph = file.parent / FORMATS['onnx'].file if format == 'openvino' else None
        what, layer = f'exported model ({format})', first_difference(format, file, deploy, image, limit, graph)
    return (
        f'the {what} differs by {worst(report):.1e}, more than {limit:g}: {layer}. Nothing was written. Another '
        'tolerance can be given (--tolerance) if that is good enough.'
    )


def _blame_int8(report: dict[str, Any], calibration: Calibration) -> str:
    outputs = {name: d for case in report['int8']['cases'] for name, d in case['differences'].items()}
    most = max(float(d['relative']) for case in report['int8']['cases'] for d in case['differences'].values())
    return (
        f'the int8 model differs from the float one by {most:.1e} ({", ".join(outputs)}), more than '
        f'{report["int8"]["tolerance"]:g}, which is no rounding. Nothing was written. Are the {len(calibration.files)} '
        f'images of {calibration.folder} like those of the task? More can be taken (--calibration-images).'
    )


def _add_papers(folder: Path, meta: dict[str, Any], report: dict[str, Any]) -> None:
    if (folder / f'{meta["file"]}.data').is_file():
        meta['data'] = f'{meta["file"]}.data'
    folders.write_json(meta, folder / 'meta.json')
    folders.write_json(report, folder / 'report.json')
    (folder / 'report.md').write_text(to_markdown(report))
    takes = meta['file'] == FORMATS['onnx'].file and 'int8' not in meta  # TensorRT wants symmetric activations
    command = trtexec(meta, profile_of(meta, report)) if takes else ''
    (folder / 'README.md').write_text(folders.readme(meta, worst(report), command))
    program = Path(__file__).with_name('run.py')
    if program.is_file() and meta['file'] == FORMATS['onnx'].file and meta['task'] != 'features':
        shutil.copy(program, folder)
