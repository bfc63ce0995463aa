"""A TensorRT engine of an exported ONNX file, compared with onnxruntime; or the command that builds one elsewhere.

The network is strongly typed: TensorRT computes in the types that the ONNX file states, which is the only way that
TensorRT 11 has (BuilderFlag.FP16, layer precisions and ``trtexec --fp16`` are gone) and one that TensorRT 10 has, too.
So the precision is chosen when the model is exported (``--half``), and the reductions of GRN and LayerNorm stay in
float32 because the file casts them (``norm_precision``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config

from . import folder as folders
from .detection import align_detections
from .exportable import ExportError
from .formats import FORMATS, Run, open_exported
from .norm_precision import float32_norms
from .parity import TOLERANCES, differences
from .preprocessing import real_images, to_input
from .report import plain, to_markdown, worst

__all__ = ['ENGINE', 'build_engine', 'profile_of', 'trtexec']

ENGINE = 'model.engine'
DEVICE = 'cuda'
NOTE = 'The engine is compared with the same ONNX file in onnxruntime.'
Shapes = tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]
"""Least, usual and largest input: batch, height, width of each."""


def profile_of(
    meta: Mapping[str, Any], report: Mapping[str, Any], given: Sequence[Sequence[int] | None] = (None, None, None)
) -> Shapes:
    """Which inputs an engine shall take.

    Args:
        meta: What is in meta.json.
        report: What is in report.json: its cases are what is taken where nothing is given.
        given: Least, usual and largest (batch, height, width), each or None.

    Raises:
        ExportError: They are not in order, or the exported model does not take them.
    """
    cases = [(n, h, w) for n, _, h, w in (case['shape'] for case in report['cases'])]
    known = [tuple(map(min, zip(*cases, strict=True))), cases[0], tuple(map(max, zip(*cases, strict=True)))]
    least, usual, largest = (tuple(shape or default) for shape, default in zip(given, known, strict=True))
    fixed = [meta['input']['shape'][i] for i in (0, 2, 3)]
    for low, middle, high, only in zip(least, usual, largest, fixed, strict=True):
        if not 1 <= low <= middle <= high:
            raise ExportError(f'shapes from {least} by {usual} to {largest} (batch, height, width) are not in order.')
        if only is not None and (low, high) != (only, only):
            raise ExportError(f'the model takes {fixed} (batch, height, width; None: any), not {least} to {largest}.')
    return (least, usual, largest)  # type: ignore[return-value]


def trtexec(meta: Mapping[str, Any], shapes: Shapes, tf32: bool = False) -> str:
    """The command that builds the engine without Python, in the folder of the export."""
    words = ['trtexec', f'--onnx={meta["file"]}', f'--saveEngine={ENGINE}', '--stronglyTyped']
    words += [] if tf32 else ['--noTF32']
    if None in meta['input']['shape']:
        name = meta['input']['name']
        for kind, (n, height, width) in zip(('min', 'opt', 'max'), shapes, strict=True):
            words.append(f'--{kind}Shapes={name}:{n}x3x{height}x{width}')
    return ' '.join(words)


def build_engine(
    folder: str | Path,
    out_dir: str | Path | None = None,
    shapes: Sequence[Sequence[int] | None] = (None, None, None),
    tf32: bool = False,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Build an engine, compare it with onnxruntime on photographs, and leave a folder with both, or nothing at all.

    Args:
        folder: What ``export`` left, with format 'onnx'.
        out_dir: Folder to make; by default ``tensorrt`` in ``folder``.
        shapes: See ``profile_of``.
        tf32: Let float32 be multiplied in TF32, with 10 bits of the mantissa.
        tolerance: Largest relative difference of any output; by default 1e-4, with ``tf32`` or a model in float16 1e-2.
        overwrite: Replace an ``out_dir`` that this has made.

    Returns:
        The report (report.json).

    Raises:
        ExportError: There is no TensorRT, the folder is of another format, TensorRT does not take the model, or the
            engine differs by more than the tolerance.
    """
    folder = Path(folder)
    meta, report = _read(folder)
    found = profile_of(meta, report, shapes)
    if find_spec('tensorrt') is None or not torch.cuda.is_available():
        what = 'tensorrt is not installed' if torch.cuda.is_available() else 'there is no NVIDIA GPU'
        raise ExportError(
            f'an engine needs TensorRT and an NVIDIA GPU, and {what} here. Where both are, run in {folder}: '
            f'{trtexec(meta, found, tf32)}'
        )
    out_dir = folder / 'tensorrt' if out_dir is None else Path(out_dir)
    folders.check_folder(out_dir, overwrite)
    half, norms = _precision(folder / meta['file'])
    with folders.build_folder(out_dir, overwrite) as new:
        engine = _build(folder / meta['file'], meta, found, tf32)
        (new / ENGINE).write_bytes(engine)
        limit = TOLERANCES[half or tf32] if tolerance is None else tolerance
        done = _compare(folder / meta['file'], new / ENGINE, meta, report, found, limit)
        done.update(norms_in_float32=norms, shapes=found, tf32=tf32, command=trtexec(meta, found, tf32))
        if not done['passed']:
            raise ExportError(
                f'the engine differs by {worst(done):.1e} from onnxruntime, more than {limit:g}. Nothing was written. '
                'Another tolerance can be given (--tolerance) if that is good enough.'
            )
        folders.write_json({**meta, 'file': ENGINE}, new / 'meta.json')
        folders.write_json(done, new / 'report.json')
        (new / 'report.md').write_text(to_markdown(done))
    return done


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        meta, report = (json.loads((folder / name).read_text()) for name in ('meta.json', 'report.json'))
    except (OSError, ValueError) as error:
        raise ExportError(
            f'{folder} is no folder of an export ({type(error).__name__}: {error}): tools/export.py makes one.'
        ) from error
    if meta['file'] != FORMATS['onnx'].file:
        raise ExportError(f'{folder} holds {meta["file"]}: TensorRT needs --format onnx.')
    return meta, report


def _precision(file: Path) -> tuple[bool, dict[str, str]]:
    """Whether the weights are in float16, and the nodes of GRN and LayerNorm, which are in float32."""
    import onnx

    graph = onnx.load(file, load_external_data=False)
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.graph.initializer)
    return half, float32_norms(graph)


def _build(file: Path, meta: Mapping[str, Any], shapes: Shapes, tf32: bool) -> bytes:
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(file)):  # which finds weights beside the file, too
        errors = '; '.join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise ExportError(f'TensorRT {trt.__version__} cannot read {file}: {errors}')
    config = builder.create_builder_config()
    if not tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if None in meta['input']['shape']:
        profile = builder.create_optimization_profile()
        least, usual, largest = ((n, 3, height, width) for n, height, width in shapes)
        profile.set_shape(meta['input']['name'], least, usual, largest)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError(f'TensorRT {trt.__version__} builds no engine of {file}; its own messages stand above.')
    return bytes(engine)


def _compare(
    file: Path, engine: Path, meta: Mapping[str, Any], report: Mapping[str, Any], shapes: Shapes, limit: float
) -> dict[str, Any]:
    """A report on the inputs of the export's report that the engine takes, or on its usual one."""
    import tensorrt as trt

    sizes = [(n, height, width) for n, _, height, width in (case['shape'] for case in report['cases'])]
    bounds = list(zip(shapes[0], shapes[2], strict=True))
    inside = [s for s in sizes if all(low <= n <= high for n, (low, high) in zip(s, bounds, strict=True))]
    images, source = real_images(Config())
    names = [output['name'] for output in meta['outputs']]
    align = align_detections if 'dets' in names else None
    reference, run = open_exported(file), open_engine(engine, names)
    cases = []
    for size in inside or [shapes[1]]:
        image = to_input(images, size, meta).numpy()
        found = {'engine - onnxruntime': differences(names, reference(image), run(image), align)}
        cases.append(dict(shape=list(image.shape), differences=plain(found)))
    done = dict(
        config=report['config'],
        format='tensorrt',
        file=ENGINE,
        images=source,
        note=NOTE,
        tolerance=limit,
        passed=False,
        machine=torch.cuda.get_device_name(),
        date=date.today().isoformat(),
        versions=dict(tensorrt=trt.__version__, torch=torch.__version__),
        cases=cases,
    )
    done['passed'] = worst(done) <= limit
    return done


def open_engine(file: Path, names: Sequence[str]) -> Run:
    """An engine as a function.

    Args:
        file: The engine.
        names: Of its outputs, in the order in which they shall be returned.

    Raises:
        ExportError: TensorRT cannot read it: engines belong to one GPU and one version.
    """
    import tensorrt as trt

    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(file.read_bytes())
    if engine is None:
        raise ExportError(f'TensorRT {trt.__version__} cannot read {file}: build it with this version, on this GPU.')
    dtypes = {name: torch.from_numpy(np.empty(0, trt.nptype(engine.get_tensor_dtype(name)))).dtype for name in names}
    tensors = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    source = next(name for name in tensors if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT)
    context = engine.create_execution_context()

    class Outputs(trt.IOutputAllocator):  # how many detections there are is known only when they are there
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.memory: dict[str, torch.Tensor] = {}
            self.shapes: dict[str, tuple[int, ...]] = {}

        def reallocate_output_async(self, name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            self.memory[name] = torch.empty(max(size, 1), dtype=torch.uint8, device=DEVICE)
            return self.memory[name].data_ptr()

        def notify_shape(self, name: str, shape: Sequence[int]) -> None:
            self.shapes[name] = tuple(shape)

        def value(self, name: str) -> np.ndarray:
            size = math.prod(self.shapes[name]) * dtypes[name].itemsize
            return self.memory[name][:size].view(dtypes[name]).reshape(self.shapes[name]).cpu().numpy()

    def run(image: np.ndarray) -> list[np.ndarray]:
        outputs, stream = Outputs(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            there = torch.from_numpy(np.ascontiguousarray(image)).to(DEVICE)
            context.set_input_shape(source, tuple(image.shape))
            context.set_tensor_address(source, there.data_ptr())
            for name in names:
                context.set_output_allocator(name, outputs)
            if not context.execute_async_v3(stream.cuda_stream):
                raise ExportError(f'TensorRT does not run {file.name} on {tuple(image.shape)}: see its messages above.')
            stream.synchronize()
            return [outputs.value(name) for name in names]

    return run
