"""The checks for a GPU, by what the CPU has: they run, and they find what is wrong."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mmunireplknet.ops import reference

from . import device_cases
from .fake_gpu import FakeGPU, fake_gpu

CHECKS: dict[str, Callable[[str, str], Any]] = {
    'sweep': lambda device, backend: device_cases.sweep(device, backend, (5,), 3),
    'block_sweep': lambda device, backend: device_cases.block_sweep(device, backend, ['7'], [(9, 10)]),
    'autocast': device_cases.check_autocast,
    'determinism': device_cases.check_determinism,
    'block': device_cases.check_block,
}
SLOW: dict[str, Callable[[str, str], Any]] = {
    'operators': device_cases.check_operators,
    'gradients': device_cases.check_gradients,
    'compiled': lambda device, backend: device_cases.check_compiled(device, backend, 'aot_eager'),
    'large': device_cases.large,
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    with fake_gpu(monkeypatch) as gpu:
        monkeypatch.setattr('mmunireplknet.ops.backends.suits_cpp', lambda x: False)
        yield gpu


@pytest.mark.parametrize('backend', ['torch', 'triton', 'auto'])
@pytest.mark.parametrize('check', [*CHECKS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_checks_pass(gpu: FakeGPU, check: str, backend: str) -> None:
    {**CHECKS, **SLOW}[check]('cpu', backend)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('kwargs', [{}, dict(deploy=True), dict(channels_last=True)])
def test_models_pass(gpu: FakeGPU, training: bool, kwargs: dict) -> None:
    device_cases.check_model('cpu', 1e-4, training, **kwargs)


@pytest.mark.parametrize('check', ['sweep', 'autocast', 'block_sweep', 'block'])
def test_checks_find_a_wrong_weight_gradient(gpu: FakeGPU, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.weight_grad
    monkeypatch.setattr(reference, 'weight_grad', lambda *args: right(*args) * 1.02)
    with pytest.raises(AssertionError):
        CHECKS[check]('cpu', 'torch')


def test_checks_find_what_differs_from_call_to_call(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    right, counter = reference.weight_grad, iter(range(99))
    monkeypatch.setattr(reference, 'weight_grad', lambda *args: right(*args) * (1 + 1e-6 * next(counter)))
    with pytest.raises(AssertionError):
        device_cases.check_determinism('cpu', 'torch')


def test_models_are_told_apart(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu.backends['cuda'].forward
    monkeypatch.setattr(gpu.backends['cuda'], 'forward', lambda *args: right(*args) * 1.01)
    monkeypatch.setenv('MMUNI_DW_BACKEND', 'cuda')
    with pytest.raises(AssertionError):
        device_cases.check_model('cpu', 1e-4, False)
