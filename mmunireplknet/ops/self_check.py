"""Whether the compiled CPU kernels compute on this machine what torch computes: small cases of each of the seven."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import reference

__all__ = ['self_check']

_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # relative L2 errors


def self_check() -> str:
    """What is wrong, or nothing. Modes that are active, as of a FLOP counter, neither see nor change what is done."""
    with _disable_current_modes(), torch.no_grad(), torch.autocast('cpu', enabled=False):
        for name, mine, exact in itertools.chain(_convolutions(), _blocks(), _pointwise()):
            error = float((mine.double() - exact).norm() / exact.norm())
            limit = _LIMITS[mine.dtype]
            if not error < limit:
                where = f'{mine.dtype}, {torch.ops.mmuni_cpu.capability()}'.removeprefix('torch.')
                return f'their {name} is off by {error:.1e} on this machine ({where}).'
    return ''


def _drawing(seed: int) -> functools.partial[Tensor]:
    generator = torch.Generator('cpu').manual_seed(seed)
    return functools.partial(torch.randn, generator=generator, dtype=torch.float32, device='cpu')


def _convolutions() -> Iterator[tuple[str, Tensor, Tensor]]:
    cpp, draw = torch.ops.mmuni_cpu, _drawing(0)
    for kernel, dilation, shape, dtype, layout in (
        (13, 1, (2, 19, 21, 20), torch.float32, torch.contiguous_format),
        (3, 4, (1, 3, 17, 8), torch.float32, torch.contiguous_format),
        (7, 1, (2, 19, 9, 8), torch.float32, torch.channels_last),
        (5, 2, (1, 19, 9, 20), torch.bfloat16, torch.channels_last),
        (5, 2, (1, 19, 9, 20), torch.float16, torch.contiguous_format),
    ):
        x, grad = (draw(shape).to(dtype).contiguous(memory_format=layout) for _ in range(2))
        weight = draw(shape[1], 1, kernel, kernel)
        out, grad_x, grad_weight = torch.empty_like(x), torch.empty_like(x), torch.empty_like(weight)
        cpp.forward(x, weight, None, out, kernel, dilation, False)
        cpp.forward(grad, weight, None, grad_x, kernel, dilation, True)
        cpp.weight_grad(x, grad, grad_weight, kernel, dilation)
        yield 'forward', out, reference.convolve(x.double(), weight.double(), None, dilation)
        yield 'input gradient', grad_x, reference.input_grad(grad.double(), weight.double(), dilation)
        yield 'weight gradient', grad_weight, reference.weight_grad(x.double(), grad.double(), kernel, dilation)


def _blocks() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Against the same operators in float64, which torch computes."""
    cpp, ops, draw = torch.ops.mmuni_cpu, torch.ops.mmuni, _drawing(1)
    kernel, dilation, eps, c = [7, 3], [1, 2], [1e-3, 1e-2], 19
    static = (kernel, dilation, eps)
    weight, gamma, beta = draw(c * (49 + 9)), draw(2, c), draw(c)
    mean, var, grad_gamma = (torch.empty_like(gamma) for _ in range(3))
    grad_weight, grad_beta = torch.empty_like(weight), torch.empty_like(beta)
    for dtype in (torch.float32, torch.bfloat16):
        x, grad = (draw(2, c, 9, 8).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
        y, grad_x = torch.empty_like(x), torch.empty_like(x)
        cpp.block_forward(x, *static, weight, gamma, beta, mean, var, y)
        cpp.block_backward(
            grad, x, *static, weight, gamma, mean, var, grad_x, grad_weight, grad_gamma, grad_beta, False, 144.0
        )
        wide_x, wide_grad, *wide = (t.double() for t in (x, grad, weight, gamma, beta))
        exact = ops.dilated_reparam_forward(wide_x, *wide, *static, 'torch')
        tensors = (wide_grad, wide_x, *wide[:2], *exact[1:])
        gradients = ops.dilated_reparam_backward(*tensors, None, None, 144.0, True, *static, 'torch')
        for mine, right in zip((y, mean, var), exact, strict=True):
            yield 'block forward', mine, right
        for mine, right in zip((grad_x, grad_weight, grad_gamma, grad_beta), gradients, strict=True):
            yield 'block backward', mine, right


def _pointwise() -> Iterator[tuple[str, Tensor, Tensor]]:
    cpp, draw = torch.ops.mmuni_cpu, _drawing(2)
    scale, shift, slope, pivot = draw(2, 19), draw(2, 19), draw(2, 19), draw(19)
    for dtype in (torch.float32, torch.bfloat16):
        x, grad, residual = (draw(2, 300, 19).to(dtype) for _ in range(3))
        out, grad_x, total = torch.empty_like(x), torch.empty_like(x), torch.empty_like(scale)
        total = torch.stack([total, total], 1)
        cpp.apply(x, scale, shift, residual, out, True)
        cpp.grad(grad, x, scale, shift, slope, grad_x, True)
        cpp.sums(x, grad, pivot, None, total, True)
        x, grad, residual = x.double(), grad.double(), residual.double()
        a, b, c = (t.double()[:, None] for t in (scale, shift, slope))
        value = F.gelu(x)
        derivative = torch.special.ndtr(x) + x * torch.exp(-0.5 * x.square()) * 0.3989422804014327
        yield 'apply', out, value * a + b + residual
        yield 'grad', grad_x, (grad * a + b + c * value) * derivative
        yield 'sums', total, torch.stack([(grad * (value - pivot.double())).sum(1), grad.sum(1)], 1)
