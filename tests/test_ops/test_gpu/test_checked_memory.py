"""What the check of interpreted kernels finds, and what it lets pass."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from .interpreted import interpreting


def copy(source, target, size, SHIFT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + place + SHIFT, mask=place < size, other=0.0)
    tl.store(target + place, value, mask=place < size)


def turn(memory, size: tl.constexpr, WAIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Through memory: threads read what others have written."""
    place = tl.program_id(0) * size + tl.arange(0, size)
    tl.store(memory + place, tl.program_id(0).to(tl.float32) + tl.zeros((size,), tl.float32))
    if WAIT:
        tl.debug_barrier()
    tl.store(memory + place, tl.load(memory + tl.program_id(0) * size + size - 1 - tl.arange(0, size)))


def total(source, target, size: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.atomic_add(target, tl.sum(tl.load(source + tl.arange(0, size)), axis=0))


def spread(target, size: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Neighbouring threads write to the same place where STEP is 2."""
    tl.store(target + tl.arange(0, size) // STEP, tl.arange(0, size).to(tl.float32))


def ones(target, size: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(target + tl.arange(0, size), (tl.arange(0, size) < 16).to(target.dtype.element_ty))


@pytest.fixture
def kernels() -> Iterator[SimpleNamespace]:
    with triton.knobs.runtime.scope(), interpreting():
        triton.knobs.runtime.interpret = True
        yield SimpleNamespace(**{f.__name__: triton.jit(f) for f in (copy, turn, total, spread, ones)})


def test_lets_pass_what_is_right(kernels: SimpleNamespace) -> None:
    source, target = torch.randn(37), torch.zeros(37)
    kernels.copy[(3,)](source, target, 37, 0, 16)
    assert torch.equal(target, source)
    kernels.copy[(3,)](source, source, 37, 0, 16)  # in place, and once more: launches come one after the other
    kernels.turn[(2,)](target, 16, True)
    assert target[:32].tolist() == [0.0] * 16 + [1.0] * 16
    kernels.spread[(1,)](target, 16, 1)


@pytest.mark.parametrize('shift', [-1, 1])
def test_finds_reads_beside_a_tensor(kernels: SimpleNamespace, shift: int) -> None:
    with pytest.raises(InterpreterError, match=r'reads \[\d+, \d+\), but the tensors are argument 0'):
        kernels.copy[(3,)](torch.randn(37), torch.zeros(37), 37, shift, 16)


def test_finds_writes_behind_a_tensor(kernels: SimpleNamespace) -> None:
    with pytest.raises(InterpreterError, match='writes'):
        kernels.copy[(3,)](torch.randn(40), torch.zeros(37), 40, 0, 16)


def test_finds_programs_that_touch_the_same_element(kernels: SimpleNamespace) -> None:
    memory = torch.randn(48)
    with pytest.raises(InterpreterError, match='program 2 writes what another one reads: element 16'):
        kernels.copy[(2,)](memory, memory, 32, 1, 16)
    with pytest.raises(InterpreterError, match='program 2 reads what another one writes: element 16'):
        kernels.copy[(2,)](memory[1:], memory[1:], 32, -1, 16)
    with pytest.raises(InterpreterError, match='program 2 writes what another one writes: element 0 '):
        kernels.spread[(2,)](memory, 16, 1)


def test_finds_a_barrier_that_is_not_there(kernels: SimpleNamespace) -> None:
    with pytest.raises(InterpreterError, match='without a barrier'):
        kernels.turn[(2,)](torch.zeros(32), 16, False)


def test_finds_two_threads_that_write_to_one_place(kernels: SimpleNamespace) -> None:
    with pytest.raises(InterpreterError, match='writes an element twice at once'):
        kernels.spread[(1,)](torch.zeros(16), 16, 2)


def test_refuses_atomic_operations(kernels: SimpleNamespace) -> None:
    with pytest.raises(InterpreterError, match='atomic'):
        kernels.total[(1,)](torch.zeros(16), torch.zeros(1), 16)


def test_memory_is_poisoned(kernels: SimpleNamespace) -> None:
    """What no kernel writes is seen."""
    assert torch.zeros(3).new_empty(2, 3).isnan().all()
    assert torch.empty_like(torch.zeros(3, dtype=torch.float16)).isnan().all()
    assert torch.empty(3, dtype=torch.bfloat16).isnan().all()


def test_bfloat16_is_as_on_a_gpu(kernels: SimpleNamespace) -> None:
    source = torch.cat(
        [torch.randn(24), torch.tensor([torch.nan, torch.inf, 1.00390625, 1.01171875, 0.0, -0.0, 3e38, 1e-40])]
    )
    target = torch.zeros(32, dtype=torch.bfloat16)
    kernels.copy[(2,)](source, target, 32, 0, 16)
    torch.testing.assert_close(target, source.bfloat16(), rtol=0, atol=0, equal_nan=True)
    kernels.ones[(1,)](target, 32)
    assert target.tolist() == [1.0] * 16 + [0.0] * 16
