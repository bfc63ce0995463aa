"""The pointwise passes of a block on a GPU: what is timed, and how long moving their maps takes at least."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import backends, passes
from .roofline import Card

__all__ = ['PASSES', 'pass_of', 'table']

Shape = tuple[int, int, int, int]

# By what they do: the function, how many maps it reads and writes, and of how many times C channels.
PASSES: dict[str, tuple[str, int, int]] = {
    'statistics, NCHW': ('moments', 1, 1),
    'BN and SE, NCHW to rows': ('apply', 2, 1),
    'sums of GELU': ('sums', 1, 4),
    'GELU and GRN': ('apply', 2, 4),
    'BN and residual, rows to NCHW': ('apply', 3, 1),
    'backward: sums of the last BN': ('sums', 2, 1),
    'backward: last BN, NCHW to rows': ('grad', 3, 1),
    'backward: sums of GELU, and GRN': ('sums', 3, 4),
    'backward: GELU and GRN': ('grad', 3, 4),
    'backward: BN and SE, rows to NCHW': ('grad', 3, 1),
}


def pass_of(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """One of ``PASSES`` on maps (N, C, H, W) of a block; on the CPU, in a rehearsal, by plain torch.

    Raises:
        KeyError: There is no such pass.
    """
    function, _, times = PASSES[name]
    n, c, h, w = shape[0], shape[1] * times, *shape[2:]
    kernels: Any = passes if device.type == 'cpu' else backends.module_of('triton')

    def draw(planes: bool) -> Tensor:
        size = (n, c, h, w) if planes else (n, h, w, c)
        x = torch.randn(size, device=device).to(dtype)
        return x.permute(0, 2, 3, 1) if planes else x

    each, row = torch.randn(n, c, device=device), torch.randn(c, device=device)
    result = torch.empty(n, 2, c, device=device)
    given: dict[str, tuple] = {
        'statistics, NCHW': (draw(True),),
        'BN and SE, NCHW to rows': (draw(True), each, each, None, draw(False)),
        'sums of GELU': (draw(False), None, None, None, result, True),
        'GELU and GRN': (draw(False), each, row, None, draw(False), True),
        'BN and residual, rows to NCHW': (draw(False), each, each, draw(True), draw(True)),
        'backward: sums of the last BN': (draw(False), draw(True), row, None, result),
        'backward: last BN, NCHW to rows': (draw(True), draw(False), each, row, row, draw(False)),
        'backward: sums of GELU, and GRN': (draw(False), draw(False), None, draw(False), result, True, each, row),
        'backward: GELU and GRN': (draw(False), draw(False), each, None, each, draw(False), True, row.clone()),
        'backward: BN and SE, rows to NCHW': (draw(False), draw(True), each, each, row, draw(True)),
    }
    return functools.partial(getattr(kernels, function), *given[name])


def table(entries: Sequence[Mapping[str, Any]], card: Card) -> Iterator[str]:
    """Lines of a table: the time of each pass, and that of moving its maps once."""
    yield from ('', '**pointwise passes**: microseconds under a CUDA graph (in eager mode)', '')
    yield from ('| pass | map, dtype | time | memory | of the roofline |', '|---|---|---|---|---|')
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        if not entry['error']:
            rows.setdefault(entry['row'], []).append(entry)
    for row in rows.values():
        times, first = {entry['mode']: 1e3 * entry['ms'] for entry in row}, row[0]
        _, maps, channels = PASSES[first['name']]
        values = maps * channels * math.prod(first['shape'])
        least = 1e6 * values * (4 if first['dtype'] == 'float32' else 2) / card.bandwidth
        texts = [f'{times[mode]:.1f}' if mode in times else '-' for mode in ('graph', 'eager')]
        part = f'{least / times["graph"]:.0%}' if 'graph' in times else ''
        where = f'{tuple(first["shape"])}, {first["dtype"]}'
        yield f'| {first["name"]} | {where} | {texts[0]} ({texts[1]}) | {least:.1f} | {part} |'
