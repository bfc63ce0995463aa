"""GRN and LayerNorm of a half-precision graph: float32 by casts, node by node."""

from collections import Counter

import numpy as np
import pytest

from mmunireplknet import UniRepLKNet
from mmunireplknet.deploy.exportable import ExportError, make_exportable
from mmunireplknet.deploy.norm_precision import float32_norms, module_of, pin_layer_norms
from mmunireplknet.deploy.onnx_file import check_onnx, write_onnx

from ..procedural import image, randomise

onnx = pytest.importorskip('onnx')
FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def half_graph(shared=False):
    """x -> LayerNormalization -> + its bias, or another -> y, in float16."""
    values = dict(scale=np.float16([1, 2, 3]), bias=np.float16([0, 1, 0]), other=np.float16([1, 1, 1]))
    nodes = [
        onnx.helper.make_node('LayerNormalization', ['x', 'scale', 'bias'], ['n'], 'norm', axis=-1, stash_type=1),
        onnx.helper.make_node('Add', ['n', 'bias' if shared else 'other'], ['y']),
    ]
    nodes[0].metadata_props.add(key='module', value='backbone.norm0')
    x, y = (onnx.helper.make_tensor_value_info(name, HALF, [2, 3]) for name in 'xy')
    weights = [onnx.numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = onnx.helper.make_graph(nodes, 'g', [x], [y], weights)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 18)], ir_version=9)


@pytest.mark.parametrize('shared', [False, True])
def test_casts_around_a_layer_norm(shared):
    ort = pytest.importorskip('onnxruntime')
    graph, x = half_graph(shared), np.float16([[1, 2, 4], [300, 0, 1]])
    before = ort.InferenceSession(graph.SerializeToString()).run(None, {'x': x})[0]
    with pytest.raises(ExportError, match=r'1 of 1 .* not in float32, the first in FLOAT16: norm of backbone\.norm0'):
        float32_norms(graph)
    pin_layer_norms(graph)
    check_onnx(graph)
    assert [node.op_type for node in graph.graph.node] == ['Cast', 'LayerNormalization', 'Cast', 'Add']
    assert {module_of(node) for node in graph.graph.node[:3]} == {'backbone.norm0'}
    assert float32_norms(graph) == {'norm': 'backbone.norm0'}
    types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    kept = {'bias': HALF} if shared else {'other': HALF}
    assert {**kept, 'scale_float32': FLOAT, 'bias_float32': FLOAT}.items() <= types.items()
    assert ('bias' in types) == shared, 'a weight that nobody uses stays'
    after = ort.InferenceSession(graph.SerializeToString()).run(None, {'x': x})[0]
    assert after == pytest.approx(before, abs=2**-9)  # about 1, of which float16 has 10 bits
    pinned = graph.SerializeToString()
    pin_layer_norms(graph)
    assert graph.SerializeToString() == pinned, 'pinned twice'


@pytest.mark.slow
def test_every_norm_of_variant_a(tmp_path):
    """12 blocks with a norm and a mean of GRN each, and 6 LayerNorms outside of them: two in the stem, three before
    the later stages, and the last."""
    trunk = randomise(UniRepLKNet('a', out_indices=(3,), gap_before_final_norm=True)).eval()
    file = tmp_path / 'a.onnx'
    write_onnx(make_exportable(trunk, None, half=True), image((1, 3, 64, 64)), file, exporter='torchscript')
    graph = onnx.load(file)
    found = float32_norms(graph)
    kinds = {node.name: node.op_type for node in graph.graph.node}
    assert Counter(kinds[name] for name in found) == {'ReduceL2': 12, 'ReduceMean': 12, 'LayerNormalization': 6}
    grn = {module for name, module in found.items() if kinds[name] == 'ReduceL2'}
    assert grn == {f'stages.{i}.{k}.act.1' for i, depth in enumerate((2, 2, 6, 2)) for k in range(depth)}
    layers = {module for name, module in found.items() if kinds[name] == 'LayerNormalization'}
    assert layers == {f'downsample_layers.{place}' for place in ('0.1', '0.4', '1.1', '2.1', '3.1')} | {'norm'}
    kernels = {node.input[1] for node in graph.graph.node if node.op_type == 'Conv'}
    assert {tensor.data_type for tensor in graph.graph.initializer if tensor.name in kernels} == {HALF}
