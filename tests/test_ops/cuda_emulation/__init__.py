"""The shipped CUDA kernels on the CPU: compiled by a C++ compiler, run on the machine of ``machine.cpp``."""

from __future__ import annotations

import ctypes
import random
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from mmunireplknet.ops import build

HERE = Path(__file__).resolve().parent
SOURCES = Path(build.__file__).resolve().parent / 'csrc' / 'cuda'
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Shape(ctypes.Structure):
    """As in job.h."""

    _fields_ = [(name, ctypes.c_int) for name in ('n', 'c', 'h', 'w', 'kernel', 'dilation')]


class Sums(ctypes.Structure):
    """As in job.h."""

    _fields_ = [('partial', ctypes.c_void_p), ('out', ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ('size', 'count', 'between', 'apart')
    ]


def compile_emulation(folder: Path, program: str, sources: Path = SOURCES) -> ctypes.CDLL:
    """The machine with ``program``, 'emulate' or 'checks', as a library."""
    library = folder / f'{program}.so'
    command = [*build.compiler(), '-std=c++17', '-O1', '-w', '-fPIC', '-shared', f'-I{HERE}', f'-I{sources}']
    files = [str(HERE / f'{name}.cpp') for name in ('machine', program)]
    subprocess.run([*command, *files, '-o', str(library)], check=True)
    return ctypes.CDLL(str(library))


class Emulation:
    """The operators of operators.cpp, for tensors on the CPU.

    Attributes:
        processors: Of the GPU; with 0, one block has all the tiles of a channel.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.processors = 0
        library.conflicts.restype = library.copies.restype = ctypes.c_int64
        for name in ('forward', 'weight_grad', 'add_up'):
            getattr(library, name).restype = ctypes.c_char_p

    def _begin(self, *tensors: Tensor | None) -> list[ctypes.c_void_p]:
        """Pointers of tensors, which alone may be touched."""
        self.library.forget()
        for t in tensors:
            if t is None:
                continue
            for image in t if t.dim() == 4 else [t]:  # there may be much memory between two of them
                reach = sum((size - 1) * step for size, step in zip(image.shape, image.stride(), strict=True)) + 1
                self.library.allow(ctypes.c_void_p(image.data_ptr()), ctypes.c_size_t(reach * t.element_size()))
        self.library.set_up(random.randrange(2**31), self.processors)
        return [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]

    def _end(self, problem: bytes) -> None:
        if problem:
            raise RuntimeError(problem.decode())

    def add_up(self, partial: Tensor, out: Tensor, between: int, apart: int) -> None:
        """As ``add`` of operators.cpp: sum i is that of ``partial`` at i * between + j * apart."""
        pointers = self._begin(partial, out)
        job = Sums(*pointers, out.numel(), partial.numel() // out.numel(), between, apart)
        self._end(self.library.add_up(ctypes.byref(job)))

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        sums: Tensor | None,
        kernel: int,
        dilation: int,
        flip: bool,
        tf32: bool,
    ) -> None:
        """As the operator of operators.cpp."""
        out.fill_(torch.nan)
        shape = ctypes.byref(Shape(*x.shape, kernel, dilation))
        partial = None if sums is None else torch.full((*x.shape[:2], self.library.subtiles(shape)), torch.nan)
        p = self._begin(x, weight, bias, out, partial)
        self._end(
            self.library.forward(
                TYPES[x.dtype], p[0], _strides(x), p[1], TYPES[weight.dtype], p[2],
                0 if bias is None else TYPES[bias.dtype], p[3], _strides(out), p[4], shape, flip, not tf32,
            )
        )  # fmt: skip
        if sums is not None and partial is not None:
            self.add_up(partial, sums, partial.shape[-1], 1)

    def planned_sets(self, x: Tensor, out: Tensor, kernel: int) -> int:
        """In how many sets of rows a warp makes the outputs."""
        self._begin()
        shape = ctypes.byref(Shape(*x.shape, kernel, 1))
        return self.library.planned_sets(TYPES[x.dtype], _strides(x), _strides(out), shape)

    def weight_grad(self, x: Tensor, grad: Tensor, out: Tensor, kernel: int, dilation: int, tf32: bool) -> None:
        """As the operator of operators.cpp."""
        shape = ctypes.byref(Shape(*x.shape, kernel, dilation))
        self._begin()
        partial = torch.full((self.library.weight_grad_parts(TYPES[x.dtype], shape), *out.shape), torch.nan)
        p = self._begin(x, grad, partial)
        self._end(
            self.library.weight_grad(
                TYPES[x.dtype], p[0], _strides(x), p[1], _strides(grad), p[2], shape, not tf32
            )
        )  # fmt: skip
        self.add_up(partial, out, 1, out.numel())


def _strides(t: Tensor) -> ctypes.Array:
    """As operators.cpp passes them: where there is one column alone, its distance to the next may be anything."""
    return (ctypes.c_int64 * 4)(*t.stride()[:3], 1 if t.shape[3] == 1 else t.stride(3))
