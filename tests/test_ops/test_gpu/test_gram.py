from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ...procedural import relative_error
from .test_convolution import TOLERANCE, maps


def exact(x: Tensor, grad: Tensor, kernel: int, dilation: int) -> Tensor:
    padding, c = kernel // 2 * dilation, x.shape[1]
    weight = x.new_zeros(c, 1, kernel, kernel, dtype=torch.float64)
    return torch.ops.aten.convolution_backward(
        grad.double(), x.double(), weight, None, [1, 1], [padding] * 2, [dilation] * 2, False, [0, 0], c, [0, 1, 0]
    )[1]


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize(('kernel', 'dilation'), [(3, 1), (3, 4), (5, 1), (5, 3), (7, 2), (13, 1), (17, 1), (31, 1)])
def test_is_the_gradient(gpu: SimpleNamespace, kernel: int, dilation: int, dtype: torch.dtype) -> None:
    x, _, _ = maps(dtype, kernel)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = gpu.gram.weight_grad(x, grad, kernel, dilation)
    assert out.dtype == torch.float32
    assert relative_error(out, exact(x, grad, kernel, dilation)) < 1e-6
