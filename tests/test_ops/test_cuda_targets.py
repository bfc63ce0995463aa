"""By which nvcc, by how many at once, and for which GPUs the CUDA kernels are built."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmunireplknet.ops import build

from .fake_nvcc import NVCC, WORKS, commands, files_in, program, set_gpus, set_nvcc, set_torch


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders in which nvcc is looked for, the first to be taken first; all are empty, and torch has CUDA 13."""
    monkeypatch.setenv('CUDA_HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('PATH', os.pathsep.join(['', str(tmp_path / 'first'), str(tmp_path / 'second'), '/bin']))
    package = SimpleNamespace(submodule_search_locations=[tmp_path / 'nvidia'])
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: package)
    monkeypatch.setattr(build, 'CUDA_FOLDER', tmp_path / 'cuda')
    set_torch(monkeypatch, tmp_path, "'13.0'")
    return [tmp_path / f for f in ('home/bin', 'first', 'second', 'nvidia/cu13/bin', 'nvidia/cu12/bin', 'cuda/bin')]


def test_places_of_nvcc(places: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last to come is the first to be taken."""
    assert build.nvcc() == ('', (0, 0))
    for folder in reversed(places):
        file = program(folder / 'nvcc', NVCC.format(release='13.5', then=''))
        assert build.nvcc() == (str(file), (13, 5))
    assert list(build.nvccs()) == [str(folder / 'nvcc') for folder in places]
    monkeypatch.delenv('CUDA_HOME')
    monkeypatch.setenv('CUDA_PATH', str(places[-1].parent))
    assert build.nvcc()[0] == str(places[-1] / 'nvcc')


def test_an_nvcc_of_another_cuda_hides_none(places: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of the system in PATH, where pip has installed that which torch needs."""
    for folder, release in zip(places, ('12.4', '12.8', '11.8', '13.0', '12.9', '13.1'), strict=True):
        program(folder / 'nvcc', NVCC.format(release=release, then=''))
    assert build.nvcc() == (str(places[3] / 'nvcc'), (13, 0))
    for version, place in (("'12.6'", 0), ('None', 0), ("'11.8'", 2)):
        set_torch(monkeypatch, places[0].parents[1], version)
        assert build.nvcc()[0] == str(places[place] / 'nvcc')


def test_every_nvcc_that_does_not_fit_is_named(package: Path, places: list[Path]) -> None:
    program(places[0] / 'nvcc', NVCC.format(release='12.4', then=''))
    program(places[2] / 'nvcc', 'print("no compiler")')
    (places[3]).mkdir(parents=True)
    (places[3] / 'nvcc').write_text('#!/no/such/program\n')
    (places[3] / 'nvcc').chmod(0o755)
    reason = build.why_not('cuda')
    assert 'there is no nvcc of CUDA 13' in reason
    assert f'{places[0] / "nvcc"} of 12.4, ' in reason
    assert f"{places[2] / 'nvcc'} --version names no release: 'no compiler'" in reason
    assert f'{places[3] / "nvcc"} cannot be run: ' in reason


@pytest.mark.parametrize(
    ('wish', 'expected'),
    [
        ('9.0', ['90,code=sm_90']),
        (' 9.0;9.0;8.6 ', ['90,code=sm_90', '86,code=sm_86']),
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


@pytest.mark.parametrize(('release', 'newest'), [('12.6', '90'), ('12.8', '120'), ('13.0', '120')])
def test_what_is_built_by_default(release: str, newest: str, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nvcc knows; PTX only of what every later GPU can run."""
    set_torch(monkeypatch, package.parent, f"'{release}'")
    set_nvcc(monkeypatch, package.parent, release=release)
    expected = ['80,code=sm_80', '90,code=sm_90', '90,code=compute_90', '120,code=sm_120']
    found = [flag.removeprefix('-gencode=arch=compute_') for flag in build.architectures()]
    assert found == expected[: 3 if newest == '90' else 4]


@pytest.mark.parametrize(('said', 'targets'), [('9.0\n9.0', 'sm90'), ('12.0\n8.6\n7.5', 'sm120-sm86'), ('8.9', 'sm89')])
def test_the_gpus_of_this_machine(
    said: str, targets: str, package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The library is named after them: another machine that shares the folder builds its own."""
    tool = set_nvcc(monkeypatch, package.parent)
    set_gpus(monkeypatch, tmp_path, said)
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', 'native')
    library = build.build(kind='cuda')
    assert f'-cu13-{targets}-' in library.name
    assert all('-arch=native' not in command for command in commands(tool))
    set_gpus(monkeypatch, tmp_path, '8.0')
    assert build.library_file('cuda', others=False) is None


@pytest.mark.parametrize(
    ('said', 'reason'),
    [
        (None, ': no GPU is seen here, .*No such file.*; name those to build for, as in 8.0;9.0'),
        ('NVIDIA-SMI has failed', ': no GPU is seen here, .*NVIDIA-SMI has failed'),
        ('7.5', r', which is 7.5 here: the CUDA kernels take 8.0 \(Ampere\)'),
    ],
)
def test_no_gpus_to_build_for(
    said: str | None, reason: str, package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_nvcc(monkeypatch, package.parent)
    if said is None:
        monkeypatch.setenv('PATH', '/nowhere')
    else:
        set_gpus(monkeypatch, tmp_path, said)
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', 'native')
    with pytest.raises(RuntimeError, match=f'TORCH_CUDA_ARCH_LIST=native{reason}'):
        build.build(kind='cuda')
    assert build.library_file('cuda') is None


@pytest.mark.parametrize(('wish', 'cores', 'gigabytes', 'expected'), [
    ('3', 64, 64, 3), ('', 6, 64, 6), ('', 64, 4, 8), ('', 64, 0.1, 1), ('0', 2, 64, 2), ('many', 2, 64, 2),
])  # fmt: skip
def test_compilers_at_once(
    wish: str, cores: int, gigabytes: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('MAX_JOBS', wish)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(cores), raising=False)
    monkeypatch.setattr(os, 'sysconf', {'SC_PAGE_SIZE': 4096, 'SC_PHYS_PAGES': int(gigabytes * 2**18)}.get)
    assert build.jobs() == expected


@pytest.mark.parametrize('most', [1, 2])
def test_no_more_compilers_than_asked_for(package: Path, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = """
import os, time
folder = os.path.dirname(sys.argv[0]) + '/running'
os.makedirs(folder, exist_ok=True)
mine = f'{folder}/{os.getpid()}'
open(mine, 'w').close()
time.sleep(0.05)
open(sys.argv[0] + '.count', 'a').write(f'{len(os.listdir(folder))}\\n')
os.remove(mine)
"""
    tool = set_nvcc(monkeypatch, package.parent, counting + WORKS)
    monkeypatch.setenv('MAX_JOBS', str(most))
    build.build(kind='cuda')
    counts = Path(f'{tool.with_suffix(".py")}.count').read_text().split()
    assert 1 <= max(map(int, counts)) <= most


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


def test_what_is_said_in_another_encoding(package: Path, places: list[Path], tmp_path: Path) -> None:
    """By nvcc, by the driver, or by a compiler about what is wrong."""
    says = r'import os, sys; os.write(1, b"\xe9rror, release 13.0, \xff"); sys.exit(3)'
    nvcc = program(places[0] / 'nvcc', says)
    assert build.nvcc() == (str(nvcc), (13, 0))
    program(places[1] / 'nvidia-smi', says)
    with pytest.raises(RuntimeError, match=r'no GPU is seen here, .*release 13.0'):
        build._gpus()
    with pytest.raises(RuntimeError, match=r'did not compile.\n(.*\n)*.*release 13.0'):
        build._run('cuda', [str(nvcc)])
