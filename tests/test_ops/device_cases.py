"""What must hold on every device: run on a GPU by ``test_on_gpu``, and here and there on the CPU, to be sure it runs.

Each function raises where something does not hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mmunireplknet import UniRepLKNet
from mmunireplknet.ops import DepthwiseConv2d, depthwise_conv2d, depthwise_conv2d_pooled, dilated_reparam_conv

from ..procedural import image, randomise, relative_error
from . import reparam_cases
from .cases import KERNELS, LARGE, LAYOUTS, Case, draw, mistakes, plain

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ARCH = dict(depths=[1, 1, 1, 1], dims=[16, 16, 24, 24], kernel_sizes=[[3], [7], [13], [5]])
SHAPE = (2, 6, 21, 19)


def sweep(device: str, backend: str, kernels: Iterable[int] = KERNELS, most: int | None = None) -> None:
    """Output and gradients of every kernel, dtype, size, layout, dilation that reaches 31 pixels at most."""
    wrong: list[str] = []
    for kernel, dtype in itertools.product(kernels, DTYPES):
        cases = [case for case in draw(kernel, dtype, LAYOUTS) if _reaches(case)]
        for case in cases[:most]:
            wrong += mistakes(case, backend, device)
    assert not wrong, '\n'.join(wrong)


def _reaches(case: Case) -> bool:
    return (case.kernel - 1) * case.dilation < 31


def large(device: str, backend: str) -> None:
    """Maps that take many programs."""
    wrong = [text for case in LARGE if _reaches(case) for text in mistakes(case, backend, device)]
    assert not wrong, '\n'.join(wrong)


def block_sweep(device: str, backend: str, names: Iterable[str], sizes: Iterable[tuple[int, int]]) -> None:
    """The Dilated Reparam Block with every set of branches."""
    wrong: list[str] = []
    for name, size, dtype in itertools.product(names, sizes, DTYPES):
        for layout, offset in (('contiguous', 0.0), ('channels_last', 3.0)):
            case = reparam_cases.Case(name, size, 17, 2, layout, dtype, offset if dtype == torch.float32 else 0.0)
            wrong += reparam_cases.mistakes(case, backend, device=device)
    assert not wrong, '\n'.join(wrong)


def arguments(device: str, kernel: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and bias that want gradients."""
    c = SHAPE[1]
    shapes = (SHAPE, (c, 1, kernel, kernel), (c,))
    return tuple(image(s, i).to(device, dtype).requires_grad_() for i, s in enumerate(shapes))  # type: ignore[return-value]


def check_operators(device: str, backend: str) -> None:
    """torch's own checks of registered operators: schema, autograd, shapes, tracing."""
    x, weight, bias = arguments(device)
    ops, grad = torch.ops.mmuni, torch.randn_like(x)
    channels_last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    inputs = reparam_cases.inputs_of(reparam_cases.Case('7', (9, 10), 5)).to(device)
    flat = torch.cat([w.flatten() for w in inputs.weights])
    static = ([w.shape[-1] for w in inputs.weights], inputs.dilations, inputs.eps, backend)
    gamma, beta = torch.stack(inputs.gammas), torch.stack(inputs.betas).sum(0)
    _, mean, var = ops.dilated_reparam_forward(inputs.x, flat, gamma, beta, *static)
    tensors = (inputs.grad, inputs.x, flat, gamma, mean, var)
    for operator, given in (
        (ops.depthwise_conv2d, (x, weight, bias, 1, backend)),
        (ops.depthwise_conv2d, (channels_last, weight, None, 2, backend)),
        (ops.depthwise_conv2d_input_grad, (grad, weight, 1, backend)),
        (ops.depthwise_conv2d_weight_grad, (x, grad, 7, 1, backend)),
        (ops.depthwise_conv2d_pooled, (x, weight, bias, 1, backend)),
        (ops.dilated_reparam_forward, (inputs.x, flat, gamma, beta, *static)),
        (ops.dilated_reparam_stats, (inputs.x, flat, len(gamma), *static)),
        (ops.dilated_reparam_sums, (*tensors, *static)),
        (ops.dilated_reparam_backward, (*tensors, None, None, float(inputs.x[:, 0].numel()), True, *static)),
    ):
        torch.library.opcheck(operator.default, given)


def check_gradients(device: str, backend: str) -> None:
    """By finite differences, in float64, twice."""
    x, weight, bias = (t.detach().double().requires_grad_() for t in arguments(device, 3))
    x = x.detach()[:1, :, :4, :3].requires_grad_()
    function = lambda *inputs: depthwise_conv2d(*inputs, 1, backend)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))


def _results(function: Callable, *inputs: Tensor) -> list[Tensor]:
    out = function(*inputs)
    outs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(o.shape, generator=generator).to(o) for o in outs]
    found = torch.autograd.grad(outs, [t for t in inputs if t.requires_grad], grads)
    return [t.detach() for t in (*outs, *found)]


def equal(mine: Iterable[Tensor], right: Iterable[Tensor], limit: float) -> None:
    errors = [relative_error(a.cpu(), b.cpu()) for a, b in zip(mine, right, strict=True)]
    assert max(errors) < limit, errors


def check_compiled(device: str, backend: str, compiler: str = 'inductor') -> None:
    """Without a break in the graph, forward and backward."""
    inputs = arguments(device)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, sums = depthwise_conv2d_pooled(x, weight, bias, 1, backend)
        return depthwise_conv2d(x, weight, bias, 1, backend) * 2, y, sums

    equal(
        _results(torch.compile(function, fullgraph=True, backend=compiler), *inputs), _results(function, *inputs), 1e-5
    )


def check_autocast(device: str, backend: str) -> None:
    """The map is cast; the weight is not, nor is its gradient rounded."""
    x, weight, bias = arguments(device)
    with torch.autocast(device, torch.bfloat16):
        y = depthwise_conv2d(x, weight, bias, 1, backend)
    grads = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    assert (y.dtype, {g.dtype for g in grads}) == (torch.bfloat16, {torch.float32})
    inputs = [t.detach().cpu().double().requires_grad_() for t in (x, weight, bias)]
    equal([y, *grads], _results_of_ones(*inputs), 8e-3)


def _results_of_ones(*inputs: Tensor) -> list[Tensor]:
    out = plain(*inputs, 1)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]


def check_determinism(device: str, backend: str) -> None:
    """The same bits at every call."""
    inputs = arguments(device, 13)[:2]
    function = lambda x, weight: depthwise_conv2d(x, weight, None, 1, backend)  # noqa: E731
    first = _results(function, *inputs)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, _results(function, *inputs), strict=True))


def models(device: str, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """A small backbone as it is, and layer by layer with torch's own convolutions."""
    mine, right = (randomise(UniRepLKNet(ARCH, fused=fused, **kwargs)).to(device) for fused in (True, False))
    for layer in right.modules():
        if type(layer) is DepthwiseConv2d:
            layer.__class__ = nn.Conv2d
    return mine, right


def check_model(device: str, limit: float, training: bool, **kwargs: Any) -> None:
    """Maps and gradients of a backbone."""
    results = []
    for model in models(device, **kwargs):
        model.train(training)
        parameters = [p for p in model.parameters() if p.requires_grad]
        outs = model(image((2, 3, 64, 96)).to(device))
        grads = torch.autograd.grad(outs, parameters, [image(o.shape, 3).to(device) for o in outs])
        results.append([t.detach() for t in (*outs, *grads)])
    mine, right = results
    scale = max(float(g.norm()) for g in right)
    assert (
        max(float((a - b).norm()) / max(float(b.norm()), 1e-3 * scale) for a, b in zip(mine, right, strict=True))
        < limit
    )


def check_block(device: str, backend: str) -> None:
    """``dilated_reparam_conv`` twice, as in two steps of training: nothing of the first is left in the second."""
    cases = [reparam_cases.Case('13', (20, 21), 9, seed) for seed in (2, 3)]
    for case in (*cases, *cases):
        inputs = reparam_cases.inputs_of(case).to(device)
        actual = reparam_cases.differentiate(lambda *args: dilated_reparam_conv(*args, None, backend), inputs)
        found = reparam_cases.errors({name: [t.cpu() for t in ts] for name, ts in actual.items()}, case)
        assert max(found.values()) < 3e-5, found
