"""The pointwise half of a block against plain torch in float64: outputs, gradients, and what is hard about them."""

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmunireplknet.ops import linear as linear_module
from mmunireplknet.ops import pointwise
from mmunireplknet.ops.linear import linear, product

from ..procedural import image, relative_error
from . import pointwise_cases as cases
from .pointwise_cases import CHANNELS, EPS, SIZES, TOLERANCE, Kind, differentiate, errors, problem

NAMES = ('grn_mlp', 'normalize', 'gate')
KINDS = [
    Kind(),
    Kind(kept=True),
    Kind(multiplier=False, biases=False),
    Kind(residual=False, beta=False),
    Kind(kept=True, multiplier=False, residual=False, biases=False, beta=False),
]
pytestmark = pytest.mark.usefixtures('cpp')


def needs_two_values(name: str, kind: Kind, pixels: int) -> bool:
    return pixels < 2 and name != 'grn_mlp' and not kind.kept


# ------------------------------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize('kind', KINDS, ids=str)
@pytest.mark.parametrize('channels', CHANNELS)
@pytest.mark.parametrize('name', NAMES)
def test_against_float64(name: str, channels: int, kind: Kind) -> None:
    for n in (1, 3):
        for size in SIZES:
            if not needs_two_values(name, kind, n * size[0] * size[1]):
                p = problem(name, n, channels, size, kind)
                assert max(errors(p)) < TOLERANCE[torch.float32], (n, size, errors(p))


@pytest.mark.parametrize('kept', [False, True])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('name', NAMES)
def test_16_bit_maps(name: str, dtype: torch.dtype, kept: bool) -> None:
    for channels in (16, 37, 80):
        for size in SIZES[1:]:
            p = problem(name, 2, channels, size, Kind(kept), dtype)
            found = errors(p)
            assert max(found) < TOLERANCE[dtype], (channels, size, found)
            # Of those, sums into float32 parameters see little of the rounding where all is computed by the kernels.
            assert name == 'grn_mlp' or max(found[2:4]) < 5e-6


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_mlp_is_no_worse_than_that_of_the_layers(dtype: torch.dtype) -> None:
    p = problem('grn_mlp', 3, 37, (20, 33), Kind(), dtype)
    layers = errors(p, lambda *inputs: cases.grn_mlp(*(t.to(dtype) for t in inputs)))
    for mine, theirs in zip(errors(p), layers, strict=True):
        assert mine < 1.1 * theirs + 1e-5


@pytest.mark.parametrize('name', ['normalize', 'gate'])
def test_statistics(name: str) -> None:
    """Mean and biased variance of the batch, without gradient, and how many values they are of."""
    x = image((3, 20, 33, 37)) * 2 + 5
    c, se = torch.ones(37), ((torch.ones(9, 37), torch.ones(9)), (torch.ones(37, 9), torch.ones(37)))
    extra = se if name == 'gate' else ()
    _, mean, var, count = getattr(pointwise, name)(x.requires_grad_(), c, c, pointwise.Statistics(EPS), *extra)
    exact = torch.var_mean(x.detach().double(), (0, 1, 2), correction=0)
    assert relative_error(var, exact[0]) < 1e-6
    assert relative_error(mean, exact[1]) < 1e-6
    assert count == 3 * 20 * 33
    assert not mean.requires_grad
    assert not var.requires_grad
    kept = pointwise.Statistics(EPS, c + 1, c + 2)
    _, mean, var, _ = getattr(pointwise, name)(x, c, c, kept, *extra)
    assert torch.equal(mean, c + 1)
    assert torch.equal(var, c + 2)


@pytest.mark.parametrize('name', ['normalize', 'gate'])
def test_one_value_a_channel_has_no_variance(name: str) -> None:
    p = problem(name, 1, 3, (1, 1))
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        p.mine(*p.inputs)


@pytest.mark.parametrize('name', ['normalize', 'gate'])
@pytest.mark.parametrize('offset', [100.0, -1e4])
def test_a_mean_far_from_zero(name: str, offset: float) -> None:
    """E[x^2] - E[x]^2 in float32 would leave nothing of the variance."""
    p = problem(name, 3, 37, (20, 33))
    p.inputs[0] = p.inputs[0] + offset
    # What is left of x itself: it is rounded to multiples of 1e-3 around 1e4, the same in the reference.
    limits = [3e-6 + 1e-7 * abs(offset)] * 2 + [5e-6 + 1e-7 * abs(offset)] * (len(p.inputs) - 1)
    assert all(e < limit for e, limit in zip(errors(p), limits, strict=True)), errors(p)


@pytest.mark.parametrize('size', [(64, 64), (5, 4)], ids=str)
def test_an_odd_first_pixel(size: tuple[int, int]) -> None:
    """As at the corner of a padded image: the variance is as exact as ever."""
    x = image((2, *size, 8)) + 300
    x[0, 0, 0] = 0.0
    var = pointwise.normalize(x.clone(), torch.ones(8), torch.zeros(8), pointwise.Statistics(EPS))[2]
    assert relative_error(var, torch.var(x.double(), (0, 1, 2), correction=0)) < 2e-5


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('inside', [False, True])
def test_backward_under_autocast(name: str, inside: bool) -> None:
    """Nothing of it is cast: what had to be, was cast before."""
    p = problem(name, 2, 16, (5, 4))
    expected = differentiate(p.mine, p.inputs, p.grad)
    leaves = [t.detach().requires_grad_() for t in p.inputs]
    with torch.autocast('cpu', torch.bfloat16, enabled=False):
        y = p.mine(*leaves)
    with torch.autocast('cpu', torch.bfloat16, enabled=inside):
        y.backward(p.grad)
    assert all(torch.equal(t.grad, e) for t, e in zip(leaves, expected[1:], strict=True))


@pytest.mark.parametrize('name', NAMES)
def test_gradients_of_another_layout(name: str) -> None:
    """An expanded gradient, as that of a sum, and one of a permuted map."""
    p = problem(name, 2, 16, (5, 4))
    permuted = p.grad.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not permuted.is_contiguous()
    expected, actual = (differentiate(p.mine, p.inputs, grad) for grad in (p.grad, permuted))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert max(errors(p._replace(grad=p.grad[:, :1, :1].expand_as(p.grad)))) < TOLERANCE[torch.float32]


@pytest.mark.parametrize('name', NAMES)
def test_input_without_gradient(name: str) -> None:
    p = problem(name, 2, 16, (5, 4))
    expected = differentiate(p.mine, p.inputs, p.grad)
    leaves = [p.inputs[0], *(t.clone().requires_grad_() for t in p.inputs[1:])]
    p.mine(*leaves).backward(p.grad)
    assert leaves[0].grad is None
    assert all(torch.equal(t.grad, e) for t, e in zip(leaves[1:], expected[2:], strict=True))


@pytest.mark.parametrize('frozen', [(1,), (5,), (1, 2, 5, 6)])
def test_frozen_weights_of_the_mlp(frozen: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradients are not computed, and the others are the same."""
    p, products = problem('grn_mlp', 2, 16, (5, 4)), []
    expected = differentiate(p.mine, p.inputs, p.grad)[1:]
    monkeypatch.setattr(pointwise, 'product', lambda a, b: products.append(None) or product(a, b))
    leaves = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate(p.inputs)]
    p.mine(*leaves).backward(p.grad)
    assert len(products) == 2 - len({1, 5} & {*frozen})
    for i, (leaf, e) in enumerate(zip(leaves, expected, strict=True)):
        assert leaf.grad is None if i in frozen else torch.equal(leaf.grad, e)


@pytest.mark.parametrize('kept', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_without_gradients(name: str, kept: bool) -> None:
    """The same bits; of what is given, only the map that ``normalize`` gets is overwritten."""
    p = problem(name, 2, 16, (5, 4), Kind(kept))
    expected = p.mine(*p.inputs)
    copies = [t.clone() for t in p.inputs]
    with torch.no_grad():
        y = p.mine(*copies)
    assert torch.equal(y, expected)
    assert all(torch.equal(a, b) for a, b in zip(copies[1:], p.inputs[1:], strict=True))
    assert torch.equal(copies[0], y if name == 'normalize' else p.inputs[0])


@pytest.mark.parametrize('name', NAMES)
def test_it_cannot_be_differentiated_twice(name: str) -> None:
    p = problem(name, 2, 16, (5, 4))
    x = p.inputs[0].requires_grad_()
    (grad,) = torch.autograd.grad(p.mine(x, *p.inputs[1:]).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'cannot be differentiated twice .* fused=False'):
        grad.sum().backward()


@pytest.mark.parametrize('name', NAMES)
def test_nor_where_the_gradient_is_a_constant(name: str) -> None:
    """The gradient of a sum depends on the input all the same; without an error its derivative would be missing."""
    p = problem(name, 2, 16, (5, 4))
    x = p.inputs[0].requires_grad_()
    (grad,) = torch.autograd.grad(p.mine(x, *p.inputs[1:]).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='cannot be differentiated twice'):
        (grad.square().sum() + x.sum()).backward()


# ------------------------------------------------------------------------------------------ GELU and GRN


def kernel_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative by the compiled kernels, for x (P,)."""
    x = x.view(1, -1, 1)
    value, slope = torch.empty_like(x), torch.empty_like(x)
    torch.ops.mmuni_cpu.apply(x, None, None, None, value, True)
    torch.ops.mmuni_cpu.grad(torch.ones_like(x), x, None, None, None, slope, True)
    return value.flatten(), slope.flatten()


def torch_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = F.gelu(x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def test_gelu() -> None:
    """Over [-12, 12] and around 0, where it is x / 2."""
    x = torch.cat([torch.linspace(-12, 12, 600_001), torch.linspace(-1e-3, 1e-3, 10_001)])
    exact = torch_gelu(x.double())
    for mine, theirs, reference in zip(kernel_gelu(x), torch_gelu(x), exact, strict=True):
        error, torch_error = (float((t - reference).abs().max()) for t in (mine, theirs))
        assert error < 1e-6
        assert error < torch_error + 1e-7
    near_zero = x.abs() < 1e-3
    value = kernel_gelu(x)[0][near_zero]
    assert ((value - exact[0][near_zero]).abs() <= 1e-6 * exact[0][near_zero].abs()).all()


@pytest.mark.parametrize('count', [1, 5, 64])
def test_gelu_of_what_is_not_finite_or_large(count: int) -> None:
    """As torch's, except that it is inf for inf; each number alone and beside others, in vectors and behind them."""
    numbers = [torch.inf, 1e4, 1e30, 1e38, 88.0, 13.5, 1e-40]
    for special in (*numbers, *(-number for number in numbers), 3e37, torch.nan, 0.0):
        x = torch.linspace(-1, 1, count)
        x[count // 2] = special
        mine, theirs = kernel_gelu(x), torch_gelu(x)
        if special == torch.inf:
            assert mine[0][count // 2] == torch.inf
            theirs[0][count // 2] = torch.inf
            mine[1][count // 2] = theirs[1][count // 2]
        for a, b in zip(mine, theirs, strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-6, equal_nan=True), (special, a, b)


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of grn_mlp, and those of the layers in float64."""
    p = problem('grn_mlp', len(x), x.shape[-1], x.shape[1:3])
    inputs = [x, weight1, bias1, *p.inputs[3:]]
    exact = differentiate(p.layers, [None if t is None else t.double() for t in inputs], p.grad.double())
    return differentiate(p.mine, inputs, p.grad), exact


@pytest.mark.parametrize('bias', [False, True])
def test_grn_of_an_empty_map(bias: bool) -> None:
    """Every norm is zero, which has no derivative: torch takes 0, and so does this."""
    mine, exact = mlp(torch.zeros(2, 5, 4, 16), image((64, 16), 1), torch.zeros(64) if bias else None)
    assert all(t.isfinite().all() for t in mine)
    assert not mine[2].any()
    for a, e in zip(mine, exact, strict=True):
        assert relative_error(a, e) < 1e-6 or not (a.any() or e.any())


@pytest.mark.parametrize('channels', [[3], [0, 17, 63], list(range(63))])
def test_grn_with_empty_channels(channels: list[int]) -> None:
    weight, bias = image((64, 16), 1), image((64,), 2)
    weight[channels], bias[channels] = 0.0, 0.0
    mine, exact = mlp(image((2, 5, 4, 16)), weight, bias)
    assert all(t.isfinite().all() for t in mine)
    for a, e in zip(mine, exact, strict=True):
        assert relative_error(a, e) < 5e-6


def test_grn_of_one_empty_image() -> None:
    x = image((2, 5, 4, 16))
    x[1] = 0.0
    for a, e in zip(*mlp(x, image((64, 16), 1), None), strict=True):
        assert relative_error(a, e) < 5e-6


@pytest.mark.parametrize('name', ['normalize', 'gate'])
def test_constant_channels(name: str) -> None:
    """Their variance is zero: nothing is divided by it but eps."""
    p = problem(name, 2, 16, (5, 4))
    p.inputs[0][..., 3], p.inputs[0][..., 7] = 0.0, 5.0
    assert max(errors(p)) < TOLERANCE[torch.float32]


# ------------------------------------------------------------------------------------------ memory, products, machines


def kept_tensors(function: Callable[[], Tensor], size: int) -> list[Tensor]:
    """What ``function`` keeps for the backward pass, of at least ``size`` elements."""
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return [t for t in kept if t.numel() >= size]


@pytest.mark.parametrize('name', NAMES)
def test_what_is_kept(name: str) -> None:
    """The input, and of the perceptron its hidden layer; the layers by themselves keep several maps more."""
    p = problem(name, 2, 16, (20, 33))
    leaves = [t.clone().requires_grad_() for t in p.inputs]
    x = leaves[0]
    kept = kept_tensors(lambda: p.mine(*leaves), x.numel() // 2)
    assert kept[0].data_ptr() == x.data_ptr()
    assert [t.numel() // x.numel() for t in kept] == ([1, 4] if name == 'grn_mlp' else [1])
    assert sum(t.numel() for t in kept_tensors(lambda: p.layers(*leaves), x.numel() // 2)) > 1.9 * sum(
        t.numel() for t in kept
    )


@pytest.mark.parametrize('by_onednn', [False, True])
@pytest.mark.parametrize('shape', [(1, 1, 1), (7, 3, 12), (300, 37, 148), (64, 80, 320)], ids=str)
def test_products(shape: tuple[int, int, int], by_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of contiguous and of transposed matrices, with both libraries."""
    if by_onednn and not torch.backends.mkldnn.is_available():
        pytest.skip('torch has no oneDNN here')
    monkeypatch.setattr(linear_module, '_prefers_onednn', lambda: by_onednn)
    p, i, o = shape
    x, weight, bias, grad = image((p, i)), image((o, i), 1), image((o,), 2), image((p, o), 3)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert relative_error(linear(x, weight, bias), exact) < 2e-6
    assert relative_error(linear(x, weight), exact - bias) < 2e-6
    assert relative_error(linear(grad, weight.t()), grad.double() @ weight.double()) < 2e-6
    assert relative_error(product(grad, x), grad.double().t() @ x.double()) < 2e-6
    assert relative_error(product(x, grad), x.double().t() @ grad.double()) < 2e-6


def test_torch_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module can be imported, and multiplies as torch does."""
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: False)
    monkeypatch.setattr(torch.ops, 'mkldnn', SimpleNamespace())
    spec = importlib.util.spec_from_file_location('mmunireplknet.ops.without_onednn', linear_module.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x, weight = image((7, 5)), image((3, 5), 1)
    assert torch.equal(module.linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_products_of_other_dtypes(dtype: torch.dtype) -> None:
    x, weight, bias = image((7, 5)).to(dtype), image((3, 5), 1).to(dtype), image((3,), 2).to(dtype)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert relative_error(product(x, x), x.double().t() @ x.double()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize('by_onednn', [False, True])
def test_flop_counter(by_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products count as those of the layers do, whichever library makes them."""
    if by_onednn and not torch.backends.mkldnn.is_available():
        pytest.skip('torch has no oneDNN here')
    monkeypatch.setattr(linear_module, '_prefers_onednn', lambda: by_onednn)
    p, counts = problem('grn_mlp', 2, 16, (5, 4)), []
    for function in (p.mine, p.layers):
        with FlopCounterMode(display=False) as counter:
            differentiate(function, p.inputs, p.grad)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * (2 * 40 * 16 * 64)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('name', ['normalize', 'gate'])
def test_threads_do_not_matter(name: str, dtype: torch.dtype) -> None:
    p, results = problem(name, 3, 37, (20, 33), dtype=dtype), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(differentiate(p.mine, p.inputs, p.grad))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))
