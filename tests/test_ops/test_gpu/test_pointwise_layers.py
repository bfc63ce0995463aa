"""``normalize``, ``gate`` and ``grn_mlp`` as on a GPU, in Triton's interpreter, against autograd in float64."""

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmunireplknet.ops import moments, pointwise, pointwise_kernels

from ...procedural import image, relative_error
from .. import pointwise_device_cases as device_cases
from ..pointwise_cases import EPS, TOLERANCE, Kind, differentiate, errors, problem
from ..test_pointwise import KINDS, NAMES, kept_tensors
from ..triton_pointwise import in_layout, pointwise_on_gpu


@pytest.fixture
def calls(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is computed in Triton from now on."""
    with pointwise_on_gpu(monkeypatch, gpu.backend) as calls:
        yield calls


def turned(name: str, c: int, kind: Kind, dtype: torch.dtype, planes: bool) -> Any:
    """A problem with its maps in the layouts that they have in a block of NCHW maps, or the other way around."""
    p = problem(name, 2, c, (5, 7), kind, dtype)
    p.inputs[0] = in_layout(p.inputs[0], planes)
    if name == 'normalize' and kind.residual:
        p.inputs[4] = in_layout(p.inputs[4], not planes)
    return p._replace(grad=in_layout(p.grad, not planes))


@pytest.mark.parametrize('planes', [False, True])
@pytest.mark.parametrize('kind', KINDS, ids=str)
@pytest.mark.parametrize('name', NAMES)
def test_against_float64(calls: list[str], name: str, kind: Kind, planes: bool) -> None:
    p = turned(name, 21, kind, torch.float32, planes)
    assert max(errors(p)) < TOLERANCE[torch.float32]
    assert {'apply', 'sums', 'grad'} <= {*calls}
    # Statistics of a batch come from one pass, and those that are kept from none, but for the means of a gate.
    assert calls.count('moments') == (name != 'grn_mlp' and not kind.kept)
    assert calls.count('sums') == (2 if name == 'grn_mlp' or (name == 'gate' and kind.kept) else 1)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('name', NAMES)
def test_16_bit_maps(calls: list[str], name: str, dtype: torch.dtype) -> None:
    for kept in (False, True):
        assert max(errors(turned(name, 16, Kind(kept), dtype, True))) < TOLERANCE[dtype]


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('planes', [False, True])
def test_layouts(calls: list[str], name: str, planes: bool) -> None:
    """What a linear layer reads is contiguous; the result of a norm lies as its residual, and gradients as the maps."""
    p = turned(name, 6, Kind(), torch.float32, planes)
    leaves = [t.detach().requires_grad_() for t in p.inputs]
    y = p.mine(*leaves)
    y.backward(p.grad)
    assert y.stride() == (leaves[4].stride() if name == 'normalize' else y.contiguous().stride())
    expected = leaves[0].contiguous() if name == 'grn_mlp' else leaves[0]
    assert leaves[0].grad.stride() == expected.stride() or name == 'grn_mlp'


def test_a_residual_of_another_dtype(calls: list[str]) -> None:
    """As under autocast: the map has 16 bits, the residual and the result 32, and nothing is cast in between."""
    p = turned('normalize', 16, Kind(), torch.float16, True)
    p.inputs[4] = p.inputs[4].float()
    leaves = [t.detach().requires_grad_() for t in p.inputs]
    y = p.mine(*leaves)
    grad = image(tuple(y.shape), 9)
    y.backward(grad)
    assert [t.grad.dtype for t in leaves] == [torch.float16] + [torch.float32] * 4
    exact = differentiate(p.layers, [t.double() for t in p.inputs], grad.double())
    assert relative_error(y.detach(), exact[0]) < 1e-6
    assert relative_error(leaves[0].grad, exact[1]) < TOLERANCE[torch.float16]
    assert max(relative_error(t.grad, e) for t, e in zip(leaves[1:], exact[2:], strict=True)) < 1e-6
    kept = kept_tensors(lambda: p.mine(*leaves), leaves[0].numel())
    assert [t.dtype for t in kept] == [torch.float16]


@pytest.mark.parametrize('name', NAMES)
def test_what_is_kept(calls: list[str], name: str) -> None:
    p = turned(name, 16, Kind(), torch.float32, True)
    leaves = [t.clone().requires_grad_() for t in p.inputs]
    kept = kept_tensors(lambda: p.mine(*leaves), leaves[0].numel())
    assert [t.numel() // leaves[0].numel() for t in kept] == ([1, 4] if name == 'grn_mlp' else [1])


@pytest.mark.parametrize('name', NAMES)
def test_without_gradients(calls: list[str], name: str) -> None:
    """The same bits; only the map that ``normalize`` gets may be overwritten."""
    for planes in (False, True):
        p = turned(name, 16, Kind(), torch.float32, planes)
        expected, copies = p.mine(*p.inputs), [t.clone() for t in p.inputs]
        with torch.no_grad():
            assert torch.equal(p.mine(*copies), expected)
        assert all(
            torch.equal(a, b)
            for a, b in zip(copies[name == 'normalize' :], p.inputs[name == 'normalize' :], strict=True)
        )


def test_a_gradient_of_no_layout(calls: list[str]) -> None:
    """That of a sum, which has no memory of its own, and a slice."""
    for name in NAMES:
        p = problem(name, 2, 6, (5, 7))
        p = p._replace(grad=p.grad[:, :1, :1].expand_as(p.grad))
        p.inputs[0] = torch.cat([p.inputs[0]] * 2, 1)[:, 5:]
        assert max(errors(p)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize('frozen', [(1,), (2,), (5,), (1, 2, 5, 6)])
def test_frozen_weights_of_the_mlp(calls: list[str], frozen: tuple[int, ...]) -> None:
    p = problem('grn_mlp', 2, 6, (5, 4))
    expected = differentiate(p.mine, p.inputs, p.grad)[1:]
    leaves = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate(p.inputs)]
    p.mine(*leaves).backward(p.grad)
    for i, (leaf, e) in enumerate(zip(leaves, expected, strict=True)):
        assert leaf.grad is None if i in frozen else relative_error(leaf.grad, e) < 1e-6


def test_grn_of_an_empty_channel(calls: list[str]) -> None:
    """Its norm is zero, which has no derivative: torch takes 0, and so does this."""
    p = problem('grn_mlp', 2, 6, (5, 4))
    p.inputs[1][3], p.inputs[2][3] = 0.0, 0.0
    assert max(errors(p)) < TOLERANCE[torch.float32]


def test_it_cannot_be_differentiated_twice(calls: list[str]) -> None:
    for name in NAMES:
        p = problem(name, 2, 6, (5, 4))
        x = p.inputs[0].requires_grad_()
        (grad,) = torch.autograd.grad(p.mine(x, *p.inputs[1:]).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r'cannot be differentiated twice .* fused=False'):
            grad.sum().backward()


@pytest.mark.parametrize('at_hand', [True, False])
def test_synchronised(calls: list[str], process_group: None, at_hand: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one all-reduce forward and one backward, of as many values as the layers reduce.

    On a GPU the count of the values in all processes stays there, as a tensor.
    """
    monkeypatch.setattr(moments, '_is_at_hand', lambda values: at_hand)
    reduced: list[int] = []
    group, all_reduce = torch.distributed.group.WORLD, torch.distributed.all_reduce
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.distributed,
            'all_reduce',
            lambda t, *args, **kw: reduced.append(t.numel()) or all_reduce(t, *args, **kw),
        )
        for name in ('normalize', 'gate'):
            p = problem(name, 2, 6, (5, 4))
            statistics = pointwise.Statistics(EPS, group=group)
            function = getattr(pointwise, name)

            def mine(x: Tensor, w: Tensor, b: Tensor, *rest: Tensor, function: Any = function) -> Tensor:
                pairs = rest if len(rest) == 2 else (rest[:2], rest[2:])
                return function(x, w, b, statistics, *pairs)[0]  # noqa: B023

            assert max(errors(p._replace(mine=mine))) < TOLERANCE[torch.float32]
    assert reduced == [13] * 4


@pytest.mark.slow
def test_device_cases(calls: list[str]) -> None:
    """What a GPU is to be tested with, that it runs."""
    device_cases.sweep('cpu', [(3, 4)], [5], [torch.float16])
    device_cases.gelu('cpu')
    device_cases.check_determinism('cpu')
    device_cases.check_inference('cpu', torch.float16, 1e-3)
    assert 'moments' in calls


@pytest.mark.slow
def test_device_cases_of_models(calls: list[str]) -> None:
    for training in (True, False):
        device_cases.check_autocast('cpu', torch.float16, training)
        device_cases.check_backbone('cpu', 1e-4, training)
    assert 'moments' in calls


@pytest.mark.slow
def test_device_cases_find_what_is_wrong(
    calls: list[str], gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = gpu.backend.apply

    def wrong(*args: Any) -> None:
        apply(*args)
        args[4].mul_(1.01)

    monkeypatch.setattr(gpu.backend, 'apply', wrong)
    for check in (
        lambda: device_cases.sweep('cpu', [(3, 4)], [5], [torch.float16]),
        lambda: device_cases.gelu('cpu'),
        lambda: device_cases.check_inference('cpu', torch.float16, 1e-3),
    ):
        with pytest.raises(AssertionError):
            check()


# ------------------------------------------------------------------------------------------ the deploy form


@pytest.mark.parametrize('planes', [False, True])
def test_excite(calls: list[str], planes: bool) -> None:
    x = in_layout(image((2, 5, 7, 9)), planes)
    down, up = (image((3, 9), 1), image((3,), 2)), (image((9, 3), 3), image((9,), 4))
    y = pointwise.excite(x, x.sum((1, 2)), down, up)
    gates = torch.sigmoid(
        torch.relu(x.double().mean((1, 2)) @ down[0].double().t() + down[1]) @ up[0].double().t() + up[1]
    )
    assert relative_error(y, x.double() * gates[:, None, None]) < 1e-6
    assert y.is_contiguous()
    assert calls == ['gates', 'apply']


def test_add(calls: list[str]) -> None:
    x, residual = image((2, 5, 7, 9)).half(), in_layout(image((2, 5, 7, 9), 1), True)
    y = pointwise.add(x, residual)
    assert y.stride() == residual.stride()
    assert relative_error(y, x.double() + residual) < 1e-7
    assert calls == ['apply']


# ------------------------------------------------------------------------------------------ what fails


@pytest.mark.parametrize('broken', ['apply', 'sums', 'grad', 'grn', 'grn_grads'])
def test_a_kernel_that_fails_gives_way(
    calls: list[str], gpu: SimpleNamespace, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a backward pass, too; the warning comes once, and the kernels are not tried again."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError('ptxas fatal')

    monkeypatch.setattr(gpu.backend, broken, fail)
    p = problem('grn_mlp', 2, 6, (5, 4))
    with pytest.warns(UserWarning, match=f'pointwise layers fail in {broken}, and are not used any more') as all_:
        assert max(errors(p)) < TOLERANCE[torch.float32]
    assert len(all_) == 1
    assert not pointwise_kernels.suits(p.inputs[0])
    calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert max(errors(p)) < TOLERANCE[torch.float32]
        assert max(errors(problem('gate', 2, 6, (5, 4)))) < TOLERANCE[torch.float32]
        assert max(errors(problem('normalize', 2, 6, (5, 4)))) < TOLERANCE[torch.float32]
    assert calls == []
    pointwise_kernels._failures.clear()


def test_want_of_memory_is_no_failure(calls: list[str], gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError('out of memory')

    with monkeypatch.context() as patch:
        patch.setattr(gpu.backend, 'apply', fail)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            pointwise.add(image((1, 2, 2, 3)), image((1, 2, 2, 3)))
    assert pointwise_kernels.suits(image((1, 2, 2, 3)))


def test_a_failure_while_a_graph_is_captured(
    calls: list[str], gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is lost: torch cannot go on in its place."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError('ptxas fatal')

    monkeypatch.setattr(gpu.backend, 'apply', fail)
    monkeypatch.setattr(pointwise_kernels.fastest, 'is_capturing', lambda device=None: True)
    with pytest.raises(RuntimeError, match='ptxas fatal'):
        pointwise.add(image((1, 2, 2, 3)), image((1, 2, 2, 3)))
