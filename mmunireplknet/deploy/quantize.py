"""Post-training quantization of an exported model to int8, with ranges that calibration images give.

Quantized are the products with weights, which take the time: convolutions, the 13x13 depthwise ones among them, and
linear layers. All else stays in float, and so do the products inside of SE, which are of one pixel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mmcv
import numpy as np
from mmengine.logging import print_log
from rich.progress import track
from torch import nn

from ..compat import keep_signal_stack
from ..engine.inference import find_images
from ..models.layers import GRN, SEBlock
from .exportable import Exportable, ExportError
from .formats import Run
from .norm_precision import module_of
from .onnx_file import check_onnx
from .pooling import MatrixPool2d
from .run import preprocess

if TYPE_CHECKING:
    import onnx

__all__ = ['FLOAT_MODULES', 'Calibration', 'check_int8', 'layers_to_quantize', 'quantize']

PACKAGES = dict(onnx='onnxruntime', openvino='nncf')
FLOAT_MODULES = (SEBlock, GRN, nn.LayerNorm, MatrixPool2d)
"""Nothing inside of these is quantized: sums over a map or over channels, and what they are divided by."""
OPERATORS = ('Conv', 'MatMul', 'Gemm')
"""What onnxruntime has an integer kernel for. ConvTranspose is missing: it would be computed in float all the same."""

OPENVINO_OPERATORS = ('Convolution', 'GroupConvolution', 'MatMul')
"""The same under OpenVINO's names."""


class Calibration:
    """Images of a folder as inputs of a model: each (N, 3, H, W) in float32, prepared as meta.json says.

    Args:
        folder: Searched to any depth.
        count: How many to take, evenly over the names in order; all if there are fewer.

    Raises:
        ExportError: It is no folder, or there is no image in it.
    """

    def __init__(self, folder: str | Path, count: int) -> None:
        if not Path(folder).is_dir():
            raise ExportError(f'int8={str(folder)!r} is no folder: expected one with calibration images.')
        try:
            found = find_images([str(folder)])
        except FileNotFoundError as error:
            raise ExportError(f'int8: {error}') from error
        self.folder = Path(folder)
        self.files = [found[i * len(found) // count] for i in range(count)] if count < len(found) else found

    def load(self, file: Path, meta: Mapping[str, Any]) -> np.ndarray:
        """One of ``files`` as input of the model that ``meta`` (meta.json) describes.

        Raises:
            ExportError: It cannot be read, or there is no rule for the size that the model wants.
        """
        image = mmcv.imread(file)
        if image is None:
            raise ExportError(f'int8: {file} cannot be read as an image: remove it.')
        try:
            prepared, _ = preprocess(image[..., ::-1], dict(meta))
        except KeyError as error:
            raise ExportError(f'int8: {file} cannot be prepared, since there is no rule for {error}.') from error
        return np.repeat(prepared, meta['input']['shape'][0] or 1, 0)

    def keep_detections(self, run: Run, meta: Mapping[str, Any]) -> None:
        """Leave out images in which a detector finds nothing: what follows the boxes has no value, and so no range.

        Args:
            run: The float model.
            meta: What is in meta.json.

        Raises:
            ExportError: No image is left.
        """
        files = [path for path in self.files if all(out.size for out in run(self.load(path, meta)))]
        if not files:
            raise ExportError(f'int8: nothing is found in any of the {len(self.files)} images of {self.folder}.')
        if len(files) < len(self.files):
            print_log(
                f'int8: nothing is found in {len(self.files) - len(files)} of {len(self.files)} images', 'current'
            )
        self.files = files


def check_int8(format: str, half: bool, folder: str | Path, count: int) -> Calibration:
    """Find the calibration images, and refuse what cannot be quantized.

    Raises:
        ExportError: The format, the combination or the folder; or a package is missing.
    """
    if format not in PACKAGES:
        raise ExportError(f'int8 is for the formats onnx and openvino, not for {format}.')
    if half:
        raise ExportError('int8 and half exclude each other: give one of them.')
    if count < 1:
        raise ExportError(f'calibration_images={count}: expected 1 or more.')
    if find_spec(PACKAGES[format]) is None:
        raise ExportError(
            f'int8 of the format {format} needs {PACKAGES[format]}, not installed here: '
            'pip install -r requirements/export.txt'
        )
    return Calibration(folder, count)


def layers_to_quantize(graph: onnx.ModelProto, exportable: Exportable) -> list[onnx.NodeProto]:
    """Products with constant weights outside of ``FLOAT_MODULES``.

    Args:
        graph: What ``write_onnx`` made of ``exportable``; its nodes say which module they are of.
        exportable: The model.
    """
    names = [name.removeprefix('model.') for name, m in exportable.named_modules() if isinstance(m, FLOAT_MODULES)]
    inside = tuple(f'{name}.' for name in names)
    constants = {tensor.name for tensor in graph.graph.initializer}
    return [
        node
        for node in graph.graph.node
        if node.op_type in OPERATORS and node.input[1] in constants and not f'{module_of(node)}.'.startswith(inside)
    ]


def quantize(format: str, file: Path, exportable: Exportable, images: Calibration, meta: Mapping[str, Any]) -> int:
    """Put an int8 model in the place of a float one.

    Args:
        format: 'onnx' or 'openvino'.
        file: The float model. The ONNX file that an OpenVINO model was converted from lies beside it.
        exportable: What it was made of.
        images: Calibration images.
        meta: What is in meta.json.

    Returns:
        How many layers are computed in int8.

    Raises:
        ExportError: An image cannot be read, the model is too large, or the quantization fails.
    """
    import onnx

    if file.with_name('model.onnx.data').exists():
        raise ExportError('int8: models of more than 2 GiB, whose weights lie beside the graph, are not quantized.')
    graph = onnx.load(file.with_name('model.onnx'))
    names = [node.name for node in layers_to_quantize(graph, exportable)]
    if not names:
        raise ExportError(f'int8: {file.name} has no convolution and no linear layer to quantize.')
    work: Callable[..., None] = _quantize_onnx if format == 'onnx' else _quantize_openvino
    try:
        with _quiet():
            work(file, names, images, meta)
    except ExportError:
        raise
    except Exception as error:  # those of onnxruntime, OpenVINO and nncf have no other base
        raise ExportError(f'{file.name} cannot be quantized: {type(error).__name__}: {error}') from error
    return len(names)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep out advice that does not apply: the graph needs no preprocessing, and what stays in float is on purpose."""
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in (None, 'nncf')}
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)


# ------------------------------------------------------------------------------------------ onnxruntime


def _quantize_onnx(file: Path, names: Sequence[str], images: Calibration, meta: Mapping[str, Any]) -> None:
    """Signed weights with a scale for each output channel, unsigned activations: what VNNI multiplies.

    Outputs of convolutions are in int8, too, since onnxruntime has no integer convolution with a float output; those of
    linear layers stay in float.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    name = meta['input']['name']
    files = iter(track(images.files, description='Calibrating'))

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            path = next(files, None)
            return None if path is None else {name: images.load(path, meta)}

    result = file.with_name('int8.onnx')
    quantize_static(
        file,
        result,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=[*OPERATORS, 'Relu'],
        nodes_to_quantize=[*names, *_relus(onnx.load(file), names)],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        extra_options=dict(MatMulConstBOnly=True, OpTypesToExcludeOutputQuantization=['MatMul', 'Gemm']),
    )
    graph = onnx.load(result)
    _read_floats(graph, names)
    used = {node.domain for node in graph.graph.node}
    imports = [opset for opset in graph.opset_import if opset.domain in used]
    del graph.opset_import[:]
    graph.opset_import.extend(imports)
    graph.producer_name, graph.producer_version = 'mmunireplknet', ''
    check_onnx(graph)
    onnx.save(graph, result)
    result.replace(file)


def _relus(graph: onnx.ModelProto, names: Sequence[str]) -> list[str]:
    """ReLUs behind a quantized convolution: an unsigned integer that begins at zero makes them superfluous."""
    outputs = {node.output[0] for node in graph.graph.node if node.name in names and node.op_type == 'Conv'}
    return [node.name for node in graph.graph.node if node.op_type == 'Relu' and node.input[0] in outputs]


def _read_floats(graph: onnx.ModelProto, names: Sequence[str]) -> None:
    """Let what stays in float read the values before rounding, where there are such, as the sum at a block's end.

    onnxruntime's quantizer gives all readers of a value that one of them takes in int8 the rounded one, so that the
    errors would add up from block to block.
    """
    producers = {out: node for node in graph.graph.node for out in node.output}
    computed = {node.output[0] for node in graph.graph.node if node.name in names and node.op_type == 'Conv'}
    before = {}
    for node in graph.graph.node:
        source = producers.get(node.input[0]) if node.op_type == 'DequantizeLinear' else None
        if source is not None and source.input[0] not in computed:
            before[node.output[0]] = source.input[0]
    for node in graph.graph.node:
        if node.name not in names:
            for i, name in enumerate(node.input):
                node.input[i] = before.get(name, name)


# ------------------------------------------------------------------------------------------ OpenVINO


@keep_signal_stack()
def _quantize_openvino(file: Path, names: Sequence[str], images: Calibration, meta: Mapping[str, Any]) -> None:
    """The same layers by NNCF: signed weights with a scale for each output channel, unsigned activations."""
    import nncf
    import openvino

    model = openvino.Core().read_model(file)
    everything = {operation.get_friendly_name(): operation.get_type_name() for operation in model.get_ordered_ops()}
    products = [name for name, kind in everything.items() if kind in OPENVINO_OPERATORS]
    chosen = {name for name in products if name.removesuffix('/WithoutBiases') in names}  # of a node with a bias
    if len(chosen) != len(names):
        raise ExportError(f'int8: {len(names)} layers were to be quantized, OpenVINO knows {len(chosen)} of them.')
    quantized = nncf.quantize(
        model,
        nncf.Dataset(images.files, lambda path: images.load(path, meta)),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(images.files),
        # It gains nothing: UperNet-A on CamVid is at 61.92 mIoU with it and at 62.01 without, in float at 62.08.
        advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
        ignored_scope=nncf.IgnoredScope(
            names=[name for name in products if name not in chosen],
            types=sorted(set(everything.values()) - set(OPENVINO_OPERATORS)),
            validate=False,
        ),
    )
    result = file.with_name('int8.xml')
    openvino.save_model(quantized, result, compress_to_fp16=False)
    for suffix in ('.xml', '.bin'):
        result.with_suffix(suffix).replace(file.with_suffix(suffix))
