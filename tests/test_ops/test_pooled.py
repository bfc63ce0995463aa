"""The convolution that also sums its maps."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmunireplknet.ops import depthwise_conv2d_pooled

from ..procedural import image, relative_error
from .cases import TOLERANCE, plain
from .fake_gpu import FakeGPU, fake_gpu

X, WEIGHT, BIAS = image((2, 6, 9, 10)), image((6, 1, 7, 7), 1), image((6,), 2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    with fake_gpu(monkeypatch) as gpu:
        yield gpu


def check(x: Tensor, bias: Tensor | None, backend: str) -> None:
    y, sums = depthwise_conv2d_pooled(x, WEIGHT, bias, 1, backend)
    wide = None if bias is None else bias.double()
    exact = plain(x.double(), WEIGHT.to(x.dtype).double(), wide, 1)
    assert relative_error(y, exact) < 2 * TOLERANCE[x.dtype][0]
    assert relative_error(sums, exact.sum((2, 3))) < 2 * TOLERANCE[x.dtype][1]
    assert (y.dtype, sums.dtype) == (x.dtype, torch.promote_types(x.dtype, torch.float32))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('bias', [None, BIAS])
def test_values(dtype: torch.dtype, layout: torch.memory_format, bias: Tensor | None, backend: str) -> None:
    check(X.to(dtype).contiguous(memory_format=layout), bias, backend)


def test_in_one_pass_where_the_backend_has_it(gpu: FakeGPU) -> None:
    gpu.milliseconds['triton'] = 0.5
    check(X, BIAS, 'auto')
    check(X, BIAS, 'auto')
    assert gpu.calls() == {'triton': ['forward', 'pooled'] * 3, 'cuda': ['forward']}
    assert sorted(gpu.timed) == ['cuda', 'torch', 'triton']  # those without it, with the pass for the sums


def test_no_map(backend: str) -> None:
    y, sums = depthwise_conv2d_pooled(X[:0], WEIGHT, None, 1, backend)
    assert (y.shape, sums.shape) == ((0, 6, 9, 10), (0, 6))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r'weight \(6, 1, 7, 7\) does not fit x \(2, 5, 9, 10\)'):
        depthwise_conv2d_pooled(X[:, :5], WEIGHT)
    with pytest.raises(ValueError, match="backend='mkl' is unknown"):
        depthwise_conv2d_pooled(X, WEIGHT, backend='mkl')


def test_gradients(backend: str) -> None:
    inputs = [t.double().requires_grad_() for t in (X[:1, :2, :5, :4], WEIGHT[:2], BIAS[:2])]
    assert torch.autograd.gradcheck(lambda *args: depthwise_conv2d_pooled(*args, 1, backend), inputs)


def test_gradient_of_one_output() -> None:
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(depthwise_conv2d_pooled(x, WEIGHT)[1].sum(), x)
    (exact,) = torch.autograd.grad(plain(x, WEIGHT, None, 1).sum(), x)
    assert relative_error(grad, exact) < 1e-6


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_opcheck(layout: torch.memory_format, backend: str) -> None:
    x = X.contiguous(memory_format=layout).requires_grad_()
    torch.library.opcheck(torch.ops.mmuni.depthwise_conv2d_pooled.default, (x, WEIGHT, BIAS, 1, backend))


def test_autocast() -> None:
    with torch.autocast('cpu', torch.bfloat16):
        y, sums = depthwise_conv2d_pooled(X, WEIGHT, BIAS)
    assert (y.dtype, sums.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(y, plain(X, WEIGHT, BIAS, 1)) < 6e-3


def test_flops() -> None:
    with FlopCounterMode(display=False) as counter:
        depthwise_conv2d_pooled(X, WEIGHT, BIAS)
    assert counter.get_total_flops() == 2 * X.numel() * 49
