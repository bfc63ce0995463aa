"""The pointwise passes and their coefficients in Triton's interpreter, against plain torch in float64."""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from mmunireplknet.ops import coefficients, passes
from mmunireplknet.ops.self_check import self_check

from ...procedural import image, relative_error
from ..triton_pointwise import in_layout

SHAPES = [(2, 5, 7, 37), (1, 9, 16, 40)]  # sizes of no tile; the second has wide reads
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 2e-3}
# All layouts of the three maps of a kernel; the dtype is another matter.
CASES = [(torch.float32, layouts) for layouts in itertools.product((False, True), repeat=3)]
CASES += [(torch.float16, (False, True, True)), (torch.float16, (True, False, False))]


def maps(shape: tuple[int, ...], dtype: torch.dtype, layouts: tuple[bool, ...]) -> list[Tensor]:
    return [in_layout(image(shape, seed).to(dtype), planes) for seed, planes in enumerate(layouts)]


def rows(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three times (N, C), and (C,)."""
    n, c = shape[0], shape[-1]
    return image((n, c), 11), image((n, c), 12), image((n, c), 13), image((c,), 14)


def wide(given: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.double(), given)


def compare(mine: Any, theirs: Any) -> float:
    """The largest relative error."""
    pairs = list(zip(tree_leaves(mine), tree_leaves(theirs), strict=True))
    assert [a is None for a, _ in pairs] == [b is None for _, b in pairs]
    return max(
        relative_error(a, b.expand(a.shape)) if b.any() else float(a.abs().max()) for a, b in pairs if a is not None
    )


# ------------------------------------------------------------------------------------------ passes


@pytest.mark.parametrize(('dtype', 'layouts'), CASES, ids=str)
def test_apply(gpu: SimpleNamespace, dtype: torch.dtype, layouts: tuple[bool, ...]) -> None:
    for shape in SHAPES:
        x, residual, out = maps(shape, dtype, layouts)
        scale, shift, _, row = rows(shape)
        for given, gelu in (
            ((scale, shift, residual), False),
            ((row, None, None), True),
            ((None, row, residual), True),
        ):
            right = torch.empty_like(x, dtype=torch.float64)
            passes.apply(*wide((x, *given)), right, gelu)
            gpu.pointwise.apply(x, *given, out, gelu)
            assert relative_error(out, right) < TOLERANCE[dtype]


@pytest.mark.parametrize(('dtype', 'layouts'), CASES, ids=str)
def test_grad(gpu: SimpleNamespace, dtype: torch.dtype, layouts: tuple[bool, ...]) -> None:
    for shape in SHAPES:
        grad, x, out = maps(shape, dtype, layouts)
        scale, shift, slope, row = rows(shape)
        for given, gelu in (((scale, shift, slope), False), ((scale, None, slope), True), ((row, row, row), True)):
            right, total = torch.empty_like(x, dtype=torch.float64), torch.empty(shape[-1])
            passes.grad(*wide((grad, x, *given)), right, gelu)
            gpu.pointwise.grad(grad, x, *given, out, gelu, total)
            assert relative_error(out, right) < TOLERANCE[dtype]
            assert relative_error(total, right.sum((0, 1, 2))) < 1e-6
            again = torch.empty_like(out)
            gpu.pointwise.grad(grad, x, *given, again, gelu)
            assert torch.equal(again, out)


@pytest.mark.parametrize(('dtype', 'layouts'), CASES, ids=str)
def test_sums(gpu: SimpleNamespace, dtype: torch.dtype, layouts: tuple[bool, ...]) -> None:
    for shape in SHAPES:
        x, grad, out = maps(shape, dtype, layouts)
        scale, shift, _, row = rows(shape)
        for given, gelu in (((grad, row), False), ((grad, None), True), ((None, row), True), ((None, None), False)):
            right, written = torch.empty(shape[0], 2, shape[-1]).double(), torch.empty_like(x, dtype=torch.float64)
            passes.sums(*wide((x, *given)), written, right, gelu, *wide((scale, shift)))
            result, alone = torch.empty(right.shape), torch.empty(right.shape)
            gpu.pointwise.sums(x, *given, out, result, gelu, scale, shift)
            gpu.pointwise.sums(x, *given, None, alone, gelu)
            assert relative_error(result, right) < 1e-6
            assert relative_error(out, written) < TOLERANCE[dtype]
            assert torch.equal(alone, result)


@pytest.mark.parametrize('planes', [False, True])
def test_moments(gpu: SimpleNamespace, planes: bool) -> None:
    """Also of a map far from zero, where E[x^2] - E[x]^2 in float32 would leave nothing."""
    for shape, offset in ((SHAPES[0], 0.0), (SHAPES[0], 1e3), ((1, 1, 1, 3), 5.0), ((2, 20, 21, 5), 0.0)):
        x = in_layout(image(shape) + offset, planes)
        mine, right = gpu.moments.moments(x), passes.moments(x.double())
        for a, b in zip(mine[:2], right[:2], strict=True):
            assert ((a - b).abs() <= 2e-7 * (1 + offset)).all()
        assert torch.allclose(mine[2].double(), right[2], rtol=1e-6 + 2e-7 * offset, atol=0)


def test_moments_of_a_padded_map(gpu: SimpleNamespace) -> None:
    """Its first rows are far from all others, in each program that has some of them."""
    x = image((2, 40, 40, 3)) + 300
    x[:, :7] = 0.0
    assert compare(gpu.moments.moments(x), passes.moments(x.double())) < 1e-6


@pytest.mark.parametrize(('programs', 'chunks'), [(1, 256), (3, 256), (10**6, 256), (10**6, 2)])
def test_how_pixels_are_divided(
    gpu: SimpleNamespace, programs: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.pointwise, '_PROGRAMS', programs)
    monkeypatch.setattr(gpu.pointwise, '_CHUNKS', chunks)
    gpu.pointwise._tiling.cache_clear()
    x, grad = image((2, 30, 29, 5)), image((2, 30, 29, 5), 1)
    result, right = torch.empty(2, 2, 5), torch.empty(2, 2, 5).double()
    gpu.pointwise.sums(x, grad, None, None, result)
    passes.sums(x.double(), grad.double(), None, None, right)
    assert relative_error(result, right) < 1e-6
    assert compare(gpu.moments.moments(x), passes.moments(x.double())) < 1e-6
    total = torch.empty(5)
    gpu.pointwise.grad(grad, x, None, None, None, torch.empty_like(x), False, total)
    assert relative_error(total, grad.double().sum((0, 1, 2))) < 1e-6
    gpu.pointwise._tiling.cache_clear()


def test_many_images_of_many_parts(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are put together at a time."""
    monkeypatch.setattr(gpu.moments, '_ELEMENTS', 128)
    x = image((7, 20, 20, 3))
    assert gpu.pointwise.tiling_of(x, True, X_PLANES=x).chunks == 4
    assert compare(gpu.moments.moments(x), passes.moments(x.double())) < 1e-6


def test_maps_of_two_dtypes(gpu: SimpleNamespace) -> None:
    """As under autocast: a residual in float32 beside a map of 16 bits, and the gradient of the one for the other."""
    x, grad = image((2, 5, 7, 9)).half(), image((2, 5, 7, 9), 1)
    out, right = torch.empty_like(grad), torch.empty_like(grad).double()
    gpu.pointwise.apply(x, None, None, grad, out)
    assert relative_error(out, x.double() + grad) < 1e-7
    gpu.pointwise.grad(grad, x, None, None, None, half := torch.empty_like(x), True)
    passes.grad(grad.double(), x.double(), None, None, None, right, True)
    assert relative_error(half, right) < TOLERANCE[torch.float16]


def test_bfloat16(gpu: SimpleNamespace) -> None:
    x, residual = (image((2, 5, 7, 9), seed).bfloat16() for seed in range(2))
    out, right = torch.empty_like(x), torch.empty_like(x, dtype=torch.float64)
    gpu.pointwise.apply(x, None, None, residual, out, True)
    passes.apply(x.double(), None, None, residual.double(), right, True)
    assert relative_error(out, right) < TOLERANCE[torch.bfloat16]


def test_in_place(gpu: SimpleNamespace) -> None:
    x, grad = image((2, 5, 7, 9)), image((2, 5, 7, 9), 1)
    other, slope = torch.empty_like(x), image((9,), 2)
    gpu.pointwise.grad(grad, x, None, None, slope, other, True)
    gpu.pointwise.grad(grad, x, None, None, slope, grad, True)
    assert torch.equal(grad, other)
    gpu.pointwise.apply(x, slope, None, None, other, True)
    gpu.pointwise.apply(x, slope, None, None, x, True)
    assert torch.equal(x, other)


def test_gelu(gpu: SimpleNamespace) -> None:
    """Value and derivative over [-12, 12], and of what is large or not finite, as torch's in float64."""
    extremes = [1e4, 1e19, 1e30, 1e38, 88.0, 13.5, 1e-40, 0.0]
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([*extremes, *(-e for e in extremes)])]).view(1, 1, -1)
    value, slope = torch.empty_like(x), torch.empty_like(x)
    gpu.pointwise.apply(x, None, None, None, value, True)
    gpu.pointwise.grad(torch.ones_like(x), x, None, None, None, slope, True)
    exact = x.double().requires_grad_()
    right = torch.nn.functional.gelu(exact)
    (derivative,) = torch.autograd.grad(right.sum(), exact)
    assert torch.allclose(value.double(), right.detach(), rtol=1e-6, atol=1e-6)
    assert torch.allclose(slope.double(), derivative, rtol=1e-6, atol=1e-6)
    x = torch.tensor([torch.inf, torch.nan, -torch.inf]).view(1, 1, -1)
    gpu.pointwise.apply(x, None, None, None, value := torch.empty_like(x), True)
    gpu.pointwise.grad(torch.ones_like(x), x, None, None, None, slope := torch.empty_like(x), True)
    assert value[0, 0, 0] == torch.inf
    assert value[0, 0, 1].isnan()
    assert slope[0, 0, 0] == 1
    assert slope[0, 0, 1].isnan()


@pytest.mark.usefixtures('cpp')
@pytest.mark.parametrize('gelu', [False, True])
def test_against_the_compiled_kernels(gpu: SimpleNamespace, gelu: bool) -> None:
    """The same three functions with the same arguments."""
    shape = (2, 9, 11, 20)
    x, grad, residual = maps(shape, torch.float32, (False,) * 3)
    scale, shift, slope, pivot = rows(shape)
    results = []
    for kernels in (gpu.pointwise, torch.ops.mmuni_cpu):
        outs = [torch.empty_like(x) for _ in range(3)] + [torch.empty(2, 2, 20) for _ in range(2)]
        kernels.apply(x, scale, shift, residual, outs[0], gelu)
        kernels.grad(grad, x, scale, shift, slope, outs[1], gelu)
        kernels.sums(x, None, pivot, outs[2], outs[3], gelu)
        kernels.sums(x, grad, pivot, None, outs[4], gelu)
        results.append(outs)
    assert compare(*results) < 5e-7


def test_what_is_refused(gpu: SimpleNamespace) -> None:
    x, row = torch.empty(2, 4, 5, 6), torch.empty(6)
    apply = gpu.pointwise.apply
    with pytest.raises(ValueError, match='out must have the shape of x'):
        apply(x, None, None, None, torch.empty(2, 4, 6, 5))
    with pytest.raises(ValueError, match='as NHWC or as NCHW'):
        apply(x.transpose(1, 2), None, None, None, x.transpose(1, 2))
    for wrong in (row.double(), torch.empty(5), torch.empty(12)[::2], torch.empty(3, 6)):
        with pytest.raises(ValueError, match=r'scale must be \(2, 6\) or \(6,\) in float32'):
            apply(x, wrong, None, None, x)


# ------------------------------------------------------------------------------------------ coefficients


def given_coefficients(n: int, c: int) -> Iterator[tuple[str, tuple]]:
    r = max(1, c // 4)
    first, second = image((n, 2, c), 1).unbind(1)
    multiplier, pooled, squares = image((n, c), 2), image((n, c), 3), image((n, 2, c), 4).square().unbind(1)[1]
    squares[:, 0] = 0.0
    mean, var, weight, bias = image((c,), 5), image((c,), 6).square() + 0.1, image((c,), 7), image((c,), 8)
    down, up = (image((r, c), 9) / c**0.5, image((r,), 10)), (image((c, r), 11), image((c,), 12))
    norm = (mean, var, 1e-3, weight, bias)
    e = coefficients.excite(multiplier, *norm, down, up)
    yield from (('affine', (*norm, m)) for m in (None, multiplier))
    yield 'excite', (multiplier, *norm, down, up)
    yield 'excite_grads', ((first, second), e, weight, bias, down[0], up[0])
    yield 'gates', (multiplier, 7, down, up)
    yield 'grn', (squares, weight)
    yield 'grn_grads', (first, coefficients.grn(squares, weight)[0], weight)
    for m, p, share, batch in itertools.product(
        (None, multiplier), (None, pooled), (None, lambda t: 2 * t), (False, True)
    ):
        moments = (mean, e.inverse, multiplier)
        yield 'normalize_grads', ((first, second), weight, bias, *moments, m, p, 12, 12 * n, share, batch)


@pytest.mark.parametrize(('n', 'c'), [(1, 5), (2, 130), pytest.param(65, 34, marks=pytest.mark.slow)])
def test_coefficients(gpu: SimpleNamespace, n: int, c: int) -> None:
    """More images, and more channels, than a program takes at a time."""
    for name, given in given_coefficients(n, c):
        mine = getattr(gpu.coefficients, name)(*given)
        assert compare(mine, getattr(coefficients, name)(*wide(given))) < 1e-6, name


def test_gates_of_weights_in_16_bits(gpu: SimpleNamespace) -> None:
    (sums, pixels, down, up) = next(given for name, given in given_coefficients(3, 37) if name == 'gates')
    down, up = ([t.bfloat16() for t in pair] for pair in (down, up))
    assert compare(gpu.coefficients.gates(sums, pixels, down, up), coefficients.gates(sums, pixels, down, up)) < 1e-6


# ------------------------------------------------------------------------------------------ self-check


def test_self_check(gpu: SimpleNamespace) -> None:
    assert self_check('triton', gpu.backend, torch.device('cpu'), 'pointwise') == ''


@pytest.mark.slow
@pytest.mark.parametrize('name', ['apply', 'grad', 'sums', 'moments', *coefficients.__all__[1:]])
def test_self_check_finds(gpu: SimpleNamespace, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(gpu.backend, name)

    def wrong(*args: Any, **options: Any) -> Any:
        results = right(*args, **options)
        for tensor in [args[-2]] if results is None else tree_leaves(results):
            if tensor is not None:
                tensor.mul_(1.05)
        return results

    monkeypatch.setattr(gpu.backend, name, wrong)
    assert f'their {name} is off by ' in self_check('triton', gpu.backend, torch.device('cpu'), 'pointwise')
