"""Which backend is the fastest on a GPU: timed there once for every kind of map, and remembered.

Timed are the candidates by the GPU's own clock, on the tensors of the first call of a kind. A kind is the operator,
kernel, dilation, dtype and memory layout, and the sizes of the map up to a factor of two, so that training at many
image sizes meets few of them. ``MMUNI_DW_TUNE=0`` and ``torch.use_deterministic_algorithms`` leave the choice to
``guess``; ``MMUNI_DW_TUNE=FILE`` keeps the timings in a file for later processes. The processes of a distributed
training time by themselves and may choose differently: their results then differ in the last bits.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

__all__ = ['clear', 'find', 'guess', 'is_capturing', 'is_failed', 'kind_of', 'mark_failed', 'may_time', 'remembered']

Kind = tuple[int, str, int, int, str, bool, int, int, int]
Candidate = Callable[[], object]

MOST = 4096  # kinds that are remembered; what comes later is guessed
REPEATS = 5
HEAD_START = 4_000_000  # cycles that the GPU is kept busy while the calls are queued behind one another

_taken: dict[Kind, str] = {}
_failed: set[tuple[Kind, str]] = set()
_read: set[str] = set()  # files, by device
_unwritable: set[str] = set()
_lock = threading.Lock()  # the backward pass runs in a thread of its own


def kind_of(function: str, x: Tensor, kernel: int, dilation: int) -> Kind:
    """What the time depends on; maps (N, C, H, W) of one kind are less than a factor of two apart in each size."""
    n, c, h, w = x.shape
    sizes = (n * c).bit_length(), h.bit_length(), w.bit_length()
    return x.device.index or 0, function, kernel, dilation, str(x.dtype), x.stride(1) == 1, *sizes


def guess(function: str, kernel: int, names: Sequence[str]) -> str:
    """What is taken where nothing may be timed: the first of ``names``, but for what is little but memory traffic.

    torch has a kernel of its own for 3x3, of which only the weight gradient is slow: one block of threads for each tap.
    """
    return 'torch' if (kernel <= 3 and function != 'weight_grad') or not names else names[0]


def remembered(kind: Kind) -> str | None:
    """What was the fastest for this kind; None where that is not known, or must not count."""
    if torch.are_deterministic_algorithms_enabled() or os.environ.get('MMUNI_DW_TUNE') == '0':
        return None
    return _taken.get(kind)


def is_capturing() -> bool:
    """Whether what is launched now is recorded into a CUDA graph, where nobody may wait for the GPU."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def may_time(x: Tensor) -> bool:
    """Whether candidates can be run on ``x`` now, and their order may decide."""
    if torch.are_deterministic_algorithms_enabled() or os.environ.get('MMUNI_DW_TUNE') == '0' or len(_taken) >= MOST:
        return False
    return not (isinstance(x, FakeTensor) or torch.compiler.is_compiling() or is_capturing())


def mark_failed(kind: Kind, name: str) -> None:
    """Never take ``name`` for this kind again: it raised."""
    _failed.add((kind, name))
    if _taken.get(kind) == name:
        del _taken[kind]


def is_failed(kind: Kind, name: str) -> bool:
    """Whether ``name`` has raised for this kind."""
    return (kind, name) in _failed


def clear() -> None:
    """Forget everything."""
    for memory in (_taken, _failed, _read, _unwritable):
        memory.clear()


def find(kind: Kind, candidates: Mapping[str, Candidate], device: torch.device) -> tuple[str, dict[str, Exception]]:
    """Time the candidates and remember the fastest.

    Args:
        kind: Of the work.
        candidates: What does it, by the name of the backend.
        device: Where.

    Returns:
        The fastest, and what those raised that could not do it.

    Raises:
        Exception: Of the last candidate, where all of them raised.
    """
    with _lock:
        _read_file(device)
        if kind in _taken and _taken[kind] in candidates:
            return _taken[kind], {}
        times: dict[str, float] = {}
        errors: dict[str, Exception] = {}
        for name, candidate in candidates.items():
            try:
                times[name] = _milliseconds(candidate, device)
            except Exception as error:  # a compiler's, a driver's, out of memory: torch may still do it
                errors[name] = error.with_traceback(None)  # whose frames would keep the tensors of the candidate
        if not times:
            raise list(errors.values())[-1]
        _taken[kind] = min(times, key=times.__getitem__)
        _write_file(kind, times, device)
        return _taken[kind], errors


def _milliseconds(candidate: Candidate, device: torch.device) -> float:
    """Of the GPU alone: the calls are queued while it is busy with something else."""
    candidate()  # compiles, and fills the caches
    best = float('inf')
    with torch.cuda.device(device):
        for _ in range(2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START)
            start.record()
            for _ in range(REPEATS):
                candidate()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / REPEATS)
    return best


def _file() -> str:
    value = os.environ.get('MMUNI_DW_TUNE') or '1'
    return '' if value in ('0', '1') else value


def _identity(device: torch.device) -> dict[str, str]:
    """What timings depend on beside the kind."""
    from .. import __version__

    name = torch.cuda.get_device_name(device)
    return {'device': name, 'torch': torch.__version__, 'mmunireplknet': __version__}


def _read_file(device: torch.device) -> None:
    file, identity = _file(), _identity(device) if _file() else {}
    if not file or f'{file} {device}' in _read:
        return
    _read.add(f'{file} {device}')
    path = Path(file).expanduser()
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            if {name: entry[name] for name in identity} == identity:
                kind: Kind = (device.index or 0, *entry['kind'])
                _taken.setdefault(kind, min(entry['ms'], key=entry['ms'].get))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # a line that another process is writing, or that somebody has edited


def _write_file(kind: Kind, times: Mapping[str, float], device: torch.device) -> None:
    if not (file := _file()):
        return
    path = Path(file).expanduser()
    line = json.dumps({**_identity(device), 'kind': kind[1:], 'ms': times}) + '\n'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open('a') as stream:
            stream.write(line)  # one write, so that the lines of several processes stay apart
    except OSError as error:
        if str(path) not in _unwritable:
            _unwritable.add(str(path))
            warnings.warn(f'mmunireplknet: MMUNI_DW_TUNE={file} cannot be written: {error}.', stacklevel=2)
