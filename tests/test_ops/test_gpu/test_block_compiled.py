"""What the kernels of the Dilated Reparam Block are compiled to, at the sizes of the third stage of UniRepLKNet-T.

As a program it prints the table of docs/triton-kernels.md.
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .launches import Launch
from .machine_code import TOOLS, Code
from .test_block import launches

SHAPE = (16, 320, 32, 32)
# Instructions of a thread per pixel, all steps of a kernel together; a tenth above what was counted.
MOST = {
    90: {'_moments_kernel': 130, '_outputs_kernel': 120, '_weight_grad_kernel': 165, '_input_grad_kernel': 83},
    120: {'_moments_kernel': 178, '_outputs_kernel': 174, '_weight_grad_kernel': 205, '_input_grad_kernel': 155},
    80: {'_moments_kernel': 200, '_outputs_kernel': 190, '_weight_grad_kernel': 165, '_input_grad_kernel': 147},
}
ONCE = {'_lay_out_kernel': 26, '_merge_kernel': 3, '_collect_kernel': 2}


def kernels(capability: int, dtype: torch.dtype) -> Iterator[Launch]:
    """The launches for the first channels that are taken."""
    from mmunireplknet.ops.gpu import branches

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branches, 'capability_of', lambda x: capability)
        for side in launches(SHAPE, dtype):
            for launch in side:
                if launch.arguments().get('FIRST') in (None, 0) or launch.name == '_moments_kernel':
                    yield launch


def count(launch: Launch, capability: int, folder: Path) -> tuple[Code, float]:
    """The machine code, and its instructions per pixel of the channels that it is launched for."""
    values = launch.arguments()
    trips, channels = 1, launch.grid[0]
    if 'splits' in values and 'blocks' in values:
        trips, channels = math.ceil(values['blocks'] / values['splits']), channels // values['splits']
    elif 'blocks' in values:
        channels //= values['blocks']
    elif launch.name == '_lay_out_kernel':
        trips = math.ceil(sum(values['KERNELS']) / len(values['KERNELS']))  # of the loops over the rows of each branch
    code = launch.code(capability, folder, trips)
    threads = launch.grid[0] * 32 * values['num_warps']
    return code, code.instructions * threads / (channels * SHAPE[0] * SHAPE[2] * SHAPE[3])


def check(code: Code, name: str, capability: int) -> None:
    assert code.spills == 0
    assert not code.counts.keys() & {'ATOM', 'ATOMG', 'RED'}
    if name not in ONCE:
        assert code.counts['HGMMA' if capability == 90 and name != '_weight_grad_kernel' else 'HMMA'] > 0


@pytest.fixture(autouse=True)
def tools() -> None:
    if not all(shutil.which(TOOLS / tool) for tool in ('cuobjdump', 'nvdisasm')):
        pytest.skip('this triton has no tools to read machine code')


@pytest.mark.slow
@pytest.mark.parametrize('capability', MOST)
def test_instructions(capability: int, tmp_path: Path) -> None:
    totals = dict.fromkeys(MOST[capability] | ONCE, 0.0)
    for launch in kernels(capability, torch.bfloat16):
        if launch.name in totals:
            code, per_pixel = count(launch, capability, tmp_path)
            check(code, launch.name, capability)
            totals[launch.name] += per_pixel
    assert {name: total for name, total in totals.items() if not 0 < total <= (MOST[capability] | ONCE)[name]} == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'allowed'),
    [*[(name, False) for name in MOST[90]], ('_outputs_kernel', True), ('_weight_grad_kernel', True)],
)
def test_float32(name: str, allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two parts, where TF32 is not allowed, and in one."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', allowed)
    # Of several groups of branches the first, which has the most taps.
    launch = next(launch for launch in kernels(90, torch.float32) if launch.name == name)
    check(count(launch, 90, tmp_path)[0], name, 90)


def main() -> None:
    """Print the table."""
    for capability in MOST:
        for launch in kernels(capability, torch.bfloat16):
            if launch.name in MOST[capability] | ONCE:
                code, per_pixel = count(launch, capability, Path(tempfile.gettempdir()))
                values = launch.arguments()
                sys.stdout.write(
                    f'| {launch.name} | {capability} | {values.get("BLOCK", "")}, {values["num_warps"]} | '
                    f'{code.registers} | {code.spills} | {per_pixel:.1f} |\n'
                )
                sys.stdout.flush()


if __name__ == '__main__':
    main()
