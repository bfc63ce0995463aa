"""The Dilated Reparam Block as one operation against its branches one by one, in float64, on every backend."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from mmunireplknet.models.dilated_reparam import PUBLISHED_BRANCHES
from mmunireplknet.ops import dilated_reparam_conv, merge_branches

from ..procedural import relative_error
from .cases import LAYOUTS
from .reparam_cases import (
    BRANCHES,
    COLUMNS,
    PUBLISHED,
    SINGLE,
    Case,
    Inputs,
    differentiate,
    errors,
    inputs_of,
    mistakes,
    per_branch,
)  # fmt: skip

OPS = torch.ops.mmuni
BASE = Case('13', channels=18)  # more channels than a register has lanes
both_backends = pytest.mark.parametrize('backend', ['torch', 'cpp'], indirect=True)  # 'auto' is one of them


def compute(backend: str) -> Callable:
    return functools.partial(dilated_reparam_conv, backend=backend)


def operands(inputs: Inputs) -> tuple[tuple[Tensor, ...], tuple]:
    """The tensors x, weight, gamma and beta of the operators, and what all of them take at the end."""
    weight = torch.cat([w.flatten() for w in inputs.weights])
    kernels = [w.shape[-1] for w in inputs.weights]
    tensors = inputs.x, weight, torch.stack(inputs.gammas), torch.stack(inputs.betas).sum(0)
    return tensors, (kernels, inputs.dilations, inputs.eps)


def test_the_published_branches_are_tested() -> None:
    assert dict(PUBLISHED_BRANCHES) == PUBLISHED


# ------------------------------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize('branches', BRANCHES)
def test_against_float64(branches: str, backend: str) -> None:
    for size in ((9, 14), (20, 23)):
        assert mistakes(Case(branches, size), backend) == []


@both_backends
@pytest.mark.parametrize('branches', ['7', '17', 'one branch', 'one tap', 'thirteen'])
def test_in_double_precision(branches: str, backend: str) -> None:
    assert mistakes(Case(branches, dtype=torch.float64), backend) == []


@both_backends
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('branches', ['7', '13', '17', 'one tap', 'twelve'])
def test_maps_smaller_than_the_kernel(branches: str, dtype: torch.dtype, backend: str) -> None:
    for size in ((1, 1), (2, 3), (1, 5), (7, 1)):
        assert mistakes(Case(branches, size, batch=6, dtype=dtype), backend) == []


@both_backends
@pytest.mark.parametrize('channels', [1, 3, 16, 17, 33])
def test_channels(channels: int, backend: str) -> None:
    assert mistakes(Case('9', channels=channels, batch=1), backend) == []


@both_backends
@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts_of_the_input(layout: str, backend: str) -> None:
    case = BASE._replace(branches='9', layout=layout)
    assert mistakes(case, backend) == []
    y = compute(backend)(*inputs_of(case)[:-1])[0]
    assert y.stride() == torch.empty_like(inputs_of(case).x).stride()


@both_backends
@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts_of_the_gradient(layout: str, backend: str) -> None:
    assert mistakes(BASE._replace(branches='9', grad_layout=layout), backend) == []


@both_backends
def test_a_constant_gradient(backend: str) -> None:
    """That of a sum: all gradients but those of beta are zero, as the normalized map has a constant sum."""
    inputs = inputs_of(BASE)
    grads = differentiate(compute(backend), inputs._replace(grad=torch.ones(()).expand_as(inputs.x)))
    count = inputs.x.numel() / BASE.channels
    assert all(torch.equal(grad, torch.full_like(grad, count)) for grad in grads['betas'])
    assert grads['x'][0].abs().max() < 1e-5
    assert max(float(grad.abs().max()) for name in ('weights', 'gammas') for grad in grads[name]) < 1e-6 * count


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('branches', ['7', '13', '17', 'one branch', 'twelve'])
@both_backends
def test_16_bits_are_rounded_once(branches: str, dtype: torch.dtype, backend: str) -> None:
    for layout in ('contiguous', 'channels_last'):
        assert mistakes(Case(branches, layout=layout, dtype=dtype), backend) == []


@both_backends
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('branches', ['7', '13', 'one tap', 'thirteen'])
def test_16_bits_are_no_worse_than_those_of_the_layers(branches: str, dtype: torch.dtype, backend: str) -> None:
    case = Case(branches, (20, 23), dtype=dtype)
    inputs = inputs_of(case)
    layers = inputs._replace(weights=[w.to(dtype) for w in inputs.weights])
    mine, theirs = (errors(differentiate(f, i), case) for f, i in ((compute(backend), inputs), (per_branch, layers)))
    for name in COLUMNS:
        # Rounding is a matter of luck where both round the same.
        assert mine[name] < 1.5 * theirs[name] + SINGLE[name], (name, mine[name], theirs[name])


@pytest.mark.parametrize('offset', [100.0, -1000.0])
def test_a_mean_far_from_zero(offset: float, backend: str) -> None:
    """E[z^2] - E[z]^2 would leave nothing of the variance of a branch of one tap."""
    limits = {**dict.fromkeys(COLUMNS, 1e-6 * abs(offset)), 'var': 5e-6, 'betas': 1e-6}
    assert mistakes(Case('one tap', (20, 23), offset=offset), backend, limits) == []


def test_each_branch_has_its_own_eps(backend: str) -> None:
    """Those of the cases differ; large ones, and exchanged."""
    inputs = inputs_of(Case('one tap'))
    results = []
    for eps in ([3.0, 0.5, 1e-5], [0.5, 3.0, 1e-5]):
        changed = inputs._replace(eps=eps)
        exact = differentiate(per_branch, changed.double())
        results.append(differentiate(compute(backend), changed))
        assert all(
            relative_error(a, b) < 5e-6 for name in COLUMNS for a, b in zip(results[-1][name], exact[name], strict=True)
        )
    assert relative_error(results[0]['y'][0], results[1]['y'][0]) > 0.05


# ------------------------------------------------------------------------------------------ autograd


@pytest.mark.parametrize('frozen', ['x', 'weights', 'gammas', 'betas'])
def test_what_needs_no_gradient(frozen: str, backend: str) -> None:
    """The rest gets the same gradients, bit by bit."""
    inputs = inputs_of(BASE)
    expected = differentiate(compute(backend), inputs)
    leaves = {'x': [inputs.x], 'weights': inputs.weights, 'gammas': inputs.gammas, 'betas': inputs.betas}
    leaves = {name: [t.clone().requires_grad_(name != frozen) for t in ts] for name, ts in leaves.items()}
    y, *_ = dilated_reparam_conv(
        leaves['x'][0], leaves['weights'], inputs.dilations, leaves['gammas'], leaves['betas'], inputs.eps,
        backend=backend,
    )  # fmt: skip
    y.backward(inputs.grad)
    for name, tensors in leaves.items():
        for t, e in zip(tensors, expected[name], strict=True):
            assert t.grad is None if name == frozen else torch.equal(t.grad, e), name


def test_statistics_have_no_gradient(backend: str) -> None:
    inputs = inputs_of(BASE)
    inputs.x.requires_grad_()
    y, mean, var, count = compute(backend)(*inputs[:-1])
    assert y.requires_grad
    assert not mean.requires_grad
    assert not var.requires_grad
    assert mean.shape == var.shape == (len(inputs.weights), BASE.channels)
    assert count == BASE.batch * BASE.size[0] * BASE.size[1]


@both_backends
def test_it_cannot_be_differentiated_twice(backend: str) -> None:
    inputs = inputs_of(BASE)
    y, *_ = compute(backend)(inputs.x.requires_grad_(), *inputs[1:-1])
    (grad,) = torch.autograd.grad(y.square().sum(), inputs.x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'cannot be differentiated twice .* fused=False'):
        grad.sum().backward()


def test_only_the_input_is_kept(backend: str) -> None:
    inputs = inputs_of(BASE._replace(size=(60, 60)))
    x = inputs.x.requires_grad_()
    kept = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, *_ = compute(backend)(x, *inputs[1:-1])
    assert [t.data_ptr() for t in kept if t.numel() >= x.numel() // 2] == [x.data_ptr()]
    y.backward(inputs.grad)
    assert torch.equal(x.grad, differentiate(compute(backend), inputs)['x'][0])


@pytest.mark.parametrize('inside', [False, True])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, inside: bool, backend: str) -> None:
    """The same as of an input that is cast by hand, with a backward pass inside or outside of the region."""
    inputs = inputs_of(BASE)
    cast = differentiate(compute(backend), inputs._replace(x=inputs.x.to(dtype)))
    x = inputs.x.clone().requires_grad_()
    weights = [w.clone().requires_grad_() for w in inputs.weights]
    with torch.autocast('cpu', dtype):
        y, *_ = dilated_reparam_conv(x, weights, *inputs[2:-1], backend=backend)
        if inside:
            y.backward(inputs.grad.to(dtype))
    if not inside:
        y.backward(inputs.grad.to(dtype))
    assert y.dtype == dtype
    assert torch.equal(y, cast['y'][0])
    assert x.grad.dtype == torch.float32
    assert torch.equal(x.grad, cast['x'][0].float())
    assert all(torch.equal(w.grad, e) for w, e in zip(weights, cast['weights'], strict=True))


def test_backward_under_autocast(backend: str) -> None:
    """Of a forward pass outside of it: nothing is cast that was not cast there."""
    inputs = inputs_of(BASE)
    expected = differentiate(compute(backend), inputs)
    x, weights = inputs.x.clone().requires_grad_(), [w.clone().requires_grad_() for w in inputs.weights]
    y, *_ = dilated_reparam_conv(x, weights, *inputs[2:-1], backend=backend)
    with torch.autocast('cpu', torch.bfloat16):
        y.backward(inputs.grad)
    assert torch.equal(x.grad, expected['x'][0])
    assert all(torch.equal(w.grad, e) for w, e in zip(weights, expected['weights'], strict=True))


def test_autocast_leaves_double_precision_alone(backend: str) -> None:
    with torch.autocast('cpu', torch.bfloat16):
        assert mistakes(BASE._replace(dtype=torch.float64), backend) == []


def test_one_value_a_channel_has_no_variance(backend: str) -> None:
    inputs = inputs_of(Case('7', (1, 1), batch=1))
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        compute(backend)(*inputs[:-1])


def test_the_first_branch_is_dense(backend: str) -> None:
    """What is merged ignores its dilation."""
    inputs = inputs_of(Case('7'))
    dilations = [2, *inputs.dilations[1:]]
    with pytest.raises(ValueError, match=r'\[2, .* must begin with 1'):
        compute(backend)(*inputs._replace(dilations=dilations)[:-1])
    with pytest.raises(ValueError, match='must begin with 1'):
        merge_branches(inputs.weights, dilations, inputs.gammas)


def test_no_values(backend: str) -> None:
    """An empty map, finite statistics, and zeros as gradients."""
    inputs = inputs_of(Case('7', batch=0))
    found = differentiate(compute(backend), inputs)
    assert found['y'][0].shape == found['x'][0].shape == inputs.x.shape
    for name in COLUMNS:
        assert not any(t.any() for t in found[name]), name  # NaN would be


def test_merge_branches() -> None:
    """One convolution with the merged kernel is the sum of the branches; gradients of the scales are right."""
    inputs = inputs_of(BASE).double()
    scales = torch.stack(inputs.gammas).requires_grad_()
    merged = merge_branches(inputs.weights, inputs.dilations, scales)
    zero, one = torch.zeros_like(scales), torch.ones_like(scales)
    y, *_ = per_branch(
        inputs.x, inputs.weights, inputs.dilations, list(scales), list(zero), [0.0] * len(scales), (zero, one)
    )
    mine = torch.nn.functional.conv2d(inputs.x, merged, padding=6, groups=BASE.channels)
    assert relative_error(mine.detach(), y.detach()) < 1e-14
    grads = [torch.autograd.grad(out, scales, inputs.grad)[0] for out in (mine, y)]
    assert relative_error(*grads) < 1e-13
    with pytest.raises(ValueError, match='size 9 does not fit into a 7x7'):
        merge_branches([torch.ones(2, 1, 7, 7), torch.ones(2, 1, 3, 3)], [1, 4], torch.ones(2, 2))


# ------------------------------------------------------------------------------------------ as operators of torch


@pytest.mark.parametrize(
    ('backend', 'dtype', 'layout'),
    [('torch', torch.float32, 'contiguous'), ('cpp', torch.bfloat16, 'channels_last')],
    indirect=['backend'],
    ids=str,
)
def test_opcheck(dtype: torch.dtype, layout: str, backend: str) -> None:
    inputs = inputs_of(Case('7', (6, 7), layout=layout, dtype=dtype))
    (x, weight, gamma, beta), static = operands(inputs)
    static = (*static, backend)
    _, mean, var = OPS.dilated_reparam_forward(x, weight, gamma, beta, *static)
    tensors = inputs.grad, x, weight, gamma, mean, var
    opcheck(OPS.dilated_reparam_forward.default, (x, weight, gamma, beta, *static))
    opcheck(OPS.dilated_reparam_stats.default, (x, weight, len(gamma), *static))
    opcheck(OPS.dilated_reparam_sums.default, (*tensors, *static))
    opcheck(OPS.dilated_reparam_backward.default, (*tensors, None, None, 84.0, True, *static))
    opcheck(OPS.dilated_reparam_backward.default, (*tensors, gamma, beta, 168.0, False, *static))


def test_parts_agree_with_the_whole(backend: str) -> None:
    """What the synchronised form is made of: the statistics, and the sums with which the gradients are computed."""
    inputs = inputs_of(BASE)
    (x, weight, gamma, beta), static = operands(inputs)
    static, count = (*static, backend), float(x.numel() // x.shape[1])
    _, mean, var = OPS.dilated_reparam_forward(x, weight, gamma, beta, *static)
    for mine, whole in zip(OPS.dilated_reparam_stats(x, weight, len(gamma), *static), (mean, var), strict=True):
        assert torch.equal(mine, whole)
    tensors = inputs.grad, x, weight, gamma, mean, var
    whole = OPS.dilated_reparam_backward(*tensors, None, None, count, True, *static)
    sums = OPS.dilated_reparam_sums(*tensors, *static)
    given = OPS.dilated_reparam_backward(*tensors, *sums, count, True, *static)
    assert all(torch.equal(a, b) for a, b in zip(sums, whole[2:], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given, whole, strict=True))


@pytest.mark.parametrize(
    ('backend', 'layout'), [('torch', 'contiguous'), ('cpp', 'channels_last')], indirect=['backend']
)
def test_compile(layout: str, backend: str) -> None:
    """In one graph, forward and backward, with the same results."""
    torch._dynamo.reset()
    inputs = inputs_of(BASE._replace(branches='7', layout=layout))
    compiled = torch.compile(compute(backend), fullgraph=True, backend='aot_eager')
    mine, expected = (differentiate(f, inputs) for f in (compiled, compute(backend)))
    for name in COLUMNS:
        assert all(relative_error(a, b) < 1e-6 for a, b in zip(mine[name], expected[name], strict=True)), name
    assert mine['y'][0].stride() == expected['y'][0].stride()


def test_flop_counter(backend: str) -> None:
    """2 N C H W K^2 summed over the branches, and three times that with the backward pass."""
    inputs = inputs_of(BASE)
    forward = 2 * inputs.x.numel() * sum(w.shape[-1] ** 2 for w in inputs.weights)
    with FlopCounterMode(display=False) as counter:
        compute(backend)(*inputs[:-1])
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        differentiate(compute(backend), inputs)
    assert counter.get_total_flops() == 3 * forward


# ------------------------------------------------------------------------------------------ machines


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_threads_do_not_matter(layout: str, dtype: torch.dtype, cpp: Path) -> None:
    """Not a bit depends on the number of threads or on their order."""
    inputs = inputs_of(Case('7', (17, 20), 70, 3, layout, dtype))
    results: list[dict[str, Any]] = []
    for count in (1, 1, 2, 2, 3, 3):
        torch.set_num_threads(count)
        results.append(differentiate(compute('cpp'), inputs))
    for name in COLUMNS:
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other[name], results[0][name], strict=True)), name


def test_repeatable(backend: str) -> None:
    inputs = inputs_of(BASE)
    first, second = (differentiate(compute(backend), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for name in COLUMNS for a, b in zip(first[name], second[name], strict=True))


def test_batch_of_one_image_and_many() -> None:
    """A mistake that depends on what lies beside a map would show in a batch of equal images."""
    one, many = inputs_of(Case('7', batch=1)), inputs_of(Case('7', batch=1))
    many = many._replace(x=many.x.expand(3, -1, -1, -1), grad=many.grad.expand(3, -1, -1, -1))
    a, b = (differentiate(compute('auto'), inputs) for inputs in (one, many))
    assert relative_error(b['y'][0], a['y'][0].expand(3, -1, -1, -1)) < 1e-6
    assert relative_error(b['x'][0], a['x'][0].expand(3, -1, -1, -1)) < 1e-6
    assert all(relative_error(w, 3 * v) < 5e-6 for w, v in zip(b['weights'], a['weights'], strict=True))
