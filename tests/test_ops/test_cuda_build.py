"""Building the CUDA kernels: what nvcc is asked, and what is said where it is not there or fails."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmunireplknet.ops import build, cuda

from .fake_nvcc import FAILS, commands, files_in, set_nvcc, set_torch


def without_nvcc(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(build, 'nvccs', dict)


def without_cuda(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    set_nvcc(monkeypatch, folder)
    set_torch(monkeypatch, folder, 'None')


def with_another_cuda(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    tool = set_nvcc(monkeypatch, folder, release='12.8')
    monkeypatch.setattr(build, 'nvccs', lambda: {str(tool): (12, 8)})


def without_sources(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    set_nvcc(monkeypatch, folder)
    shutil.rmtree(build.CUDA_SOURCES)


@pytest.mark.parametrize(
    ('situation', 'reason'),
    [
        (
            without_nvcc,
            'there is no nvcc of CUDA 13, which torch .* is for; install CUDA 13 (pip has .*nvidia-cuda-nvcc==13',
        ),
        (without_cuda, 'has no CUDA'),
        (with_another_cuda, 'there is no nvcc of CUDA 13, which torch .* is for (seen: .*nvcc of 12.8)'),
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
    said, made = capsys.readouterr().out.splitlines()
    assert said == 'compiling the CPU kernels'
    assert 'built in' in made


@pytest.mark.parametrize('linked', [True, False])
def test_commands(package: Path, linked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs CUDA is compiled by nvcc, what needs torch is not; torch_cuda is linked where there is one."""
    tool = set_nvcc(monkeypatch, package.parent)
    if linked:
        (package.parent / 'torch' / 'lib' / 'libtorch_cuda.so').touch()
    library = build.build(kind='cuda')
    assert library == build.library_file('cuda') == package / build.library_name('cuda')
    assert re.fullmatch(r'mmuni_cuda-[0-9a-f]{12}-cu13-ptx90-sm120-sm80-sm90-\w+\.so', library.name)
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
        ('12.0 9.0+PTX 8.0', '13', 'is up to date', 'cu13-ptx90-sm120-sm80-sm90'),
        ('12.0', '13', 'built in', 'cu13-sm120'),
        ('12.0', '13', 'is up to date', 'cu13-sm120'),
        ('12.0', '12', 'built in', 'cu12-sm120'),
        ('9.0', '12', 'built in', 'cu12-sm90'),
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
        lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith('compiling the C')]
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
