"""Whether the Triton kernels of the pointwise layers are taken, on machines that are made up."""

import importlib.util
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmunireplknet.ops import backends, fastest, pointwise_kernels

DEVICE = torch.device('cuda', 0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """One with an H200, whose attributes the tests change; ``checks`` are the self-checks made."""
    found = SimpleNamespace(checks=[], problems={}, capability=(9, 0))

    def check(name: str, backend: Any, device: torch.device, part: str = '') -> str:
        found.checks.append((name, device.index, part))
        problem = found.problems.get(part, '')
        if isinstance(problem, Exception):
            raise problem
        return problem

    for function in (backends._why_not_installed, backends._why_not_loaded):
        function.cache_clear()
    monkeypatch.setattr(backends, 'module_of', lambda name: SimpleNamespace(why_not=lambda: ''))
    monkeypatch.setattr(backends, 'self_check', check)
    monkeypatch.setattr(backends, '_checked', {})
    monkeypatch.setattr(pointwise_kernels, '_failures', [])
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
    monkeypatch.setattr(torch.version, 'hip', None)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: found.capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA H200')
    monkeypatch.setattr(fastest, 'is_capturing', lambda device=None: False)
    monkeypatch.setattr(backends, 'is_on_gpu', lambda x: True)
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    yield found
    for function in (backends._why_not_installed, backends._why_not_loaded):
        function.cache_clear()


def test_they_are_checked_once_for_each_gpu(machine: SimpleNamespace) -> None:
    for index in (0, 1, 0, 1):
        assert pointwise_kernels.why_not(torch.device('cuda', index)) == ''
    assert machine.checks == [('triton', 0, 'pointwise'), ('triton', 1, 'pointwise')]
    x = torch.empty(1, 2, 3, 3)
    assert pointwise_kernels.suits(x)
    assert not pointwise_kernels.suits(x.double())
    assert len(machine.checks) == 2


def test_convolutions_that_fail_leave_them_and_the_other_way_around(machine: SimpleNamespace) -> None:
    machine.problems = {'convolutions': 'their forward is off by 1.0e+00.'}
    with pytest.warns(UserWarning, match='the triton kernels are not used'):
        assert backends.why_not('triton', DEVICE)
    assert pointwise_kernels.why_not(DEVICE) == ''
    other = torch.device('cuda', 1)
    machine.problems = {'pointwise': 'their apply is off by 1.0e+00.'}
    with pytest.warns(
        UserWarning, match='the triton kernels of the pointwise layers are not used: their apply'
    ) as all_:
        assert pointwise_kernels.why_not(other) == pointwise_kernels.why_not(other)
    assert len(all_) == 1
    assert backends.why_not('triton', other) == ''


def test_a_check_that_raises(machine: SimpleNamespace) -> None:
    machine.problems = {'pointwise': RuntimeError('Failed to find C compiler')}
    with pytest.warns(UserWarning, match='self-check on NVIDIA H200 failed: RuntimeError: Failed to find C compiler'):
        assert not pointwise_kernels.suits(torch.empty(1, 2, 3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert not pointwise_kernels.suits(torch.empty(1, 2, 3, 3))


def test_want_of_memory_is_no_reason_for_long(machine: SimpleNamespace) -> None:
    machine.problems = {'pointwise': torch.cuda.OutOfMemoryError('CUDA out of memory')}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert not pointwise_kernels.suits(torch.empty(1, 2, 3, 3))
        machine.problems = {}
        assert pointwise_kernels.suits(torch.empty(1, 2, 3, 3))


def test_an_old_gpu(machine: SimpleNamespace) -> None:
    machine.capability = (7, 5)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert 'the kernels take 8.0 (Ampere) or newer' in pointwise_kernels.why_not(DEVICE)
    assert machine.checks == []


@pytest.mark.parametrize('missing', ['triton', 'gpu', 'nvidia'])
def test_a_machine_without(machine: SimpleNamespace, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == 'triton':
        monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    elif missing == 'gpu':
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    else:
        monkeypatch.setattr(torch.version, 'hip', '6.4')
    assert pointwise_kernels.why_not(DEVICE)
    assert machine.checks == []


def test_nothing_is_checked_while_a_graph_is_captured(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is that remembered: after it, they are checked and taken, inside of a graph as well."""
    monkeypatch.setattr(fastest, 'is_capturing', lambda device=None: True)
    assert not pointwise_kernels.suits(torch.empty(1, 2, 3, 3))
    assert machine.checks == []
    monkeypatch.setattr(fastest, 'is_capturing', lambda device=None: False)
    assert pointwise_kernels.suits(torch.empty(1, 2, 3, 3))
    monkeypatch.setattr(fastest, 'is_capturing', lambda device=None: True)
    assert pointwise_kernels.suits(torch.empty(1, 2, 3, 3))


@pytest.mark.slow
def test_the_package_can_be_imported_without_triton() -> None:
    program = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == 'triton' or name.startswith('triton.'):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
from mmunireplknet.ops import pointwise, pointwise_kernels
import torch
assert not pointwise_kernels.suits(torch.empty(1, 2, 3, 3))
assert 'triton' not in sys.modules
"""
    subprocess.run([sys.executable, '-c', program], check=True)
