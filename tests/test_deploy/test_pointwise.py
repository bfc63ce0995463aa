import copy

import pytest
import torch
from torch import nn

from mmunireplknet.deploy.exportable import make_exportable
from mmunireplknet.deploy.onnx_file import write_onnx
from mmunireplknet.deploy.pointwise import ChannelsFirstLayerNorm, with_convolutions, with_reductions
from mmunireplknet.models.block import UniRepLKNetBlock

from ..procedural import image
from .cases import build, segmentor_config


@pytest.fixture
def exportable():
    cfg = segmentor_config()
    return make_exportable(build(cfg), cfg)


def test_the_blocks_compute_the_same_with_convolutions(exportable):
    x = image((2, 3, 64, 96))
    before = copy.deepcopy(exportable.state_dict())
    converted = with_convolutions(exportable)
    linear = [m for block in converted.modules() if isinstance(block, UniRepLKNetBlock) for m in block.modules()]
    assert not any(isinstance(m, nn.Linear) for m in linear)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), exportable(x), rtol=1e-5, atol=1e-5)
    assert before.keys() == exportable.state_dict().keys() == converted.state_dict().keys()
    assert all(torch.equal(before[k], v) for k, v in exportable.state_dict().items()), 'it is a copy'


def test_layer_norm_by_reductions_computes_the_same(exportable):
    x = image((2, 3, 64, 96))
    converted = with_reductions(exportable)
    assert not any(isinstance(m, nn.LayerNorm) for m in converted.modules())
    assert any(isinstance(m, nn.LayerNorm) for m in exportable.modules()), 'it is a copy'
    assert converted.state_dict().keys() == exportable.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(converted(x), exportable(x), rtol=1e-5, atol=1e-5)
    norm = next(m for m in converted.half().modules() if isinstance(m, ChannelsFirstLayerNorm))
    x = torch.full((1, norm.weight.numel(), 2, 2), 1e4, dtype=torch.float16)
    x[:, ::2] = -1e4  # the square of a deviation is no float16
    assert torch.isfinite(norm(x)).all()


def test_norms_are_taken_in_float32(exportable):
    converted = with_convolutions(exportable.half())
    grn = next(m for name, m in converted.named_modules() if name.endswith('blocks.0.act.1') or name.endswith('act.1'))
    x = torch.full((1, grn.gamma.numel(), 8, 8), 1e4, dtype=torch.float16)  # the square is no float16
    assert grn(x).dtype == torch.float16
    assert torch.isfinite(grn(x)).all()


def test_onnx_files_have_no_transposition_in_the_blocks(exportable, tmp_path):
    onnx = pytest.importorskip('onnx')
    write_onnx(exportable, image((1, 3, 64, 64)), tmp_path / 'm.onnx', dynamic=False, exporter='torchscript')
    nodes = onnx.load(tmp_path / 'm.onnx').graph.node
    inside = [n.op_type for n in nodes if any(m in n.name for m in ('pwconv1', 'pwconv2', '/act/'))]
    assert inside.count('Conv') == 2 * sum(isinstance(m, UniRepLKNetBlock) for m in exportable.modules())
    assert not {'Transpose', 'MatMul', 'Gemm'} & set(inside)
