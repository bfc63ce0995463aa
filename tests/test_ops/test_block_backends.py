"""The Dilated Reparam Block: fused or branch after branch, on a GPU that is made of the CPU."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmunireplknet.ops import backends, block_backends, dilated_reparam, dilated_reparam_conv, fastest

from .fake_gpu import FakeGPU
from .reparam_cases import Case, differentiate, errors, inputs_of

BLOCK = Case('7', (9, 10), 4)
FUNCTIONS = ('block_forward', 'block_backward')
SHORT = torch.cuda.OutOfMemoryError('CUDA out of memory')


def train(gpu: FakeGPU, group: Any = None) -> tuple[list[str], list[str]]:
    """A step with a check of its results; the fused functions that computed it, and what was timed."""
    gpu.calls()
    before = len(gpu.timed)
    inputs = inputs_of(BLOCK)
    found = differentiate(lambda *args: dilated_reparam_conv(*args, group), inputs)
    assert max(errors(found, BLOCK).values()) < 1e-5
    return [name for name in gpu.calls()['triton'] if name.startswith('block')], gpu.timed[before:]


def taken(function: str) -> str | None:
    kernel = [weight.shape[-1] for weight in inputs_of(BLOCK).weights]
    return fastest.remembered(fastest.kind_of(function, inputs_of(BLOCK).x, max(kernel), len(kernel)))


@pytest.mark.parametrize(
    ('fused', 'branches', 'expected'),
    [(2.0, 4.0, 'triton'), (2.0, 1.9, 'triton'), (2.0, 1.7, 'branches')],
    ids=['faster', 'little slower', 'slower'],
)
def test_the_fused_block_is_kept_unless_it_is_clearly_slower(
    gpu: FakeGPU, fused: float, branches: float, expected: str
) -> None:
    gpu.milliseconds |= {'triton': fused, 'branches': branches}
    _, timed = train(gpu)
    assert timed.count('branches') >= 2
    assert [taken(name) for name in FUNCTIONS] == [expected] * 2
    assert train(gpu)[0] == ([*FUNCTIONS] if expected == 'triton' else [])
    assert train(gpu) == ([*FUNCTIONS] if expected == 'triton' else [], [])


def slower(which: str, gpu: FakeGPU) -> Callable:
    """A clock for which only one of the fused functions is slow."""
    time = gpu.time

    def clock(candidate: Any, *rest: Any) -> float:
        function = getattr(candidate, 'func', None)
        gpu.milliseconds['triton'] = 9.0 if getattr(function, '__qualname__', '') and is_named(function, which) else 2.0
        return time(candidate, *rest)

    return clock


def is_named(function: Any, which: str) -> bool:
    cells = getattr(function, '__closure__', None) or ()
    return which in [cell.cell_contents for cell in cells]


@pytest.mark.parametrize('which', FUNCTIONS)
def test_each_function_is_chosen_by_itself(gpu: FakeGPU, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused forward and backward by branch, or the reverse: what is kept between them is the same."""
    monkeypatch.setattr(fastest, '_milliseconds', slower(which, gpu))
    train(gpu)
    assert [taken(name) for name in FUNCTIONS] == [('branches' if name == which else 'triton') for name in FUNCTIONS]
    used, _ = train(gpu)
    assert which not in used
    assert ({*FUNCTIONS} - {which}) <= {*used}


@pytest.mark.parametrize('how', ['variable', 'deterministic', 'capturing'])
def test_where_nothing_may_be_timed_the_fused_one_is_taken(
    gpu: FakeGPU, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.milliseconds['branches'] = 0.1
    if how == 'variable':
        monkeypatch.setenv('MMUNI_DW_TUNE', '0')
    elif how == 'deterministic':
        torch.use_deterministic_algorithms(True)
    else:
        monkeypatch.setattr(fastest, 'is_capturing', lambda *_: True)
    assert train(gpu) == ([*FUNCTIONS], [])


def test_it_can_be_forced(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.milliseconds['branches'] = 0.1
    monkeypatch.setenv('MMUNI_DW_BACKEND', 'triton')
    assert train(gpu) == ([*FUNCTIONS], [])


def test_branches_that_do_not_fit_are_not_timed(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is that remembered: another time there may be room."""
    gpu.milliseconds['branches'] = 0.1
    monkeypatch.setattr(block_backends, '_fits', lambda x: False)
    ran: list[str] = []
    monkeypatch.setattr(fastest, '_milliseconds', partial(refusing, gpu, ran))
    assert train(gpu)[0] == [name for name in FUNCTIONS for _ in range(2)]  # timed, and run
    assert ran == ['triton'] * 2
    assert [taken(name) for name in FUNCTIONS] == [None] * 2
    monkeypatch.setattr(block_backends, '_fits', lambda x: True)
    monkeypatch.setattr(fastest, '_milliseconds', gpu.time)
    train(gpu)
    assert [taken(name) for name in FUNCTIONS] == ['branches'] * 2


def refusing(gpu: FakeGPU, ran: list[str], candidate: Any, *rest: Any) -> float:
    milliseconds = gpu.time(candidate, *rest)
    ran.append(gpu.timed[-1])
    return milliseconds


@pytest.mark.parametrize(('free', 'reserved', 'allocated', 'expected'), [
    (1000, 0, 0, False), (32 * 720 + 1, 0, 0, True), (1000, 30000, 1000, True), (1000, 30000, 29000, False),
])  # fmt: skip
def test_what_fits(free: int, reserved: int, allocated: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into what is free, and what torch keeps of what was."""
    x: Any = SimpleNamespace(device=torch.device('cuda', 0), numel=lambda: 720)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (free, 10 * free))
    monkeypatch.setattr(torch.cuda, 'memory_reserved', lambda device: reserved)
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda device: allocated)
    assert block_backends._fits(x) == expected


class Peak(TorchDispatchMode):
    """``bytes`` are the most that new tensors have had at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.live = {key: kept for key, kept in self.live.items() if not kept[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.live.values()))
        return out


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_what_the_branches_take(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without memory, which are not on the CPU: no more than is held to be free, and not much less."""
    monkeypatch.setattr(dilated_reparam, 'compute_block', lambda name, plain, *_: plain())
    x, weight = torch.empty(4, 32, 64, 64, dtype=dtype, device='meta'), torch.empty(32 * (49 + 25 + 9), device='meta')
    gamma = torch.empty(3, 32, device='meta')
    static, taken = ([7, 5, 3], [1, 1, 2], [1e-5] * 3, 'torch'), []
    for function, args in (
        (dilated_reparam._forward, (x, weight, gamma, gamma[0])),
        (dilated_reparam._backward, (x, x, weight, gamma, gamma, gamma, None, None, 64.0, True)),
    ):
        with Peak() as peak:
            function(*args, *static)
        taken.append(peak.bytes / x.numel())
    assert block_backends.SCRATCH / 2 < max(taken) < block_backends.SCRATCH


def test_want_of_memory_while_timing(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch, recwarn: Any) -> None:
    """The fused block is taken, without a word, and the memory of the other one is freed."""
    freed: list[int] = []
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: freed.append(1))
    monkeypatch.setattr(fastest, '_milliseconds', partial(short_of_memory, gpu))
    assert {*train(gpu)[0]} == {*FUNCTIONS}
    assert (len(freed), [taken(name) for name in FUNCTIONS]) == (2, [None] * 2)
    assert not recwarn.list


def short_of_memory(gpu: FakeGPU, candidate: Any, *rest: Any) -> float:
    if gpu.label_of(candidate) == 'branches':
        raise SHORT
    return gpu.time(candidate, *rest)


def test_want_of_memory_later(gpu: FakeGPU) -> None:
    """Where the branches were faster, but do not fit any more, the fused block is taken from then on."""
    gpu.milliseconds['branches'] = 0.1
    train(gpu)
    assert train(gpu)[0] == []
    kernel, x = [7, 5, 3, 3], inputs_of(BLOCK).x
    tried: list[int] = []

    def plain() -> Tensor:
        tried.append(1)
        raise SHORT

    gpu.backends['triton'].block_forward = lambda *args: torch.ones(args)  # type: ignore[attr-defined]
    for _ in range(3):
        y = block_backends.compute_block('block_forward', plain, 'auto', x, kernel, [1, 1, 2, 3], (2, 3))
        assert (tuple(y.shape), tried) == ((2, 3), [1])


def test_an_error_of_the_branches_is_told(gpu: FakeGPU) -> None:
    gpu.milliseconds['branches'] = 0.1
    train(gpu)

    def plain() -> None:
        raise RuntimeError('of torch')

    gpu.backends['triton'].block_forward = lambda *args: pytest.fail('it was hidden')  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match='of torch'):
        block_backends.compute_block('block_forward', plain, 'auto', inputs_of(BLOCK).x, [7, 5, 3, 3], [1, 1, 2, 3], ())


def test_a_fused_block_that_fails_in_timing_is_given_up(gpu: FakeGPU) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError('ptxas fatal')

    gpu.backends['triton'].block_forward = fail  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match='the triton kernels fail in the block_forward of a 7x7 kernel') as caught:
        assert 'block_forward' not in train(gpu)[0]
    assert len(caught) == 1
    assert train(gpu)[0] == ['block_backward']


def test_synchronised_processes_may_choose_differently(gpu: FakeGPU, process_group: None) -> None:
    """No all-reduce is inside of what is timed, so that their number and sizes are the same."""
    reduced: list[tuple[int, bool]] = []
    all_reduce = torch.distributed.all_reduce

    def counted(tensor: Tensor, **options: Any) -> Any:
        reduced.append((tensor.numel(), fastest.is_timing()))
        return all_reduce(tensor, **options)

    torch.distributed.all_reduce = counted
    try:
        seen = []
        for branches in (9.0, 0.1):
            fastest.clear()
            gpu.milliseconds['branches'] = branches
            for _ in range(2):
                reduced.clear()
                used, _ = train(gpu, torch.distributed.group.WORLD)
                seen.append([*reduced])
            assert ({*used} == {'block_stats', 'block_sums', 'block_backward'}) == (branches == 9.0)
    finally:
        torch.distributed.all_reduce = all_reduce
    assert seen == [[(2 * 4 * 4 + 1, False), (4 * 4 + 4, False)]] * 4


def test_a_check_that_memory_was_too_short_for_is_made_again(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = iter([SHORT, ''])

    def check(*_: Any) -> str:
        problem = next(problems)
        if isinstance(problem, Exception):
            raise problem
        return problem

    monkeypatch.setattr(backends, '_checked', {})
    monkeypatch.setattr(backends, 'self_check', check)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA H200')
    device = torch.device('cuda', 0)
    assert backends.why_no_block('triton', device) == backends.NO_MEMORY
    assert not backends.is_checked('triton', device, 'block')
    assert backends.why_no_block('triton', device) == ''
    assert backends.is_checked('triton', device, 'block')
