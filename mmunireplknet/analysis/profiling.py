"""What a function is made of, by torch's profiler: which kernels ran, and where the time went."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch.profiler import ProfilerActivity, profile, record_function

__all__ = ['GROUPS', 'breakdown', 'compiled_calls', 'group_of', 'profile_events', 'torch_depthwise', 'why_void']

_CONVOLUTIONS = {'aten::convolution': 1, 'aten::convolution_backward': 2}  # and which input is the weight
_DEPTHWISE = ' (depthwise)'  # marks torch's convolutions with one input channel a group
_ROOT = 'breakdown'

# First match wins, on the names of an operator and of all that it was called by: 'outer/inner/operator'. In our blocks
# one pass makes both GELU and the sums that GRN needs; it is counted as GELU.
GROUPS: tuple[tuple[str, str], ...] = (
    (r'mmuni::(depthwise|dilated)', 'depthwise'),
    (re.escape(_DEPTHWISE), 'depthwise'),
    (r'_Gate', 'SE'),
    (r'aten::(adaptive_avg_pool2d|relu|sigmoid)', 'SE'),
    (r'layer_norm', 'LayerNorm'),
    (r'aten::(linear|addmm|mm|bmm|matmul|conv2d|convolution)\b', 'GEMM'),
    (r'mkldnn::_(linear|convolution)', 'GEMM'),
    (r'_GrnMlp.*mmuni_cpu::sums', 'GELU'),
    (r'gelu', 'GELU'),
    (r'_GrnMlp|grn|linalg_vector_norm', 'GRN'),
    (r'.', 'rest'),
)


def profile_events(function: Callable[[], object]) -> list[Any]:
    """Events of one call on the CPU, as torch's ``FunctionEvent``, with the shapes of the inputs."""
    os.environ.setdefault('KINETO_LOG_LEVEL', '10')  # torch 2.13 writes two lines to stderr at every start and stop
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        function()
    return list(profiler.events() or ())


def compiled_calls(events: Iterable[Any]) -> Counter[str]:
    """How often each compiled kernel ran, by the operator of ours that called it: 'operator > kernel'.

    A kernel that is called from elsewhere stands alone: 'kernel'.
    """
    calls: Counter[str] = Counter()
    for event in events:
        if event.name.startswith('mmuni_cpu::'):
            caller = next((name for name in _ancestors(event) if name.startswith('mmuni::')), None)
            calls[event.name if caller is None else f'{caller} > {event.name}'] += 1
    return calls


def torch_depthwise(events: Iterable[Any]) -> list[str]:
    """Depthwise convolutions of more than 3x3 taps that torch computed itself: the fall-back, with the weight's shape.

    3x3 is left out because torch is taken for it on purpose where it is faster.
    """
    weights = ((event.name, _depthwise_weight(event)) for event in events)
    return [f'{name} {shape}' for name, shape in weights if max(shape[2:], default=0) > 3]


def why_void(function: Callable[[], object], kernels: Mapping[str, int]) -> str:
    """Why a timing of ``function`` would not be one of the compiled kernels; empty if it would be.

    Args:
        function: What is timed.
        kernels: Name -> how often at least it must run, e.g. {'mmuni_cpu::forward': 15}.
    """
    function()  # the first call also checks the kernels against torch
    events = profile_events(function)
    ran = Counter(event.name for event in events)
    missing = [f'{name} ran {ran[name]} times, not {n}' for name, n in kernels.items() if ran[name] < n]
    fallbacks = [f'torch computed {text}' for text in dict.fromkeys(torch_depthwise(events))]
    return '; '.join(missing + fallbacks)


def group_of(path: str) -> str:
    """Group of an operator by its path, see ``GROUPS``."""
    return next(group for pattern, group in GROUPS if re.search(pattern, path))


def breakdown(function: Callable[[], object], rounds: int = 5) -> dict[str, float]:
    """Milliseconds of the calling thread by group; medians over ``rounds`` calls after a first one."""

    def labelled() -> None:
        with record_function(_ROOT):
            function()

    labelled()
    totals = [_milliseconds_by_group(profile_events(labelled)) for _ in range(rounds)]
    names = dict.fromkeys(group for _, group in GROUPS)
    return {name: float(np.median([total[name] for total in totals])) for name in names}


def _milliseconds_by_group(events: list[Any]) -> Counter[str]:
    totals: Counter[str] = Counter()
    for event in events:
        path = '/'.join([*reversed(list(_ancestors(event))), _name(event)])
        if path.startswith(_ROOT):
            totals[group_of(path)] += event.self_cpu_time_total / 1e3
    return totals


def _ancestors(event: Any) -> Iterator[str]:
    """Names of what called ``event``, the innermost first."""
    while (event := event.cpu_parent) is not None:
        yield _name(event)


def _name(event: Any) -> str:
    return event.name + _DEPTHWISE if _depthwise_weight(event) else event.name


def _depthwise_weight(event: Any) -> list[int]:
    """Shape of the weight, (C, 1, K, K), if this is a depthwise convolution of torch; else nothing."""
    shapes, index = event.input_shapes or [], _CONVOLUTIONS.get(event.name)
    weight = [] if index is None or len(shapes) <= index else shapes[index]
    return weight if len(weight) == 4 and weight[0] > 1 and weight[1] == 1 else []
