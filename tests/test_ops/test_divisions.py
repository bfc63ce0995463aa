"""Divisions of a backend's work: ``auto`` times them beside the other backends, on a GPU that is made of the CPU."""

import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mmunireplknet.ops import (
    backends,
    depthwise_conv2d,
    depthwise_conv2d_pooled,
    dilated_reparam_conv,
    fastest,
    reference,
)

from ..procedural import image, relative_error
from .cases import plain
from .fake_gpu import DividedBackend, FakeGPU
from .reparam_cases import Case, differentiate, inputs_of

X, WEIGHT = image((2, 6, 20, 21)), image((6, 1, 13, 13), 1)


@pytest.fixture
def triton(gpu: FakeGPU) -> DividedBackend:
    gpu.backends['triton'] = triton = DividedBackend()
    return triton


def convolve(weight: Tensor = WEIGHT, backend: str = 'auto') -> None:
    """With a check of the result."""
    y = depthwise_conv2d(X, weight, None, 1, backend)
    assert relative_error(y, plain(X, weight, None, 1)) < 1e-6


def known(function: str = 'forward') -> tuple[str | None, str]:
    """What was the fastest of all, and the division with which triton was."""
    kind = fastest.kind_of(function, X, 13, 1)
    return fastest.remembered(kind), fastest.division(kind, 'triton')


@pytest.mark.parametrize(
    ('milliseconds', 'taken'),
    [
        ({'triton 16': 0.5}, ('triton 16', '16')),
        ({'triton 64': 0.5}, ('triton 64', '64')),
        ({'triton 16': 1.5}, ('cuda', '16')),
        ({'torch': 0.5}, ('torch', '64')),
    ],
    ids=str,
)
def test_divisions_are_candidates(
    gpu: FakeGPU, triton: DividedBackend, milliseconds: dict[str, float], taken: tuple[str, str]
) -> None:
    gpu.milliseconds |= milliseconds
    convolve()
    assert sorted(gpu.timed) == ['cuda', 'torch', 'triton 16', 'triton 64']
    assert known() == taken
    gpu.calls()
    convolve()
    assert len(gpu.timed) == 4
    assert backends.choose('auto', X, 13) == taken[0].partition(' ')[0]
    assert gpu.calls()['triton'] == ['forward'] * taken[0].startswith('triton')


@pytest.mark.parametrize('function', ['input_grad', 'weight_grad', 'pooled'])
def test_of_every_function(gpu: FakeGPU, triton: DividedBackend, function: str) -> None:
    gpu.milliseconds['triton 16'] = 0.5
    ops, args = torch.ops.mmuni, (1, 'auto')
    if function == 'pooled':
        depthwise_conv2d_pooled(X, WEIGHT)
    elif function == 'input_grad':
        ops.depthwise_conv2d_input_grad(X, WEIGHT, *args)
    else:
        ops.depthwise_conv2d_weight_grad(X, X, 13, *args)
    assert known(function) == ('triton 16', '16')
    assert sorted(gpu.timed) == ['cuda', 'torch', 'triton 16', 'triton 64']


@pytest.mark.parametrize('how', ['variable', 'deterministic'])
def test_where_the_choice_is_fixed_the_rule_decides(
    gpu: FakeGPU, triton: DividedBackend, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was timed before."""
    gpu.milliseconds['triton 16'] = 0.5
    convolve()
    assert known() == ('triton 16', '16')
    if how == 'variable':
        monkeypatch.setenv('MMUNI_DW_TUNE', '0')
    else:
        torch.use_deterministic_algorithms(True)
    assert known() == (None, '')
    convolve()
    convolve(backend='triton')
    assert len(gpu.timed) == 4


def test_a_division_that_fails_leaves_the_others(gpu: FakeGPU, triton: DividedBackend) -> None:
    """Without a word: nobody misses it."""
    gpu.milliseconds['triton 16'] = 0.5
    triton.failing = {'64'}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        convolve()
        convolve()
    assert (known(), len(gpu.timed)) == (('triton 16', '16'), 4)


def test_a_backend_all_of_whose_divisions_fail_is_given_up(gpu: FakeGPU, triton: DividedBackend) -> None:
    triton.failing = {'16', '64'}
    with pytest.warns(UserWarning, match='the triton kernels fail in the forward of .*: out of registers') as caught:
        convolve()
    assert len(caught) == 1
    convolve()
    assert (known()[0], len(gpu.timed)) == ('cuda', 4)
    assert fastest.is_failed(fastest.kind_of('forward', X, 13, 1), 'triton')


@pytest.mark.parametrize('function', ['forward', 'input_grad', 'weight_grad', 'pooled'])
def test_a_division_that_is_wrong_is_not_taken(gpu: FakeGPU, triton: DividedBackend, function: str) -> None:
    gpu.milliseconds |= {'triton 16': 0.1, 'triton 64': 0.5}
    triton.wrong = {'16'}
    grad = image(X.shape, 2)

    def do(module: ModuleType) -> object:
        if function == 'weight_grad':
            return module.weight_grad(X, grad, 13, 1)
        return module.forward(X, WEIGHT, None, 1, function == 'input_grad')

    if function == 'pooled':
        depthwise_conv2d_pooled(X, WEIGHT)
    else:
        backends.compute(do, 'auto', function, X, 13, 1)
    assert known(function) == ('triton 64', '64')


def test_a_backend_all_of_whose_divisions_are_wrong_is_given_up(gpu: FakeGPU, triton: DividedBackend) -> None:
    gpu.milliseconds |= {'triton 16': 0.1, 'triton 64': 0.1}
    triton.wrong = {'16', '64'}
    with pytest.warns(
        UserWarning, match=r'triton kernels fail in the forward of .*differs from that of torch by 0\.1 '
    ):
        convolve()
    convolve()
    assert known()[0] == 'cuda'


@pytest.mark.parametrize('value', [0.0, float('nan'), float('inf')])
def test_maps_on_which_nothing_can_be_compared(gpu: FakeGPU, triton: DividedBackend, value: float) -> None:
    gpu.milliseconds['triton 16'] = 0.5
    depthwise_conv2d(torch.full_like(X, value), WEIGHT)
    assert known() == ('triton 16', '16')


def test_what_torch_loses_in_float16_is_no_error(
    gpu: FakeGPU, triton: DividedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU torch rounds the gradient of a weight to the dtype of the maps, where much of a small one is lost."""
    gpu.milliseconds['triton 16'] = 0.5
    exact = triton.weight_grad = reference.weight_grad  # the triton kernels write float32

    def rounded(*args: Any) -> Tensor:
        return exact(*args).half().float()

    monkeypatch.setattr(reference, 'weight_grad', rounded)
    x, grad = X.half(), (image(X.shape, 2) * 1e-8).half()
    assert relative_error(rounded(x, grad, 13, 1), exact(x, grad, 13, 1)) > 0.05
    result = backends.compute(lambda module: module.weight_grad(x, grad, 13, 1), 'auto', 'weight_grad', x, 13, 1)
    assert fastest.remembered(fastest.kind_of('weight_grad', x, 13, 1)) == 'triton 16'
    assert relative_error(result, exact(x, grad, 13, 1)) < 1e-3


def test_torch_may_be_unable_to_compute_what_others_can(
    gpu: FakeGPU, triton: DividedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: object) -> Tensor:
        raise RuntimeError('no such kernel')

    with monkeypatch.context() as patch:
        patch.setattr(reference, 'forward', forward)
        triton.forward = lambda x, *_: x.clone()
        gpu.backends['cuda'].reason = 'not today'
        assert torch.equal(depthwise_conv2d(X, WEIGHT), X)
    assert known()[0] == 'triton 64'


def test_a_backend_that_is_asked_for_is_divided_as_well(
    gpu: FakeGPU, triton: DividedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.milliseconds['triton 16'] = 0.5
    convolve(backend='triton')
    assert (gpu.timed, known()) == (['triton 64', 'triton 16'], (None, '16'))
    monkeypatch.setenv('MMUNI_DW_BACKEND', 'triton')
    convolve()
    assert len(gpu.timed) == 2
    monkeypatch.delenv('MMUNI_DW_BACKEND')
    convolve()  # the rest
    assert (gpu.timed[2:], known()[0]) == (['cuda', 'torch'], 'triton 16')
    triton.failing = {'16', '64'}
    with pytest.raises(RuntimeError, match='out of registers'):
        convolve(WEIGHT[..., 3:10, 3:10], 'triton')


def test_nothing_is_run_on_tensors_that_are_none(gpu: FakeGPU, triton: DividedBackend) -> None:
    x = FakeTensorMode().from_tensor(X)
    for backend in ('auto', 'triton'):
        backends.choose(backend, x, 13, 1, 'forward', lambda module: pytest.fail('it was run'))
    assert gpu.timed == []


def test_divisions_are_kept(
    gpu: FakeGPU, triton: DividedBackend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA H200')
    monkeypatch.setenv('MMUNI_DW_TUNE', str(tmp_path / 'tune.jsonl'))
    gpu.milliseconds['triton 16'] = 0.5
    convolve()
    times = json.loads((tmp_path / 'tune.jsonl').read_text())['ms']
    assert times == {'cuda': 1.0, 'triton 64': 2.0, 'triton 16': 0.5, 'torch': 3.0}
    fastest.clear()
    assert known() == (None, '')
    convolve()
    assert (len(gpu.timed), known()) == (4, ('triton 16', '16'))


def test_what_is_timed_as_a_part_needs_no_other_division(gpu: FakeGPU, triton: DividedBackend) -> None:
    """Each takes seconds to compile; the rest is timed once it is used by itself."""
    kind = fastest.kind_of('block_forward', X, 13, 6)
    gpu.milliseconds['triton 16'] = 0.5
    fastest.find(kind, {'branches': convolve}, torch.device('cpu'))
    assert gpu.timed == ['branches', 'cuda', 'triton 64', 'torch']
    assert known() == (None, '64')
    convolve()
    assert (gpu.timed[4:], known()) == (['triton 16'], ('triton 16', '16'))


def test_what_was_chosen_asks_the_driver_for_nothing(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question costs as much as a launch, at every convolution and block."""
    monkeypatch.setattr(backends, 'ON_GPU', ('triton',))
    inputs = inputs_of(Case('7', (9, 10), 4))
    for _ in range(2):
        differentiate(dilated_reparam_conv, inputs)
        convolve()
        monkeypatch.setattr(fastest, 'is_capturing', lambda *_: pytest.fail('it was asked'))
