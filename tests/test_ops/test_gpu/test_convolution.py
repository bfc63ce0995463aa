from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ...procedural import relative_error

# Relative L2 error against float64: the interpreter multiplies float32 without TF32; float16 rounds the sum once.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4}


def maps(dtype: torch.dtype, kernel: int, shape: tuple[int, int, int, int] = (2, 3, 11, 37)) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    sizes = shape, (shape[1], 1, kernel, kernel), shape[1:2]
    return tuple(torch.randn(size, generator=generator).to(dtype) for size in sizes)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, flipped: bool = False) -> Tensor:
    weight = weight.flip(2, 3) if flipped else weight
    padding = weight.shape[-1] // 2 * dilation
    bias = None if bias is None else bias.double()
    return F.conv2d(x.double(), weight.double(), bias, 1, padding, dilation, x.shape[1])


@pytest.mark.parametrize('flipped', [False, True])
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize(('kernel', 'dilation'), [(3, 1), (3, 4), (5, 1), (5, 3), (7, 2), (13, 1), (17, 1), (31, 1)])
def test_is_the_convolution(
    gpu: SimpleNamespace, kernel: int, dilation: int, dtype: torch.dtype, flipped: bool
) -> None:
    x, weight, bias = maps(dtype, kernel)
    out = gpu.convolution.forward(x, weight, None if flipped else bias, dilation, flipped)
    expected = convolve(x, weight, None if flipped else bias, dilation, flipped)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert relative_error(out, expected) < TOLERANCE[dtype]
