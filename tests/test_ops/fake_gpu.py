"""A GPU that is the CPU, with backends that compute by torch, say what they were asked for, and can be told to fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmunireplknet.ops import backends, fastest, reference


class FakeBackend:
    """A backend as ``backends`` describes it; ``calls`` are the functions that were called, in order.

    Attributes:
        fails: Raised instead of a result.
        reason: Why a map is not supported.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: Exception | None = None
        self.reason = ''

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.fails is not None:
            raise self.fails

    def supports(self, x: Tensor, kernel: int, dilation: int) -> str:
        return 'it has no kernels for float64.' if x.dtype == torch.float64 else self.reason

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, flipped: bool = False) -> Tensor:
        self._call('input_grad' if flipped else 'forward')
        return reference.forward(x, weight, bias, dilation, flipped)

    def weight_grad(self, x: Tensor, grad: Tensor, kernel: int, dilation: int) -> Tensor:
        self._call('weight_grad')
        return reference.weight_grad(x, grad, kernel, dilation)


class PoolingBackend(FakeBackend):
    """One whose forward also sums, and which has the function of the Dilated Reparam Block."""

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, flipped: bool = False,
        pooled: bool = False, layout: torch.memory_format | None = None,
    ) -> Any:  # fmt: skip
        y = super().forward(x, weight, bias, dilation, flipped)
        if layout is not None:
            y = y.contiguous(memory_format=layout)
        if not pooled:
            return y
        self.calls.append('pooled')
        exact = reference.convolve(x.double(), weight.double(), None if bias is None else bias.double(), dilation)
        return y, exact.sum((2, 3)).float()

    def block_supports(self, x: Tensor, kernel: list[int], dilation: list[int]) -> str:
        return 'it has no kernels for one branch.' if len(kernel) == 1 else ''

    def __getattr__(self, name: str) -> Callable:
        if name not in ('block_forward', 'block_stats', 'block_sums', 'block_backward'):
            raise AttributeError(name)

        def block(*args: Any) -> Any:
            self._call(name)
            operator = getattr(torch.ops.mmuni, name.replace('block', 'dilated_reparam'))
            return operator(*args, 'torch')

        block.backend = self  # type: ignore[attr-defined]
        return block


class DividedBackend(PoolingBackend):
    """One with two divisions of its work, of which the first is its own choice.

    Attributes:
        failing: Labels of those that raise.
        wrong: Labels of those whose results are scaled by a tenth too much.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failing: set[str] = set()
        self.wrong: set[str] = set()

    def divisions(self, function: str, x: Tensor, dilation: int) -> dict[str, Any]:
        return {
            label: SimpleNamespace(
                backend=self,
                label=label,
                forward=partial(self._divided, label, self.forward),
                weight_grad=partial(self._divided, label, self.weight_grad),
            )
            for label in ('64', '16')
        }

    def _divided(self, label: str, function: Callable, *args: Any, **options: Any) -> Any:
        if label in self.failing:
            raise RuntimeError(f'out of registers with {label}')
        result = function(*args, **options)
        if label not in self.wrong:
            return result
        return (1.1 * result[0], *result[1:]) if isinstance(result, tuple) else 1.1 * result


class FakeGPU:
    """What the fixture ``gpu`` is: the backends, how long each of them takes, and what was timed."""

    def __init__(self) -> None:
        self.backends: dict[str, FakeBackend] = {'triton': PoolingBackend(), 'cuda': FakeBackend()}
        self.milliseconds = {
            'triton': 2.0, 'triton 64': 2.0, 'triton 16': 2.5, 'cuda': 1.0, 'torch': 3.0, 'branches': 4.0,
        }  # fmt: skip
        self.timed: list[str] = []

    def label_of(self, candidate: Any) -> str:
        """That of a partial, of something for its module, or of a function of the block; all others are branches."""
        candidate = getattr(candidate, 'candidate', candidate)
        function = getattr(candidate, 'func', None)
        module = getattr(function, 'backend', None) or next(iter(getattr(candidate, 'args', ())), None)
        if module is reference:
            return 'torch'
        owner = getattr(module, 'backend', module)
        name = next((name for name, backend in self.backends.items() if backend is owner), 'branches')
        return f'{name} {module.label}' if hasattr(module, 'label') else name

    def time(self, candidate: Any, device: torch.device, limit: float) -> float:
        """In place of the GPU's clock."""
        label = self.label_of(candidate)
        self.timed.append(label)
        candidate()
        return self.milliseconds[label]

    def calls(self) -> dict[str, list[str]]:
        """What each backend was asked for since the last time."""
        calls = {name: backend.calls for name, backend in self.backends.items()}
        for backend in self.backends.values():
            backend.calls = []
        return calls


@contextmanager
def fake_gpu(patch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    """Maps in the memory of the CPU count as on a GPU, on which both backends work."""
    gpu, module_of = FakeGPU(), backends.module_of
    patch.setattr(backends, 'module_of', lambda name: gpu.backends.get(name) or module_of(name))
    patch.setattr(backends, '_why_not_on_gpu', lambda name, device: '' if name in gpu.backends else 'it is gone.')
    patch.setattr(backends, 'is_on_gpu', lambda x: x.device.type in ('cpu', 'cuda'))
    patch.setattr(backends, '_warned', set())
    patch.setattr(backends, '_postponed', set())
    patch.setattr(backends, '_checked', {(f'{name}{part}', 0): '' for name in gpu.backends for part in ('', ' block')})
    patch.setattr(fastest, '_milliseconds', gpu.time)
    patch.setenv('MMUNI_DW_TUNE', '1')  # nothing is written
    fastest.clear()
    yield gpu
    fastest.clear()
