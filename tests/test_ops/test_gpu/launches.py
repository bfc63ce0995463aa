"""What the functions of the GPU package launch, for maps of any size: recorded on meta tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from . import machine_code


class Launch(NamedTuple):
    """One kernel with its arguments."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def arguments(self) -> dict[str, Any]:
        """By name."""
        return dict(self.kernel.signature.bind_partial(*self.args).arguments) | self.kwargs

    def code(self, capability: int, folder: Path, trips: int = 1) -> machine_code.Code:
        """Compile it as a launch on a GPU of this compute capability would, and read the machine code."""
        target = GPUTarget('cuda', capability, 32)
        backend = CUDABackend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = bind(*self.args, **self.kwargs)
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, dict(self.kwargs), bound, specialization, options
        )
        source = ASTSource(self.kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=target, options=options.__dict__)
        return machine_code.read(machine_code.Launch(self.name, self.grid, bound, compiled), folder, trips)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launch nothing, and list what would have been launched."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(kernel, grid, args, kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, 'run', record)
        yield launches


def launches_of(function: Callable, *args: Any) -> list[Launch]:
    """What ``function`` launches."""
    with recorded() as launches:
        function(*args)
    return launches
