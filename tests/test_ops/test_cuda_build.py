"""Building the CUDA kernels: where nvcc is looked for, what it is asked, and what is said where it is not there."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmunireplknet.ops import build, cuda

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


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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


def test_places_of_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last to come is the first to be taken."""
    monkeypatch.setenv('CUDA_HOME', str(tmp_path / 'nowhere'))
    monkeypatch.setenv('PATH', str(tmp_path / 'path'))
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    monkeypatch.setattr(build, 'CUDA_FOLDER', tmp_path / 'cuda')
    assert build.nvcc() == ''
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name: SimpleNamespace(submodule_search_locations=[tmp_path / name])
    )
    assert build.nvcc() == ''
    monkeypatch.delenv('CUDA_PATH', raising=False)
    for folder in ('cuda/bin', 'nvidia/cu13/bin', 'path', 'elsewhere/bin', 'home/bin'):
        file = program(tmp_path / folder / 'nvcc', '')
        if folder == 'elsewhere/bin':
            monkeypatch.delenv('CUDA_HOME')
            monkeypatch.setenv('CUDA_PATH', str(tmp_path / 'elsewhere'))
        if folder == 'home/bin':
            monkeypatch.setenv('CUDA_HOME', str(tmp_path / 'home'))
        assert build.nvcc() == str(file)


@pytest.mark.parametrize(
    ('wish', 'expected'),
    [
        ('', ['80,code=sm_80', '90,code=sm_90', '90,code=compute_90']),
        ('9.0', ['90,code=sm_90']),
        ('8.6;12.0+PTX', ['86,code=sm_86', '120,code=sm_120', '120,code=compute_120']),
        ('8.0 9.0a', ['80,code=sm_80', '90a,code=sm_90a']),
        ('7.5;8.0;', ['80,code=sm_80']),
        ('7.0 7.5 8.0 8.6 9.0+PTX', ['80,code=sm_80', '86,code=sm_86', '90,code=sm_90', '90,code=compute_90']),
        ('Turing;Ampere;9.0', ['80,code=sm_80', '86,code=sm_86', '86,code=compute_86', '90,code=sm_90']),
    ],
)
def test_architectures(wish: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', wish)
    assert build.architectures() == [f'-gencode=arch=compute_{flag}' for flag in expected]


def test_the_architecture_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', 'native')
    assert build.architectures() == ['-arch=native']


@pytest.mark.parametrize(
    ('wish', 'reason'),
    [
        ('Rubin', "'Rubin' is no architecture; write it as 8.0;9.0+PTX"),
        ('7.0;Turing', 'take 8.0 (Ampere) and newer'),
        ('90', "'90'"),
    ],
)
def test_unknown_architectures(wish: str, reason: str, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_nvcc(monkeypatch, package.parent)
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', wish)
    with pytest.raises(RuntimeError, match=re.escape(f'TORCH_CUDA_ARCH_LIST={wish}: ')) as caught:
        build.build(kind='cuda')
    assert reason in str(caught.value)
    assert files_in(package) == []


def without_nvcc(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(build, 'nvcc', lambda: '')


def without_cuda(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    set_nvcc(monkeypatch, folder)
    set_torch(monkeypatch, folder, 'None')


def with_another_cuda(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    set_nvcc(monkeypatch, folder, release='12.8')


def with_nonsense(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(build, 'nvcc', lambda: shutil.which('true'))


def without_sources(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    set_nvcc(monkeypatch, folder)
    shutil.rmtree(build.CUDA_SOURCES)


@pytest.mark.parametrize(
    ('situation', 'reason'),
    [
        (without_nvcc, 'there is no nvcc (install CUDA 13 or the package nvidia-cuda-nvcc, or set CUDA_HOME)'),
        (without_cuda, 'has no CUDA'),
        (with_another_cuda, 'is of CUDA 12, torch .* of CUDA 13; they must have the same number'),
        (with_nonsense, 'names no release'),
        (without_sources, 'their sources are missing'),
    ],
)
def test_why_not(
    situation: Callable, reason: str, package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It is said where they are asked for, and else nothing is: the CPU kernels are built as ever."""
    situation(monkeypatch, package.parent)
    assert re.search(reason.replace('(', r'\(').replace(')', r'\)'), build.why_not('cuda'))
    with pytest.raises(RuntimeError, match='The CUDA kernels cannot be built: '):
        build.build(kind='cuda')
    monkeypatch.setattr(sys, 'argv', ['build', '--kernels', 'cuda'])
    with pytest.raises(SystemExit, match='The CUDA kernels cannot be built: '):
        build.main()
    assert files_in(package) == []
    capsys.readouterr()
    monkeypatch.setattr(sys, 'argv', ['build'])
    build.main()
    assert files_in(package) == [build.library_name()]
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize('linked', [True, False])
def test_commands(package: Path, linked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs CUDA is compiled by nvcc, what needs torch is not; torch_cuda is linked where there is one."""
    tool = set_nvcc(monkeypatch, package.parent)
    if linked:
        (package.parent / 'torch' / 'lib' / 'libtorch_cuda.so').touch()
    library = build.build(kind='cuda')
    assert library == build.library_file('cuda') == package / build.library_name('cuda')
    assert re.fullmatch(r'mmuni_cuda-[0-9a-f]{12}-cu13-ptx90-sm80-sm90-\w+\.so', library.name)
    *compiled, link = commands(tool)
    sources = [word for command in compiled for word in command if word.endswith('.cu')]
    assert sorted(sources) == sorted(str(file) for file in build.CUDA_SOURCES.glob('*.cu'))
    for command in compiled:
        assert {*build.NVCC_FLAGS, *build.architectures(), '-c'} <= set(command)
        assert not [word for word in command if 'torch' in word]
    (by_host,) = commands(Path(build.compiler()[0]))
    assert str(build.CUDA_SOURCES / 'operators.cpp') in by_host
    assert {build.TORCH_TARGET, f'-I{package.parent / "torch" / "include"}'} <= set(by_host)
    assert sum(word.endswith('.o') for word in link) == len(sources) + 1
    assert {'-shared', '-ltorch_cpu'} <= set(link)
    assert ('-ltorch_cuda' in link) == linked


def test_names_follow_their_own_sources(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a library of the other kind taken for a stale one."""
    set_nvcc(monkeypatch, package.parent)
    first = [build.build(kind=kind) for kind in build.KINDS]
    assert all(file.exists() for file in first)
    (package / 'csrc' / 'cuda' / 'forward.cuh').write_text('// changed')
    build.fingerprint.cache_clear()
    assert build.library_file('cpu') == first[0]
    assert build.library_file('cuda') is None
    second = build.build(kind='cuda')
    assert files_in(package) == sorted([first[0].name, second.name])


def test_another_list_of_gpus_is_built_again(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And another major version of CUDA; what is there serves until then, and goes afterwards."""
    set_nvcc(monkeypatch, package.parent)
    monkeypatch.setattr(sys, 'argv', ['build', '--kernels', 'cuda'])
    first = build.build(kind='cuda')
    for wish, release, said, targets in (
        ('9.0+PTX 8.0', '13', 'is up to date', 'cu13-ptx90-sm80-sm90'),
        ('12.0', '13', 'built in', 'cu13-sm120'),
        ('12.0', '13', 'is up to date', 'cu13-sm120'),
        ('12.0', '12', 'built in', 'cu12-sm120'),
        ('native', '12', 'built in', 'cu12-native'),
    ):
        monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', wish)
        set_nvcc(monkeypatch, package.parent, release=f'{release}.9')
        set_torch(monkeypatch, package.parent, f"'{release}.0'")
        assert build.library_file('cuda') == first
        build.main()
        assert said in capsys.readouterr().out
        first = build.library_file('cuda')
        assert f'-{targets}-' in first.name
        assert files_in(package) == [first.name]


def test_a_library_for_other_gpus(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a wheel brings it along: it is found, but after that for those which are asked for, wherever this is."""
    set_nvcc(monkeypatch, package.parent)
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', '12.0')
    brought = build.build(kind='cuda')
    for wish in ('', '9.0', '7.5', 'nonsense'):
        monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', wish)
        assert build.library_file('cuda') == brought
        assert build.library_file('cuda', others=False) is None
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', '9.0')
    asked = build.build(build.cache_folder(), 'cuda')
    assert build.library_file('cuda') == build.library_file('cuda', others=False) == asked
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', '8.0')
    later = build.build(build.cache_folder(), 'cuda')
    os.utime(asked, (1, 1))
    monkeypatch.delenv('TORCH_CUDA_ARCH_LIST')
    assert build.library_file('cuda') == brought
    brought.unlink()
    assert build.library_file('cuda') == later
    (package / 'csrc' / 'cuda' / 'forward.cuh').write_text('// changed')
    build.fingerprint.cache_clear()
    assert build.library_file('cuda') is None


def test_caches_that_cannot_be_looked_into(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold no library: names that are too long, a user without a home, as in containers."""
    monkeypatch.setenv('XDG_CACHE_HOME', 'x' * 300)
    assert [build.library_file(kind) for kind in build.KINDS] == [None, None]
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setattr(Path, 'home', homeless)
    assert [build.library_file(kind) for kind in build.KINDS] == [None, None]
    built = build.build(kind='cpu')
    assert build.library_file('cpu') == built
    shutil.rmtree(build.CUDA_SOURCES)
    assert build.library_file('cuda') is None


def homeless() -> Path:
    raise RuntimeError('Could not determine home directory.')


def test_message_of_nvcc(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for the CPU stay."""
    set_nvcc(monkeypatch, package.parent, FAILS)
    monkeypatch.setattr(sys, 'argv', ['build'])
    with pytest.raises(SystemExit, match=r'The CUDA kernels did not compile\.\n.*nvcc(.|\n)*expected a semicolon'):
        build.main()
    assert files_in(package) == [build.library_name('cpu')]


def test_main_builds_both(package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    set_nvcc(monkeypatch, package.parent)
    monkeypatch.setattr(sys, 'argv', ['build'])
    for said in ('built in', 'is up to date'):
        build.main()
        lines = capsys.readouterr().out.splitlines()
        assert [str(build.library_file(kind)) for kind in build.KINDS] == [line.split()[0] for line in lines]
        assert all(said in line for line in lines)


@pytest.fixture
def _fresh() -> None:
    cuda.why_not.cache_clear()
    yield
    cuda.why_not.cache_clear()


@pytest.mark.usefixtures('_fresh')
def test_backend_says_why_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, 'cuda', None)
    assert 'need a torch for CUDA, and this one, ' in cuda.why_not()
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.setattr(build, 'library_file', lambda kind: None)
    for reason, said in (('there is no nvcc.', 'there is no nvcc.'), ('', 'run python -m mmunireplknet.ops.build.')):
        monkeypatch.setattr(build, 'why_not', lambda kind, reason=reason: reason)
        cuda.why_not.cache_clear()
        assert cuda.why_not() == f'the CUDA kernels are not built: {said}'
    (tmp_path / 'broken.so').write_text('this is no library')
    monkeypatch.setattr(build, 'library_file', lambda kind: tmp_path / 'broken.so')
    cuda.why_not.cache_clear()
    assert re.search(r'broken\.so does not work: .*(invalid ELF header|file too short)', cuda.why_not())


def test_what_is_supported() -> None:
    x = torch.empty(2, 3, 40, 50, device='meta')
    assert [cuda.supports(x.to(dtype), 31, 1) for dtype in cuda.DTYPES] == ['', '', '']
    assert cuda.supports(x, 7, 5) == ''
    assert 'no kernels for torch.float64' in cuda.supports(x.double(), 3, 1)
    assert 'reach over 37 pixels, more than 31' in cuda.supports(x, 7, 6)
    assert 'too large' in cuda.supports(torch.empty(2**20, 1, 2**10, 2**10, device='meta'), 3, 1)
