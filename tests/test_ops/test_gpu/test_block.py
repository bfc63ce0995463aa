"""The Dilated Reparam Block by the kernels for GPUs, in Triton's interpreter, against float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mmunireplknet.ops import merge_branches

from ...procedural import image, relative_error
from ..reparam_cases import COLUMNS, Case, Inputs, differentiate, error, inputs_of, per_branch
from .launches import Launch, launches_of
from .test_statistics import operands

OPS = torch.ops.mmuni
# Relative L2 errors. Half precision rounds y, the gradient of x and, before the sums for the weights, those of the
# branches; statistics and the other sums are as exact as in single precision. A gamma here is that of a single channel.
SINGLE = {'y': 1e-6, 'mean': 1e-6, 'var': 1e-6, 'x': 1e-6, 'weights': 5e-6, 'gammas': 5e-6, 'betas': 1e-6}
TOLERANCE = {torch.float32: SINGLE, torch.float16: {**SINGLE, 'y': 5e-4, 'x': 5e-4, 'weights': 1e-3}}
SLOW = [
    Case('13', (9, 14), 1, 1),
    Case('13', (5, 11), 1, 1, 'channels_last', torch.float16),
    Case('13', (2, 3), 1, 2, dtype=torch.float16),
    Case('17', (20, 14), 1, 1),
    Case('7', (4, 37), 1, 1, 'channels_last', grad_layout='channels_last'),
    Case('one tap', (1, 1), 1, 6),
    Case('one tap', (7, 1), 1, 2, dtype=torch.float16),
    Case('twelve', (6, 8), 1, 1),
]


def rounded(case: Case) -> Inputs:
    """The weights as the kernels see them."""
    inputs = inputs_of(case)
    return inputs._replace(weights=[w.to(case.dtype).float() for w in inputs.weights])


def compute(gpu: SimpleNamespace, inputs: Inputs) -> dict[str, list[Tensor]]:
    """Everything, in the columns of ``differentiate``."""
    (x, weight, gamma, beta), static = operands(inputs)
    y, mean, var = gpu.block.block_forward(x, weight, gamma, beta, *static)
    count = float(x.numel() // x.shape[1])
    grads = gpu.block.block_backward(inputs.grad, x, weight, gamma, mean, var, None, None, count, True, *static)
    assert [t.dtype for t in (y, mean, var, *grads)] == [x.dtype, *[torch.float32] * 2, x.dtype, *[torch.float32] * 3]
    assert [t.stride() for t in (y, grads[0])] == [torch.empty_like(x).stride()] * 2
    sizes = [w.numel() for w in inputs.weights]
    weights = [g.view_as(w) for g, w in zip(grads[1].split(sizes), inputs.weights, strict=True)]
    columns = [y], [*mean], [*var], [grads[0]], weights, [*grads[2]], [grads[3]] * len(sizes)
    return dict(zip(COLUMNS, columns, strict=True))


def mistakes(gpu: SimpleNamespace, inputs: Inputs) -> list[str]:
    """What is out of tolerance."""
    actual, limits = compute(gpu, inputs), TOLERANCE[inputs.x.dtype]
    exact = inputs.double()
    values = differentiate(per_branch, exact)
    constants = torch.stack(values['mean']), torch.stack(values['var'])
    terms = differentiate(lambda *arguments: per_branch(*arguments, statistics=constants), exact)
    # A mean is to be compared with the deviation.
    values['mean'], actual['mean'] = (
        [(m - o) / v.sqrt().clamp_min(1e-9) + 1 for m, o, v in zip(side, constants[0], constants[1], strict=True)]
        for side in (values['mean'], actual['mean'])
    )
    found = {n: max(map(error, actual[n], values[n], terms[n] if n != 'mean' else values[n])) for n in COLUMNS}
    return [f'{name} is off by {e:.1e}' for name, e in found.items() if not e < limits[name]]


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_a_small_block(gpu: SimpleNamespace, dtype: torch.dtype) -> None:
    """The rest of the cases is slow."""
    assert mistakes(gpu, rounded(Case('one branch', (3, 5), 1, 2, dtype=dtype))) == []


@pytest.mark.parametrize('layout', ['half the channels', 'permuted'])
def test_layouts_that_are_neither(gpu: SimpleNamespace, layout: str) -> None:
    """What compiled code around the operators relies on: the strides that they are said to return."""
    assert mistakes(gpu, rounded(Case('one branch', (3, 4), 2, 2, layout))) == []


def test_results_share_no_memory(gpu: SimpleNamespace) -> None:
    """Which operators must not, and ``torch.library.opcheck`` says so."""
    inputs = inputs_of(Case('one branch', (3, 4), 1, 1))
    (x, weight, gamma, beta), static = operands(inputs)
    y, mean, var = gpu.block.block_forward(x, weight, gamma, beta, *static)
    grads = gpu.block.block_backward(inputs.grad, x, weight, gamma, mean, var, None, None, 12.0, True, *static)
    results = (y, mean, var, *grads)
    assert len({t.untyped_storage().data_ptr() for t in results}) == len(results)


@pytest.mark.slow
@pytest.mark.parametrize('case', SLOW, ids=str)
def test_against_float64(gpu: SimpleNamespace, case: Case) -> None:
    assert mistakes(gpu, rounded(case)) == []


@pytest.mark.slow
def test_a_kernel_of_31(gpu: SimpleNamespace) -> None:
    """The largest, with a wider window and Gram matrices in several kernels."""
    inputs = inputs_of(Case('one branch', (6, 33), 1, 1))
    weights = [image((1, 1, 31, 31), 5) / 31, image((1, 1, 5, 5), 6)]
    ones = [torch.ones(1), torch.full((1,), 0.5)]
    inputs = inputs._replace(weights=weights, dilations=[1, 7], gammas=ones, betas=ones, eps=[1e-5, 1e-3])
    assert mistakes(gpu, inputs) == []


@pytest.mark.slow
def test_some_channels_at_a_time(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which share the memory for the outputs of the branches: the same bits."""
    inputs = inputs_of(Case('one tap', (20, 5), 3, 2))
    whole = compute(gpu, inputs)
    monkeypatch.setattr(gpu.block, '_SCRATCH', 2 * 3 * 2 * 20 * 8 * 4)  # of two channels
    parts = compute(gpu, inputs)
    assert all(torch.equal(a, b) for name in COLUMNS for a, b in zip(parts[name], whole[name], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_many_values(gpu: SimpleNamespace, dtype: torch.dtype) -> None:
    """So many that outputs of branches are rounded where the map is."""
    case = Case('one tap', (33, 37), 1, 1, dtype=dtype)
    assert math.prod(case.size) > gpu.block._FEW
    assert mistakes(gpu, rounded(case)) == []


@pytest.mark.slow
def test_in_two_parts(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 where TF32 is not allowed."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    assert mistakes(gpu, inputs_of(Case('9', (11, 19), 1, 1))) == []


@pytest.mark.slow
def test_many_tiles_of_a_program(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.statistics, '_RESIDENT', 1)
    assert mistakes(gpu, inputs_of(Case('one tap', (35, 20), 1, 2))) == []


def test_a_constant_gradient(gpu: SimpleNamespace) -> None:
    """That of a sum: all gradients but those of beta are zero, as the normalized map has a constant sum."""
    inputs = inputs_of(Case('one branch', (5, 7), 1, 1))
    grads = compute(gpu, inputs._replace(grad=torch.ones(()).expand_as(inputs.x)))
    assert torch.equal(grads['betas'][0], torch.tensor([35.0]))
    assert grads['x'][0].abs().max() < 1e-5
    assert grads['weights'][0].abs().max() < 35e-6


def test_without_the_gradient_of_x(gpu: SimpleNamespace) -> None:
    inputs = inputs_of(Case('one branch', (3, 4), 1, 1))
    (x, weight, gamma, _), static = operands(inputs)
    mean, var = gpu.block.block_stats(x, weight, 1, *static)
    some, all_ = (
        gpu.block.block_backward(inputs.grad, x, weight, gamma, mean, var, None, None, 12.0, needs_x, *static)
        for needs_x in (False, True)
    )
    assert some[0].numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(some[1:], all_[1:], strict=True))


@pytest.mark.slow
def test_two_processes(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics and sums of each half of a batch, put together as the operators do it, give those of the whole."""
    inputs = inputs_of(Case('one tap', (4, 9), 2, 3))
    (x, weight, gamma, beta), static = operands(inputs)
    exact = [t.double() for t in (inputs.grad, x, weight, gamma, beta)]
    y, mean, var = OPS.dilated_reparam_forward(*exact[1:], *static, 'torch')
    count = float(x.numel() // x.shape[1])
    whole = OPS.dilated_reparam_backward(*exact[:4], mean, var, None, None, count, True, *static, 'torch')

    parts = (slice(0, 1), slice(1, 3))
    moments = [gpu.block.block_stats(x[part], weight, 3, *static) for part in parts]
    packed = [torch.cat([m, v + m**2]).double() * 36 * n for (m, v), n in zip(moments, (1, 2), strict=True)]
    total = sum(packed) / count
    mean, var = total[:3].float(), (total[3:] - total[:3] ** 2).float()
    scales = gamma * torch.rsqrt(var + var.new_tensor(static[2])[:, None])
    merged = merge_branches(inputs.weights, inputs.dilations, scales)
    bias = beta - (scales * mean).sum(0)
    ys = [gpu.convolution.forward(x[part], merged, bias, 1) for part in parts]
    assert relative_error(torch.cat(ys), y) < 1e-6

    arguments = [(inputs.grad[part], x[part], weight, gamma, mean, var) for part in parts]
    sums = [gpu.block.block_sums(*a, *static) for a in arguments]
    shared = [sum(side) for side in zip(*sums, strict=True)]
    grads = [gpu.block.block_backward(*a, *shared, count, True, *static) for a in arguments]
    assert relative_error(torch.cat([g[0] for g in grads]), whole[0]) < 1e-6
    assert relative_error(sum(g[1] for g in grads), whole[1]) < 2e-6
    for grad in grads:
        assert all(torch.equal(a, b) and a is not b for a, b in zip(grad[2:], shared, strict=True))
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(shared, whole[2:], strict=True))


# ------------------------------------------------------------------------------------------ what is launched


def launches(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.bfloat16) -> tuple[list[Launch], ...]:
    """Of the published block, forward and backward, on meta tensors."""
    from mmunireplknet.ops.gpu import block

    static = (13, 5, 7, 3, 3, 3), (1, 1, 2, 3, 4, 5), (1e-5,) * 6
    n, c, h, w = shape
    x, weight, gamma = (torch.empty(s, device='meta') for s in (shape, c * sum(k * k for k in static[0]), (6, c)))
    x = x.to(dtype)
    forward = launches_of(block.block_forward, x, weight, gamma, gamma[0], *static)
    arguments = x, x, weight, gamma, gamma, gamma, None, None, float(n * h * w), True
    return forward, launches_of(block.block_backward, *arguments, *static)


def passes(launch: Launch, shape: tuple[int, ...]) -> int:
    """How many maps a kernel reads or writes."""
    return sum(isinstance(t, torch.Tensor) and t.shape == shape for t in launch.arguments().values())


@pytest.mark.parametrize(('shape', 'parts'), [((16, 320, 32, 32), 2), ((2, 320, 52, 84), 1), ((2, 160, 100, 168), 2)])
def test_passes_over_the_map(shape: tuple[int, int, int, int], parts: int) -> None:
    """Three forward; five backward, of which one writes, for some channels at a time."""
    forward, backward = launches(shape)
    assert [(launch.name, passes(launch, shape)) for launch in forward] == [
        ('_lay_out_kernel', 0),
        ('_moments_kernel', 1),
        ('_merge_kernel', 0),
        ('_expand', 0),
        ('_convolve', 2),
    ]
    assert [(launch.name, passes(launch, shape)) for launch in backward] == [
        ('_lay_out_kernel', 0),
        ('_lay_out_kernel', 0),
        *parts
        * [('_outputs_kernel', 2), ('_collect_kernel', 0), ('_weight_grad_kernel', 2), ('_input_grad_kernel', 1)],
    ]
    channels = [(launch.arguments()['FIRST'], launch.arguments()['CHANNELS']) for launch in backward[2::4]]
    assert [first for first, _ in channels] == [sum(count for _, count in channels[:i]) for i in range(parts)]
    assert sum(count for _, count in channels) == shape[1]
    scratch = [launch.arguments()['held_ptr'] for launch in backward[2:] if 'held_ptr' in launch.arguments()]
    assert all(held is scratch[0] for held in scratch)
    assert scratch[0].numel() * 2 <= 2**25


def test_memory_of_a_large_map() -> None:
    """One channel at least is taken at a time, however large."""
    _, backward = launches((1, 2, 2048, 2048))
    scratch = [launch.arguments()['held_ptr'].shape for launch in backward if 'held_ptr' in launch.arguments()]
    assert set(scratch) == {(1, 6, 1, 2048, 2048)}


def test_what_is_supported() -> None:
    from mmunireplknet.ops.gpu.block import block_supports

    x = torch.empty(2, 3, 8, 8, device='meta')
    assert block_supports(x, (13, 5, 7, 3, 3, 3), (1, 1, 2, 3, 4, 5)) == ''
    assert 'does not fit into the 7x7' in block_supports(x, (7, 5), (1, 2))
    assert 'more than 31' in block_supports(x, (33,), (1,))
    assert 'float64' in block_supports(x.double(), (7, 5), (1, 1))
    assert block_supports(x, (31, 29, 27), (1, 1, 1)) == ''
