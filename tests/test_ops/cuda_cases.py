"""What the CUDA kernels are asked to do, and whether they do it: in the emulation, and on a GPU where there is one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mmunireplknet.ops import cuda, reference

from ..procedural import relative_error
from .cases import TOLERANCE

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Widths that are copied 16, 8, 4 and 2 bytes at a time; one, two and three tiles either way; less than the kernel.
SIZES = ((1, 1), (2, 5), (7, 16), (9, 36), (20, 37), (16, 64), (33, 42), (70, 24))
TF32 = (2e-3, 2e-3)


class Case(NamedTuple):
    """One map, its kernel and what is asked for."""

    dtype: torch.dtype
    kernel: int
    dilation: int
    size: tuple[int, int]
    batch: int
    channels: int
    layout: torch.memory_format
    out_layout: torch.memory_format | None
    weight_dtype: torch.dtype
    biased: bool
    flipped: bool
    tf32: bool

    @property
    def work(self) -> int:
        """What takes the machine its time: the products, in steps of a warp."""
        tiles = self.batch * self.channels * -(-self.size[0] // 16) * -(-self.size[1] // 32)
        pieces = 5 if (self.kernel - 1) * self.dilation > 16 else 3
        return tiles * self.kernel * pieces * (1 if self.dtype.itemsize == 2 else 2 if self.tf32 else 4)


def draw(dtype: torch.dtype, kernel: int, count: int, most_work: int) -> Iterator[Case]:
    """Always the same; each with another size."""
    rng = random.Random(f'{dtype} {kernel}')
    for size in rng.sample(SIZES, count):
        while True:
            case = Case(
                dtype, kernel, rng.randrange(1, max(2, 30 // (kernel - 1) + 1)), size, rng.choice((1, 2, 3)),
                rng.choice((1, 2, 5, 8, 16)), rng.choice(LAYOUTS), rng.choice((*LAYOUTS, None)), rng.choice(DTYPES),
                rng.random() < 0.7, rng.random() < 0.5, dtype == torch.float32 and rng.random() < 0.3,
            )  # fmt: skip
            if case.work <= most_work:
                yield case
                break


def tensors(case: Case, device: str = 'cpu') -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Input, gradient of the output, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randn(case.batch, case.channels, *case.size, generator=generator)
        .to(case.dtype)
        .contiguous(memory_format=case.layout)
        for _ in range(2)
    )
    weight = torch.randn(case.channels, 1, case.kernel, case.kernel, generator=generator).to(case.weight_dtype)
    bias = torch.randn(case.channels, generator=generator).to(device) if case.biased else None
    return x.to(device), grad.to(device), weight.to(device), bias


def set_tf32(allowed: bool) -> None:
    torch.backends.cudnn.conv.fp32_precision = 'tf32' if allowed else 'ieee'


def tolerance(case: Case) -> tuple[float, float]:
    return TF32 if case.tf32 else TOLERANCE[case.dtype]


def check_forward(case: Case, device: str = 'cpu') -> None:
    x, _, weight, bias = tensors(case, device)
    set_tf32(case.tf32)
    out, sums = cuda.forward(x, weight, bias, case.dilation, case.flipped, pooled=True, layout=case.out_layout)
    wide = weight.to(case.dtype).double()
    exact = reference.convolve(
        x.double(), wide.flip(2, 3) if case.flipped else wide, None if bias is None else bias.double(), case.dilation
    )
    assert out.dtype == x.dtype
    assert out.is_contiguous(memory_format=case.layout if case.out_layout is None else case.out_layout)
    assert relative_error(out, exact) < tolerance(case)[0]
    # Of the numbers before they are rounded, but where they cancel.
    limit = (TF32 if case.tf32 else TOLERANCE[torch.float32])[1]
    assert float((sums - exact.sum((2, 3))).norm() / exact.abs().sum((2, 3)).norm()) < limit


def check_weight_grad(case: Case, device: str = 'cpu') -> None:
    x, grad, _, _ = tensors(case, device)
    set_tf32(case.tf32)
    out = cuda.weight_grad(x, grad, case.kernel, case.dilation)
    exact = reference.weight_grad(x.double(), grad.double(), case.kernel, case.dilation)
    assert out.dtype == torch.float32
    assert relative_error(out, exact) < (TF32 if case.tf32 else TOLERANCE[torch.float32])[1]
    assert torch.equal(out, cuda.weight_grad(x, grad, case.kernel, case.dilation))  # threads go on in another order
