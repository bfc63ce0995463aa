"""The pointwise half of a block as on a GPU: by Triton's interpreter, on maps in the memory of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from torch import Tensor

from mmunireplknet.ops import backends, pointwise_kernels


@contextmanager
def pointwise_on_gpu(patch: pytest.MonkeyPatch, triton: object) -> Iterator[list[str]]:
    """Maps count as on a GPU whose convolutions torch computes; ``triton`` has the functions of ``gpu.backend``.

    Returns:
        The functions of ``triton`` that were called since.
    """
    calls: list[str] = []
    module_of = backends.module_of

    class Recorded(SimpleNamespace):
        def __getattr__(self, name: str) -> object:
            calls.append(name)
            return getattr(triton, name)

    patch.setattr(backends, 'module_of', lambda name: Recorded() if name == 'triton' else module_of(name))
    patch.setattr(backends, 'is_on_gpu', lambda x: x.device.type in ('cpu', 'cuda', 'meta'))
    patch.setattr(backends, 'suits_cpp', lambda x: False)
    patch.setattr(backends, '_why_not_on_gpu', lambda name, device: 'torch convolves.')
    patch.setattr(pointwise_kernels, 'why_not', lambda device: '')
    patch.setattr(pointwise_kernels, '_failures', [])
    yield calls
    assert pointwise_kernels._failures == []  # otherwise torch has computed, and everything looks right


def in_layout(x: Tensor, planes: bool) -> Tensor:
    """A map (N, H, W, C) as a view of one in NCHW, or in contiguous memory."""
    return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) if planes else x.contiguous()
