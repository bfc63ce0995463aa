"""The layers against plain formulas in float64, and in half precision on large values and large maps.

1,200 over 200x304 is the case that overflows a half-precision sum: the sum of squares is 8.8e10, the sum 7.3e7,
and the largest float16 is 65,504.
"""

import math

import pytest
import torch
from torch import nn

from mmunireplknet import UniRepLKNet
from mmunireplknet.models.layers import GRN, LayerNorm2d, NCHWtoNHWC, NHWCtoNCHW, SEBlock
from mmunireplknet.models.unireplknet import UniRepLKNetBlock

from ..procedural import image, randomise, relative_error

# Relative L2 error that rounding alone explains: a few times the unit roundoff, 2^-11 and 2^-8.
HALF = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def plain_grn(x, gamma, beta):
    norm = torch.sqrt((x * x).sum(1, keepdim=True).sum(2, keepdim=True))
    return gamma * (x * (norm / (norm.mean(-1, keepdim=True) + 1e-6))) + beta + x


def plain_layer_norm(x, weight, bias, eps=1e-6):
    mean = x.mean(1, keepdim=True)
    var = ((x - mean) ** 2).mean(1, keepdim=True)
    return (x - mean) / torch.sqrt(var + eps) * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def plain_se(x, se):
    pooled = x.mean((2, 3))
    hidden = torch.relu(pooled @ se.down.weight[:, :, 0, 0].T + se.down.bias)
    weight = torch.sigmoid(hidden @ se.up.weight[:, :, 0, 0].T + se.up.bias)
    return x * weight[:, :, None, None]


def large_map(channels=8):
    """Values of 1,200 with some spread over channels and pixels, (1, C, 200, 304), float64, exact in halves' range."""
    steps = torch.linspace(-100, 100, channels, dtype=torch.float64).view(1, -1, 1, 1)
    return 1200 + steps + 50 * image((1, channels, 200, 304)).double().clamp(-3, 3)


@pytest.mark.parametrize('use_bias', [True, False])
def test_grn(use_bias):
    layer = randomise(nn.ModuleDict({'act': nn.Sequential(nn.GELU(), GRN(12, use_bias))}))['act'][1].double()
    assert (layer.beta is not None) == use_bias
    assert layer.gamma.abs().min() > 0
    x = image((2, 5, 7, 12)).double()
    beta = layer.beta if use_bias else 0
    assert relative_error(layer(x).detach(), plain_grn(x, layer.gamma, beta).detach()) < 1e-14


def test_grn_starts_as_identity():
    x = image((2, 5, 7, 12))
    assert torch.equal(GRN(12)(x), x)


def test_grn_gradient():
    layer = GRN(4).double()
    nn.init.normal_(layer.gamma)
    nn.init.normal_(layer.beta)
    x = image((2, 3, 3, 4)).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_layer_norm(layout, dtype):
    layer = randomise(LayerNorm2d(12)).to(dtype)
    x = (3 * image((2, 12, 5, 7)) + 1).to(dtype).contiguous(memory_format=layout)
    y = layer(x)
    assert y.is_contiguous(memory_format=layout)
    assert y.dtype == dtype
    expected = plain_layer_norm(x.double(), layer.weight.double(), layer.bias.double())
    assert relative_error(y.detach(), expected.detach()) < (1e-6 if dtype == torch.float32 else 1e-14)


def test_layer_norm_of_a_strided_view():
    layer = randomise(LayerNorm2d(6))
    x = image((2, 12, 9, 7))[:, ::2, ::2, 1:-1]
    assert not x.is_contiguous()
    y = layer(x)
    assert y.is_contiguous()
    assert relative_error(y.detach(), plain_layer_norm(x, layer.weight, layer.bias).detach()) < 1e-6


def test_layer_norm_eps():
    """eps 1e-6 stands inside of the root: it decides on a map of tiny values."""
    layer = LayerNorm2d(12).double()
    x = 1e-3 * image((2, 12, 5, 7)).double()
    y = layer(x).detach()
    assert relative_error(y, plain_layer_norm(x, layer.weight, layer.bias, 1e-6).detach()) < 1e-12
    assert relative_error(y, plain_layer_norm(x, layer.weight, layer.bias, 1e-5).detach()) > 1e-2


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_se(layout):
    layer = randomise(SEBlock(16)).double()
    x = image((2, 16, 5, 7)).double().contiguous(memory_format=layout)
    y = layer(x)
    assert relative_error(y.detach(), plain_se(x, layer).detach()) < 1e-14
    assert y.is_contiguous(memory_format=layout)
    assert layer.down.weight.shape == (4, 16, 1, 1)


def test_permutes_are_views():
    x = image((2, 3, 5, 7))
    y = NCHWtoNHWC()(x)
    assert y.shape == (2, 5, 7, 3)
    assert y.data_ptr() == x.data_ptr()
    assert torch.equal(y[1, 2, 3], x[1, :, 2, 3])
    assert NHWCtoNCHW()(y).data_ptr() == x.data_ptr()
    assert torch.equal(NHWCtoNCHW()(y), x)


@pytest.mark.parametrize('dtype', HALF)
def test_half_grn(dtype):
    layer = GRN(8)
    nn.init.uniform_(layer.gamma, 0.2, 0.6)
    nn.init.normal_(layer.beta)
    layer.to(dtype)
    x = large_map().permute(0, 2, 3, 1).to(dtype)
    assert float(x.double().norm(dim=(1, 2)).max()) > 65504  # what a norm in float16 cannot hold
    y = layer(x)
    assert y.dtype == dtype
    assert y.isfinite().all()
    expected = plain_grn(x.double(), layer.gamma.double(), layer.beta.double())
    assert relative_error(y.detach(), expected.detach()) < HALF[dtype]


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', HALF)
def test_half_layer_norm(dtype, layout):
    layer = randomise(LayerNorm2d(8)).to(dtype)
    x = large_map().to(dtype).contiguous(memory_format=layout)
    y = layer(x)
    assert y.dtype == dtype
    assert y.isfinite().all()
    expected = plain_layer_norm(x.double(), layer.weight.double(), layer.bias.double())
    assert relative_error(y.detach(), expected.detach()) < HALF[dtype]


@pytest.mark.parametrize('dtype', HALF)
def test_half_se(dtype):
    layer = randomise(SEBlock(8))
    with torch.no_grad():
        layer.down.weight.mul_(1e-3)  # keeps the sigmoid away from its ends, where an error would not be seen
    layer.to(dtype)
    x = large_map().to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert y.isfinite().all()
    expected = plain_se(x.double(), layer.double()).detach()
    assert 0.05 < float((expected / x.double()).mean()) < 0.95
    assert relative_error(y.detach(), expected) < HALF[dtype]


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('kernel_size', [3, 13])
def test_half_block(kernel_size, channels_last):
    """A whole block in the deploy form, float16, on values of 1,200; the convolution averages so that it can hold."""
    block = randomise(UniRepLKNetBlock(8, kernel_size)).eval()
    block.switch_to_deploy()
    conv = block.dwconv if kernel_size == 3 else block.dwconv.lk_origin
    with torch.no_grad():
        conv.weight.abs_().div_(conv.weight.sum((2, 3), keepdim=True))
        block.se.down.weight.mul_(1e-3)
        block.pwconv1[1].weight.mul_(0.5)
        block.pwconv2[0].weight.mul_(20)  # the branch is a good part of the output
    x = large_map()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    reference = randomise(UniRepLKNetBlock(8, kernel_size, deploy=True)).double()
    block.half()
    reference.load_state_dict(block.state_dict())
    x = x.half()
    inner = {}
    block.pwconv1.register_forward_hook(lambda _, __, y: inner.update(y=y))
    with torch.no_grad():
        y = block(x)
        expected = reference(x.double())
    assert float(inner['y'].double().norm(dim=(1, 2)).max()) > 65504
    assert y.dtype == torch.float16
    assert y.isfinite().all()
    # The residual dominates; what the block adds is compared on its own, with the rounding of its operands.
    assert relative_error(y, expected) < 2e-3
    assert float((expected - x.double()).norm() / x.double().norm()) > 0.1
    assert relative_error(y.double() - x.double(), expected - x.double()) < 1e-2


@pytest.mark.parametrize('dtype', HALF)
def test_half_pooled_feature(dtype):
    x = large_map().to(dtype)
    with torch.device('meta'):
        model = UniRepLKNet('a', out_indices=(3,), gap_before_final_norm=True)
    model.downsample_layers = nn.ModuleList([nn.Identity()] * 4)
    model.stages = nn.ModuleList([nn.Identity()] * 4)
    model.norm = randomise(nn.LayerNorm(8, eps=1e-6)).to(dtype)
    (y,) = model(x)
    assert y.dtype == dtype
    assert y.isfinite().all()
    expected = torch.nn.functional.layer_norm(
        x.double().mean((2, 3)), (8,), model.norm.weight.double(), model.norm.bias.double(), 1e-6
    )
    assert relative_error(y.detach(), expected.detach()) < 2 * HALF[dtype]


@pytest.mark.parametrize(
    'build', [GRN, LayerNorm2d, SEBlock, lambda dim: UniRepLKNetBlock(dim, 3), lambda dim: UniRepLKNetBlock(dim, 7)]
)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_gradients_of_a_zero_map(build, dtype):
    layer = build(8).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(0.1, 1)
    shape = (2, 5, 7, 8) if isinstance(layer, GRN) else (2, 8, 5, 7)
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    y = layer.train()(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


def test_half_gradient_of_grn_under_autocast():
    """bfloat16 autocast: parameters and their gradients stay in float32, the map in bfloat16."""
    layer = GRN(8)
    nn.init.normal_(layer.gamma)
    x = large_map().permute(0, 2, 3, 1).bfloat16().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    (y.float() / math.prod(y.shape)).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert layer.gamma.grad.dtype == torch.float32
    double = GRN(8).double()
    double.load_state_dict({k: v.double() for k, v in layer.state_dict().items()})
    x64 = x.detach().double().requires_grad_()
    (double(x64) / math.prod(y.shape)).sum().backward()
    assert relative_error(x.grad, x64.grad) < 5e-2
    assert relative_error(layer.gamma.grad, double.gamma.grad) < 5e-2
