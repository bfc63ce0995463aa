"""The formats that a model is exported to: what each needs, how it is written, and how it is run."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat import keep_signal_stack, resize_of_open_sizes
from ..models.checkpoint_file import read_checkpoint
from ..models.unireplknet import UniRepLKNet
from .exportable import Exportable, ExportError
from .onnx_file import OPSET, failure, write_onnx
from .parity import TOLERANCES, compare
from .pointwise import with_reductions

__all__ = ['FORMATS', 'Format', 'Options', 'Run', 'check_packages', 'format_of', 'open_exported', 'write']

Run = Callable[[np.ndarray], list[np.ndarray]]
"""An exported model: the input (N, 3, H, W) in float32 to its outputs."""


@dataclass(frozen=True)
class Format:
    """A format of exported models.

    Attributes:
        file: Name of the file in the folder.
        packages: What writing it and checking it imports.
    """

    file: str
    packages: tuple[str, ...] = ()


FORMATS = {
    'onnx': Format('model.onnx', ('onnx', 'onnxscript', 'onnxslim', 'onnxruntime')),
    'openvino': Format('model.xml', ('onnx', 'onnxscript', 'onnxslim', 'openvino')),
    'torchscript': Format('model.torchscript.pt'),
    'pt2': Format('model.pt2'),
    'safetensors': Format('model.safetensors', ('safetensors',)),
}


@dataclass(frozen=True)
class Options:
    """How a format is written.

    Attributes:
        dynamic: Leave batch, height and width open.
        half: The weights are in float16.
        opset: Version of the ONNX operators.
        exporter: See ``write_onnx``.
        meta: Facts that go into a safetensors file.
    """

    dynamic: bool = True
    half: bool = False
    opset: int = OPSET
    exporter: str | None = None
    meta: Mapping[str, Any] | None = None


def check_packages(format: str) -> None:
    """Make sure that a format is known and what it needs is installed.

    Raises:
        ExportError: It is not.
    """
    if format not in FORMATS:
        raise ExportError(f'format={format!r} is not known: expected one of {", ".join(FORMATS)}.')
    missing = [name for name in FORMATS[format].packages if find_spec(name) is None]
    if missing:
        raise ExportError(
            f'format {format} needs {", ".join(missing)}, not installed here: pip install -r requirements/export.txt'
        )


def write(format: str, exportable: Exportable, image: Tensor, folder: Path, options: Options) -> Path:
    """Write ``exportable`` into ``folder``.

    Args:
        format: One of ``FORMATS``.
        exportable: The model.
        image: Example input.
        folder: Where to.
        options: How.

    Raises:
        ExportError: The model cannot be written in this format, or is not ready.
    """
    unmerged = [m for m in exportable.modules() if isinstance(m, UniRepLKNet) and not m.deploy]
    if unmerged or any(m.training for m in exportable.modules()):
        what = 'in training form' if unmerged else 'in training mode'
        raise ExportError(f'the model is {what}, which is not for export: make_exportable makes it ready.')
    file = folder / FORMATS[format].file
    with resize_of_open_sizes():
        if format == 'onnx':
            write_onnx(exportable, image, file, options.dynamic, options.opset, options.exporter)
        elif format == 'openvino':
            _write_openvino(exportable, image, file, options)
        elif format == 'torchscript':
            _write_torchscript(exportable, image, file, TOLERANCES[options.half])
        elif format == 'pt2':
            _write_pt2(exportable, image, file, options.dynamic)
        else:
            _write_safetensors(exportable, file, options.meta or {})
    return file


def _write_openvino(exportable: Exportable, image: Tensor, file: Path, options: Options) -> None:
    import openvino

    graph = file.with_name(FORMATS['onnx'].file)  # left there to look for differences in
    write_onnx(with_reductions(exportable), image, graph, options.dynamic, options.opset, options.exporter)
    model = openvino.convert_model(graph)
    openvino.save_model(model, file, compress_to_fp16=options.half)


def _write_torchscript(exportable: Exportable, image: Tensor, file: Path, tolerance: float) -> None:
    others = [F.pad(image, (0, 32, 0, 64)), F.pad(image[:1], (0, 17, 0, 5))]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # deprecation, and sizes in Python: other sizes are tried here
            traced = torch.jit.trace(exportable, (image,), check_trace=False)
            for other in others:
                for name, difference in compare(exportable, exportable(other), traced(other)).items():
                    if not difference.relative <= tolerance:
                        raise ExportError(
                            f'the trace made at {tuple(image.shape)} computes {name} differently at '
                            f'{tuple(other.shape)}, by {difference.relative:.1e}: it depends on the size.'
                        )
            torch.jit.save(traced, str(file))
    except RuntimeError as error:
        raise ExportError(failure(exportable, 'torchscript', error)) from error


def _write_pt2(exportable: Exportable, image: Tensor, file: Path, dynamic: bool) -> None:
    axes = exportable.dynamic_axes[exportable.input_name] if dynamic else {}
    shapes = ({axis: torch.export.Dim.DYNAMIC for axis in axes},)
    try:
        with torch.no_grad():
            program = torch.export.export(exportable, (image,), dynamic_shapes=shapes, strict=False)
            torch.export.save(program, file)
    except Exception as error:  # what a model holds decides what the exporter raises
        raise ExportError(failure(exportable, 'pt2', error)) from error


def _write_safetensors(exportable: Exportable, file: Path, meta: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    state = {name: value.contiguous().clone() for name, value in exportable.model.state_dict().items()}
    save_file(state, file, metadata=dict(format='pt', meta=json.dumps(meta)))


# ------------------------------------------------------------------------------------------ run


def format_of(file: Path) -> str:
    """Format of an exported file, by its name.

    Raises:
        ExportError: It is none of ours.
    """
    for name, format in FORMATS.items():
        if file.suffix == Path(format.file).suffix and file.name.endswith(format.file.partition('.')[2]):
            return name
    names = ', '.join(format.file for format in FORMATS.values())
    raise ExportError(f'{file} is no exported model: expected {names}.')


def open_exported(file: Path, exportable: Exportable | None = None, threads: int = 1, format: str | None = None) -> Run:
    """An exported file as a function.

    Args:
        file: The file.
        exportable: The model whose weights a safetensors file holds; the others need none.
        threads: Threads of onnxruntime and OpenVINO; torch's own formats follow ``torch.set_num_threads``.
        format: What to open it as, by default its format; OpenVINO opens ONNX files, too.

    Raises:
        ExportError: The file is of no known format, or a safetensors file without a model.
    """
    format = format or format_of(file)
    if format == 'onnx':
        return _open_onnx(file, threads)
    if format == 'openvino':
        return _open_openvino(file, threads)
    if format == 'safetensors':
        return _open_safetensors(file, exportable)
    module = torch.jit.load(str(file)) if format == 'torchscript' else torch.export.load(file).module()
    return _torch_run(module)


def _torch_run(module: Callable[[Tensor], tuple[Tensor, ...]]) -> Run:
    @torch.no_grad()
    def run(image: np.ndarray) -> list[np.ndarray]:
        return [out.numpy() for out in module(torch.from_numpy(image))]

    return run


def _open_onnx(file: Path | bytes, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    source = file if isinstance(file, bytes) else str(file)
    session = onnxruntime.InferenceSession(source, options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})


@keep_signal_stack()
def _open_openvino(file: Path, threads: int) -> Run:
    import openvino

    config = {'INFERENCE_NUM_THREADS': str(threads), 'INFERENCE_PRECISION_HINT': 'f32'}
    compiled = openvino.Core().compile_model(file, 'CPU', config)
    return lambda image: [np.array(out) for out in compiled(image).values()]


def _open_safetensors(file: Path, exportable: Exportable | None) -> Run:
    if exportable is None:
        raise ExportError(f'{file} holds weights alone: a model is needed to run them.')
    fresh = copy.deepcopy(exportable)
    fresh.model.load_state_dict(read_checkpoint(file)['state_dict'])
    return _torch_run(fresh)
