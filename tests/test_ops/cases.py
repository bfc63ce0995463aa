"""Maps of every kind for the depthwise convolution, and what it makes of them in float64.

Run as a program, it checks the compiled kernels in a sweep and prints their instruction set, which they choose once for
the life of a process.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..procedural import relative_error

KERNELS = range(3, 32, 2)
SIZES = ((1, 1), (2, 5), (7, 7), (3, 19), (20, 37), (70, 40))
CHANNELS = (1, 3, 17, 33)
DILATIONS = (1, 2, 3, 4, 5)
BATCHES = (1, 3)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    'contiguous': lambda x: x.contiguous(),
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'half the planes': lambda x: torch.cat((x, x), 1)[:, x.shape[1] :],
    'half the channels': lambda x: torch.cat((x, x), 1).contiguous(memory_format=torch.channels_last)[:, x.shape[1] :],
    'every second pixel': lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, ::2, ::2],
    'permuted': lambda x: x.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1),
    'expanded': lambda x: x[:, :1].expand_as(x),
}
GRAD_LAYOUTS = {**LAYOUTS, 'constant': lambda x: x[:1, :1, :1, :1].expand_as(x)}
# Relative L2 error: of sums over a kernel (output, input gradient) and of sums over a map (weight and bias gradient).
# It is 1e-7 to 5e-7 in float32; what stands here are cases of one channel or one pixel, where the sum cancels. That of
# the 16-bit types is their unit roundoff: they round the sum once.
TOLERANCE = {
    torch.float32: (3e-6, 1e-5),
    torch.float64: (6e-15, 2e-14),
    torch.bfloat16: (4e-3, 4e-3),
    torch.float16: (5e-4, 5e-4),
}
# In tensor cores float32 is multiplied in three parts of 11 bits each, which leaves errors of 2**-21 in every product.
TOLERANCE_ON_GPU = {**TOLERANCE, torch.float32: (1e-5, 2e-5)}
SUMS_OVER_A_MAP = ('weight gradient', 'bias gradient')


class Case(NamedTuple):
    """One input and its gradient; ``layout`` is of the former, ``grad_layout`` of the latter."""

    kernel: int
    dtype: torch.dtype
    size: tuple[int, int]
    layout: str
    grad_layout: str
    channels: int
    dilation: int
    batch: int

    @property
    def work(self) -> int:
        """Multiply-adds of the forward convolution."""
        return self.kernel**2 * self.size[0] * self.size[1] * self.channels * self.batch


# What the sweep does not reach: several parts of a map in one sum, and more memory than a thread keeps.
LARGE = (
    Case(7, torch.float32, (9, 10), 'contiguous', 'channels_last', 530, 1, 5),
    Case(31, torch.float32, (226, 180), 'channels_last', 'contiguous', 1, 5, 1),
    Case(31, torch.float32, (131, 101), 'contiguous', 'channels_last', 2, 1, 2),
)


def draw(
    kernel: int, dtype: torch.dtype, layouts: Iterable[str] | None = None, most_work: float = 3e6
) -> Iterator[Case]:
    """Every size, with every one of ``layouts`` or with a random one; the rest is drawn, the same at each call."""
    rng = random.Random(f'{kernel} {dtype}')
    for size in SIZES:
        for layout in layouts or [rng.choice(list(LAYOUTS))]:
            while True:
                rest = (rng.choice(list(GRAD_LAYOUTS)), *map(rng.choice, (CHANNELS, DILATIONS, BATCHES)))
                case = Case(kernel, dtype, size, layout, *rest)
                if case.work <= most_work:
                    yield case
                    break


def tensors(case: Case, device: str = 'cpu') -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, bias and the gradient of the output, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    shape, kernel = (case.batch, case.channels, *case.size), (case.kernel, case.kernel)
    x, weight, bias, grad = (
        torch.randn(s, generator=generator).to(device, case.dtype)
        for s in (shape, (case.channels, 1, *kernel), (case.channels,), shape)
    )
    return LAYOUTS[case.layout](x), weight, bias, GRAD_LAYOUTS[case.grad_layout](grad)


def differentiate(function: Callable, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients of ``function`` of the first three."""
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    out = function(*inputs)
    names = ('output', 'input gradient', 'weight gradient', 'bias gradient')
    return dict(zip(names, (out.detach(), *torch.autograd.grad(out, inputs, grad)), strict=True))


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """The convolution as torch has it."""
    return F.conv2d(x, weight, bias, 1, dilation * (weight.shape[-1] // 2), dilation, x.shape[1])


@functools.lru_cache(maxsize=16)
def reference(case: Case) -> dict[str, Tensor]:
    """Output and gradients in float64."""
    return differentiate(lambda *inputs: plain(*inputs, case.dilation), *(t.double() for t in tensors(case)))


def mistakes(case: Case, backend: str, device: str = 'cpu') -> list[str]:
    """What is out of tolerance, of the output and the gradients."""
    from mmunireplknet.ops import depthwise_conv2d

    mine = differentiate(lambda *inputs: depthwise_conv2d(*inputs, case.dilation, backend), *tensors(case, device))
    found, limits = [], TOLERANCE if device == 'cpu' else TOLERANCE_ON_GPU
    for name, exact in reference(case).items():
        error, tolerance = relative_error(mine[name].cpu(), exact), limits[case.dtype][name in SUMS_OVER_A_MAP]
        if mine[name].dtype != case.dtype or not error < tolerance:
            found.append(f'{name} ({mine[name].dtype}) of {case} with {backend} is off by {error:.1e}')
    return found


def wrong_roundings(dtype: torch.dtype, backend: str) -> int:
    """How many of all 16-bit numbers come out of a one-tap convolution other than torch rounds their multiple."""
    from mmunireplknet.ops import depthwise_conv2d

    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 16, 1, 1)
    wrong = 0
    # The factors reach halves, numbers that are no longer normal, and infinity.
    for factor in (1.0, 0.5, 1 / 3, 1.5, 1 + 2**-9, 1.4e-4, 3e-8, 100.0, 1e30):
        weight = torch.zeros(16, 1, 3, 3)
        weight[:, :, 1, 1] = factor
        expected = (x.float() * factor).to(dtype)
        out = depthwise_conv2d(x, weight, None, 1, backend)
        wrong += int((~((out == expected) | (out.isnan() & expected.isnan()))).sum())
    return wrong


def main() -> None:
    """Print whatever is out of tolerance, and at last the instruction set."""
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for case in itertools.chain.from_iterable(draw(kernel, dtype) for kernel in KERNELS):
            sys.stdout.writelines(f'{mistake}\n' for mistake in mistakes(case, 'cpp'))
        if dtype.itemsize == 2 and (wrong := wrong_roundings(dtype, 'cpp')):
            sys.stdout.write(f'{wrong} numbers of {dtype} are rounded wrongly\n')
    sys.stdout.write(torch.ops.mmuni_cpu.capability())


if __name__ == '__main__':
    main()
