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
PROCESSORS = 1  # few, so that blocks have several tiles


class Shape(ctypes.Structure):
    """As in job.h."""

    _fields_ = [(name, ctypes.c_int) for name in ('n', 'c', 'h', 'w', 'kernel', 'dilation')]


class Sums(ctypes.Structure):
    """As in job.h."""

    _fields_ = [('partial', ctypes.c_void_p), ('out', ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ('size', 'count', 'between', 'apart')
    ]


def compile_emulation(folder: Path, flags: tuple[str, ...] = ()) -> Path:
    """Build the library; ``flags`` come last."""
    library = folder / 'emulation.so'
    command = [*build.compiler(), '-std=c++17', '-O1', '-fPIC', '-shared', f'-I{HERE}', f'-I{SOURCES}', *flags]
    subprocess.run([*command, *map(str, HERE.glob('*.cpp')), '-o', str(library)], check=True)
    return library


class Emulation:
    """Functions like those of the CUDA backend, for tensors on the CPU."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        for name in ('forward', 'weight_grad', 'add_up'):
            getattr(self.library, name).restype = ctypes.c_char_p

    def _begin(self, *tensors: Tensor | None) -> list[ctypes.c_void_p]:
        """Pointers of tensors, which alone may be touched."""
        self.library.forget()
        for t in tensors:
            if t is not None and t.numel():
                reach = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True)) + 1
                self.library.allow(ctypes.c_void_p(t.data_ptr()), ctypes.c_size_t(reach * t.element_size()))
        self.library.set_up(random.randrange(2**31), PROCESSORS)
        return [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]

    def _end(self, problem: bytes) -> None:
        if problem:
            raise RuntimeError(problem.decode())

    def _sum(self, partial: Tensor, out: Tensor, between: int, apart: int) -> None:
        pointers = self._begin(partial, out)
        job = Sums(*pointers, out.numel(), partial.numel() // out.numel(), between, apart)
        self._end(self.library.add_up(ctypes.byref(job)))

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dilation: int,
        flipped: bool = False,
        layout: torch.memory_format | None = None,
        exact: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Output, in ``layout`` or in that of ``x``, and the sums of its planes."""
        out = torch.empty_like(x) if layout is None else torch.empty_like(x, memory_format=layout)
        out.fill_(torch.nan)
        shape = Shape(*x.shape, weight.shape[-1], dilation)
        partial = torch.full((*x.shape[:2], self.library.subtiles(ctypes.byref(shape))), torch.nan)
        weight = weight.contiguous()
        p = self._begin(x, weight, bias, out, partial)
        strides = [(ctypes.c_int64 * 4)(*t.stride()) for t in (x, out)]
        bias_type = 0 if bias is None else TYPES[bias.dtype]
        self._end(
            self.library.forward(
                TYPES[x.dtype], p[0], strides[0], p[1], TYPES[weight.dtype], p[2], bias_type, p[3], strides[1], p[4],
                ctypes.byref(shape), ctypes.c_bool(flipped), ctypes.c_bool(exact),
            )
        )  # fmt: skip
        sums = torch.empty(x.shape[:2])
        self._sum(partial, sums, partial.shape[-1], 1)
        return out, sums

    def weight_grad(self, x: Tensor, grad: Tensor, kernel: int, dilation: int, exact: bool = True) -> Tensor:
        """(C, 1, K, K) in float32."""
        shape = ctypes.byref(Shape(*x.shape, kernel, dilation))
        self._begin()
        parts = self.library.weight_grad_parts(TYPES[x.dtype], shape)
        partial = torch.full((parts, x.shape[1], 1, kernel, kernel), torch.nan)
        p = self._begin(x, grad, partial)
        strides = [(ctypes.c_int64 * 4)(*t.stride()) for t in (x, grad)]
        self._end(
            self.library.weight_grad(
                TYPES[x.dtype], p[0], strides[0], p[1], strides[1], p[2], shape, ctypes.c_bool(exact)
            )
        )
        out = torch.empty(partial.shape[1:])
        self._sum(partial, out, 1, out.numel())
        return out
