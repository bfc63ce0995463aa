"""What an ONNX file must be, and names that lead from its nodes to modules."""

import pytest
import torch
from torch import nn

from mmunireplknet import UniRepLKNet
from mmunireplknet.deploy import onnx_file
from mmunireplknet.deploy.exportable import ExportError, make_exportable
from mmunireplknet.deploy.norm_precision import module_of
from mmunireplknet.deploy.onnx_file import check_onnx, count_depthwise, write_onnx

from ..procedural import image
from ..test_models.tiny import tiny

onnx = pytest.importorskip('onnx')


@pytest.mark.parametrize(
    ('name', 'module'),
    [
        ('/Shape', ''),
        ('/model/backbone/norm0/Transpose_1', 'backbone.norm0'),
        ('/backbone/stages.0/stages.0.1/dwconv/Conv', 'backbone.stages.0.1.dwconv'),
        ('/backbone/stages.2/stages.2.10/act/act.1/Div', 'backbone.stages.2.10.act.1'),
        ('/backbone/stages.0/stages.0.0/pwconv2/pwconv2.1/Transpose', 'backbone.stages.0.0.pwconv2.1'),
        ('/lateral_convs.0/conv/Conv', 'lateral_convs.0.conv'),
    ],
)
def test_names_of_the_older_exporter(name, module):
    assert onnx_file._scope_of_name(name) == module


def graph_of(*nodes, domains=('',)):
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2, 3]) for n in 'xy')
    opsets = [onnx.helper.make_opsetid(domain, 18) for domain in domains]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, 'g', [x], [y]), opset_imports=opsets, ir_version=9)


def test_only_standard_operators():
    check_onnx(graph_of(onnx.helper.make_node('Relu', ['x'], ['y'])))
    with pytest.raises(ExportError, match='mmcv::NMS'):
        check_onnx(graph_of(onnx.helper.make_node('NMS', ['x'], ['y'], domain='mmcv'), domains=('', 'mmcv')))
    with pytest.raises(ExportError, match='not valid ONNX'):
        check_onnx(graph_of(onnx.helper.make_node('Relu', ['nothing'], ['y'])))
    with pytest.raises(ExportError, match='not valid ONNX'):  # shapes that contradict each other
        check_onnx(graph_of(onnx.helper.make_node('Transpose', ['x'], ['y'], perm=[1, 0])))


def test_what_torch_cannot_write_is_one_sentence(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.fft.fft(x).real  # the older exporter has no operator for it

    exportable = make_exportable(tiny(), None)
    exportable.output_names = ('feat0',)
    exportable.compute = lambda x: (Odd()(x),)
    with pytest.raises(ExportError, match=r'UniRepLKNet cannot be written as onnx: .*--exporter'):
        write_onnx(exportable, image((1, 3, 32, 32)), tmp_path / 'x.onnx', exporter='torchscript')
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(('arch', 'large'), [('t', 15), ('s', 15)])
def test_large_kernels_of_the_published_variants(tmp_path, arch, large):
    """One plain Conv for each Dilated Reparam Block, and no BatchNormalization."""
    backbone = UniRepLKNet(arch)
    assert sum(k > 3 for sizes in backbone.arch.kernel_sizes for k in sizes) == large
    write_onnx(make_exportable(backbone, None), image((1, 3, 64, 64)), tmp_path / 'x.onnx', exporter='torchscript')
    graph = onnx.load(tmp_path / 'x.onnx')
    assert count_depthwise(graph) == large
    assert count_depthwise(graph, least=3) == sum(backbone.arch.depths)
    assert 'BatchNormalization' not in {node.op_type for node in graph.graph.node}
    convs = {module_of(node) for node in graph.graph.node if node.op_type == 'Conv'}
    assert 'stages.2.0.dwconv.lk_origin' in convs
