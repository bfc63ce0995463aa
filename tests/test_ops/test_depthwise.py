"""The depthwise convolution and its gradients against torch's in float64, on every backend."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from mmcv.cnn import ConvModule
from torch import Tensor, nn

from mmunireplknet.ops import DepthwiseConv2d, depthwise_conv2d, reference

from ..procedural import image, randomise, relative_error
from .cases import (
    DILATIONS,
    GRAD_LAYOUTS,
    KERNELS,
    LARGE,
    LAYOUTS,
    SIZES,
    TOLERANCE,
    Case,
    differentiate,
    draw,
    mistakes,
    plain,
    tensors,
    wrong_roundings,
)  # fmt: skip

BASE = Case(7, torch.float32, (9, 10), 'contiguous', 'contiguous', 18, 1, 2)


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('kernel', KERNELS)
def test_against_float64(kernel: int, dtype: torch.dtype, backend: str) -> None:
    for case in draw(kernel, dtype):
        assert mistakes(case, backend) == []


@pytest.mark.parametrize('kernel', [3, 5, 13, 15])
@pytest.mark.parametrize('dilation', DILATIONS)
def test_dilation(kernel: int, dilation: int, backend: str) -> None:
    for size in SIZES[:-1]:
        assert mistakes(BASE._replace(kernel=kernel, dilation=dilation, size=size), backend) == []


@pytest.mark.parametrize('case', LARGE, ids=str)
def test_large(case: Case, backend: str) -> None:
    assert mistakes(case, backend) == []


@pytest.mark.parametrize('width', [8, 13, 37])
@pytest.mark.parametrize('kernel', [11, 13, 21, 31])
def test_every_height(kernel: int, width: int, cpp: Path) -> None:
    """Minimal filtering takes rows of maps in pairs and rows of kernels in threes, from some height and width on."""
    for height in range(1, kernel + 5):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[height % 3]
        layouts = ('contiguous', 'channels_last')[:: 1 - height // 2 % 2 * 2]
        case = Case(kernel, dtype, (height, width), *layouts, (2, 17)[height % 5 == 0], 1, 1)
        assert mistakes(case, 'cpp') == []
        assert mistakes(case._replace(dtype=torch.float32), 'cpp') == []


@pytest.mark.parametrize(
    ('kernel', 'size', 'dilation', 'minimal'),
    [
        (13, (32, 32), 1, True), (13, (15, 27), 1, True), (31, (32, 32), 1, True), (31, (64, 50), 1, True),
        (7, (32, 32), 1, False), (13, (9, 32), 1, False), (13, (32, 7), 1, False), (13, (32, 32), 2, False),
    ],
)  # fmt: skip
def test_where_minimal_filtering_is_used(
    kernel: int, size: tuple[int, int], dilation: int, minimal: bool, cpp: Path
) -> None:
    """A single one comes out as the kernel: to the last bit in the plain form, rounded by minimal filtering."""
    x, weight = torch.zeros(1, 16, *size), torch.randn(16, 1, kernel, kernel)
    x[:, :, size[0] // 2, size[1] // 2] = 1
    exact, out = plain(x.double(), weight.double(), None, dilation), depthwise_conv2d(x, weight, None, dilation, 'cpp')
    assert relative_error(out, exact) < 2e-7
    assert bool((out == exact).all()) is not (minimal and torch.ops.mmuni_cpu.capability() == 'avx512')


@pytest.mark.slow
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('kernel', KERNELS)
def test_every_size_and_layout(kernel: int, dtype: torch.dtype, cpp: Path) -> None:
    for case in draw(kernel, dtype, LAYOUTS, 2e7):
        assert mistakes(case, 'torch') == []
        assert mistakes(case, 'cpp') == []


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_rounded_as_torch_does(dtype: torch.dtype, backend: str) -> None:
    assert wrong_roundings(dtype, backend) == 0


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('kernel', [3, 13])
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_no_images(dtype: torch.dtype, kernel: int, layout: str, backend: str) -> None:
    """The output is empty, and the gradients of weight and bias are zero as those of nn.Conv2d."""
    x, weight, bias, grad = tensors(BASE._replace(kernel=kernel, dtype=dtype, layout=layout, batch=0))
    # Fills freed memory with what must not be seen in the gradients.
    del [torch.full((1000 * size,), torch.nan) for size in range(1, 20)][:]
    results = differentiate(lambda *inputs: depthwise_conv2d(*inputs, 1, backend), x, weight, bias, grad)
    assert results['output'].shape == results['input gradient'].shape == x.shape
    assert torch.equal(results['weight gradient'], torch.zeros_like(weight))
    assert torch.equal(results['bias gradient'], torch.zeros_like(bias))


@pytest.mark.parametrize('shape', [(1, 16, 66, 40), (3, 40, 33, 21), (2, 3, 7, 150)], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_matter(dtype: torch.dtype, shape: tuple, cpp: Path) -> None:
    """Not a bit of the compiled kernels' results depends on the number of threads, or on their order.

    That of the bias is a sum over the map, which torch makes: the last bits of it do.
    """
    n, c, *size = shape
    x, weight, bias, grad = tensors(Case(13, dtype, tuple(size), 'contiguous', 'channels_last', c, 1, n))
    results = []
    for count in (1, 1, 2, 2, 3, 3):
        torch.set_num_threads(count)
        results.append(differentiate(lambda *inputs: depthwise_conv2d(*inputs, 1, 'cpp'), x, weight, bias, grad))
    for name in ('output', 'input gradient', 'weight gradient'):
        assert all(torch.equal(other[name], results[0][name]) for other in results[1:]), name


def test_repeatable(backend: str) -> None:
    x, weight, bias, grad = tensors(BASE._replace(kernel=13, size=(33, 21)))
    first, second = (
        differentiate(lambda *inputs: depthwise_conv2d(*inputs, 1, backend), x, weight, bias, grad) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('kernel', [3, 7, 15])
def test_layout_and_dtype_are_kept(kernel: int, layout: str, dtype: torch.dtype, backend: str) -> None:
    """Strides are those of ``torch.empty_like``: the very same for a dense map. So are those of the gradient."""
    x, weight, _, _ = tensors(BASE._replace(kernel=kernel, layout=layout, dtype=dtype))
    assert layout not in ('contiguous', 'channels_last', 'permuted') or torch.empty_like(x).stride() == x.stride()
    x.requires_grad_()
    y = depthwise_conv2d(x, weight, None, 1, backend)
    (grad,) = torch.autograd.grad(y, x, y.detach())
    for out in (y, grad):
        assert out.dtype == dtype
        assert out.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize('grad_layout', GRAD_LAYOUTS)
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_gradient_of_a_leaf_has_its_layout(layout: str, grad_layout: str, backend: str) -> None:
    x, weight, _, grad = tensors(BASE._replace(layout=layout, grad_layout=grad_layout))
    x.requires_grad_()
    weight.requires_grad_()
    depthwise_conv2d(x, weight, None, 1, backend).backward(grad)
    assert x.grad.stride() == x.stride()
    assert weight.grad.stride() == weight.stride()


@pytest.mark.parametrize(
    ('weight_dtype', 'tolerance'), [(torch.float32, 1e-6), (torch.float64, 1e-6), (torch.float16, 5e-4)], ids=str
)
def test_mixed_dtypes(weight_dtype: torch.dtype, tolerance: float, backend: str) -> None:
    """A bfloat16 map with a weight of more precision: every gradient has the dtype of its argument."""
    x, weight, bias, grad = tensors(BASE._replace(dtype=torch.bfloat16))
    weight, bias = weight.to(weight_dtype) * 1.01, bias.to(weight_dtype) * 1.01
    mine = differentiate(lambda *inputs: depthwise_conv2d(*inputs, 1, backend), x, weight, bias, grad)
    exact = differentiate(lambda *inputs: plain(*inputs, 1), *(t.double() for t in (x, weight, bias, grad)))
    assert [t.dtype for t in mine.values()] == [torch.bfloat16] * 2 + [weight_dtype] * 2
    for name, limit in zip(mine, (4e-3, 4e-3, tolerance, tolerance), strict=True):
        assert relative_error(mine[name], exact[name]) < limit, name


def test_large_values_do_not_overflow(backend: str) -> None:
    """Sums of float16 products are made in float32: 7x7 taps of 200 * 20 are 196,000, less 195,000 by the bias."""
    x, weight = torch.full((1, 3, 9, 9), 200.0).half(), torch.full((3, 1, 7, 7), 20.0).half()
    y = depthwise_conv2d(x, weight, torch.full((3,), -195000.0), 1, backend)
    assert torch.equal(y[:, :, 3:6, 3:6], torch.full((1, 3, 3, 3), 1000.0).half())


@pytest.mark.parametrize('backward_inside', [False, True])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, backward_inside: bool, backend: str) -> None:
    """The map is rounded to the dtype of autocast, weight and bias are not, and sums are made in float32."""
    x, weight, bias, grad = tensors(BASE)
    rounded, grad = x.to(dtype), grad.to(dtype)

    def function(*inputs: Tensor) -> Tensor:
        with torch.autocast('cpu', dtype):
            return depthwise_conv2d(*inputs, 1, backend)

    with torch.autocast('cpu', dtype, enabled=backward_inside):
        mine = differentiate(function, x, weight, bias, grad)
    exact = differentiate(lambda *inputs: plain(*inputs, 1), *(t.double() for t in (rounded, weight, bias, grad)))
    assert [t.dtype for t in mine.values()] == [dtype] + [torch.float32] * 3
    unit = TOLERANCE[dtype][0]
    for name, limit in zip(mine, (unit, unit, 1e-6, 1e-6), strict=True):
        assert relative_error(mine[name], exact[name]) < limit, name


def test_autocast_leaves_float64_alone(backend: str) -> None:
    x, weight, bias, _ = (t.double() for t in tensors(BASE))
    with torch.autocast('cpu', torch.bfloat16):
        y = depthwise_conv2d(x, weight, bias, 1, backend)
    assert y.dtype == torch.float64
    assert relative_error(y, plain(x, weight, bias, 1)) < 2e-15


def test_autocast_can_be_switched_off(backend: str) -> None:
    x, weight, bias, _ = tensors(BASE)
    with torch.autocast('cpu', torch.bfloat16), torch.autocast('cpu', enabled=False):
        assert depthwise_conv2d(x, weight, bias, 1, backend).dtype == torch.float32


MAP, WEIGHT = torch.zeros(2, 6, 8, 9), torch.zeros(6, 1, 5, 5)


@pytest.mark.parametrize(
    ('x', 'weight', 'bias', 'dilation', 'message'),
    [
        (MAP[0], WEIGHT, None, 1, r'x must be a floating \(N, C, H, W\) map .* got torch.float32 \(6, 8, 9\)'),
        (MAP.int(), WEIGHT, None, 1, r'x must be a floating .* got torch.int32 \(2, 6, 8, 9\)'),
        (MAP, WEIGHT[1:], None, 1, r'weight \(5, 1, 5, 5\) .* must be \(6, 1, K, K\) with an odd K'),
        (MAP, WEIGHT[:, 0], None, 1, r'weight \(6, 5, 5\) does not fit'),
        (MAP, WEIGHT[..., 1:], None, 1, r'weight \(6, 1, 5, 4\) does not fit'),
        (MAP, WEIGHT[..., 1:, 1:], None, 1, r'weight \(6, 1, 4, 4\) .* odd K'),
        (MAP, WEIGHT.expand(6, 6, 5, 5), None, 1, r'weight \(6, 6, 5, 5\) does not fit'),
        (MAP, torch.tensor(0.0), None, 1, r'weight \(\) does not fit'),
        (MAP, WEIGHT.int(), None, 1, 'int32'),
        (MAP, WEIGHT.to('meta'), None, 1, 'meta'),
        (MAP, WEIGHT, torch.zeros(5), 1, r'bias \(5,\) must be \(6,\)'),
        (MAP, WEIGHT, torch.zeros(6).int(), 1, 'int32'),
        (MAP, WEIGHT, None, 0, 'dilation=0 must be at least 1'),
    ],
)
def test_wrong_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(x, weight, bias, dilation)


@pytest.mark.parametrize('grad_layout', GRAD_LAYOUTS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_torch_takes_every_layout_off_the_cpu(layout: str, grad_layout: str) -> None:
    """On meta tensors, which go the way of those on a GPU."""
    x, grad = LAYOUTS[layout](MAP.to('meta')), GRAD_LAYOUTS[grad_layout](MAP.to('meta'))
    for kernel in (3, 5):
        weight = WEIGHT[..., :kernel, :kernel].to('meta')
        assert reference.forward(x, weight, None, 1).stride() == torch.empty_like(x).stride()
        assert reference.forward(grad, weight, None, 1, True).stride() == torch.empty_like(grad).stride()
        assert reference.weight_grad(x, grad, kernel, 1).shape == weight.shape


def test_module_is_a_conv2d(backend: str) -> None:
    mine = randomise(DepthwiseConv2d(6, 6, 13, padding=12, dilation=2, groups=6, backend=backend))
    theirs = nn.Conv2d(6, 6, 13, padding=12, dilation=2, groups=6)
    assert list(mine.state_dict()) == list(theirs.state_dict()) == ['weight', 'bias']
    theirs.load_state_dict(mine.state_dict(), strict=True)
    x = image((2, 6, 20, 21))
    expected = theirs.double()(x.double()).detach()
    assert relative_error(mine(x).detach(), expected) < 1e-6
    fresh = DepthwiseConv2d(6, 6, 13, padding=12, dilation=2, groups=6, backend=backend, dtype=torch.float64)
    assert fresh.weight.dtype == torch.float64
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    assert relative_error(fresh(x.double()).detach(), expected) < 2e-15


@pytest.mark.parametrize('kernel', [1, 3, 7])
def test_module_pads_by_name(kernel: int) -> None:
    x = image((1, 4, 9, 9))
    mine = randomise(DepthwiseConv2d(4, 4, kernel, padding='same', dilation=2, groups=4, bias=False))
    theirs = randomise(nn.Conv2d(4, 4, kernel, padding='same', dilation=2, groups=4, bias=False))
    assert mine.bias is None
    assert mine.padding == (kernel // 2 * 2,) * 2
    assert relative_error(mine(x).detach(), theirs(x).detach()) < 1e-6


@pytest.mark.parametrize('options', [{}, {'backend': 'torch'}])
def test_module_in_a_conv_module(options: dict) -> None:
    """mmcv's ConvModule gives it a norm and hence no bias."""
    layers = [
        randomise(ConvModule(6, 6, 7, padding=3, groups=6, conv_cfg=conv_cfg, norm_cfg=dict(type='BN')))
        for conv_cfg in (dict(type='LargeKernelDW', **options), None)
    ]
    assert type(layers[0].conv) is DepthwiseConv2d
    assert layers[0].conv.backend == options.get('backend', 'auto')
    assert layers[0].conv.bias is None
    x = image((2, 6, 8, 9))
    assert relative_error(layers[0](x).detach(), layers[1](x).detach()) < 1e-6


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_module_can_be_copied(duplicate: Any) -> None:
    layer = DepthwiseConv2d(6, 6, 7, padding=3, groups=6, backend='torch')
    other = duplicate(layer)
    assert other.backend == 'torch'
    assert other.weight is not layer.weight
    x = image((1, 6, 8, 9))
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(groups=1), r'groups=1 \(must be the channels, 6\)'),
        (dict(out_channels=12), r'out_channels=12 \(must be in_channels, 6\)'),
        (dict(stride=2), r'stride=2 \(must be 1\)'),
        (dict(kernel_size=(7, 5)), r'kernel_size=\(7, 5\) \(must be square and odd\)'),
        (dict(kernel_size=6), r'kernel_size=6 \(must be square and odd\)'),
        (dict(dilation=(1, 2)), r'dilation=\(1, 2\) \(must be the same both ways\)'),
        (dict(padding=2), r'padding=2 \(must be 3, which keeps the size\)'),
        (dict(dilation=2), r'padding=3 \(must be 6, which keeps the size\)'),
        (dict(padding='valid'), r'padding=valid \(must be 3'),
        (dict(padding_mode='circular'), r"padding_mode='circular' \(must be zeros\)"),
        (dict(groups=3, stride=2), r'groups=3 .*, stride=2 .*; use Conv2d for this layer'),
        (dict(backend='mkl'), "backend='mkl' is unknown: it must be auto, torch, cpp, triton, cuda"),
    ],
)
def test_module_refuses(options: dict, message: str) -> None:
    arguments = dict(in_channels=6, out_channels=6, kernel_size=7, padding=3, groups=6)
    with pytest.raises(ValueError, match=message):
        DepthwiseConv2d(**{**arguments, **options})
