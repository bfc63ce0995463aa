"""Machine code of the shipped kernels for GPUs that are not there, and what can be read off it.

The functions of the package run on CPU tensors, with a driver that only names a GPU: what they would launch is
compiled as it would be there, with the same arguments, and not run. As a program it prints the table of
docs/triton-kernels.md.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from mmunireplknet.ops.gpu import coefficients, convolution, gram, layouts, moments, pointwise, toeplitz, tuning

MODULES = (coefficients, convolution, gram, layouts, moments, pointwise, toeplitz)  # with kernels
TOOLS = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'
INSTRUCTION = re.compile(r'^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)(.*)$', re.MULTILINE)


class Launch(NamedTuple):
    """A kernel as it would have been launched."""

    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    kernel: Any


class NoDriver:
    """A driver of triton for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget('cuda', capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(capability: int, compile_: bool = True) -> Iterator[list[Launch]]:
    """All launches, compiled for a GPU like 90; without ``compile_`` only those that would be compiled anew."""
    launches: list[Launch] = []
    run = JITFunction.run

    def warm_up(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if compile_:
            launches.append(Launch(self.fn.__name__, grid, dict(zip(self.arg_names, args, strict=False)), kernel))
        return kernel

    def count(self: JITFunction, key: Any, signature: Any, device: int, *rest: Any) -> object:
        launches.append(Launch(self.fn.__name__, (), {}, None))
        kernel = object()
        self.device_caches[device][0][key] = kernel
        return kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, 'run', warm_up)
        if not compile_:
            patch.setattr(JITFunction, '_do_compile', count)
        for module in MODULES:  # forget what is compiled, here and for the others
            for function in vars(module).values():
                if isinstance(function, JITFunction):
                    patch.setattr(function, 'device_caches', type(function.device_caches)(function.create_binder))
        patch.setattr(triton.runtime.driver, '_active', NoDriver(capability))
        yield launches


class Code(NamedTuple):
    """What is read off the machine code.

    Attributes:
        registers: Of a thread.
        spills: Instructions that move registers to and from memory.
        counts: Instructions that a thread executes, by name.
    """

    registers: int
    spills: int
    counts: Counter

    @property
    def instructions(self) -> int:
        return sum(self.counts.values())


def read(launch: Launch, folder: Path, trips: int) -> Code:
    """Read the machine code of a kernel whose only loop is executed ``trips`` times."""
    file = folder / f'{launch.kernel.hash}.cubin'
    file.write_bytes(launch.kernel.asm['cubin'])
    usage, listing = (
        subprocess.run([TOOLS / 'cuobjdump', option, file], capture_output=True, text=True, check=True).stdout
        for option in ('-res-usage', '-sass')
    )
    code = [(int(place, 16), name, rest) for place, name, rest in INSTRUCTION.findall(listing)]
    end = max(place for place, name, _ in code if name.startswith('EXIT'))
    loops = [
        (int(target.group(1), 16), place)
        for place, name, rest in code
        if name.startswith('BRA') and (target := re.search(r'0x([0-9a-f]+)', rest)) and int(target.group(1), 16) < place
    ]
    counts: Counter = Counter()
    for place, name, _ in code:
        if place <= end and name != 'NOP':
            inside = any(first <= place <= last for first, last in loops if last < end)
            counts[name.partition('.')[0]] += trips if inside else 1
    registers = int(re.findall(r'REG:(\d+)', usage)[0])
    return Code(registers, counts['STL'] + counts['LDL'], counts)


def compile_forward(
    capability: int, dtype: torch.dtype, kernel: int, config: tuning.Config, width: int = 32, folder: Path = Path()
) -> tuple[Code, float]:
    """The forward kernel, and the instructions of a thread per output pixel."""
    x, weight = torch.empty(16, 8, 32, width, dtype=dtype), torch.empty(8, 1, kernel, kernel)
    with compiling_for(capability) as launches:
        convolution.convolve(x, weight, None, 1, False, False, None, config)
    launch = next(launch for launch in launches if launch.name == '_convolve')
    values = launch.arguments
    down = -(-(config.rows + kernel - 1) // values['STEP_Y'])
    code = read(launch, folder, down * (values['DEPTH'] // values['STEP_X']))
    return code, code.instructions * 32 * config.warps / (config.block * config.rows * config.columns)


def compile_weight_grad(
    capability: int, dtype: torch.dtype, kernel: int, config: tuning.Config, folder: Path = Path()
) -> tuple[Code, float]:
    """The Gram kernel; its instructions per pixel for 16 maps of 32 x 32, what a program does once included."""
    x = torch.empty(16, 8, 32, 32, dtype=dtype)
    with compiling_for(capability) as launches:
        gram.multiply(x, x, kernel, 1, config)
    launch = next(launch for launch in launches if launch.name == '_gram')
    steps = 16 * 8 * 2 // config.block
    code = read(launch, folder, steps)
    return code, code.instructions * 32 * config.warps * launch.arguments['CHUNKS'] / (16 * 32 * 32)


def main() -> None:
    """Print the table."""
    sys.stdout.write('| kernel | dtype | K | sm | division | registers | spills | MMA | per pixel |\n')
    sys.stdout.write('|---|---|---|---|---|---|---|---|---|\n')
    for operation, compile_one in (('forward', compile_forward), ('weight_grad', compile_weight_grad)):
        for dtype, kernel, capability in (
            *((torch.bfloat16, 13, sm) for sm in (80, 90, 120)),
            *((torch.float32, 13, sm) for sm in (80, 90, 120)),
            *((torch.bfloat16, kernel, 90) for kernel in (7, 31)),
        ):
            for config in tuning.candidates(operation, 32, dtype):
                code, per_pixel = compile_one(capability, dtype, kernel, config, folder=Path('/tmp'))
                products = sum(n for name, n in code.counts.items() if 'MMA' in name)
                sys.stdout.write(
                    f'| {operation} | {str(dtype)[6:]} | {kernel} | {capability} | {config.block} x {config.rows} x '
                    f'{config.columns}, {config.warps} warps | {code.registers} | {code.spills} | {products} | '
                    f'{per_pixel:.1f} |\n'
                )
                sys.stdout.flush()


if __name__ == '__main__':
    main()
