"""GRN and LayerNorm in a half-precision ONNX file: their reductions stay in float32, and the graph itself says so.

A sum of squares over a map leaves float16 long before its values do, and a runtime that sees float16 everywhere sums
in float16 (with ConvNeXt V2, TensorRT then detects nothing: facebookresearch/ConvNeXt-V2, issue 66). GRN brings its
casts along from PyTorch. Of LayerNormalization only an attribute says it, ``stash_type``, and TensorRT 11 has no such
setting of its layer any more; casts are types, which every runtime and a strongly typed network has to keep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .exportable import ExportError

if TYPE_CHECKING:
    import onnx

__all__ = ['MODULE', 'float32_norms', 'module_of', 'pin_layer_norms']

MODULE = 'module'  # the entry of a node's metadata that names the module it was made of


def module_of(node: onnx.NodeProto) -> str:
    """Name of the module that a node was made of, '' if it belongs to none."""
    return next((p.value for p in node.metadata_props if p.key == MODULE), '')


def pin_layer_norms(graph: onnx.ModelProto) -> None:
    """Put casts around every LayerNormalization in float16, in place, and hold its weights in float32."""
    import onnx

    half = onnx.TensorProto.FLOAT16
    weights = {tensor.name: tensor for tensor in graph.graph.initializer if tensor.data_type == half}
    copies: dict[str, onnx.TensorProto] = {}  # others may use a weight, too: onnxslim merges equal ones
    nodes: list[onnx.NodeProto] = []
    for node in graph.graph.node:
        if node.op_type != 'LayerNormalization' or node.input[1] not in weights:
            nodes.append(node)
            continue
        for place, name in enumerate(node.input):
            if name in weights:
                values = onnx.numpy_helper.to_array(weights[name]).astype('float32')
                copies[name] = onnx.numpy_helper.from_array(values, f'{name}_float32')
                node.input[place] = copies[name].name
        value, result = node.input[0], node.output[0]
        node.input[0], node.output[0] = f'{result}_in_float32', f'{result}_float32'
        before = onnx.helper.make_node('Cast', [value], [node.input[0]], to=onnx.TensorProto.FLOAT)
        after = onnx.helper.make_node('Cast', [node.output[0]], [result], to=half)
        for cast, side in ((before, 'before'), (after, 'after')):
            cast.name = f'{node.name}_cast_{side}'
            cast.metadata_props.extend(node.metadata_props)
        nodes += [before, node, after]
    if not copies:
        return
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]  # del empties those in the graph
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    for place in reversed(range(len(graph.graph.initializer))):
        if graph.graph.initializer[place].name not in used:
            del graph.graph.initializer[place]
    graph.graph.initializer.extend(copies.values())


def float32_norms(graph: onnx.ModelProto) -> dict[str, str]:
    """The nodes that reduce for GRN (norm and mean) and LayerNorm, all of them in float32.

    Args:
        graph: Written by ``onnx_file.write_onnx``.

    Returns:
        Modules by the names of their nodes.

    Raises:
        ExportError: One of them takes another type than float32.
    """
    import onnx

    inferred = onnx.shape_inference.infer_shapes(graph).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    grn = {module_of(node) for node in graph.graph.node if node.op_type == 'ReduceL2'}
    kinds = ('LayerNormalization', 'ReduceL2', 'ReduceMean')
    found = [n for n in graph.graph.node if n.op_type in kinds[:2] or (n.op_type == kinds[2] and module_of(n) in grn)]
    wrong = [node for node in found if types.get(node.input[0]) != onnx.TensorProto.FLOAT]
    if wrong:
        kind = onnx.TensorProto.DataType.Name(types.get(wrong[0].input[0], 0))
        raise ExportError(
            f'{len(wrong)} of {len(found)} reductions of GRN and LayerNorm are not in float32, the first in {kind}: '
            f'{wrong[0].name} of {module_of(wrong[0])}. Export the model again, with this version.'
        )
    return {node.name: module_of(node) for node in found}
