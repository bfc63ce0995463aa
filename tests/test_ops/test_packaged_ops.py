"""The compiled kernels in what a user installs: MMUNI_WITH_OPS of setup.py, and what make env leaves behind."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from mmunireplknet.ops import build

from ..packaging_cases import LEFT_OUT, ROOT, attempt, call, hook, load_make_env, version

OPS = 'mmunireplknet/ops'
PURE = f'mmunireplknet-{version()}-py3-none-any.whl'
STALE = 'mmuni_cpu-000000000000-x86_64.so'
STUB = 'extern "C" int mmuni_stub() { return 0; }'
WHEEL = 'import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])'

compiles = pytest.mark.skipif(bool(build.why_not()), reason=build.why_not())


@pytest.fixture(scope='module')
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, with what earlier builds and a killed one leave behind."""
    copy = tmp_path_factory.mktemp('tree') / 'source'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT, '*.so', '*.partial', 'docs', 'tests'))
    for folder in (copy / OPS, copy / 'build/lib' / OPS):
        (folder / 'csrc/cpu').mkdir(parents=True, exist_ok=True)
        (folder / STALE).touch()
        (folder / f'{STALE}.1.partial').touch()
    (copy / 'build/lib' / OPS / 'csrc/cpu/gone.cpp').write_text('#error this file is no longer in the tree')
    return copy


@pytest.fixture
def stub(source: Path, tmp_path: Path) -> Path:
    """The tree with kernels that compile at once."""
    copy = tmp_path / 'stub'
    shutil.copytree(source, copy)
    shutil.rmtree(copy / OPS / 'csrc')
    (copy / OPS / 'csrc/cpu').mkdir(parents=True)
    (copy / OPS / 'csrc/cpu/stub.cpp').write_text(STUB)
    return copy


def no_compiler(folder: Path) -> dict[str, str]:
    """Variables of an environment without a compiler; ``folder`` is empty, and stays so."""
    return {'PATH': str(folder), 'CXX': '', 'XDG_CACHE_HOME': str(folder)}


def wheels(source: Path, out: Path, **env: str) -> tuple[dict[str, set[str]], str]:
    """Build a wheel as pip does: the files in each wheel that came out (one or none), and what was printed."""
    done = attempt(sys.executable, '-c', WHEEL, out, cwd=source, **env)
    made = {wheel.name: set(zipfile.ZipFile(wheel).namelist()) for wheel in out.glob('*.whl')}
    assert (done.returncode == 0) == (len(made) == 1), done.stdout
    return made, done.stdout


def built(files: set[str]) -> list[str]:
    """What builds leave behind, of these files."""
    return [name for name in files if name.endswith(('.so', '.partial', '.o', '.pyc'))]


USE = """
import json
from mmunireplknet.ops import backends, build
print(json.dumps([backends.__file__, build.compiler(), str(build.library_file()), backends.why_not('cpp')]))
"""


@compiles
@pytest.mark.slow
def test_wheel_with_kernels_works_where_nothing_can_be_compiled(source: Path, tmp_path: Path) -> None:
    wheel = hook('build_wheel', source, tmp_path / 'wheel', MMUNI_WITH_OPS='1')
    assert re.fullmatch(rf'mmunireplknet-{re.escape(version())}-py3-none-(linux|macosx)_\w+\.whl', wheel.name)
    archive = zipfile.ZipFile(wheel)
    assert b'Root-Is-Purelib: false' in archive.read(f'mmunireplknet-{version()}.dist-info/WHEEL')
    (library,) = built(set(archive.namelist()))
    target, empty = tmp_path / 'target', tmp_path / 'empty'
    empty.mkdir()
    install = ('install', '-q', '--no-deps', '--no-index', '--target', target, wheel)
    call(sys.executable, '-m', 'pip', *install, cwd=tmp_path)
    printed = call(sys.executable, '-c', USE, cwd=empty, PYTHONPATH=str(target), **no_compiler(empty))
    file, compiler, found, why_not = json.loads(printed.splitlines()[-1])
    assert Path(file) == target / OPS / 'backends.py'
    assert compiler == []
    assert Path(found) == target / library
    assert why_not == ''


def test_wheel_without_kernels_is_pure_python(source: Path, tmp_path: Path) -> None:
    made, _ = wheels(source, tmp_path, MMUNI_WITH_OPS='0')
    assert set(made) == {PURE}
    assert built(made[PURE]) == []
    sources = {str(file.relative_to(source)) for file in (source / OPS / 'csrc').glob('*/*')}
    assert {name for name in made[PURE] if '/csrc/' in name} == sources
    assert {Path(name).suffix for name in sources} >= {'.cpp', '.h', '.inc', '.cu', '.cuh'}


@compiles
@pytest.mark.slow
@pytest.mark.parametrize('wish', ['1', 'auto', ''])
def test_wheel_holds_the_fresh_library_alone(stub: Path, tmp_path: Path, wish: str) -> None:
    made, printed = wheels(stub, tmp_path / 'out', MMUNI_WITH_OPS=wish)
    ((name, files),) = made.items()
    assert re.search(r'-py3-none-(linux|macosx)_', name)
    (library,) = built(files)
    assert re.fullmatch(rf'{OPS}/mmuni_cpu-[0-9a-f]{{12}}-\w+\.so', library)
    assert Path(library).name != STALE
    assert 'pure Python' not in printed


def test_source_archive_has_the_sources_of_the_kernels_and_nothing_built(source: Path, tmp_path: Path) -> None:
    with tarfile.open(hook('build_sdist', source, tmp_path / 'out')) as archive:
        names = {name.partition('/')[2] for name in archive.getnames()}
    assert {str(file.relative_to(source)) for file in (source / OPS / 'csrc').glob('*/*')} <= names
    assert built(names) == []


def test_unknown_wish_names_the_allowed_ones(source: Path, tmp_path: Path) -> None:
    made, printed = wheels(source, tmp_path, MMUNI_WITH_OPS='yes')
    assert made == {}
    assert 'error: MMUNI_WITH_OPS=yes is unknown: it must be 0, 1, cpu or auto.' in printed.splitlines()


def test_required_kernels_without_a_compiler_stop_the_build(source: Path, tmp_path: Path) -> None:
    made, printed = wheels(source, tmp_path, MMUNI_WITH_OPS='1', **no_compiler(tmp_path))
    assert made == {}
    assert re.search(r'^error: MMUNI_WITH_OPS=1: .*there is no C\+\+ compiler', printed, re.MULTILINE)


def test_kernels_are_left_out_without_a_compiler(source: Path, tmp_path: Path) -> None:
    made, printed = wheels(source, tmp_path, MMUNI_WITH_OPS='auto', **no_compiler(tmp_path))
    assert set(made) == {PURE}
    assert built(made[PURE]) == []
    (line,) = (line for line in printed.splitlines() if 'pure Python' in line)
    assert 'there is no C++ compiler' in line
    assert 'python -m mmunireplknet.ops.build' in line


@compiles
@pytest.mark.slow
def test_kernels_that_do_not_compile_stop_the_build_where_they_are_required(stub: Path, tmp_path: Path) -> None:
    (stub / OPS / 'csrc/cpu/stub.cpp').write_text('#error broken on purpose')
    made, printed = wheels(stub, tmp_path / 'required', MMUNI_WITH_OPS='1')
    assert made == {}
    assert re.search(r'stub\.cpp:1:2: error: .*broken on purpose', printed)
    made, printed = wheels(stub, tmp_path / 'auto', MMUNI_WITH_OPS='auto')
    assert set(made) == {PURE}
    assert built(made[PURE]) == []
    (line,) = (line for line in printed.splitlines() if 'pure Python' in line)
    assert 'did not compile' in line


NVCC = """#!/bin/sh
case "$*" in *--version*) echo 'Cuda compilation tools, release 13.5, V13.5.1'; exit;; esac
{then}
"""


def with_nvcc(stub: Path, folder: Path, then: str) -> dict[str, str]:
    """Variables of an environment with a torch for CUDA, and an nvcc that does ``then``; gives the tree a kernel."""
    (stub / OPS / 'csrc/cuda').mkdir()
    (stub / OPS / 'csrc/cuda/stub.cu').write_text(STUB)
    torch = folder / 'site/torch'
    (torch / 'lib').mkdir(parents=True)
    (torch / '__init__.py').touch()
    (torch / 'version.py').write_text("cuda: Optional[str] = '13.0'")
    (torch / 'lib/libtorch_cpu.so').symlink_to(Path(sys.modules['torch'].__file__).parent / 'lib/libtorch_cpu.so')
    (folder / 'home/bin').mkdir(parents=True)
    (folder / 'home/bin/nvcc').write_text(NVCC.format(then=then))
    (folder / 'home/bin/nvcc').chmod(0o755)
    return {'PYTHONPATH': str(torch.parent), 'CUDA_HOME': str(folder / 'home')}


@compiles
@pytest.mark.slow
def test_wheel_holds_the_cuda_kernels_where_there_is_nvcc(stub: Path, tmp_path: Path) -> None:
    then = 'while [ "$1" != -o ]; do shift; done; echo made > "$2"'
    made, _ = wheels(stub, tmp_path / 'out', MMUNI_WITH_OPS='1', **with_nvcc(stub, tmp_path, then))
    ((_, files),) = made.items()
    libraries = sorted(Path(name).name.partition('-')[0] for name in built(files))
    assert libraries == ['mmuni_cpu', 'mmuni_cuda']


@compiles
@pytest.mark.slow
def test_those_for_the_cpu_alone(
    stub: Path, tmp_path: Path, make_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has to wait for nvcc: neither a wheel nor make env."""
    never = with_nvcc(stub, tmp_path, 'touch "$0.asked"; exit 2')
    made, _ = wheels(stub, tmp_path / 'out', MMUNI_WITH_OPS='cpu', **never)
    ((_, files),) = made.items()
    assert [Path(name).name.partition('-')[0] for name in built(files)] == ['mmuni_cpu']
    for name, value in (*never.items(), ('MMUNI_WITH_OPS', 'cpu')):
        monkeypatch.setenv(name, value)
    make_env.build_ops(sys.executable)
    (library,) = (stub / OPS).glob(f'mmuni_cpu-*-{platform.machine()}.so')
    assert not (tmp_path / 'home/bin/nvcc.asked').exists()
    monkeypatch.delenv('MMUNI_WITH_OPS')
    library.unlink()
    make_env.build_ops(sys.executable)
    assert (tmp_path / 'home/bin/nvcc.asked').exists()


@compiles
@pytest.mark.slow
def test_cuda_kernels_that_do_not_compile_stop_the_build_where_they_are_required(stub: Path, tmp_path: Path) -> None:
    broken = with_nvcc(stub, tmp_path, 'echo "stub.cu(1): error: broken on purpose"; exit 2')
    made, printed = wheels(stub, tmp_path / 'required', MMUNI_WITH_OPS='1', **broken)
    assert made == {}
    assert re.search(r'^error: MMUNI_WITH_OPS=1: The CUDA kernels did not compile', printed, re.MULTILINE)
    assert 'stub.cu(1): error: broken on purpose' in printed
    made, printed = wheels(stub, tmp_path / 'auto', MMUNI_WITH_OPS='auto', **broken)
    ((_, files),) = made.items()
    assert [Path(name).name.partition('-')[0] for name in built(files)] == ['mmuni_cpu']
    (line,) = (line for line in printed.splitlines() if 'without CUDA kernels' in line)
    assert 'The CUDA kernels did not compile' in line


@compiles
@pytest.mark.slow
def test_development_install_compiles_into_the_source_folder(stub: Path, tmp_path: Path) -> None:
    libraries = (stub / OPS).glob
    hook('build_editable', stub, tmp_path / 'without', MMUNI_WITH_OPS='0')
    assert [file.name for file in libraries('*.so')] == [STALE]
    hook('build_editable', stub, tmp_path / 'first', MMUNI_WITH_OPS='1')
    (library,) = (file for file in libraries('*.so') if file.name != STALE)
    written = library.stat()
    hook('build_editable', stub, tmp_path / 'second', MMUNI_WITH_OPS='1')
    assert library.stat() == written  # it is there already, and is not compiled again


@compiles
@pytest.mark.slow
def test_development_install_goes_without_cuda_kernels_for_unknown_gpus(stub: Path, tmp_path: Path) -> None:
    """The CUDA library is named after them."""
    then = 'while [ "$1" != -o ]; do shift; done; echo made > "$2"'
    cuda = with_nvcc(stub, tmp_path, then)
    hook('build_editable', stub, tmp_path / 'unknown', MMUNI_WITH_OPS='auto', TORCH_CUDA_ARCH_LIST='Rubin', **cuda)
    assert not list((stub / OPS).glob('mmuni_cuda-*.so'))
    for wish, target in (('9.0', 'cu13-sm90'), ('12.0', 'cu13-sm120')):
        hook('build_editable', stub, tmp_path / target, MMUNI_WITH_OPS='1', TORCH_CUDA_ARCH_LIST=wish, **cuda)
        (library,) = (stub / OPS).glob('mmuni_cuda-*.so')
        assert f'-{target}-' in library.name


@pytest.fixture
def make_env(monkeypatch: pytest.MonkeyPatch, stub: Path, tmp_path: Path) -> ModuleType:
    """tools/make_env.py for the tree whose kernels compile at once."""
    module = load_make_env()
    monkeypatch.setattr(module, 'ROOT', stub)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.delenv('MMUNI_WITH_OPS', raising=False)
    return module


@compiles
@pytest.mark.slow
def test_make_env_compiles_what_has_changed(
    make_env: ModuleType, stub: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    kernels = stub / OPS / 'csrc/cpu/stub.cpp'
    changed, names = f'{STUB}  // changed', []
    for text, said in (
        (STUB, 'compiling the CPU kernels'),
        (STUB, None),
        (changed, 'built in'),
        ('#error broken on purpose', 'goes without the compiled kernels'),
        (changed, None),
    ):
        kernels.write_text(text)
        make_env.build_ops(sys.executable)
        out, _ = capfd.readouterr()
        assert said in out if said else out == ''
        (library,) = (stub / OPS).glob(f'mmuni_cpu-*-{platform.machine()}.so')  # that of other sources is gone
        names.append(library.name)
    assert names[0] == names[1] != names[2] == names[3] == names[4]


def test_make_env_goes_on_without_a_compiler(
    make_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    for name, value in no_compiler(tmp_path / 'empty').items():
        monkeypatch.setenv(name, value)
    make_env.build_ops(sys.executable)
    out, err = capfd.readouterr()
    assert re.search('CPU kernels .*there is no C\\+\\+ compiler', err)
    assert out.splitlines()[-1] == '[env] mmunireplknet goes without the compiled kernels that are named above'
    monkeypatch.setenv('MMUNI_WITH_OPS', '0')
    make_env.build_ops(sys.executable)
    assert capfd.readouterr() == ('', '')


@compiles
@pytest.mark.slow
def test_make_env_names_the_kernels_that_are_missing(
    make_env: ModuleType, stub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Those for the CPU are there, and are not built again; those for CUDA are tried again."""
    for name, value in with_nvcc(stub, tmp_path, 'echo "error: broken on purpose"; exit 2').items():
        monkeypatch.setenv(name, value)
    for built_now in (True, False):
        make_env.build_ops(sys.executable)
        out, err = capfd.readouterr()
        assert ('mmuni_cpu-' in out) == built_now
        assert out.splitlines()[-1] == '[env] mmunireplknet goes without the compiled kernels that are named above'
        assert re.search('The CUDA kernels did not compile(.|\n)*broken on purpose', err)
        assert 'CPU kernels' not in err


@pytest.mark.parametrize(('stack', 'venv'), [('default', '.venv'), ('openmmlab', '.venv-openmmlab')])
def test_make_env_compiles_after_the_installation_with_its_python(
    make_env: ModuleType, stub: Path, monkeypatch: pytest.MonkeyPatch, stack: str, venv: str
) -> None:
    steps = []
    monkeypatch.setattr(make_env, 'make_env', lambda *arguments: steps.append(arguments))
    monkeypatch.setattr(make_env, 'build_ops', lambda python: steps.append(python))
    monkeypatch.setattr(sys, 'argv', ['make_env.py', '--stack', stack])
    make_env.main()
    assert steps == [(stack, None), str(stub / venv / 'bin/python')]


def test_pip_leaves_the_kernels_to_make_env(
    make_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []

    def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
        seen.append(env['MMUNI_WITH_OPS'])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(make_env.subprocess, 'run', run)
    assert make_env.install(str(tmp_path / 'bin' / 'python'), '-e', '.')
    assert seen == ['0']
