"""Statistics of the branches from one pass over the map, in Triton's interpreter."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ...procedural import relative_error
from ..reparam_cases import Case, Inputs, inputs_of

OPS = torch.ops.mmuni


def operands(inputs: Inputs) -> tuple[tuple[Tensor, ...], tuple]:
    """x, weight, gamma and beta, and the sizes of the branches, as the operators take them."""
    weight = torch.cat([w.flatten() for w in inputs.weights])
    tensors = inputs.x, weight, torch.stack(inputs.gammas), torch.stack(inputs.betas).sum(0)
    return tensors, ([w.shape[-1] for w in inputs.weights], inputs.dilations, inputs.eps)


def statistics(gpu: SimpleNamespace, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and variance by the kernels, and by the operator in float64."""
    (x, weight, gamma, _), static = operands(inputs)
    mine = gpu.block.block_stats(x, weight, len(gamma), *static)
    expected = OPS.dilated_reparam_stats(x.double(), weight.double(), len(gamma), *static, 'torch')
    return *mine, *expected


@pytest.mark.parametrize(
    'case',
    [
        Case('one branch', (5, 9), 2, 1),
        Case('7', (3, 5), 1, 3),
        Case('one tap', (1, 20), 1, 1, 'channels_last'),
        Case('one tap', (2, 3), 2, 1, dtype=torch.float16),
    ],
    ids=str,
)
def test_against_float64(gpu: SimpleNamespace, case: Case) -> None:
    inputs = inputs_of(case)
    inputs = inputs._replace(weights=[w.to(case.dtype).float() for w in inputs.weights])  # as the kernels round them
    mean, var, expected_mean, expected_var = statistics(gpu, inputs)
    assert mean.dtype == var.dtype == torch.float32
    assert ((mean - expected_mean).abs() < 1e-6 * (expected_mean.abs() + expected_var.sqrt())).all()
    assert relative_error(var, expected_var) < 1e-6


@pytest.mark.parametrize('offset', [100.0, -1000.0])
def test_a_mean_far_from_zero(gpu: SimpleNamespace, offset: float) -> None:
    """E[z^2] - E[z]^2 in float32 would be off by 0.1 % at 100 and by more than the whole variance at 1000.

    The single tap of a 1x1 branch leaves the mean of the map as it is; over the edge of the map nothing is summed.
    """
    generator = torch.Generator().manual_seed(0)
    x = offset + torch.randn(2, 1, 9, 21, generator=generator)
    inputs = Inputs(x, [torch.rand(1, 1, 3, 3), torch.ones(1, 1, 1, 1)], [1, 1], [torch.ones(1)] * 2, [], [1e-5] * 2, x)
    inputs = inputs._replace(betas=[torch.zeros(1)] * 2)
    mean, var, expected_mean, expected_var = statistics(gpu, inputs)
    naive = x.square().mean() - x.mean().square()
    assert abs(naive / expected_var[1] - 1) > 1e-5  # the case is one where it cancels
    assert relative_error(var, expected_var) < 2e-6
    assert relative_error(mean, expected_mean) < 1e-6


@pytest.mark.slow
def test_many_tiles_of_a_program(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the tiles are divided among programs changes nothing but the rounding."""
    inputs = inputs_of(Case('one branch', (35, 20), 1, 2))
    results = []
    for programs in (1, 3, 1024):
        monkeypatch.setattr(gpu.statistics, '_RESIDENT', programs)
        results.append(statistics(gpu, inputs))
    for mean, var, expected_mean, expected_var in results:
        assert relative_error(mean, expected_mean) < 1e-5
        assert relative_error(var, expected_var) < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(statistics(gpu, inputs), results[-1], strict=True))


def test_one_value(gpu: SimpleNamespace) -> None:
    """Of a process that has a single pixel: its variance is zero, and others add theirs."""
    mean, var, expected_mean, _ = statistics(gpu, inputs_of(Case('one tap', (1, 1), 2, 1)))
    assert relative_error(mean, expected_mean) < 1e-6
    assert not var.any()


@pytest.mark.parametrize(('rows', 'down'), [(2, 2), (4, 2), (2, 1), (4, 1)])
@pytest.mark.parametrize('members', [None, (0,), (2,), (5,), (1, 3, 4)])
def test_the_products_of_a_plan(gpu: SimpleNamespace, members: tuple[int, ...] | None, rows: int, down: int) -> None:
    """Each row of a patch meets each row of its kernels once, in the row of the window that lies under it."""
    sizes, dilations = (13, 5, 7, 3, 3, 3), (1, 1, 2, 3, 4, 5)
    plan = gpu.branches.plan_of(sizes, dilations, members)
    found = []
    for first, b, place, low, high in plan.products(rows, down):
        for distance in range(low, high + 1, plan.dilations[b]):
            for py in range(rows):
                if 0 <= distance + py < down:
                    row = place + (distance - low) // plan.dilations[b]
                    found.append((b, py, first + distance + py - plan.reach - py, row))
    expected = [
        (i, py, (ky - sizes[b] // 2) * dilations[b], sum(sizes[:b]) + ky)
        for i, b in enumerate(range(6) if members is None else members)
        for py in range(rows)
        for ky in range(sizes[b])
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize('flipped', [False, True])
def test_the_rows_laid_out(gpu: SimpleNamespace, flipped: bool) -> None:
    plan = gpu.branches.plan_of((7, 3, 1), (1, 3, 1))
    weights = [torch.randn(2, 1, k, k, generator=torch.Generator().manual_seed(k)) for k in plan.kernels]
    table = gpu.branches.lay_out(torch.cat([w.flatten() for w in weights]), 2, plan, torch.float32, flipped)
    row = 0
    for weight, k, dilation in zip(weights, plan.kernels, plan.dilations, strict=True):
        for taps in (weight.flip(2, 3) if flipped else weight)[:, 0].unbind(1):
            expected = torch.zeros(2, plan.depth, 16)
            for n in range(16):
                for kx in range(k):
                    expected[:, plan.lead + n + (kx - k // 2) * dilation, n] = taps[:, kx]
            assert torch.equal(table[:, row], expected)
            row += 1
    assert row == table.shape[1]
