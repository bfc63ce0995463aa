"""Say which backends of the large depthwise convolution work here, which one is taken, and how fast each is."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Iterator

import torch

from ..analysis.gpu_clock import GpuClock
from ..analysis.peers import DIRECTIONS, LAYOUTS, by_backend, by_torch
from ..analysis.timing import interleave
from . import backends, build, fastest

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KERNELS = (3, 7, 13, 31)
STAGE = (1, 80, 56, 56)  # map for which the choice is shown
SHAPE, KERNEL = (1, 320, 32, 32), 13  # map and kernel that are timed
SECONDS = 0.6  # for each line, whose figures are measured in turn
GPU_SHAPES = ((16, 160, 64, 64), (16, 320, 32, 32), (2, 320, 50, 84))  # of variant T, in batches of 16 and of 2
GPU_DTYPE, GPU_SECONDS = torch.bfloat16, 0.05
LABELS = ('forward', 'input gradient', 'weight gradient')


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ('  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return ''.join(f'{line.rstrip()}\n' for line in lines)


def _note(backend: str) -> str:
    if reason := backends.why_not(backend):
        return reason
    if backend == 'cuda':
        return str(build.library_file('cuda'))
    if backend == 'triton':
        return f'triton {importlib.metadata.version("triton")}'
    return f'{build.library_file()} ({torch.ops.mmuni_cpu.capability()})' if backend == 'cpp' else ''


def _gpus() -> str:
    texts = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        texts.append(
            f'cuda:{index}: {found.name}, compute capability {found.major}.{found.minor}, '
            f'{found.total_memory / 2**30:.0f} GiB\n'
        )
    return ''.join(texts) or 'no CUDA device\n'


def _availability() -> str:
    rows = [[name, 'no' if backends.why_not(name) else 'yes', _note(name)] for name in backends.BACKENDS]
    return _table([['backend', 'works', ''], *rows])


def _choices(device: str) -> str:
    rows = [['dtype', 'layout', *(f'{k}x{k}' for k in KERNELS)]]
    for dtype in DTYPES:
        for name, layout in LAYOUTS.items():
            x = torch.empty(STAGE, dtype=dtype, device=device).contiguous(memory_format=layout)
            rows.append([str(dtype).removeprefix('torch.'), name, *(backends.choose('auto', x, k) for k in KERNELS)])
    return _table(rows)


def _unless_timed(device: str) -> str:
    return ' as long as nothing is timed (it is, at the first map of a kind)' if device == 'cuda' else ''


def _auto() -> str:
    variable = os.environ.get('MMUNI_DW_BACKEND')
    text = f'MMUNI_DW_BACKEND is {variable!r}.\n' if variable else 'MMUNI_DW_BACKEND is not set.\n'
    for device in ('cpu', 'cuda') if torch.cuda.is_available() else ('cpu',):
        try:
            text += f"\n'auto' takes, for a map of {STAGE} on {device}{_unless_timed(device)}:\n{_choices(device)}"
        except (RuntimeError, ValueError) as error:
            text += f"\n'auto' fails on {device}: {error}\n"
    return text


def _timed_rows(names: list[str]) -> Iterator[list[str]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE[1], 1, KERNEL, KERNEL, generator=generator)
    for layout, memory_format in LAYOUTS.items():
        x = torch.randn(SHAPE, generator=generator).contiguous(memory_format=memory_format)
        for direction, label in zip(DIRECTIONS, LABELS, strict=True):
            functions = {name: by_backend(direction, x, x, weight, name) for name in names}
            timings = interleave({'base': by_torch(direction, x, x, weight), **functions}, SECONDS)
            base, *others = (timing.median for timing in timings.values())
            yield [layout, label, f'{base:.2f}', *(f'{ms:.2f} ({base / ms:.1f}x)' for ms in others)]


def _gpu_rows(names: list[str], clock: GpuClock) -> Iterator[list[str]]:
    """Microseconds of every map; what was taken by 'auto' is measured as well, once it has been timed."""
    for shape in GPU_SHAPES:
        weight = torch.randn(shape[1], 1, KERNEL, KERNEL, device=clock.device)
        for layout, memory_format in LAYOUTS.items():
            x = torch.randn(shape, device=clock.device).to(GPU_DTYPE).contiguous(memory_format=memory_format)
            for direction, label in zip(DIRECTIONS, LABELS, strict=True):
                functions = [by_torch(direction, x, x, weight.to(GPU_DTYPE))]
                functions += [by_backend(direction, x, x, weight, name) for name in (*names, 'auto')]
                base, *others = (1e3 * clock.measure(function, 'eager').timing.median for function in functions)
                function = dict(forward='forward', dgrad='input_grad', wgrad='weight_grad')[direction]
                taken = fastest.remembered(fastest.kind_of(function, x, KERNEL, 1)) or '-'
                cells = [f'{us:.0f} ({base / us:.1f}x)' for us in others]
                yield [str(shape), layout, label, f'{base:.0f}', *cells, taken]


def _gpu_timing() -> str:
    names = [name for name in backends.ON_GPU if not backends.why_not(name)]
    rows = list(_gpu_rows(names, GpuClock(GPU_SECONDS)))
    header = ['map', 'layout', 'direction', 'as torch has it', *names, 'auto', 'auto took']
    return (
        f'{KERNEL}x{KERNEL}, {str(GPU_DTYPE).removeprefix("torch.")}, {torch.cuda.get_device_name()}, from a cold '
        'cache, in eager mode.\nMedian in microseconds; in brackets, how many times faster than torch as it is.\n'
        f'{_table([header, *rows])}'
    )


def _timing() -> str:
    if torch.cuda.is_available():
        return _gpu_timing()
    names = [name for name in ('torch', 'cpp') if not backends.why_not(name)]
    rows = list(_timed_rows(names))
    return (
        f'{KERNEL}x{KERNEL} on {SHAPE} float32, CPU, threads: {torch.get_num_threads()} '
        f'(OMP_NUM_THREADS sets them).\nMedian in ms; in brackets, how many times faster than torch as it is.\n'
        f'{_table([["layout", "direction", "as torch has it", *names], *rows])}'
    )


def main(argv: list[str] | None = None) -> None:
    """Write the report to the standard output."""
    parser = argparse.ArgumentParser(
        prog='python -m mmunireplknet.ops',
        description='Say which backends of the large depthwise convolution work here, which is taken, and how fast '
        'each is.',
        epilog='Example: OMP_NUM_THREADS=4 MMUNI_DW_BACKEND=torch python -m mmunireplknet.ops --no-timing',
    )
    parser.add_argument('--no-timing', action='store_true', help='leave out the timing, which takes some 5 s on a CPU')
    args = parser.parse_args(argv)
    sys.stdout.write(f'torch {torch.__version__}\n{_gpus()}\n{_availability()}\n{_auto()}')
    if not args.no_timing:
        sys.stdout.write(f'\n{_timing()}')


if __name__ == '__main__':
    main()
