"""What is the fastest on a GPU: timed there once for every kind of map, and remembered.

Timed are candidates by the GPU's own clock, on the tensors of the first call of a kind: the backends, each with the
divisions of its work that are worth it, and for the Dilated Reparam Block its branches one by one. A label names them:
'torch', 'cuda', 'triton 64' for the division 64 of the backend triton. A kind is the operator, kernel, dilation, dtype
and memory layout, and the sizes of the map up to a factor of two, so that training at many image sizes meets few.

Timings are kept in a file, so that later processes find them: a line for each time that something was timed, with what
it depends on. ``MMUNI_DW_TUNE`` names another file, '1' keeps them in the process, and '0' leaves the choice to
``guess``, as ``torch.use_deterministic_algorithms`` does. The processes of a distributed training time by themselves
and may choose differently: their results then differ in the last bits.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .. import compat

__all__ = [
    'BRANCHES', 'clear', 'division', 'find', 'guess', 'is_capturing', 'is_failed', 'is_out_of_memory', 'is_timing',
    'kind_of', 'mark_failed', 'may_time', 'remembered',
]  # fmt: skip

Kind = tuple[int, str, int, int, str, bool, int, int, int]
Candidate = Callable[[], object]

MOST = 4096  # kinds that a process times, beside those of the file; what comes later is guessed
MOST_BYTES = 4 << 20  # of the file, which is begun anew beyond
TRIES = 3  # that a candidate for which there was too little memory has
REPEATS = 5
HEAD_START = 4_000_000  # cycles that the GPU is kept busy at least while the calls are queued behind one another
FAR_BEHIND = 3.0  # times what the fastest so far takes
CLOCK = 2e9  # cycles a second, no less than a GPU has
BRANCHES = 'branches'  # label of a Dilated Reparam Block that is computed branch after branch
HANDICAP = {BRANCHES: 1.1}  # by which its time counts more, as it needs more memory

HERE = Path(__file__).resolve().parent

_times: dict[Kind, dict[str, float]] = {}  # milliseconds by label, all of maps of one size; infinite of what raised
_sizes: dict[Kind, tuple[int, ...]] = {}
_timed: set[Kind] = set()  # in this process
_settled: dict[tuple[Kind, str], str] = {}  # labels, by kind and scope
_divisions: dict[tuple[Kind, str], str] = {}  # the fastest of a backend
_failed: set[tuple[Kind, str]] = set()
_short: Counter[tuple[Kind, str]] = Counter()  # how often memory was too short, by kind and scope
_read: set[tuple[Path, int]] = set()  # files, by device
_unwritable: set[Path] = set()
_lock = threading.RLock()  # the backward pass has its own thread; what is timed may have something timed in its turn
_local = threading.local()


def kind_of(function: str, x: Tensor, kernel: int, dilation: int) -> Kind:
    """What the time depends on; maps (N, C, H, W) of one kind are less than a factor of two apart in each size."""
    n, c, h, w = x.shape
    dtype = f'{x.dtype} (TF32)' if x.dtype == torch.float32 and compat.convolutions_may_use_tf32() else str(x.dtype)
    sizes = (n * c).bit_length(), h.bit_length(), w.bit_length()
    return x.device.index or 0, function, kernel, dilation, dtype, x.stride(1) == 1, *sizes


def guess(function: str, kernel: int, names: Sequence[str]) -> str:
    """What is taken where nothing may be timed: the first of ``names``, but for what is little but memory traffic.

    torch has a kernel of its own for 3x3, of which only the weight gradient is slow: one block of threads for each tap.
    """
    return 'torch' if (kernel <= 3 and function != 'weight_grad') or not names else names[0]


def remembered(kind: Kind, scope: str = '') -> str | None:
    """The label of what was found to be the fastest for this kind; None where that is not known, or must not count.

    Args:
        kind: Of the work.
        scope: See ``find``.
    """
    return None if _is_fixed() else _settled.get((kind, scope))


def division(kind: Kind, name: str) -> str:
    """The division of the work with which the backend ``name`` was the fastest; empty as ``remembered`` is None."""
    return '' if _is_fixed() else _divisions.get((kind, name), '')


def _is_fixed() -> bool:
    """Whether the choice must be the same in every process."""
    return torch.are_deterministic_algorithms_enabled() or os.environ.get('MMUNI_DW_TUNE') == '0'


def is_capturing(device: torch.device | None = None) -> bool:
    """Whether what is launched now is recorded into a CUDA graph, where nobody may wait for the GPU.

    Args:
        device: Where it is launched. Work elsewhere counts as well if the current GPU captures, as it may not wait.
    """
    if not torch.cuda.is_available():
        return False
    if torch.cuda.is_current_stream_capturing():
        return True
    if device is None or device.type != 'cuda' or device.index in (None, torch.cuda.current_device()):
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def is_timing() -> bool:
    """Whether this is part of something that is being timed, in this thread."""
    return getattr(_local, 'depth', 0) > 0


def may_time(x: Tensor, kind: Kind) -> bool:
    """Whether candidates for work of this kind can be run on ``x`` now, and their order may decide."""
    if _is_fixed() or (len(_timed) >= MOST and kind not in _times):
        return False
    return not (isinstance(x, FakeTensor) or torch.compiler.is_compiling() or is_capturing(x.device))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory was too short, of which there may be more another time."""
    text = str(error)
    return isinstance(error, torch.cuda.OutOfMemoryError) or 'out of memory' in text or 'ALLOC_FAILED' in text


def mark_failed(kind: Kind, name: str) -> None:
    """Never take the backend ``name``, or ``BRANCHES``, for this kind again: it raised."""
    _failed.add((kind, name))
    for key in ((kind, ''), (kind, name)):
        if _settled.get(key, '').partition(' ')[0] == name:
            del _settled[key]


def is_failed(kind: Kind, name: str) -> bool:
    """Whether the backend ``name``, or ``BRANCHES``, has raised for this kind."""
    return (kind, name) in _failed


def clear() -> None:
    """Forget everything but the file."""
    for memory in (_times, _sizes, _timed, _settled, _divisions, _failed, _short, _read, _unwritable):
        memory.clear()


def find(
    kind: Kind, candidates: Mapping[str, Candidate], device: torch.device, scope: str = '', size: Sequence[int] = ()
) -> tuple[str, dict[str, Exception]]:
    """Time the candidates for which that has not been done, and remember the fastest of all.

    What was timed on a map of another size counts as long as nothing is missing, and is timed anew with what is.

    It is not remembered as long as memory is too short for one of them, which is tried ``TRIES`` times, nor while
    something else is being timed, of which this is a part.

    Args:
        kind: Of the work.
        candidates: What does it, by label.
        device: Where.
        scope: Under which name to remember it: empty, or the backend that the choice is limited to.
        size: Of the map on which the candidates work.

    Returns:
        The label of the fastest, and what those raised that could not do it.

    Raises:
        Exception: Of the last candidate, where all of them raised.
    """
    with _lock:
        _read_file(device)
        if not candidates.keys() <= _times.setdefault(kind, {}).keys():
            _are_of(kind, tuple(size))
        known = _times[kind]
        new: dict[str, float] = {}
        errors: dict[str, Exception] = {}
        hopeless = all(known.get(label) == math.inf for label in candidates)
        for label in [label for label in candidates if hopeless or label not in known]:
            try:
                limit = FAR_BEHIND * min(known.values(), default=math.inf)
                with _being_timed():
                    new[label] = _milliseconds(candidates[label], device, limit)
            except Exception as error:  # a compiler's, a driver's, out of memory: torch may still do it
                errors[label] = error.with_traceback(None)  # whose frames would keep the tensors of the candidate
            if label not in errors:
                _learn(kind, label, new[label])
            elif not is_out_of_memory(errors[label]):
                _learn(kind, label, math.inf)
            else:
                torch.cuda.empty_cache()  # what the candidate has had is in pieces that may fit nothing else
        if new:
            _timed.add(kind)
            _write_file(kind, new, device, _sizes[kind])
        usable = [label for label in candidates if known.get(label, math.inf) < math.inf]
        if not usable:
            raise list(errors.values())[-1]
        taken = min(usable, key=lambda label: known[label] * HANDICAP.get(label, 1.0))
        short = any(map(is_out_of_memory, errors.values()))
        _short[kind, scope] += short
        if not is_timing() and (not short or _short[kind, scope] >= TRIES):
            _settled[kind, scope] = taken
        return taken, errors


def _are_of(kind: Kind, size: tuple[int, ...]) -> None:
    """Forget the times of a kind that are of a map of another size: up to eight times the work of this one."""
    if _sizes.setdefault(kind, size) != size:
        _sizes[kind] = size
        _times[kind] = {label: ms for label, ms in _times[kind].items() if ms == math.inf}


def _learn(kind: Kind, label: str, milliseconds: float) -> None:
    known = _times.setdefault(kind, {})
    known[label] = milliseconds
    name, _, part = label.partition(' ')
    if part:
        parts = {other: ms for other, ms in known.items() if other.startswith(f'{name} ')}
        _divisions[kind, name] = min(parts, key=parts.__getitem__).partition(' ')[2]


@contextlib.contextmanager
def _being_timed() -> Iterator[None]:
    _local.depth = getattr(_local, 'depth', 0) + 1
    try:
        yield
    finally:
        _local.depth -= 1


def _milliseconds(candidate: Candidate, device: torch.device, limit: float = math.inf) -> float:
    """Of the GPU alone: the calls are queued while it is busy with something else. Beyond ``limit`` two are enough."""
    candidate()  # compiles, and fills the caches
    best, cycles = math.inf, HEAD_START
    with torch.cuda.device(device):
        for count, repeats in enumerate((1, 1, REPEATS, REPEATS)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(cycles)
            start.record()
            began = time.perf_counter()
            for _ in range(repeats):
                candidate()
            queueing = REPEATS * (time.perf_counter() - began) / repeats
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / repeats)
            if count and best > limit:  # once may be somebody else's doing
                break
            cycles = max(HEAD_START, int(1.5 * CLOCK * min(queueing, 0.1)))  # a block by branches is many launches
    return best


def _file() -> Path | None:
    """Where timings are kept; None where they are not."""
    value = os.environ.get('MMUNI_DW_TUNE')
    if value in ('0', '1'):
        return None
    from .build import cache_folder  # not at the top: python -m mmunireplknet.ops.build warns of one that is there

    try:
        return Path(value).expanduser() if value else cache_folder() / 'fastest.jsonl'
    except RuntimeError:  # a user without a home
        return None


def _identity(device: torch.device) -> dict[str, str]:
    """What timings depend on beside the kind."""
    from .. import __version__

    triton = getattr(sys.modules.get('triton'), '__version__', '')  # imported, wherever its kernels work
    name = torch.cuda.get_device_name(device)
    return {
        'device': name,
        'torch': torch.__version__,
        'triton': triton,
        'mmunireplknet': f'{__version__} {fingerprint()}',
    }


@functools.cache
def fingerprint() -> str:
    """Hash of what computes: while the package is worked on, its version stays the same."""
    digest = hashlib.sha256()
    files = [file for pattern in ('*.py', 'gpu/*.py', 'csrc/cuda/*.*') for file in HERE.glob(pattern)]
    with contextlib.suppress(OSError):  # it is being installed anew
        for file in sorted(files):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _read_file(device: torch.device) -> None:
    path, index = _file(), device.index or 0
    if path is None or (path, index) in _read:
        return
    _read.add((path, index))
    identity = _identity(device)
    try:
        lines = path.read_text(errors='replace').splitlines()
    except OSError:  # there is none yet
        return
    for line in lines:
        try:
            entry = json.loads(line)
            times = {str(label): float(ms) for label, ms in entry['ms'].items()}
            kind: Kind = (index, *entry['kind'])
            size = tuple(int(length) for length in entry['size'])
            if {name: entry[name] for name in identity} == identity and all(0 < ms < math.inf for ms in times.values()):
                _times.setdefault(kind, {})
                _are_of(kind, size)  # the last ones count
                for label in times.keys() - _times[kind].keys():
                    _learn(kind, label, times[label])
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # a line that another process is writing, or that somebody has edited


def _write_file(kind: Kind, times: Mapping[str, float], device: torch.device, size: tuple[int, ...] = ()) -> None:
    if (path := _file()) is None:
        return
    line = json.dumps({**_identity(device), 'kind': kind[1:], 'size': size, 'ms': times}) + '\n'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        full = path.is_file() and path.stat().st_size > MOST_BYTES
        with path.open('w' if full else 'a') as stream:
            stream.write(line)  # one write, so that the lines of several processes stay apart
    except OSError as error:
        if os.environ.get('MMUNI_DW_TUNE') and path not in _unwritable:  # else nobody has asked for it
            _unwritable.add(path)
            warnings.warn(f'mmunireplknet: MMUNI_DW_TUNE={path} cannot be written: {error}.', stacklevel=2)
