"""Which backend is taken, and what happens where one cannot be."""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mmunireplknet.ops import DepthwiseConv2d, backends, build, depthwise_conv2d, reference
from mmunireplknet.ops import cpp as cpp_backend
from mmunireplknet.ops.self_check import self_check

from ..procedural import image, relative_error
from .cases import plain

X, WEIGHT = image((1, 18, 20, 21)), image((18, 1, 7, 7), 1)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Whether the compiled kernels work is found out anew, in the test and after it."""
    backends._why_not_cpp.cache_clear()
    yield
    backends._why_not_cpp.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions of the backend torch that were called for ``X``, and not by the self-check."""
    names: list[str] = []

    def spy(name: str, function: Callable) -> Callable:
        def call(x: Tensor, *rest: Any) -> Tensor:
            if x.shape == X.shape:
                names.append(name)
            return function(x, *rest)

        return call

    for name in ('convolve', 'input_grad', 'weight_grad'):
        monkeypatch.setattr(reference, name, spy(name, getattr(reference, name)))
    return names


def check_cpp() -> str:
    return self_check('cpp', cpp_backend, torch.device('cpu'))


def compute(backend: str = 'auto') -> None:
    """All three operators, with a check of the first."""
    x, weight = X.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    y = depthwise_conv2d(x, weight, None, 1, backend)
    y.sum().backward()
    assert relative_error(y.detach(), plain(X.double(), WEIGHT.double(), None, 1)) < 1e-6


@pytest.mark.parametrize(
    ('variable', 'argument', 'taken'),
    [
        (None, 'auto', 'cpp'),
        (None, 'torch', 'torch'),
        (None, 'cpp', 'cpp'),
        ('', 'auto', 'cpp'),
        ('auto', 'auto', 'cpp'),
        ('torch', 'auto', 'torch'),
        ('cpp', 'auto', 'cpp'),
        ('torch', 'cpp', 'cpp'),
        ('cpp', 'torch', 'torch'),
        ('mkl', 'torch', 'torch'),
    ],
)
def test_argument_wins_over_the_environment(
    variable: str | None, argument: str, taken: str, monkeypatch: pytest.MonkeyPatch, calls: list[str], cpp: Path
) -> None:
    if variable is not None:
        monkeypatch.setenv('MMUNI_DW_BACKEND', variable)
    assert backends.choose(argument, X, 7) == taken
    compute(argument)
    assert calls == (['convolve', 'input_grad', 'weight_grad'] if taken == 'torch' else [])


def test_environment_is_obeyed_where_auto_would_choose_otherwise(monkeypatch: pytest.MonkeyPatch, cpp: Path) -> None:
    x = image((1, 18, 40, 40)).contiguous(memory_format=torch.channels_last)
    assert backends.choose('auto', x, 3) == 'torch'
    monkeypatch.setenv('MMUNI_DW_BACKEND', 'cpp')
    assert backends.choose('auto', x, 3) == 'cpp'


@pytest.mark.parametrize(
    ('dtype', 'kernel', 'layout', 'size', 'taken'),
    [
        (torch.float32, 3, torch.contiguous_format, 64, 'cpp'),
        (torch.float32, 3, torch.channels_last, 64, 'torch'),
        (torch.float32, 3, torch.channels_last, 32, 'cpp'),
        (torch.float32, 13, torch.channels_last, 64, 'cpp'),
        (torch.bfloat16, 13, torch.contiguous_format, 64, 'cpp'),
        (torch.float16, 13, torch.contiguous_format, 64, 'cpp'),
        (torch.float64, 13, torch.contiguous_format, 64, 'torch'),
    ],
)
def test_auto(dtype: torch.dtype, kernel: int, layout: torch.memory_format, size: int, taken: str, cpp: Path) -> None:
    x = torch.zeros(1, 16, size, size, dtype=dtype).contiguous(memory_format=layout)
    assert backends.choose('auto', x, kernel) == taken


def test_auto_off_the_cpu(cpp: Path) -> None:
    x = X.to('meta')
    assert backends.choose('auto', x, 7) == 'torch'
    with pytest.raises(RuntimeError, match="'cpp' computes on the CPU, but the input is on meta"):
        backends.choose('cpp', x, 7)


def test_float64_is_computed_by_torch(calls: list[str], cpp: Path) -> None:
    assert backends.choose('cpp', X.double(), 7) == 'torch'
    y = depthwise_conv2d(X.double(), WEIGHT.double(), None, 1, 'cpp')
    assert calls == ['convolve']
    assert relative_error(y, plain(X.double(), WEIGHT.double(), None, 1)) < 2e-15


@pytest.mark.parametrize('backend', ['mkl', '', 'CPP'])
def test_unknown_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message = f"backend='{backend}' is unknown: it must be auto, torch, cpp, triton, cuda"
    for function in (backends.why_not, backends.require, lambda b: depthwise_conv2d(X, WEIGHT, None, 1, b)):
        with pytest.raises(ValueError, match=message):
            function(backend)
    if backend:
        monkeypatch.setenv('MMUNI_DW_BACKEND', backend)
        with pytest.raises(ValueError, match=message):
            depthwise_conv2d(X, WEIGHT)


def test_torch_needs_nothing() -> None:
    assert backends.why_not('torch') == ''
    backends.require('torch')


def expect_fallback(reason: str, calls: list[str]) -> None:
    """``auto`` computes with torch, and asking for the compiled kernels says why that cannot be."""
    compute('auto')
    compute('auto')
    assert calls == 2 * ['convolve', 'input_grad', 'weight_grad']
    with pytest.raises(RuntimeError, match=f"backend 'cpp' of depthwise_conv2d cannot be used: .*{reason}"):
        compute('cpp')
    with pytest.raises(RuntimeError, match=reason):
        DepthwiseConv2d(18, 18, 7, padding=3, groups=18, backend='cpp')


@pytest.mark.parametrize(
    ('why_not', 'said'),
    [('', 'run python -m mmunireplknet.ops.build'), ('there is no C++ compiler.', 'there is no C')],
    ids=['could be', 'cannot be'],
)
def test_fallback_where_nothing_is_built(
    why_not: str, said: str, fresh: None, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, 'library_file', lambda: None)
    monkeypatch.setattr(build, 'why_not', lambda: why_not)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        expect_fallback(f'not built: {said}', calls)


def test_fallback_from_a_library_that_does_not_load(
    fresh: None, calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / 'mmuni_cpu.so'
    file.write_bytes(b'no library')
    monkeypatch.setattr(build, 'library_file', lambda: file)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        expect_fallback('mmuni_cpu.so does not work: ', calls)


def test_fallback_from_kernels_that_fail_the_check(
    fresh: None, calls: list[str], monkeypatch: pytest.MonkeyPatch, cpp: Path
) -> None:
    monkeypatch.setattr(backends, 'self_check', lambda *_: 'their forward is off by 1.0e+00.')
    with pytest.warns(UserWarning, match='compiled CPU kernels are not used: their forward is off') as caught:
        expect_fallback('their forward is off', calls)
    assert len(caught) == 1


WRITES = {  # what each operator is called in a message, and the places of the results among its arguments
    'forward': ('forward', [3]),
    'weight_grad': ('weight gradient', [2]),
    'block_forward': ('block forward', [7, 8, 9]),
    'block_backward': ('block backward', [9, 10, 11, 12]),
    'apply': ('apply', [4]),
    'grad': ('grad', [5]),
    'sums': ('sums', [4]),
}


def broken(which: str, spoil: Callable[[Tensor], Any], dtype: torch.dtype | None = None) -> SimpleNamespace:
    """The compiled operators, with one of the results spoilt; ``which`` is operator and number, as 'sums 0'."""
    real = torch.ops.mmuni_cpu
    operator, _, number = which.partition(' ')

    def call(*args: Any) -> None:
        getattr(real, operator)(*args)
        out = args[WRITES[operator][1][int(number)]]
        if out.dtype == (dtype or torch.float32):
            spoil(out)

    others = {name: getattr(real, name) for name in (*WRITES, 'capability')}
    return SimpleNamespace(**{**others, **({operator: call} if operator in WRITES else {})})


def test_self_check_passes(cpp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_cpp() == ''
    monkeypatch.setattr(torch.ops, 'mmuni_cpu', broken('nothing', torch.zero_))
    assert check_cpp() == ''


@pytest.mark.parametrize(
    'spoil',
    [
        pytest.param(torch.zero_, id='zero'),
        pytest.param(lambda out: out.mul_(1 + 2e-5), id='imprecise'),
        pytest.param(lambda out: out.view(-1)[-1:].fill_(torch.nan), id='nan'),
        pytest.param(lambda out: out.view(-1)[:1].add_(0.1), id='one value'),
    ],
)
@pytest.mark.parametrize('which', [f'{name} {i}' for name, (_, places) in WRITES.items() for i in range(len(places))])
def test_self_check_finds(which: str, spoil: Callable, cpp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, 'mmuni_cpu', broken(which, lambda out: spoil(out.as_strided((out.numel(),), (1,)))))
    assert f'their {WRITES[which.split()[0]][0]} is off by ' in check_cpp()


@pytest.mark.parametrize('which', ['forward 0', 'block_forward 2', 'block_backward 0', 'apply 0', 'grad 0'])
def test_self_check_finds_a_wrong_rounding(which: str, cpp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, 'mmuni_cpu', broken(which, lambda out: out.mul_(1.01), torch.bfloat16))
    assert re.search(r'is off by .* \(bfloat16, ', check_cpp())


def test_self_check_finds_what_only_one_layout_shows(cpp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operators = broken('forward 0', lambda out: out.zero_() if out.stride(1) == 1 else None)
    monkeypatch.setattr(torch.ops, 'mmuni_cpu', operators)
    assert 'their forward is off' in check_cpp()


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    'state',
    [
        partial(default_device, 'meta'),
        partial(default_dtype, torch.float64),
        partial(default_dtype, torch.bfloat16),
        FakeTensorMode,
        torch.inference_mode,
        partial(torch.autocast, 'cpu', torch.bfloat16),
    ],
    ids=['meta', 'float64', 'bfloat16', 'FakeTensorMode', 'inference_mode', 'autocast'],
)
def test_what_is_set_elsewhere_does_not_matter_to_the_check(state: Callable, fresh: None, cpp: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with state():
            assert backends.why_not('cpp') == ''


def test_the_check_is_not_counted(fresh: None, cpp: Path) -> None:
    with FlopCounterMode(display=False) as counter:
        depthwise_conv2d(X, WEIGHT)
    assert counter.get_total_flops() == 2 * X.numel() * 7**2


def test_self_check_warns_once_and_torch_is_used(
    fresh: None, calls: list[str], monkeypatch: pytest.MonkeyPatch, cpp: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops, 'mmuni_cpu', broken('weight_grad 0', torch.zero_))
        with pytest.warns(UserWarning, match='their weight gradient is off by 1.0e') as caught:
            assert backends.choose('auto', X, 7) == 'torch'
    expect_fallback('their weight gradient is off by', calls)
    assert len(caught) == 1


def test_kernels_that_raise_in_the_check_are_not_used(fresh: None, monkeypatch: pytest.MonkeyPatch, cpp: Path) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError('illegal instruction set')

    monkeypatch.setattr(torch.ops, 'mmuni_cpu', broken('nothing', fail))
    torch.ops.mmuni_cpu.forward = fail
    with pytest.warns(UserWarning, match='illegal instruction set'):
        compute('auto')
