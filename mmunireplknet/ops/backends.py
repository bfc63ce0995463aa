"""Which implementations of the large depthwise convolution there are, which work here, and which is taken when.

``torch`` is always there. ``cpp`` are the compiled CPU kernels in ``csrc/cpu``, built by ``setup.py`` or by
``python -m mmunireplknet.ops.build``. ``triton`` and ``cuda`` are names kept for kernels that this version lacks.
"""

from __future__ import annotations

import functools
import os
import warnings

import torch
from torch import Tensor

from .self_check import self_check

__all__ = ['BACKENDS', 'choose', 'require', 'suits_cpp', 'why_not']

BACKENDS = ('torch', 'cpp', 'triton', 'cuda')
_CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(backend: str) -> str:
    """Why ``backend`` cannot be used here; empty where it can.

    Raises:
        ValueError: There is no such backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f'backend={backend!r} is unknown: it must be auto, {", ".join(BACKENDS)}.')
    if backend == 'torch':
        return ''
    return _why_not_cpp() if backend == 'cpp' else f'this version of mmunireplknet has no {backend} kernels.'


@functools.cache
def _why_not_cpp() -> str:
    from . import build  # not at the top: python -m mmunireplknet.ops.build warns of a module that is there already

    file = build.library_file()
    if file is None:
        return f'the CPU kernels are not built: {build.why_not() or "run python -m mmunireplknet.ops.build."}'
    try:
        torch.ops.load_library(str(file))
        for name in ('forward', 'weight_grad', 'block_forward', 'block_backward', 'apply', 'grad', 'sums'):
            torch.library.register_fake(f'mmuni_cpu::{name}', lambda *_: None)  # they write into what they are given
        problem = self_check()
    except (OSError, RuntimeError) as error:
        problem = f'{file} does not work: {error}'
    if problem:
        warnings.warn(f'mmunireplknet: the compiled CPU kernels are not used: {problem}', stacklevel=2)
    return problem


def require(backend: str) -> None:
    """Check that ``backend`` works here.

    Raises:
        RuntimeError: It does not, with the reason.
        ValueError: There is no such backend.
    """
    if reason := why_not(backend):
        raise RuntimeError(f'backend {backend!r} of depthwise_conv2d cannot be used: {reason}')


def choose(backend: str, x: Tensor, kernel: int) -> str:
    """The backend for a map ``x`` (N, C, H, W) and a KxK kernel.

    ``auto`` reads ``MMUNI_DW_BACKEND``; where that says nothing it takes what was measured to be the fastest for
    device, dtype, layout and size (docs/benchmarks.md).

    Raises:
        RuntimeError: The backend that is asked for cannot be used here, or not for such a map.
        ValueError: It is unknown.
    """
    if backend == 'auto':
        backend = _wanted()
    if backend == 'auto':
        return 'cpp' if suits_cpp(x) and not _torch_is_faster(x, kernel) else 'torch'
    require(backend)
    if backend == 'cpp' and x.device.type != 'cpu':
        raise RuntimeError(f"backend 'cpp' computes on the CPU, but the input is on {x.device}.")
    if backend == 'cpp' and x.dtype not in _CPP_DTYPES:
        return 'torch'  # float64, the precision of references
    return backend


def suits_cpp(x: Tensor) -> bool:
    """Whether the compiled CPU kernels are here, not switched off, and made for maps like ``x``."""
    return x.device.type == 'cpu' and x.dtype in _CPP_DTYPES and _cpp_is_usable()


@torch.compiler.assume_constant_result
def _wanted() -> str:
    return os.environ.get('MMUNI_DW_BACKEND') or 'auto'


@torch.compiler.assume_constant_result
def _cpp_is_usable() -> bool:
    return _wanted() in ('auto', 'cpp') and not _why_not_cpp()


def _torch_is_faster(x: Tensor, kernel: int) -> bool:
    """Whether oneDNN wins: a 3x3 kernel on a large channels_last map, which is all memory traffic."""
    return kernel == 3 and x.dtype == torch.float32 and x.stride(1) == 1 and x.shape[2] * x.shape[3] > 1024
