"""Whether compiled kernels compute on this machine what torch computes: small cases of each of their functions."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from . import coefficients, passes, reference

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
        part: 'convolutions', 'block' or 'pointwise'; empty for all that it has.
    """
    checks = [_convolutions(backend, device), _sums(backend, device)] if part in ('', 'convolutions') else []
    if name == 'cuda' and part in ('', 'convolutions'):
        checks.append(_many_planes(backend, device))
    if part in ('', 'block'):
        checks.append(_blocks(backend, device))
    if part == 'pointwise' or name == 'cpp':
        checks.append(_pointwise(torch.ops.mmuni_cpu if name == 'cpp' else backend, device))
    if part == 'pointwise':
        checks.append(_coefficients(backend, device))
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


def _many_planes(backend: Any, device: torch.device) -> _Results:
    """What the kernels of CUDA do otherwise where there is enough work for every multiprocessor, as in training."""
    draw, copies = _drawing(4), 128  # 2048 planes are 8 for each of 256 multiprocessors
    for kernel, dtype, layout in (
        (13, torch.bfloat16, torch.contiguous_format),
        (7, torch.float16, torch.contiguous_format),
        (13, torch.float16, torch.channels_last),
        (5, torch.bfloat16, torch.channels_last),
        (5, torch.float32, torch.contiguous_format),
        (3, torch.float32, torch.channels_last),
    ):
        x, weight = draw(1, 16, 19, 8).to(dtype), draw(16, 1, kernel, kernel)
        exact = _exact(x, weight, 1)
        x, weight = x.repeat(1, copies, 1, 1).contiguous(memory_format=layout), weight.repeat(copies, 1, 1, 1)
        y, sums = backend.forward(x.to(device), weight.to(device), None, 1, pooled=True)
        yield 'forward of many planes', dtype, y, exact.repeat(1, copies, 1, 1)
        yield 'sum of many maps', dtype, sums, exact.sum((2, 3)).repeat(1, copies)


def _blocks(backend: Any, device: torch.device) -> _Results:
    """Against the same operators in float64, which torch computes."""
    if not hasattr(backend, 'block_forward'):
        return
    ops, draw = torch.ops.mmuni, _drawing(1)
    kernel, dilation, eps, c = [7, 3], [1, 2], [1e-3, 1e-2], 19
    static = (kernel, dilation, eps)
    weight, gamma, beta = draw(c * (49 + 9)), draw(2, c), draw(c)
    # The kernels in Triton round what they hold of 1024 values a channel or more.
    sizes = [(9, 8), (24, 23)] if hasattr(backend, 'divisions') else [(9, 8)]
    for dtype, size in itertools.product((torch.float32, torch.bfloat16), sizes):
        x, grad = (draw(2, c, *size).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
        count = 2.0 * size[0] * size[1]
        there = [t.to(device) for t in (grad, x, weight, gamma, beta)]
        y, mean, var = backend.block_forward(*there[1:], *static)
        mine = backend.block_backward(*there[:4], mean, var, None, None, count, True, *static)
        wide_x, wide_grad, *wide = (t.double() for t in (x, grad, weight, gamma, beta))
        exact = ops.dilated_reparam_forward(wide_x, *wide, *static, 'torch')
        tensors = (wide_grad, wide_x, *wide[:2], *exact[1:])
        gradients = ops.dilated_reparam_backward(*tensors, None, None, count, True, *static, 'torch')
        for value, right in zip((y, mean, var), exact, strict=True):
            yield 'block forward', dtype, value, right
        for value, right in zip(mine, gradients, strict=True):
            yield 'block backward', dtype, value, right


def _pointwise(kernels: Any, device: torch.device) -> _Results:
    """The passes against plain torch in float64, with maps in each layout that they take."""
    draw = _drawing(2)
    planes = (False, True) if hasattr(kernels, 'moments') else (False,)  # those for the CPU take contiguous maps
    for dtype, turned in itertools.product((torch.float32, torch.bfloat16), planes):
        x, grad, residual = (draw(2, 15, 20, 19).to(dtype) for _ in range(3))
        small = scale, shift, slope, pivot = draw(2, 19), draw(2, 19), draw(2, 19), draw(19)
        there = [t.to(device) for t in (x, grad, residual)]
        if turned:
            there[1] = there[1].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        a, b, c, p = (t.to(device) for t in small)
        wide = [t.double() for t in (x, grad, residual)]
        for name, mine, exact in (
            ('apply', (there[0], a, b, there[2]), (wide[0], scale, shift, wide[2])),
            ('grad', (there[1], there[0], a, b, c), (wide[1], wide[0], scale, shift, slope)),
        ):
            out, right = torch.empty_like(there[1]), torch.empty_like(wide[0])
            getattr(kernels, name)(*mine, out, True)
            getattr(passes, name)(*exact, right, True)
            yield name, dtype, out, right
        total, right = there[0].new_empty((2, 2, 19), dtype=torch.float32), wide[0].new_empty((2, 2, 19))
        kernels.sums(there[0], there[1], p, None, total, True)
        passes.sums(wide[0], wide[1], pivot, None, right, True)
        yield 'sums', dtype, total, right
        if hasattr(kernels, 'moments'):
            for mine, right in zip(kernels.moments(there[1]), passes.moments(wide[1]), strict=True):
                yield 'moments', dtype, mine, right


def _coefficients(kernels: Any, device: torch.device) -> _Results:
    """Against plain torch in float64."""
    draw = _drawing(4)
    n, c, r = 3, 38, 9
    sums, squares, multiplier, weight, bias = draw(n, 2, c), draw(n, c).square(), draw(n, c), draw(c), draw(c)
    norm = (draw(c), draw(c).square() + 0.1, 1e-3, weight, bias)
    layers = ((draw(r, c), draw(r)), (draw(c, r), draw(c)))
    e = coefficients.excite(multiplier, *norm, *layers)
    for name, given in (
        ('affine', (*norm, multiplier)),
        ('excite', (multiplier, *norm, *layers)),
        ('excite_grads', (sums.unbind(1), e, weight, bias, layers[0][0], layers[1][0])),
        ('gates', (multiplier, 40, *layers)),
        ('grn', (squares, weight)),
        ('grn_grads', (sums.unbind(1)[0], squares, weight)),
        (
            'normalize_grads',
            (sums.unbind(1), weight, bias, norm[0], e.inverse, e.pooled, multiplier, e.gates, 40, 40 * n, None, True),
        ),
    ):
        there = tree_map_only(Tensor, lambda t: t.to(device), given)
        exact = tree_map_only(Tensor, lambda t: t.double(), given)
        results = (tree_leaves(getattr(m, name)(*a)) for m, a in ((kernels, there), (coefficients, exact)))
        for mine, right in zip(*results, strict=True):
            if right is not None:
                yield name, torch.float32, mine, right.expand(mine.shape)
