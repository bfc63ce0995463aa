"""Why GPU kernels cannot be used, on machines that are made up; the self-check; and the fused block with them."""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmunireplknet.ops import DepthwiseConv2d, backends, depthwise_conv2d, dilated_reparam_conv, reference
from mmunireplknet.ops.self_check import self_check

from ..procedural import image
from .fake_gpu import FakeGPU, PoolingBackend
from .reparam_cases import Case, differentiate, errors, inputs_of

CPU = torch.device('cpu')
H200 = SimpleNamespace(capability=(9, 0), name='NVIDIA H200')


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing is known yet, in the test and after it."""
    for function in (backends._why_not_installed, backends._why_not_loaded):
        function.cache_clear()
    yield
    for function in (backends._why_not_installed, backends._why_not_loaded):
        function.cache_clear()


@pytest.fixture
def machine(fresh: None, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """One with an H200 and both backends, whose attributes the tests change; ``checks`` are the self-checks made."""
    cuda, triton = PoolingBackend(), PoolingBackend()
    cuda.why_not = lambda: ''  # type: ignore[attr-defined]
    found = SimpleNamespace(modules={'cuda': cuda, 'triton': triton}, checks=[], problem='', block='', **vars(H200))

    def check(name: str, backend: Any, device: torch.device, part: str = '') -> str:
        found.checks.append((name, str(device)))
        if part == 'block':
            return found.block
        if isinstance(found.problem, Exception):
            raise found.problem
        return found.problem

    monkeypatch.setattr(backends, 'module_of', lambda name: found.modules[name])
    monkeypatch.setattr(backends, 'self_check', check)
    monkeypatch.setattr(backends, '_checked', {})
    monkeypatch.setattr(backends, '_postponed', set())
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name if name == 'triton' else None)
    monkeypatch.setattr(torch.version, 'hip', None)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: found.capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: found.name)
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    return found


@pytest.mark.parametrize('backend', ['triton', 'cuda'])
def test_what_works(machine: SimpleNamespace, backend: str) -> None:
    assert backends.why_not(backend) == ''
    backends.require(backend)
    assert DepthwiseConv2d(6, 6, 7, padding=3, groups=6, backend=backend).backend == backend
    assert machine.checks == [(backend, 'cuda:0')]  # once


@pytest.mark.parametrize('backend', ['triton', 'cuda'])
def test_every_gpu_is_checked_by_itself(machine: SimpleNamespace, backend: str) -> None:
    assert backends.why_not(backend, torch.device('cuda', 1)) == ''
    machine.capability, machine.name = (7, 5), 'Tesla T4'
    reason = backends.why_not(backend, torch.device('cuda', 0))
    assert reason == 'Tesla T4 has compute capability 7.5; the kernels take 8.0 (Ampere) or newer.'
    assert backends.why_not(backend, torch.device('cuda')) == reason  # the current one
    assert backends.why_not(backend, torch.device('cuda', 1)) == ''
    assert machine.checks == [(backend, 'cuda:1')]


def test_what_is_known_is_not_found_out_again(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked at every convolution."""
    there = torch.device('cuda', 1)
    assert backends.why_not('triton', there) == ''
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: pytest.fail('the driver was asked'))
    assert backends.why_not('triton', there) == ''


def test_the_gpu_of_the_map_is_checked(machine: SimpleNamespace) -> None:
    """And no other, on which that would take memory."""
    x: Any = SimpleNamespace(device=torch.device('cuda', 1), dtype=torch.float32)
    assert backends.choose('triton', x, 7) == 'triton'
    assert machine.checks == [('triton', 'cuda:1')]


def test_no_triton(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    assert 'the package triton is missing' in backends.why_not('triton')
    with pytest.raises(RuntimeError, match='cannot be used: the package triton is missing'):
        depthwise_conv2d(image((1, 6, 9, 9)), image((6, 1, 7, 7)), backend='triton')


def test_a_triton_that_is_broken(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError('libtriton.so: undefined symbol')

    monkeypatch.setattr(backends, 'module_of', fail)
    assert backends.why_not('triton') == ('its kernels cannot be imported: ImportError: libtriton.so: undefined symbol')


def test_kernels_that_are_not_built(machine: SimpleNamespace) -> None:
    machine.modules['cuda'].why_not = lambda: 'the CUDA kernels are not built: run python -m mmunireplknet.ops.build.'
    assert backends.why_not('cuda').startswith('the CUDA kernels are not built')
    assert (backends.why_not('triton'), machine.checks) == ('', [('triton', 'cuda:0')])


@pytest.mark.parametrize('backend', ['triton', 'cuda'])
def test_no_gpu(machine: SimpleNamespace, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    assert backends.why_not(backend) == 'there is no CUDA device.'
    monkeypatch.setattr(torch.version, 'cuda', None)
    assert backends.why_not(backend) == f'there is no CUDA device, and torch {torch.__version__} has no CUDA.'
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.version, 'hip', '6.4')
    assert 'of AMD, torch computes' in backends.why_not(backend)
    assert machine.checks == []


@pytest.mark.parametrize(
    ('problem', 'said'),
    [
        ('their forward is off by 1.0e+00.', 'their forward is off'),
        (RuntimeError('Failed to find C compiler'), 'self-check on NVIDIA H200 failed: RuntimeError: Failed to find C'),
    ],
)
def test_a_self_check_that_fails(machine: SimpleNamespace, problem: Any, said: str) -> None:
    machine.problem = problem
    with pytest.warns(UserWarning, match='the triton kernels are not used: .*' + said):
        assert said in backends.why_not('triton')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert said in backends.why_not('triton')
    assert len(machine.checks) == 1


@pytest.mark.parametrize(
    'error',
    [torch.cuda.OutOfMemoryError('CUDA out of memory.'), RuntimeError('Triton Error [CUDA]: out of memory')],
    ids=['of torch', 'of the driver'],
)
def test_a_self_check_that_memory_is_too_short_for(machine: SimpleNamespace, error: Exception) -> None:
    """It is made again later, and nobody hears of it: the kernels may be right."""
    machine.problem = error
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert backends.why_not('triton') == 'there is too little memory left for the self-check.'
        machine.problem = ''
        assert backends.why_not('triton') == backends.why_not('triton') == ''
    assert len(machine.checks) == 2


def test_what_is_timed_without_an_unchecked_backend_would_stay(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = image((1, 6, 9, 9)), image((6, 1, 7, 7))
    monkeypatch.setattr(backends, '_postponed', {('triton', 0)})
    depthwise_conv2d(x, weight)
    assert (gpu.timed, gpu.calls()['cuda']) == ([], ['forward'])
    monkeypatch.setattr(backends, '_postponed', set())
    depthwise_conv2d(x, weight)
    assert sorted(gpu.timed) == ['cuda', 'torch', 'triton']


def test_interpreted_triton_needs_no_gpu(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    assert backends.why_not('triton') == ''
    assert machine.checks == []  # minutes by the interpreter, which is wrong in bfloat16 (triton 3.7)
    x = image((1, 6, 9, 9))
    depthwise_conv2d(x, image((6, 1, 7, 7)), backend='triton')
    assert machine.modules['triton'].calls == ['forward']
    assert backends.choose('auto', x, 7) in ('torch', 'cpp')
    with pytest.raises(RuntimeError, match="'triton' computes on the CPU, but the input is on meta"):
        backends.choose('triton', x.to('meta'), 7)


@pytest.mark.parametrize('backend', ['triton', 'cuda'])
def test_a_map_that_is_not_on_a_gpu(machine: SimpleNamespace, backend: str) -> None:
    with pytest.raises(RuntimeError, match=f"'{backend}' computes on CUDA devices, but the input is on cpu"):
        depthwise_conv2d(image((1, 6, 9, 9)), image((6, 1, 7, 7)), backend=backend)


def spoilt(which: str, spoil: Callable[[Tensor], Tensor]) -> PoolingBackend:
    """A backend one of whose results is wrong; ``which`` is a function and the number of its result."""
    backend, (name, number) = PoolingBackend(), which.split()
    right = getattr(backend, name)

    def wrong(*args: Any) -> Any:
        results = right(*args)
        if isinstance(results, Tensor):
            return spoil(results)
        return tuple(spoil(r) if i == int(number) else r for i, r in enumerate(results))

    setattr(backend, name, wrong)
    return backend


def test_a_block_that_fails_its_check_leaves_the_convolutions(machine: SimpleNamespace) -> None:
    machine.block = 'their block forward is off by 1.0e+00.'
    device = torch.device('cuda', 0)
    assert backends.why_not('triton', device) == ''
    with pytest.warns(
        UserWarning, match=r'triton kernels of the Dilated Reparam Block are not used: their block'
    ) as all_:
        assert backends.why_no_block('triton', device) == backends.why_no_block('triton', device) == machine.block
    assert len(all_) == 1
    assert backends.why_not('triton', device) == ''
    assert machine.checks == [('triton', 'cuda:0')] * 2


@pytest.mark.parametrize(('part', 'functions'), [('convolutions', 4), ('block', 2)])
def test_parts_of_the_self_check(part: str, functions: int) -> None:
    backend = PoolingBackend()
    assert self_check('fake', backend, CPU, part) == ''
    assert len(set(backend.calls)) == functions
    assert any(name.startswith('block') for name in backend.calls) == (part == 'block')


def test_self_check_passes() -> None:
    backend = PoolingBackend()
    assert self_check('fake', backend, CPU) == ''
    assert set(backend.calls) == {'forward', 'input_grad', 'weight_grad', 'block_forward', 'block_backward', 'pooled'}


def test_self_check_bears_weights_that_are_rounded_to_the_dtype_of_the_map() -> None:
    backend = PoolingBackend()
    forward, block = backend.forward, backend.block_forward

    def rounded(x: Tensor, weight: Tensor, *args: Any, **options: Any) -> Any:
        return forward(x, weight.to(x.dtype).float(), *args, **options)

    backend.forward = rounded  # type: ignore[method-assign]
    backend.block_forward = lambda x, w, *args: block(x, w.to(x.dtype).float(), *args)  # type: ignore[method-assign]
    assert self_check('fake', backend, CPU) == ''


@pytest.mark.parametrize('spoil', [lambda t: t * 1.01, lambda t: t.flip(0), lambda t: t * torch.nan])
@pytest.mark.parametrize(
    ('which', 'said'),
    [('forward 0', 'forward'), ('weight_grad 0', 'weight gradient')]
    + [(f'block_forward {i}', 'block forward') for i in range(3)]
    + [(f'block_backward {i}', 'block backward') for i in range(4)],
)
def test_self_check_finds(which: str, said: str, spoil: Callable) -> None:
    assert f'their {said} is off by ' in self_check('fake', spoilt(which, spoil), CPU)


def test_self_check_finds_wrong_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = PoolingBackend()
    right = backend.forward

    def wrong(*args: Any, pooled: bool = False, layout: torch.memory_format | None = None) -> Any:
        result = right(*args, pooled=pooled, layout=layout)
        return (result[0], result[1] * 1.1) if pooled else result

    monkeypatch.setattr(backend, 'forward', wrong)
    assert 'their sum of the maps is off by ' in self_check('fake', backend, CPU)


BLOCK = Case('7', (9, 10), 4)


def block_errors(case: Case = BLOCK) -> dict[str, float]:
    return errors(differentiate(dilated_reparam_conv, inputs_of(case)), case)


def test_a_block_that_is_not_supported_is_computed_by_branch(gpu: FakeGPU) -> None:
    assert max(block_errors(Case('one branch', (9, 10), 4)).values()) < 1e-5
    assert gpu.calls()['cuda'] == ['forward', 'weight_grad', 'input_grad'] or gpu.timed
    assert 'block_forward' not in gpu.backends['triton'].calls


def test_a_block_on_a_cpu_needs_no_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes a quarter of the time of a small one."""
    monkeypatch.setattr(backends.fastest, 'kind_of', lambda *_: pytest.fail('the kind was made'))
    assert max(block_errors().values()) < 1e-5


def test_a_block_of_float64_is_computed_by_torch(gpu: FakeGPU) -> None:
    assert max(block_errors(Case('7', (9, 10), 4, dtype=torch.float64)).values()) < 1e-12
    assert gpu.calls() == {'triton': [], 'cuda': []}


def test_a_block_that_fails_gives_way(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('MMUNI_DW_TUNE', '0')

    def fail(*_: object) -> None:
        raise RuntimeError('ptxas fatal')

    gpu.backends['triton'].block_forward = fail  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match='the triton kernels fail in the block_forward of a 7x7 kernel in float32'):
        assert max(block_errors().values()) < 1e-5
    assert gpu.calls()['triton'].count('block_backward') == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert max(block_errors().values()) < 1e-5


def test_the_block_by_name(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('MMUNI_DW_BACKEND', 'cuda')
    assert max(block_errors().values()) < 1e-5
    assert 'block_forward' not in gpu.calls()['triton']  # cuda has none, and convolves branch after branch
    monkeypatch.setenv('MMUNI_DW_BACKEND', 'triton')
    gpu.backends['triton'].fails = RuntimeError('ptxas fatal')
    with pytest.raises(RuntimeError, match='ptxas fatal'):
        block_errors()


def test_a_block_while_a_graph_is_captured(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.fastest, 'is_capturing', lambda *_: True)
    assert max(block_errors().values()) < 1e-5
    assert gpu.calls()['triton'] == ['block_forward', 'block_backward']
    monkeypatch.setattr(backends, '_checked', {})
    assert max(block_errors().values()) < 1e-5
    assert gpu.calls() == {'triton': [], 'cuda': []}


def test_synchronised_block(gpu: FakeGPU, process_group: None) -> None:
    group = torch.distributed.group.WORLD
    inputs = inputs_of(BLOCK)
    actual = differentiate(lambda *args: dilated_reparam_conv(*args, group), inputs)
    assert max(errors(actual, BLOCK).values()) < 1e-5
    assert gpu.calls()['triton'][:1] == ['block_stats']


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_the_block_by_branch_in_16_bits(gpu: FakeGPU, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the CPU the branches are convolved, forward and backward, in the dtype of the map."""
    from mmunireplknet.ops import dilated_reparam

    dtypes: list[torch.dtype] = []
    input_grad = reference.input_grad

    def spy(grad: Tensor, weight: Tensor, dilation: int) -> Tensor:
        dtypes.append(grad.dtype)
        return input_grad(grad, weight, dilation)

    monkeypatch.setattr(dilated_reparam, '_widen', lambda x: x)
    monkeypatch.setattr(reference, 'input_grad', spy)
    monkeypatch.setenv('MMUNI_DW_BACKEND', 'torch')
    found = block_errors(Case('7', (9, 10), 4, dtype=dtype))
    unit = torch.finfo(dtype).eps
    assert {name: error < 4 * unit for name, error in found.items()} == dict.fromkeys(found, True)
    assert set(dtypes) == {dtype}
