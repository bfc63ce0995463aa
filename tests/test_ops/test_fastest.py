"""What ``auto`` takes on a GPU, on one that is made of the CPU."""

import functools
import gc
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mmunireplknet.ops import backends, depthwise_conv2d, fastest, reference

from ..procedural import image, relative_error
from .cases import plain
from .fake_gpu import FakeGPU

X, WEIGHT = image((2, 6, 20, 21)), image((6, 1, 13, 13), 1)
OPS = torch.ops.mmuni
CPU = torch.device('cpu')


def convolve(x: Tensor = X, weight: Tensor = WEIGHT, dilation: int = 1, backend: str = 'auto') -> Tensor:
    """With a check of the result."""
    y = depthwise_conv2d(x, weight, None, dilation, backend)
    assert relative_error(y, plain(x, weight, None, dilation)) < 1e-6
    return y


@pytest.mark.parametrize('fastest_one', ['triton', 'cuda', 'torch'])
def test_the_fastest_is_taken_and_remembered(gpu: FakeGPU, fastest_one: str) -> None:
    gpu.milliseconds[fastest_one] = 0.5
    convolve()
    assert sorted(gpu.timed) == ['cuda', 'torch', 'triton']
    gpu.calls()
    convolve()
    convolve()
    assert len(gpu.timed) == 3
    assert gpu.calls() == {name: ['forward'] * 2 * (name == fastest_one) for name in ('triton', 'cuda')}
    assert backends.choose('auto', X, 13) == fastest_one


def test_gradients_are_chosen_by_themselves(gpu: FakeGPU) -> None:
    x, weight = X.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    grads = torch.autograd.grad(depthwise_conv2d(x, weight), (x, weight), X)
    exact = torch.autograd.grad(plain(x, weight, None, 1), (x, weight), X)
    assert [relative_error(mine, right) < 1e-6 for mine, right in zip(grads, exact, strict=True)] == [True, True]
    assert len(gpu.timed) == 9
    functions = ('forward', 'input_grad', 'weight_grad')
    assert [fastest.remembered(fastest.kind_of(name, X, 13, 1)) for name in functions] == ['cuda'] * 3


@pytest.mark.parametrize(
    ('change', 'again'),
    [
        (lambda x, w: (x[:, :, :17, :16].contiguous(), w), False),
        (lambda x, w: (x[:1, :, :, :].contiguous(), w), True),
        (lambda x, w: (image((2, 6, 40, 21)), w), True),
        (lambda x, w: (image((2, 6, 20, 32)), w), True),
        (lambda x, w: (x.contiguous(memory_format=torch.channels_last), w), True),
        (lambda x, w: (x, w[..., 3:10, 3:10]), True),
    ],
    ids=['same size', 'batch', 'height', 'width', 'layout', 'kernel'],
)
def test_what_is_timed_anew(gpu: FakeGPU, change: Callable, again: bool) -> None:
    convolve()
    convolve(*change(X, WEIGHT))
    assert len(gpu.timed) == (6 if again else 3)


def test_dilations_and_dtypes_are_timed_anew(gpu: FakeGPU) -> None:
    convolve(weight=WEIGHT[..., :3, :3])
    convolve(weight=WEIGHT[..., :3, :3], dilation=2)
    assert len(gpu.timed) == 6
    depthwise_conv2d(X.bfloat16(), WEIGHT[..., :3, :3])
    assert len(gpu.timed) == 9


GUESSES = [('forward', 13, 'cuda'), ('input_grad', 5, 'cuda'), ('forward', 3, 'torch'), ('weight_grad', 3, 'cuda')]


@pytest.mark.parametrize('why', ['variable', 'deterministic', 'capturing', 'too many', 'fake tensor', 'no candidates'])
@pytest.mark.parametrize(('function', 'kernel', 'taken'), GUESSES)
def test_where_nothing_may_be_timed(
    gpu: FakeGPU, why: str, function: str, kernel: int, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = X
    if why == 'variable':
        monkeypatch.setenv('MMUNI_DW_TUNE', '0')
    elif why == 'deterministic':
        monkeypatch.setattr(torch, 'are_deterministic_algorithms_enabled', lambda: True)
    elif why == 'capturing':
        monkeypatch.setattr(fastest, 'is_capturing', lambda *_: True)
    elif why == 'too many':
        monkeypatch.setattr(fastest, 'MOST', 0)
    elif why == 'fake tensor':
        x = FakeTensorMode().from_tensor(X)
    do = None if why == 'no candidates' else lambda module: pytest.fail('it was run')
    assert backends.choose('auto', x, kernel, 1, function, do) == taken
    assert gpu.timed == []


@pytest.mark.parametrize('how', ['variable', 'deterministic'])
def test_what_was_timed_does_not_count_where_the_choice_is_fixed(
    gpu: FakeGPU, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.milliseconds['torch'] = 0.5
    convolve()
    assert backends.choose('auto', X, 13) == 'torch'
    if how == 'variable':
        monkeypatch.setenv('MMUNI_DW_TUNE', '0')
    else:
        monkeypatch.setattr(torch, 'are_deterministic_algorithms_enabled', lambda: True)
    assert backends.choose('auto', X, 13) == 'cuda'


def test_what_was_timed_is_taken_into_a_graph(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.milliseconds['triton'] = 0.5
    convolve()
    gpu.calls()
    monkeypatch.setattr(fastest, 'is_capturing', lambda *_: True)
    convolve()
    assert gpu.calls() == {'triton': ['forward'], 'cuda': []}


def test_a_backend_that_is_not_checked_yet_is_not_captured(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, '_checked', {('triton', 0): ''})
    monkeypatch.setattr(fastest, 'is_capturing', lambda *_: True)
    assert backends.choose('auto', X, 13) == 'triton'
    monkeypatch.setattr(backends, '_checked', {})
    assert backends.choose('auto', X, 13) == 'torch'


def test_only_what_supports_a_map_is_timed(gpu: FakeGPU) -> None:
    gpu.backends['cuda'].reason = 'it reaches 31 taps only.'
    convolve()
    assert sorted(gpu.timed) == ['torch', 'triton']
    assert backends.choose('auto', X, 13) == 'triton'
    convolve(X.double(), WEIGHT.double())
    assert len(gpu.timed) == 2  # nobody but torch has kernels for float64


def test_a_remembered_backend_must_support_this_map(gpu: FakeGPU) -> None:
    convolve()
    gpu.backends['cuda'].reason = 'it is too large.'
    gpu.calls()
    convolve()
    assert gpu.calls() == {'triton': ['forward'], 'cuda': []}  # the next best
    assert len(gpu.timed) == 3


def test_one_that_fails_is_left_out_with_one_warning(gpu: FakeGPU) -> None:
    gpu.backends['cuda'].fails = RuntimeError('out of shared memory')
    with pytest.warns(UserWarning, match='cuda kernels fail in the forward of a 13x13 kernel in float32.*: Runtime'):
        convolve()
    assert backends.choose('auto', X, 13) == 'triton'
    gpu.calls()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        convolve()
        assert gpu.calls() == {'triton': ['forward'], 'cuda': []}
        convolve(weight=WEIGHT[..., 3:10, 3:10])  # another kind is tried, without another word
    assert 'cuda' in gpu.timed[3:]


def test_one_that_fails_frees_its_memory(gpu: FakeGPU) -> None:
    """At once: where memory is short, that of another candidate would be missing until the next garbage collection."""
    kept: list[weakref.ref] = []

    def fail() -> None:
        tensor = torch.empty(3)
        kept.append(weakref.ref(tensor))
        raise torch.cuda.OutOfMemoryError('CUDA out of memory')

    gc.disable()
    try:
        kind = fastest.kind_of('forward', X, 13, 1)
        candidates = {'cuda': functools.partial(lambda _: fail(), None), 'torch': functools.partial(id, 0)}
        found = fastest.find(kind, candidates, CPU)
        assert (found[0], list(found[1])) == ('torch', ['cuda'])
        del found
        assert [reference_() for reference_ in kept] == [None]
    finally:
        gc.enable()


def test_one_that_fails_later_gives_way_to_torch(gpu: FakeGPU) -> None:
    """As where triton's compiler cannot make a kernel for another width of the same kind."""
    convolve()
    gpu.backends['cuda'].fails = RuntimeError('PassManager::run failed')
    with pytest.warns(UserWarning, match='PassManager::run failed') as caught:
        convolve()
    assert len(caught) == 1
    gpu.calls()
    convolve()
    assert gpu.calls()['cuda'] == []


def test_want_of_memory_is_no_failure(gpu: FakeGPU) -> None:
    convolve()
    gpu.backends['cuda'].fails = torch.cuda.OutOfMemoryError('CUDA out of memory')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        convolve()
        gpu.backends['cuda'].fails = None
        gpu.calls()
        convolve()
    assert gpu.calls()['cuda'] == ['forward']


def test_what_fails_while_a_graph_is_captured_is_told(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    convolve()
    gpu.backends['cuda'].fails = RuntimeError('capture invalidated')
    monkeypatch.setattr(fastest, 'is_capturing', lambda *_: True)
    with pytest.raises(RuntimeError, match='capture invalidated'):
        convolve()


def test_an_error_of_torch_is_told(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in gpu.backends.values():
        backend.fails = RuntimeError('ours')

    def fail(*_: object) -> Tensor:
        raise RuntimeError('of torch')

    monkeypatch.setattr(reference, 'convolve', fail)
    with pytest.raises(RuntimeError, match='of torch'):
        convolve()


@pytest.mark.parametrize('how', ['argument', 'variable'])
def test_one_that_is_asked_for_is_taken(gpu: FakeGPU, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == 'variable':
        monkeypatch.setenv('MMUNI_DW_BACKEND', 'triton')
    backend = 'triton' if how == 'argument' else 'auto'
    convolve(backend=backend)
    assert (gpu.calls()['triton'], gpu.timed) == (['forward'], [])
    assert backends.choose(backend, X.double(), 13) == 'torch'
    gpu.backends['triton'].fails = RuntimeError('no such kernel')
    with pytest.raises(RuntimeError, match='no such kernel'):
        convolve(backend=backend)
    gpu.backends['triton'].reason = 'it reaches 31 taps only.'
    with pytest.raises(RuntimeError, match="'triton' cannot convolve this: it reaches 31 taps only"):
        convolve(backend=backend)


def test_the_layout_comes_back(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a backend makes of a map that lies in neither of the two orders."""
    monkeypatch.setattr(
        gpu.backends['cuda'], 'forward', lambda x, w, *_: reference.convolve(x.contiguous(), w, None, 1)
    )
    x = X.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1)
    assert convolve(x).stride() == x.stride() == torch.empty_like(x).stride()


def test_compiled_code_chooses_when_it_runs(gpu: FakeGPU) -> None:
    compiled = torch.compile(convolve_alone, fullgraph=True, backend='aot_eager')
    assert relative_error(compiled(X, WEIGHT), plain(X, WEIGHT, None, 1)) < 1e-6
    assert len(gpu.timed) == 3


def convolve_alone(x: Tensor, weight: Tensor) -> Tensor:
    return depthwise_conv2d(x, weight)
