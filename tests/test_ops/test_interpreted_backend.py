"""The Triton kernels behind the operators, in Triton's interpreter: small maps of every layout, and the block."""

import importlib.util
import os
import subprocess
import sys

import pytest

PROGRAM = """
import itertools, sys, torch
from mmunireplknet.ops import backends
from tests.test_ops import reparam_cases
from tests.test_ops.cases import Case, mistakes

assert backends.why_not('triton') == ''
wrong = []
for dtype, (kernel, size, layout, grad_layout, channels, dilation, batch) in itertools.product(
    (torch.float32, torch.float16),
    (
        (3, (1, 1), 'contiguous', 'channels_last', 1, 1, 1),
        (5, (7, 7), 'channels_last', 'half the planes', 3, 2, 1),
        (7, (3, 19), 'every second pixel', 'constant', 3, 3, 1),
        (13, (9, 10), 'permuted', 'expanded', 2, 1, 2),
        (5, (2, 5), 'half the channels', 'contiguous', 3, 5, 1),
    ),
):
    wrong += mistakes(Case(kernel, dtype, size, layout, grad_layout, channels, dilation, batch), 'triton')
for dtype, layout in ((torch.float32, 'channels_last'), (torch.float16, 'contiguous')):
    case = reparam_cases.Case('7', (9, 10), 2, 1, layout, dtype)
    wrong += reparam_cases.mistakes(case, 'triton', reparam_cases.TOLERANCE_ON_GPU[dtype])
sys.stdout.write('\\n'.join(wrong))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='needs the package triton')
def test_the_kernels_behind_the_operators() -> None:
    """In a process of its own: whether a kernel is interpreted is decided when it is defined."""
    environment = {**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}
    environment.pop('MMUNI_DW_BACKEND', None)
    done = subprocess.run([sys.executable, '-c', PROGRAM], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, ''), done.stdout + done.stderr
