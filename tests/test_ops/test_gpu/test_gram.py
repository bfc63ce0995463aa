from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ...procedural import relative_error
from ..cases import GRAD_LAYOUTS
from .test_convolution import LARGE, SMALL, TOLERANCE, maps


def exact(x: Tensor, grad: Tensor, kernel: int, dilation: int) -> Tensor:
    padding, c = kernel // 2 * dilation, x.shape[1]
    weight = x.new_zeros(c, 1, kernel, kernel, dtype=torch.float64)
    return torch.ops.aten.convolution_backward(
        grad.double(), x.double(), weight, None, [1, 1], [padding] * 2, [dilation] * 2, False, [0, 0], c, [0, 1, 0]
    )[1]


def check(gpu: SimpleNamespace, case: tuple, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    kernel, dilation = case
    x, _, _ = maps(dtype, kernel, shape)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = gpu.gram.weight_grad(x, grad, kernel, dilation)
    assert out.dtype == torch.float32
    assert relative_error(out, exact(x, grad, kernel, dilation)) < 1e-6  # 16-bit products are exact, sums are not cut


@pytest.mark.parametrize(
    ('case', 'dtype'), [((3, 1), torch.float32), ((5, 3), torch.bfloat16), ((13, 1), torch.float16)], ids=str
)
def test_is_the_gradient(gpu: SimpleNamespace, case: tuple, dtype: torch.dtype) -> None:
    check(gpu, case, dtype, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('case', [(3, 4), (7, 1), (7, 2), (13, 1), (17, 1), (31, 1)], ids=str)
def test_is_the_gradient_of_larger_maps(gpu: SimpleNamespace, case: tuple, dtype: torch.dtype) -> None:
    check(gpu, case, dtype, LARGE)


@pytest.mark.slow
@pytest.mark.parametrize('width', [1, 7, 8, 10, 12, 16, 48])
def test_takes_every_width(gpu: SimpleNamespace, width: int) -> None:
    for height in (1, 6):
        check(gpu, (5, 1), torch.float16, (3, 2, height, width))


@pytest.mark.slow
@pytest.mark.parametrize('layout', GRAD_LAYOUTS)
def test_takes_every_layout(gpu: SimpleNamespace, layout: str) -> None:
    x, _, _ = maps(torch.float16, 3, (2, 3, 6, 7))
    grad = GRAD_LAYOUTS[layout](torch.randn(x.shape).half())
    assert relative_error(gpu.gram.weight_grad(x, grad, 3, 1), exact(x, grad, 3, 1)) < 1e-6


@pytest.mark.slow
def test_adds_many_parts_always_in_the_same_order(gpu: SimpleNamespace) -> None:
    x, _, _ = maps(torch.float16, 3, (21, 1, 29, 17))
    grad = torch.randn(x.shape).half()
    for config in gpu.tuning.candidates('weight_grad', 17, x.dtype):
        steps = -(-21 * 8 * 2 // config.block)
        assert gpu.tuning.splits(1, steps) > 1
        out = gpu.gram.multiply(x, grad, 3, 1, config)
        assert relative_error(out, exact(x, grad, 3, 1)) < 1e-6
        assert torch.equal(out, gpu.gram.multiply(x, grad, 3, 1, config))


def test_takes_a_gradient_in_another_dtype(gpu: SimpleNamespace) -> None:
    x, _, _ = maps(torch.float16, 3, (1, 2, 4, 9))
    grad = torch.randn(x.shape)
    assert relative_error(gpu.gram.weight_grad(x, grad, 3, 1), exact(x, grad.half(), 3, 1)) < 1e-6
