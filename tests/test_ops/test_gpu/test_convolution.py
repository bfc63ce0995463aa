from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ...procedural import relative_error
from ..cases import LAYOUTS

# Relative L2 error against float64: the interpreter multiplies float32 without TF32; 16 bits round the sum once.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
SMALL, LARGE = (2, 1, 5, 19), (2, 3, 11, 37)


def maps(dtype: torch.dtype, kernel: int, shape: tuple[int, ...] = LARGE) -> tuple[Tensor, ...]:
    """Map, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    sizes = shape, (shape[1], 1, kernel, kernel), shape[1:2]
    return tuple(torch.randn(size, generator=generator).to(dtype) for size in sizes)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, flipped: bool = False) -> Tensor:
    weight = weight.flip(2, 3) if flipped else weight
    padding = weight.shape[-1] // 2 * dilation
    bias = None if bias is None else bias.double()
    return F.conv2d(x.double(), weight.double(), bias, 1, padding, dilation, x.shape[1])


def check(gpu: SimpleNamespace, case: tuple, dtype: torch.dtype, flipped: bool, shape: tuple[int, ...]) -> None:
    kernel, dilation = case
    x, weight, bias = maps(dtype, kernel, shape)
    out = gpu.convolution.forward(x, weight, None if flipped else bias, dilation, flipped)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert relative_error(out, exact(x, weight, None if flipped else bias, dilation, flipped)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ('case', 'dtype', 'flipped'),
    [((3, 1), torch.float32, True), ((5, 3), torch.bfloat16, False), ((13, 1), torch.float16, True)],
    ids=str,
)
def test_is_the_convolution(gpu: SimpleNamespace, case: tuple, dtype: torch.dtype, flipped: bool) -> None:
    check(gpu, case, dtype, flipped, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('case', [(3, 4), (7, 1), (7, 2), (13, 1), (17, 1), (31, 1)], ids=str)
def test_is_the_convolution_of_larger_maps(gpu: SimpleNamespace, case: tuple, dtype: torch.dtype) -> None:
    check(gpu, case, dtype, case[0] % 4 == 1, LARGE)


@pytest.mark.slow
@pytest.mark.parametrize('width', [1, 7, 8, 10, 12, 16, 48])
def test_takes_every_width(gpu: SimpleNamespace, width: int) -> None:
    for height in (1, 6):
        check(gpu, (5, 1), torch.float16, False, (3, 2, height, width))


@pytest.mark.slow
@pytest.mark.parametrize('width', [7, 20])
def test_every_division_gives_the_same(gpu: SimpleNamespace, width: int) -> None:
    x, weight, bias = maps(torch.float32, 5, (9, 2, 13, width))
    expected = exact(x, weight, bias, 2)
    for config in gpu.tuning.candidates('forward', width, x.dtype):
        out, sums = gpu.convolution.convolve(x, weight, bias, 2, False, True, None, config)
        assert relative_error(out, expected) < TOLERANCE[x.dtype]
        assert relative_error(sums, expected.sum((2, 3))) < 1e-5


@pytest.mark.parametrize('layout', LAYOUTS)
def test_takes_every_layout(gpu: SimpleNamespace, layout: str) -> None:
    x, weight, bias = maps(torch.float16, 3, (2, 3, 6, 7))
    x = LAYOUTS[layout](x)
    out = gpu.convolution.forward(x, weight, bias, 1)
    assert out.stride() == torch.empty_like(x).stride()
    assert relative_error(out, exact(x, weight, bias, 1)) < TOLERANCE[x.dtype]


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
def test_returns_the_layout_that_is_asked_for_and_sums(gpu: SimpleNamespace, layout: torch.memory_format) -> None:
    x, weight, bias = maps(torch.float16, 3, (2, 5, 6, 9))
    for values in (x[:1], x.contiguous(memory_format=torch.channels_last)):
        out, sums = gpu.convolution.forward(values, weight, bias, 1, pooled=True, layout=layout)
        expected = exact(values, weight, bias, 1)
        assert out.is_contiguous(memory_format=layout)
        assert sums.dtype == torch.float32
        assert relative_error(out, expected) < TOLERANCE[x.dtype]
        assert relative_error(sums, expected.sum((2, 3))) < 1e-6


def test_transposes_maps_of_many_blocks(gpu: SimpleNamespace) -> None:
    x = torch.randn(2, 70, 11, 13).contiguous(memory_format=torch.channels_last)
    planes = gpu.layouts.to_planes(x)
    assert planes.is_contiguous()
    assert torch.equal(planes, x)
    again = gpu.layouts.like(planes, x)
    assert again.stride() == x.stride()
    assert torch.equal(again, x)


@pytest.mark.parametrize('divisor', [1, 2, 3, 7, 64, 97, 2**20 - 1, 2**30, 2**31 - 1])
def test_divides(gpu: SimpleNamespace, divisor: int) -> None:
    factor, shift = gpu.convolution.reciprocal(divisor)
    assert -(2**31) <= factor < 0
    for number in (0, 1, divisor - 1, divisor, 5 * divisor - 1, 5 * divisor, 2**31 - 1):
        if number < 2**31:  # what the kernel computes, in whole numbers
            assert (2 * number * (factor + 2**32) >> 32) >> shift == number // divisor


class Recorder:
    """A kernel that remembers its last launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.arguments = dict(zip(self.kernel.arg_names, args, strict=True))
            self.kernel[grid](*args, **options)

        return launch


@pytest.mark.slow
def test_reads_and_writes_beyond_32_bits(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of 2**24 + 1 channels of two images, of which only the pages in use take memory."""
    from triton.runtime.interpreter import GridExecutor

    kernel = gpu.convolution._convolve
    monkeypatch.setattr(gpu.convolution, '_convolve', recorder := Recorder(kernel))
    x, weight, _ = maps(torch.float16, 3, (2, 1, 8, 16))
    expected = gpu.convolution.forward(x, weight, None, 1)
    far = (2**24 + 1) * 128
    assert far > 2**31
    source, target = (torch.empty(far + 128, dtype=torch.float16) for _ in range(2))
    source[:128], source[far:] = x.flatten(1)
    monkeypatch.setattr(GridExecutor, '_restore_args_dev', lambda *_: None)  # copies all memory onto itself
    arguments = recorder.arguments | {'x': source, 'out': target, 'channels': 2**24 + 1}
    kernel[(1,)](*arguments.values())
    assert torch.equal(target[:128], expected[0].flatten())
    assert torch.equal(target[far:], expected[1].flatten())


@pytest.mark.parametrize(
    ('shape', 'dtype', 'kernel', 'dilation', 'reason'),
    [
        ((2, 3, 64, 64), torch.float64, 13, 1, 'float64'),
        ((2, 3, 64, 64), torch.float16, 13, 3, '37 pixels'),
        ((2, 3, 64, 64), torch.float16, 33, 1, '33 pixels'),
        ((2, 3, 64, 64), torch.float16, 1, 1, '1 pixels'),
        ((1, 1, 2**16, 2**15), torch.float16, 13, 1, 'too large'),
        ((2, 3, 64, 64), torch.float16, 31, 1, ''),
        ((2, 3, 64, 64), torch.bfloat16, 5, 7, ''),
        ((64, 2**13, 2**6, 2**7), torch.bfloat16, 13, 1, ''),
    ],
    ids=str,
)
def test_says_what_it_cannot_do(
    gpu: SimpleNamespace, shape: tuple[int, ...], dtype: torch.dtype, kernel: int, dilation: int, reason: str
) -> None:
    x = torch.empty(shape, dtype=dtype, device='meta')
    answer = gpu.convolution.supports(x, kernel, dilation)
    assert reason in answer if reason else answer == ''


def test_precision_obeys_torch(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed, expected in ((True, 'tf32'), (False, 'tf32x3')):
        monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', allowed)
        assert gpu.convolution.precision(torch.empty(1)) == expected


def test_interpreting_leaves_no_trace(interpreted_modules: SimpleNamespace) -> None:
    import triton.language as tl

    from .interpreted import interpreting

    x, weight, _ = maps(torch.float16, 3, (1, 1, 4, 8))
    places = (tl, tl.core, tl.math, tl.standard, tl.tensor)
    before = [dict(vars(place)) for place in places]
    with interpreting():
        interpreted_modules.convolution.forward(x, weight, None, 1, pooled=True)
        assert vars(tl)['sum'] is not before[0]['sum']
    for place, names in zip(places, before, strict=True):
        assert [name for name, value in names.items() if vars(place)[name] is not value] == []
