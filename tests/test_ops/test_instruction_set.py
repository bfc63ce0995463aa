"""The compiled kernels with each instruction set, which they choose once for the life of a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize('capability', ['portable', 'avx2', 'avx512'])
@pytest.mark.parametrize('cases', ['cases', 'reparam_cases', 'pointwise_cases'])
def test_instruction_set(cases: str, capability: str, cpp: Path) -> None:
    machine = torch.backends.cpu.get_cpu_capability()
    if not machine.startswith({'portable': '', 'avx2': 'AVX', 'avx512': 'AVX512'}[capability]):
        pytest.skip(f'this machine has {machine}, which lacks {capability}')
    expected = 'neon' if os.uname().machine == 'aarch64' else capability
    done = subprocess.run(
        [sys.executable, '-m', f'tests.test_ops.{cases}'], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, 'MMUNI_CPU_CAPABILITY': capability, 'OMP_NUM_THREADS': '1'},
    )  # fmt: skip
    assert (done.stdout, done.returncode) == (expected, 0), done.stderr
