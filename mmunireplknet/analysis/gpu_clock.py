"""Time and memory of functions on a GPU: from a cold cache, one call at a time, by the GPU's own clock."""

from __future__ import annotations

import importlib.metadata
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from .timing import Timing, summarise

__all__ = ['CpuClock', 'GpuClock', 'Measured']

FLUSH = 2**28  # bytes: more than the L2 cache of any GPU so far
ROUNDS = (5, 100)  # least and most


@dataclass(frozen=True)
class Measured:
    """Timing, and bytes that were allocated at most beyond what was there before; None where that is not known."""

    timing: Timing
    peak: int | None


class GpuClock:
    """Times on the current CUDA device.

    Args:
        seconds: About how long to measure each function.
    """

    modes = ('eager', 'graph')

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.device = torch.device('cuda', torch.cuda.current_device())
        self.buffer = torch.empty(FLUSH, dtype=torch.int8, device=self.device)

    def measure(self, function: Callable[[], object], mode: str) -> Measured:
        """Time ``function``: 'eager' with what Python and the launches cost, 'graph' as a replayed CUDA graph."""
        for _ in range(3):  # compiles, chooses backends, fills the allocator
            function()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return Measured(self._time(self._captured(function) if mode == 'graph' else function), peak)

    @staticmethod
    def _captured(function: Callable[[], object]) -> Callable[[], object]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay

    def _time(self, function: Callable[[], object]) -> Timing:
        once = self._samples(function, 2)[-1]
        return summarise(self._samples(function, min(max(int(self.seconds / once), ROUNDS[0]), ROUNDS[1])))

    def _samples(self, function: Callable[[], object], rounds: int) -> list[float]:
        """Seconds of every call."""
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for start, end in pairs:
            self.buffer.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def synchronize(self) -> None:
        """Wait for the GPU; raises where an earlier error has left it unusable in this process."""
        torch.cuda.synchronize()
        torch.empty(1, device=self.device).fill_(0).cpu()

    def ceilings(self) -> dict[str, float]:
        """Rates of this GPU: bytes a second of a copy, FLOP/s of matrix products in float32 and bfloat16."""
        source = torch.empty(2**30, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        rates = {'copy': 2 * source.numel() / (self._time(partial(target.copy_, source)).median / 1e3)}
        allowed = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision('highest')
        for dtype, size in ((torch.float32, 4096), (torch.bfloat16, 8192)):
            a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
            seconds = self._time(partial(torch.mm, a, b)).median / 1e3
            rates[str(dtype).removeprefix('torch.')] = 2 * size**3 / seconds
        torch.set_float32_matmul_precision(allowed)
        return rates

    def environment(self) -> dict[str, str]:
        """The card, its driver and the versions, as text."""
        properties = torch.cuda.get_device_properties(self.device)
        return {
            'card': f'{properties.name}, compute capability {properties.major}.{properties.minor}, '
            f'{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB',
            'versions': f'torch {torch.__version__}, CUDA {torch.version.cuda}, '
            f'cuDNN {torch.backends.cudnn.version()}, driver {_driver()}, triton {_version("triton")}, '
            f'mmunireplknet {_version("mmunireplknet")}',
        }


def _driver() -> str:
    try:
        command = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return 'unknown'


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return 'missing'


class CpuClock:
    """A rehearsal without a GPU: everything runs, and what it takes says nothing."""

    modes = ('eager', 'graph')
    device = torch.device('cpu')

    def measure(self, function: Callable[[], object], mode: str) -> Measured:
        """One call, whatever the mode."""
        start = time.perf_counter()
        function()
        return Measured(summarise([time.perf_counter() - start]), None)

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def ceilings(self) -> dict[str, float]:
        """Made up."""
        return {'copy': 1e10, 'float32': 1e11, 'bfloat16': 1e11}

    def environment(self) -> dict[str, str]:
        """That it is none."""
        return {
            'card': 'none: a rehearsal on the CPU, whose figures say nothing',
            'versions': f'torch {torch.__version__}',
        }
