"""How the work of a kernel is divided into programs, for which map.

There are few divisions to choose from. By default a rule chooses, from the size of the map alone; ``tune`` measures all
of them on the GPU for maps like one that is given, and keeps what was fastest in a file, which later processes read.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..build import cache_folder

__all__ = ['Config', 'candidates', 'choose', 'splits', 'tune']

OPERATIONS = ('forward', 'weight_grad')
MOST_RESULTS = 1000


class Config(NamedTuple):
    """A division of the work.

    Attributes:
        rows: Rows of a patch.
        columns: Columns of a patch.
        block: Patches of a program; for the weight gradient, of one product.
        step: Pixels of the window in one product.
        warps: Of a program.
    """

    rows: int
    columns: int
    block: int
    step: int
    warps: int


def candidates(operation: str, width: int, dtype: torch.dtype) -> list[Config]:
    """The divisions that are worth a try for maps of this width; there are no others."""
    rows, columns = (8, 8) if width <= 8 else (4, 16)
    if operation == 'weight_grad':
        # Products of 32 patches in float32 need more registers than a GPU of compute capability 12 has.
        return [Config(rows, columns, block, 128, 4) for block in ((16, 32) if dtype.itemsize == 2 else (16,))]
    step = 128 // dtype.itemsize
    return [Config(rows, columns, block, step, warps) for block, warps in ((16, 2), (32, 4), (64, 4), (128, 8))]


def choose(operation: str, x: Tensor, kernel: int, dilation: int) -> Config:
    """The division for a map ``x`` (N, C, H, W): what was measured for such maps, or else by rule."""
    shape, measured = tuple(x.shape), results()
    if measured:
        config = measured.get(_class_of(operation, shape, kernel, dilation, x.dtype, device_of(x)))
        if config is not None:
            return config
    return by_rule(operation, shape, dilation, x.dtype)


@functools.lru_cache(maxsize=4096)
def by_rule(operation: str, shape: tuple[int, ...], dilation: int, dtype: torch.dtype) -> Config:
    """The division with the least work, and with enough programs to fill a GPU."""
    n, c, h, w = shape

    def cost(config: Config) -> float:
        patches = n * dilation * -(-h // (config.rows * dilation)) * -(-w // config.columns)
        blocks = -(-patches // config.block)
        if operation == 'weight_grad':
            return blocks * (config.block + 2)  # a product costs as much as 2 patches more
        # Reading the matrix of the kernel costs as much as 24 patches; a GPU has some 128 multiprocessors to fill.
        return max(1.0, c * blocks / 128) * (config.block + 24)

    return min(candidates(operation, w, dtype), key=cost)


def splits(programs: int, steps: int) -> int:
    """Into how many parts the sum over ``steps`` is divided: enough to fill a GPU, but of four steps at least."""
    return max(1, min(-(-512 // programs), steps // 4))


def tune(
    operation: str,
    shape: tuple[int, int, int, int],
    kernel: int,
    dilation: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: str = 'cuda',
    timer: Callable[[Callable[[], object]], float] | None = None,
) -> dict[Config, float]:
    """Measure every division for maps of such a shape, and keep the fastest for this and for later processes.

    Maps of the same size class (powers of two of C and of N * H * W, and the largest power of two up to 8 that divides
    W) on the same kind of GPU, in the same dtype and with the same kernel, then take what was fastest here.

    Args:
        operation: 'forward', which is also the input gradient, or 'weight_grad'.
        shape: (N, C, H, W).
        kernel: Size K of the kernel.
        dilation: Pixels between neighbouring taps.
        dtype: Of the map.
        device: Where to measure.
        timer: Milliseconds that a function takes; ``triton.testing.do_bench`` by default.

    Returns:
        The milliseconds of every division.

    Raises:
        ValueError: There is no such operation.
    """
    from . import convolution, gram

    if operation not in OPERATIONS:
        raise ValueError(f'operation={operation!r} must be one of {", ".join(OPERATIONS)}.')
    x = torch.randn(shape, device=device).to(dtype)
    weight = torch.randn(shape[1], 1, kernel, kernel, device=device)

    def run(config: Config) -> object:
        if operation == 'forward':
            return convolution.convolve(x, weight, None, dilation, False, False, None, config)
        return gram.multiply(x, x, kernel, dilation, config)

    measure: Callable[[Callable[[], object]], float] = timer or triton.testing.do_bench
    times = {c: measure(functools.partial(run, c)) for c in candidates(operation, shape[3], dtype)}
    fastest = min(times, key=lambda config: times[config])
    _keep(_class_of(operation, shape, kernel, dilation, dtype, device_of(x)), fastest)
    return times


def device_of(x: Tensor) -> str:
    """Name of the GPU."""
    return torch.cuda.get_device_name(x.device) if x.is_cuda else x.device.type


def _class_of(
    operation: str, shape: tuple[int, ...], kernel: int, dilation: int, dtype: torch.dtype, device: str
) -> str:
    n, c, h, w = shape
    vector = min(w & -w, 8)
    sizes = f'C{c.bit_length()} P{(n * h * w).bit_length()} W{vector if w > 8 else 0}'
    return f'{device}, triton {triton.__version__}, {operation}, {dtype}, K{kernel} D{dilation} {sizes}'


def results_file() -> Path:
    """Where results are kept."""
    return cache_folder() / 'triton-divisions.json'


@functools.cache
def results() -> dict[str, Config]:
    """What was measured here, by class; nothing where the file is missing or is not one of ours."""
    try:
        found = json.loads(results_file().read_text())
        return {str(key): _checked(str(key), value) for key, value in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _checked(key: str, value: list[int]) -> Config:
    """A division as it was read.

    Raises:
        ValueError: It is none that could have been measured, so it is of another version of this module.
    """
    config = Config(*value)
    operation, dtype = key.split(', ')[-3:-1]
    widths = (8,) if key.endswith('W0') else (16,)
    if any(config in candidates(operation, width, getattr(torch, dtype.removeprefix('torch.'))) for width in widths):
        return config
    raise ValueError(f'{config} for {key} is none of the divisions.')


def _keep(key: str, config: Config) -> None:
    """Add a result to the file. Others see the old or the new file, never a part; of two writers the last one wins."""
    results.cache_clear()
    kept = {k: v for k, v in results().items() if k != key} | {key: config}
    kept = dict(list(kept.items())[-MOST_RESULTS:])
    folder = results_file().parent
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, suffix='.partial')
    try:
        with os.fdopen(handle, 'w') as file:
            json.dump(kept, file, indent=0)
        os.replace(name, results_file())
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    results.cache_clear()
