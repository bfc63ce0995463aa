"""An Exportable as an ONNX file of standard operators, with names that lead back to the model's modules."""

from __future__ import annotations

import ast
import io
import tempfile
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from .exportable import Exportable, ExportError
from .norm_precision import MODULE, pin_layer_norms
from .pointwise import with_convolutions

if TYPE_CHECKING:
    import onnx

__all__ = ['OPSET', 'check_onnx', 'count_depthwise', 'failure', 'write_onnx']

OPSET = 18
"""The version that torch's exporter writes without converting: LayerNormalization is one operator, GELU is not yet."""
LARGEST = 2**31 - 2**26
"""Bytes of weights that are written into the file, which protobuf limits to 2 GiB; more go into a file beside it."""
DYNAMO_SCOPES = 'pkg.torch.onnx.name_scopes'


def write_onnx(
    exportable: Exportable,
    image: Tensor,
    file: Path,
    dynamic: bool = True,
    opset: int = OPSET,
    exporter: str | None = None,
) -> None:
    """Export, clean and check.

    Args:
        exportable: What to write.
        image: Example input; its size is the only one that a model without dynamic axes takes.
        file: File to write.
        dynamic: Leave batch, height and width open, as far as ``exportable.dynamic_axes`` does.
        opset: Version of the standard operators.
        exporter: 'dynamo', or 'torchscript' for torch's older one, which is about 20 times faster; by default
            what ``exportable`` names.

    Raises:
        ExportError: The exporter fails, or what it writes is not made of standard operators alone.
    """
    import onnx

    exportable = with_convolutions(exportable)
    large = sum(value.nbytes for value in exportable.state_dict().values()) > LARGEST
    if (exporter or exportable.exporter) == 'dynamo':
        graph = _export_dynamo(exportable, image, dynamic, opset)
    else:
        graph = _export_traced(exportable, image, dynamic, opset, file.parent)
        graph = graph if large else _slim(graph)
    _clean(graph, exportable, dynamic)
    pin_layer_norms(graph)
    if not large:
        check_onnx(graph)
        onnx.save(graph, file)
        return
    onnx.save(graph, file, save_as_external_data=True, location=f'{file.name}.data')
    check_onnx(onnx.load(file, load_external_data=False), file)


def _export_dynamo(exportable: Exportable, image: Tensor, dynamic: bool, opset: int) -> onnx.ModelProto:
    axes = exportable.dynamic_axes[exportable.input_name] if dynamic else {}
    shapes = ({axis: torch.export.Dim.DYNAMIC for axis in axes},)
    try:
        with torch.no_grad(), redirect_stdout(io.StringIO()):  # it prints its progress
            program = torch.export.export(exportable, (image,), dynamic_shapes=shapes, strict=False)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                input_names=[exportable.input_name],
                output_names=list(exportable.output_names),
            )
    except Exception as error:  # what a model holds decides what the exporter raises
        raise ExportError(failure(exportable, 'onnx', error)) from error
    return cast(torch.onnx.ONNXProgram, exported).model_proto


def _export_traced(exportable: Exportable, image: Tensor, dynamic: bool, opset: int, folder: Path) -> onnx.ModelProto:
    import onnx

    try:
        with torch.no_grad(), tempfile.TemporaryDirectory(dir=folder) as temporary:
            file = str(Path(temporary, 'traced.onnx'))  # beside which torch puts the weights of a large model
            torch.onnx.export(
                exportable,
                (image,),
                file,
                dynamo=False,
                opset_version=opset,
                input_names=[exportable.input_name],
                output_names=list(exportable.output_names),
                dynamic_axes=exportable.dynamic_axes if dynamic else _unknown_sizes(exportable),
            )
            return onnx.load(file)
    except Exception as error:  # what a model holds decides what the exporter raises
        raise ExportError(failure(exportable, 'onnx', error)) from error


def _unknown_sizes(exportable: Exportable) -> dict[str, dict[int, str]]:
    """Axes that a fixed input leaves open: the number of detections."""
    known = set(exportable.dynamic_axes[exportable.input_name].values())
    axes = {name: exportable.dynamic_axes.get(name, {}) for name in exportable.output_names}
    return {name: {i: a for i, a in own.items() if a.partition('/')[0] not in known} for name, own in axes.items()}


def failure(exportable: Exportable, format: str, error: Exception) -> str:
    """What to say when torch cannot write a model."""
    reason = (str(error).strip().splitlines() or [''])[0]
    return (
        f'{type(exportable.model).__name__} cannot be written as {format}: {type(error).__name__}: {reason} '
        'Try the other exporter (--exporter torchscript), --shape, --backbone-only, or another format.'
    )


def _slim(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Fold what the older exporter leaves behind; the newer one's graphs are no faster for it (docs/deployment.md)."""
    import onnxslim

    return onnxslim.slim(graph)


def _clean(graph: onnx.ModelProto, exportable: Exportable, dynamic: bool) -> None:
    """Leave one entry of metadata a node, its module, and name the open axes as ``dynamic_axes`` does.

    The exporter writes its stack traces into the file, with the paths of this machine, and calls axes s16 and the like.
    """
    for node in graph.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == DYNAMO_SCOPES), None)
        module = _innermost(ast.literal_eval(scopes)[:-1]) if scopes else _scope_of_name(node.name)
        del node.metadata_props[:]
        if module:
            node.metadata_props.add(key=MODULE, value=module)
    values = [*graph.graph.input, *graph.graph.output]
    for value in [*values, *graph.graph.value_info]:
        del value.metadata_props[:]
    for tensor in graph.graph.initializer:
        del tensor.metadata_props[:]
    del graph.metadata_props[:], graph.graph.metadata_props[:]
    if dynamic:
        _name_axes(graph, exportable)
    graph.producer_name, graph.doc_string, graph.graph.doc_string = 'mmunireplknet', '', ''
    for node in graph.graph.node:
        node.doc_string = ''


def _name_axes(graph: onnx.ModelProto, exportable: Exportable) -> None:
    names: dict[str, str] = {}
    for value in (*graph.graph.input, *graph.graph.output):
        dims = value.type.tensor_type.shape.dim
        for axis, name in exportable.dynamic_axes.get(value.name, {}).items():
            names.setdefault(dims[axis].dim_param, name)
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def _innermost(scopes: Iterable[str]) -> str:
    found = (list(scopes) or [''])[-1].removeprefix('model.')
    return '' if found.startswith('_empty') else found  # torch's word for no module


def _scope_of_name(name: str) -> str:
    """Module of a node of the older exporter, which calls them /model/backbone/stages.0/stages.0.1/dwconv/Conv."""
    path = ''
    for part in name.strip('/').split('/')[:-1]:
        path = _join(path, part)
    return path.removeprefix('model.')


def _join(path: str, part: str) -> str:
    """A member of a list or Sequential repeats its name: stages.0 and stages.0.1 make stages.0.1."""
    head = part.rpartition('.')[0]
    if head and (path == head or path.endswith(f'.{head}')):
        return path[: len(path) - len(head)] + part
    return f'{path}.{part}' if path else part


def check_onnx(graph: onnx.ModelProto, file: Path | None = None) -> None:
    """Refuse what is not a valid graph of standard operators with shapes that can be inferred.

    Args:
        graph: The graph.
        file: Where it is, if weights stand beside it.

    Raises:
        ExportError: The first thing that is wrong.
    """
    import onnx

    foreign = sorted({f'{node.domain}::{node.op_type}' for node in graph.graph.node if node.domain})
    if foreign or graph.functions:
        names = ', '.join(foreign or [f.name for f in graph.functions])
        raise ExportError(f'the graph needs operators outside of the ONNX standard ({names}), which runtimes lack.')
    try:
        onnx.checker.check_model(str(file) if file else graph, full_check=True)
        onnx.shape_inference.infer_shapes(graph, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f'the exported graph is not valid ONNX: {error}') from error


def count_depthwise(graph: onnx.ModelProto, least: int = 5) -> int:
    """Depthwise Convs with a kernel of ``least`` or more."""
    found = 0
    for node in graph.graph.node:
        if node.op_type == 'Conv':
            attributes = {a.name: a for a in node.attribute}
            group = attributes['group'].i if 'group' in attributes else 1
            found += group > 1 and min(attributes['kernel_shape'].ints) >= least
    return found
