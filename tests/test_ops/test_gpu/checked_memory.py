"""What ``compute-sanitizer`` checks on a GPU, for kernels in Triton's interpreter.

Every address that a program reads or writes must lie in a tensor that the kernel was given. In one launch no two
programs may touch the same element if one of them writes it, since nothing orders them; a program may read what it has
written only behind ``tl.debug_barrier``, since another of its threads may have written it; and one store may name an
element only once. New memory holds NaN, so that reading what nobody has written shows. Atomics are refused: no kernel
of ours has any, so that its results are the same at every call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter


class WrongAccess(AssertionError):
    """A kernel has touched memory in a way that is wrong on a GPU."""


class _Region:
    """The storage of a tensor that a kernel was given, and who has touched it in this launch."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.name, self.itemsize = name, tensor.element_size()
        self.start, self.end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        count = storage.nbytes() // self.itemsize
        self.writer, self.reader = np.zeros(count, np.int32), np.zeros(count, np.int32)  # program; 0: none; -1: several
        self.written, self.slot = np.zeros(count, np.int32), np.empty(count, np.int32)


class Checker:
    """Of one launch after the other."""

    def __init__(self) -> None:
        self.regions: list[_Region] = []
        self.program = self.period = 0  # a period ends with a barrier, or with the program

    def launch(self, tensors: dict[str, torch.Tensor]) -> None:
        self.regions, self.program, seen = [], 0, set()
        for name, tensor in tensors.items():
            place = tensor.untyped_storage().data_ptr()
            if place not in seen and tensor.untyped_storage().nbytes():
                seen.add(place)
                self.regions.append(_Region(name, tensor))

    def next_program(self) -> None:
        self.program += 1
        self.period += 1

    def _elements(self, addresses: np.ndarray, itemsize: int, verb: str) -> tuple[_Region, np.ndarray]:
        low, high = int(addresses.min()), int(addresses.max()) + itemsize
        for region in self.regions:
            if region.start <= low and high <= region.end:
                break
        else:
            known = ', '.join(f'{region.name} [{region.start}, {region.end})' for region in self.regions)
            raise WrongAccess(f'program {self.program} {verb} [{low}, {high}), but the tensors are {known}')
        if itemsize != region.itemsize or ((addresses - region.start) % itemsize).any():
            raise WrongAccess(f'program {self.program} {verb} parts of the elements of {region.name}')
        return region, ((addresses - region.start) // itemsize).astype(np.int64)

    def _refuse(self, wrong: np.ndarray, region: _Region, where: np.ndarray, what: str) -> None:
        if wrong.any():
            first = where[wrong][0]
            raise WrongAccess(
                f'program {self.program} {what}: element {first} of the storage of {region.name}, {wrong.sum()} in all'
            )

    def read(self, addresses: np.ndarray, itemsize: int) -> None:
        region, where = self._elements(addresses, itemsize, 'reads')
        writer, reader = region.writer[where], region.reader[where]
        self._refuse((writer != 0) & (writer != self.program), region, where, 'reads what another one writes')
        fresh = (writer == self.program) & (region.written[where] == self.period)
        self._refuse(fresh, region, where, 'reads what it has written, without a barrier')
        region.reader[where] = np.where((reader == 0) | (reader == self.program), self.program, -1)

    def write(self, addresses: np.ndarray, itemsize: int) -> None:
        region, where = self._elements(addresses, itemsize, 'writes')
        for others, verb in ((region.writer[where], 'writes'), (region.reader[where], 'reads')):
            wrong = (others != 0) & (others != self.program)
            self._refuse(wrong, region, where, f'writes what another one {verb}')
        order = np.arange(len(where), dtype=np.int32)
        region.slot[where] = order
        self._refuse(region.slot[where] != order, region, where, 'writes an element twice at once')
        region.writer[where], region.written[where] = self.program, self.period


def _tensors(args: list, kwargs: dict) -> Iterator[tuple[str, torch.Tensor]]:
    for name, arg in [*((f'argument {i}', arg) for i, arg in enumerate(args)), *kwargs.items()]:
        if isinstance(arg, tuple):
            yield from _tensors([*arg], {})
        elif isinstance(arg, torch.Tensor):
            yield name, arg


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_and_fill(*args: Any, **options: Any) -> torch.Tensor:
        memory = allocate(*args, **options)
        return memory.fill_(torch.nan) if memory.is_floating_point() and memory.device.type == 'cpu' else memory

    return allocate_and_fill


@contextlib.contextmanager
def checked_memory() -> Iterator[None]:
    """Meanwhile interpreted kernels are checked; one that is wrong raises an ``InterpreterError``."""
    checker = Checker()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    begin, load, store, move = (
        executor._init_args_hst, builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx,
    )  # fmt: skip

    def launched(self: Any, args: tuple, kwargs: dict) -> tuple[list, dict]:
        there = begin(self, args, kwargs)
        checker.launch(dict(_tensors(*there)))
        return there

    def moved(self: Any, *place: int) -> None:
        checker.next_program()
        move(self, *place)

    def loaded(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        if (addresses := ptrs.data[mask.data]).size:
            checker.read(addresses, ptrs.get_element_ty().primitive_bitwidth // 8)
        return load(self, ptrs, mask, *rest)

    def stored(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if (addresses := ptrs.data[mask.data]).size:
            checker.write(addresses, ptrs.get_element_ty().primitive_bitwidth // 8)
        return store(self, ptrs, value, mask, *rest)

    def waited(self: Any) -> None:
        checker.period += 1

    def refused(self: Any, *_: Any) -> None:
        raise WrongAccess('an atomic operation: the order of the sums, and so their last bits, would vary')

    with pytest.MonkeyPatch.context() as patch:
        for place, name in ((torch, 'empty'), (torch, 'empty_like'), (torch.Tensor, 'new_empty')):
            patch.setattr(place, name, _poisoned(getattr(place, name)))
        patch.setattr(executor, '_init_args_hst', launched)
        for name, function in [
            ('set_grid_idx', moved), ('create_masked_load', loaded), ('create_masked_store', stored),
            ('create_barrier', waited), ('create_atomic_rmw', refused), ('create_atomic_cas', refused),
        ]:  # fmt: skip
            patch.setattr(builder, name, function)
        yield
