"""Whether compiled kernels compute on this machine what torch computes: small cases of each of their functions."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import reference

__all__ = ['self_check']

_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # relative L2 errors
# By the dtype of the map: kernels for a GPU round weights and what they keep to it. Products of TF32 have 11 bits,
# and torch's settings allow or forbid them.
_LIMITS_ON_GPU = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 3e-3}
_Results = Iterator[tuple[str, torch.dtype, Tensor, Tensor]]  # the dtype is that of the map


def self_check(name: str, backend: Any, device: torch.device, part: str = '') -> str:
    """What is wrong, or nothing. Modes that are active, as of a FLOP counter, neither see nor change what is done.

    Args:
        name: Of the backend; 'cpp' has pointwise kernels as well.
        backend: Its module, see ``backends``.
        device: Where to check it.
        part: 'convolutions' or 'block'; empty for all.
    """
    checks = [] if part == 'block' else [_convolutions(backend, device), _sums(backend, device)]
    if part != 'convolutions':
        checks.append(_blocks(backend, device))
    if name == 'cpp':
        checks.append(_pointwise())
    with _disable_current_modes(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        for what, dtype, mine, exact in itertools.chain.from_iterable(checks):
            error = float((mine.double().cpu() - exact).norm() / exact.norm())
            limit = _LIMITS[mine.dtype] if name == 'cpp' else _LIMITS_ON_GPU[dtype]
            if not error < limit:
                where = f'{mine.dtype}, {_where(name, device)}'.removeprefix('torch.')
                return f'their {what} is off by {error:.1e} on this machine ({where}).'
    return ''


def _where(name: str, device: torch.device) -> str:
    if name == 'cpp':
        return torch.ops.mmuni_cpu.capability()
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else name


def _drawing(seed: int) -> functools.partial[Tensor]:
    generator = torch.Generator('cpu').manual_seed(seed)
    return functools.partial(torch.randn, generator=generator, dtype=torch.float32, device='cpu')


def _convolutions(backend: Any, device: torch.device) -> _Results:
    """Against torch's in float64, on the CPU."""
    draw = _drawing(0)
    for kernel, dilation, shape, dtype, layout in (
        (13, 1, (2, 19, 21, 20), torch.float32, torch.contiguous_format),
        (3, 4, (1, 3, 17, 8), torch.float32, torch.contiguous_format),
        (7, 1, (2, 19, 9, 8), torch.float32, torch.channels_last),
        (5, 2, (1, 19, 9, 20), torch.bfloat16, torch.channels_last),
        (5, 2, (1, 19, 9, 20), torch.float16, torch.contiguous_format),
    ):
        x, grad = (draw(shape).to(dtype).contiguous(memory_format=layout) for _ in range(2))
        weight = draw(shape[1], 1, kernel, kernel)
        there = [t.to(device) for t in (x, grad, weight)]
        yield 'forward', dtype, backend.forward(there[0], there[2], None, dilation), _exact(x, weight, dilation)
        exact = reference.input_grad(grad.double(), weight.double(), dilation)
        yield 'input gradient', dtype, backend.forward(there[1], there[2], None, dilation, True), exact
        exact = reference.weight_grad(x.double(), grad.double(), kernel, dilation)
        yield 'weight gradient', dtype, backend.weight_grad(there[0], there[1], kernel, dilation), exact


def _exact(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    return reference.convolve(x.double(), weight.double(), None, dilation)


def _sums(backend: Any, device: torch.device) -> _Results:
    if 'pooled' not in inspect.signature(backend.forward).parameters:
        return
    draw = _drawing(3)
    x, weight = draw(2, 19, 21, 20).to(torch.bfloat16), draw(19, 1, 7, 7)
    there = (t.to(device) for t in (x, weight))
    y, sums = backend.forward(*there, None, 1, pooled=True, layout=torch.channels_last)
    exact = _exact(x, weight, 1)
    yield 'forward', x.dtype, y, exact
    yield 'sum of the maps', x.dtype, sums, exact.sum((2, 3))


def _blocks(backend: Any, device: torch.device) -> _Results:
    """Against the same operators in float64, which torch computes."""
    if not hasattr(backend, 'block_forward'):
        return
    ops, draw = torch.ops.mmuni, _drawing(1)
    kernel, dilation, eps, c = [7, 3], [1, 2], [1e-3, 1e-2], 19
    static = (kernel, dilation, eps)
    weight, gamma, beta = draw(c * (49 + 9)), draw(2, c), draw(c)
    for dtype in (torch.float32, torch.bfloat16):
        x, grad = (draw(2, c, 9, 8).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
        there = [t.to(device) for t in (grad, x, weight, gamma, beta)]
        y, mean, var = backend.block_forward(*there[1:], *static)
        mine = backend.block_backward(*there[:4], mean, var, None, None, 144.0, True, *static)
        wide_x, wide_grad, *wide = (t.double() for t in (x, grad, weight, gamma, beta))
        exact = ops.dilated_reparam_forward(wide_x, *wide, *static, 'torch')
        tensors = (wide_grad, wide_x, *wide[:2], *exact[1:])
        gradients = ops.dilated_reparam_backward(*tensors, None, None, 144.0, True, *static, 'torch')
        for value, right in zip((y, mean, var), exact, strict=True):
            yield 'block forward', dtype, value, right
        for value, right in zip(mine, gradients, strict=True):
            yield 'block backward', dtype, value, right


def _pointwise() -> _Results:
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
        yield 'apply', dtype, out, value * a + b + residual
        yield 'grad', dtype, grad_x, (grad * a + b + c * value) * derivative
        yield 'sums', dtype, total, torch.stack([(grad * (value - pivot.double())).sum(1), grad.sum(1)], 1)
