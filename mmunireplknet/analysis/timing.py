"""Measure functions against each other in one process: time, saved activations, and the rate of matrix products."""

from __future__ import annotations

import math
import timeit
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

__all__ = ['Timing', 'gemm_rates', 'interleave', 'saved_bytes', 'summarise', 'thread_count']

SAMPLE = 0.01  # seconds; what is quicker is repeated until a sample takes as long
ROUNDS = (5, 30)  # least and most, unless they are given
HOPELESS_ROUNDS = 3
GEMM_SIZES = (1024, 1536, 2048)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Attributes:
        median: Over the rounds.
        low: First quartile.
        high: Third quartile.
        rounds: How many samples it is made of.
    """

    median: float
    low: float
    high: float
    rounds: int


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """Let torch compute with ``threads`` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleave(
    functions: Mapping[str, Callable[[], object]],
    seconds: float = 4.0,
    rounds: int | None = None,
    hopeless: Callable[[Mapping[str, float]], Collection[str]] = lambda _: (),
) -> dict[str, Timing]:
    """Time all functions in turn, A B C, A B C, ..., so that a drift of the machine hits all of them.

    Args:
        functions: By name.
        seconds: About how long to measure, after the warm-up.
        rounds: How often; None takes as many as fit into ``seconds``, 5 at least and 30 at most.
        hopeless: Given the seconds that each took in the warm-up, names those whose exact time does not matter: they
            are in three rounds only.

    Returns:
        The timing of each.
    """
    timers = {name: timeit.Timer(function) for name, function in functions.items()}
    once = {name: _warm_up(timer) for name, timer in timers.items()}
    calls = {name: max(1, math.ceil(SAMPLE / duration)) for name, duration in once.items()}
    slow = set(hopeless(once))
    if rounds is None:
        one_round = sum(once[name] * calls[name] for name in timers if name not in slow)
        rounds = min(max(int(seconds / one_round), ROUNDS[0]), ROUNDS[1])
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for index in range(rounds):
        for name, timer in timers.items():
            if name not in slow or index < HOPELESS_ROUNDS:
                samples[name].append(timer.timeit(calls[name]) / calls[name])
    return {name: summarise(values) for name, values in samples.items()}


def _warm_up(timer: timeit.Timer) -> float:
    """Seconds of a call; the first one pays for caches and for code that is generated, so it counts only if long."""
    first = timer.timeit(1)
    return first if first > 0.5 else timer.timeit(1)


def summarise(seconds: list[float]) -> Timing:
    """Median and quartiles of samples in seconds."""
    low, median, high = (1e3 * np.percentile(seconds, (25, 50, 75))).tolist()
    return Timing(median, low, high, len(seconds))


def gemm_rates(rounds: int = 7) -> dict[str, float]:
    """GFLOP/s of float32 matrix products: the best over squares of 1024 to 2048.

    Returns:
        'torch.mm', the library that torch was built with (MKL uses no AVX-512 on processors that are not Intel's),
        and, where torch has it, 'oneDNN', which it takes for convolutions, by a 1x1 convolution.
    """
    functions: dict[str, Callable[[], object]] = {}
    for size in GEMM_SIZES:
        a, b = torch.rand(2, size, size)
        x = torch.rand(1, size, size // 32, 32).contiguous(memory_format=torch.channels_last)
        functions[f'torch.mm {size}'] = partial(torch.mm, a, b)
        if torch.backends.mkldnn.is_available():
            # F.conv2d would go around oneDNN where there is one thread.
            functions[f'oneDNN {size}'] = partial(
                torch.mkldnn_convolution, x, b.view(size, size, 1, 1), None, (0, 0), (1, 1), (1, 1), 1
            )
    with torch.inference_mode():
        timings = interleave(functions, rounds=rounds)
    rates: dict[str, float] = {}
    for key, timing in timings.items():
        name, length = key.split()
        rates[name] = max(rates.get(name, 0.0), 2e-6 * int(length) ** 3 / timing.median)
    return rates


def saved_bytes(function: Callable[[], object], owned: Iterable[Tensor] = ()) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once.

    Counted is what autograd saves (``torch.autograd.graph.saved_tensors_hooks``); not the arguments that
    ``torch.utils.checkpoint`` keeps by itself.

    Args:
        function: The forward pass. What it returns is held until the count is done: memory that is freed and used
            again would count once instead of twice.
        owned: Parameters and buffers, which are there anyway and do not count.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function()
    for tensor in owned:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del kept
    return sum(storages.values())
