"""An nvcc that compiles nothing, a torch for CUDA, and GPUs: what a build of the CUDA kernels sees of a machine."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmunireplknet.ops import build

NVCC = """
import sys
if '--version' in sys.argv:
    sys.exit(print('Cuda compilation tools, release {release}, V{release}.1'))
{then}
"""
WORKS = """
open(sys.argv[sys.argv.index('-o') + 1], 'w').close()
open(sys.argv[0] + '.log', 'a').write(' '.join(sys.argv[1:]) + '\\n')
"""
FAILS = "sys.exit('forward.cuh(1): error: expected a semicolon')"


@pytest.fixture(name='package')
def cuda_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the sources in a package without a library, a torch for CUDA 13 and an empty cache."""
    here = tmp_path / 'ops'
    shutil.copytree(build.CUDA_SOURCES, here / 'csrc' / 'cuda')
    (here / 'csrc' / 'cpu').mkdir()
    (here / 'csrc' / 'cpu' / 'stub.cpp').touch()
    monkeypatch.setattr(build, 'HERE', here)
    monkeypatch.setattr(build, 'SOURCES', here / 'csrc' / 'cpu')
    monkeypatch.setattr(build, 'CUDA_SOURCES', here / 'csrc' / 'cuda')
    set_torch(monkeypatch, tmp_path, "'13.0'")
    for name in ('CUDA_HOME', 'TORCH_CUDA_ARCH_LIST'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('CXX', str(program(tmp_path / 'c++', 'import sys' + WORKS)))
    build.fingerprint.cache_clear()
    yield here
    build.fingerprint.cache_clear()


def program(file: Path, text: str) -> Path:
    """A command that is a Python program."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix('.py').write_text(text)
    file.write_text(f'#!/bin/sh\nexec {sys.executable} -S {file.with_suffix(".py")} "$@"\n')
    file.chmod(0o755)
    return file


def set_torch(monkeypatch: pytest.MonkeyPatch, folder: Path, version: str) -> None:
    (folder / 'torch' / 'lib').mkdir(parents=True, exist_ok=True)
    (folder / 'torch' / 'version.py').write_text(
        f'__version__ = "2.13.0"\ncuda: Optional[str] = {version}\nhip = None\n'
    )
    monkeypatch.setattr(build, '_torch_folder', lambda: folder / 'torch')


def set_nvcc(monkeypatch: pytest.MonkeyPatch, folder: Path, then: str = WORKS, release: str = '13.5') -> Path:
    file = program(folder / 'home' / 'bin' / 'nvcc', NVCC.format(release=release, then=then))
    monkeypatch.setenv('CUDA_HOME', str(folder / 'home'))
    return file


def commands(tool: Path) -> list[list[str]]:
    file = Path(f'{tool.with_suffix(".py")}.log')
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def files_in(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir() if f.is_file())


def set_gpus(monkeypatch: pytest.MonkeyPatch, folder: Path, said: str) -> None:
    """A driver whose nvidia-smi says so."""
    asked = "['--query-gpu=compute_cap', '--format=csv,noheader']"
    program(folder / 'driver' / 'nvidia-smi', f'import sys\nassert sys.argv[1:] == {asked}\nprint({said!r})')
    monkeypatch.setenv('PATH', os.pathsep.join([str(folder / 'driver'), '/usr/bin', '/bin']))
