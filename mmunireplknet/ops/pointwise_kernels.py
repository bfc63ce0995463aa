"""Which kernels compute the pointwise half of a block: those for the CPU, those in Triton on a GPU, or none.

On a GPU they are checked once against torch, apart from the convolutions. What fails later is computed by torch, and
the kernels are not taken again.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import FlopCounterMode

from . import backends, coefficients, fastest, passes

__all__ = ['are_triton', 'coefficients_for', 'passes_for', 'suits', 'why_not']

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_failures: list[str] = []


def suits(x: Tensor, synchronised: bool = False) -> bool:
    """Whether there are Triton kernels for maps like ``x``, which work, and which may be taken now.

    They are no operators of torch: whatever looks at operators, a compiler for one, gets torch's layers instead.

    Args:
        x: A map.
        synchronised: Whether processes take statistics together. One whose kernels fail then stays with the fused
            operators, which torch computes: its layers call other collectives, and all processes would wait for ever.
    """
    if not backends.is_on_gpu(x) or x.dtype not in DTYPES or torch.compiler.is_compiling() or type(x) is not Tensor:
        return False
    mode = _get_current_dispatch_mode()
    if mode is not None and not _counts_flops(mode):
        return False
    return backends._wanted() != 'torch' and (synchronised or not _failures) and not why_not(x.device)


def _counts_flops(mode: Any) -> bool:
    return isinstance(mode, FlopCounterMode) or isinstance(getattr(mode, 'counter', None), FlopCounterMode)


def why_not(device: torch.device) -> str:
    """Why the Triton kernels cannot be used on this GPU; empty where they can."""
    if not backends.is_checked('triton', device, 'pointwise'):
        if reason := backends._why_not_there('triton'):
            return reason
        if fastest.is_capturing(device):
            return 'they are not checked yet, and a check cannot be captured into a graph.'
    return backends._checked_on_gpu('triton', device, 'pointwise')


def are_triton(x: Tensor) -> bool:
    """Whether maps like ``x`` are for the Triton kernels, which take the layout NCHW, too, and maps of two dtypes."""
    return backends.is_on_gpu(x)


def passes_for(x: Tensor) -> Any:
    """What has the functions of ``passes`` for maps on the device of ``x``; on the CPU all but ``moments``."""
    return _triton if are_triton(x) else torch.ops.mmuni_cpu


def coefficients_for(x: Tensor) -> Any:
    """What has the functions of ``coefficients`` for maps on the device of ``x``."""
    return _triton if are_triton(x) else coefficients


class _Guarded:
    """The functions in Triton; from the first that fails, those of torch."""

    def __getattr__(self, name: str) -> Any:
        return functools.partial(self._call, name)

    @staticmethod
    def _call(name: str, *args: Any, **options: Any) -> Any:
        if not _failures:
            try:
                return getattr(backends.module_of('triton'), name)(*args, **options)
            except Exception as error:  # of triton's compiler, of the driver: whatever it is, torch computes without it
                if fastest.is_out_of_memory(error) or fastest.is_capturing():
                    raise  # torch needs no less of it; and a graph is lost
                _give_up(name, error)
        return _PLAIN[name](*args, **options)


def _give_up(name: str, error: Exception) -> None:
    _failures.append(name)
    warnings.warn(
        f'mmunireplknet: the triton kernels of the pointwise layers fail in {name}, and are not used any more: '
        f'{type(error).__name__}: {error}',
        stacklevel=2,
    )


_PLAIN = {name: getattr(module, name) for module in (passes, coefficients) for name in module.__all__}
_triton = _Guarded()
