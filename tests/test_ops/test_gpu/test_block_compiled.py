"""What the kernels of the Dilated Reparam Block are compiled to, at the sizes of the third stage of UniRepLKNet-T."""

import shutil
from pathlib import Path

import pytest

from .machine_code import TOOLS
from .test_block import launches

SHAPE = (16, 320, 32, 32)
TILES = 8  # of a program of the kernels with a loop over tiles
# Instructions of a thread per pixel, all of them for a kernel with several loops; a tenth above what was counted.
MOST = {'_moments_kernel': 210, '_gradient_sums_kernel': 155, '_weight_grad_kernel': 200, '_input_grad_kernel': 1000}


@pytest.mark.slow
@pytest.mark.parametrize('capability', [80, 90])
@pytest.mark.parametrize('name', MOST)
def test_nothing_is_spilled(name: str, capability: int, tmp_path: Path) -> None:
    if not all(shutil.which(TOOLS / tool) for tool in ('cuobjdump', 'nvdisasm')):
        pytest.skip('this triton has no tools to read machine code')
    chosen = [launch for side in launches(SHAPE) for launch in side if launch.name == name]
    assert chosen
    for launch in chosen:
        code = launch.code(capability, tmp_path, 1 if name == '_input_grad_kernel' else TILES)
        values = launch.arguments()
        pixels = values['ROWS'] * 16 * (1 if name == '_input_grad_kernel' else TILES)
        assert code.spills == 0
        assert code.counts['HMMA'] + code.counts['HGMMA'] > 0
        assert not code.counts.keys() & {'ATOM', 'ATOMG', 'RED'}
        assert code.instructions * 32 * values['num_warps'] / pixels <= MOST[name]
