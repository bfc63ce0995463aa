"""Building the compiled kernels: when, where to, and what is said where it fails."""

import importlib.metadata
import platform
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from mmunireplknet.ops import build

WORKS = """
import sys
sys.stdout.write('compiled\\n')
open(sys.argv[sys.argv.index('-o') + 1], 'w').close()
open(sys.argv[0] + '.log', 'a').write(' '.join(sys.argv[1:]) + '\\n')  # written at once, as compilers run side by side
"""
FAILS = "import sys\nsys.exit('conv.h:1: error: expected a semicolon')"
FAILS_TO_LINK = "import sys\n'-shared' in sys.argv and sys.exit('ld: cannot find -ltorch_cpu')\n" + WORKS

EMULATOR = platform.machine() == 'x86_64' and (shutil.which('qemu-x86_64') or shutil.which('qemu-x86_64-static'))
MAIN = """
#include <cstdio>
#include <cstdlib>
#include "kernels.h"
float* mmuni::allocate(int64_t count) { return static_cast<float*>(std::malloc(4 * count)); }
int main() {
  std::printf("%s %s %s", mmuni::portable_kernels.name, mmuni::avx2_kernels.name, mmuni::avx512_kernels.name);
}
"""

LOAD_AND_COMPUTE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
x, weight = torch.randn(2, 19, 9, 20), torch.randn(19, 1, 13, 13)
out = torch.empty_like(x)
torch.ops.mmuni_cpu.forward(x, weight, None, out, 13, 1, False)
exact = torch.nn.functional.conv2d(x.double(), weight.double(), padding=6, groups=19)
assert (out - exact).norm() / exact.norm() < 1e-6
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make ``CXX`` a Python program."""

    def install(program: str) -> None:
        file = tmp_path / 'compiler.py'
        file.write_text(program)
        monkeypatch.setenv('CXX', f'{sys.executable} -S {file}')

    return install


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the CPU sources in a package without a library, an empty cache, and no nvcc."""
    here = tmp_path / 'ops'
    monkeypatch.setattr(build, 'nvcc', lambda: '')
    shutil.copytree(build.SOURCES, here / 'csrc' / 'cpu')
    monkeypatch.setattr(build, 'HERE', here)
    monkeypatch.setattr(build, 'SOURCES', here / 'csrc' / 'cpu')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    build.fingerprint.cache_clear()
    yield here
    build.fingerprint.cache_clear()


def name_now() -> str:
    build.fingerprint.cache_clear()
    return build.library_name()


def files_in(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir() if f.is_file()) if folder.exists() else []


def test_name_follows_the_sources(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = name_now()
    assert name_now() == first
    header = build.SOURCES / 'conv.h'
    text = header.read_text()
    header.write_text(text + '\n')
    changed = name_now()
    (build.SOURCES / 'more.cpp').write_text('')
    added = name_now()
    (build.SOURCES / 'more.cpp').unlink()
    header.write_text(text)
    assert name_now() == first
    monkeypatch.setattr(build, 'FLAGS', (*build.FLAGS, '-g'))
    assert len({first, changed, added, name_now()}) == 4


def test_name_follows_the_processor(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = name_now()
    monkeypatch.setattr(build.platform, 'machine', lambda: 'riscv64')
    assert name_now().endswith('-riscv64.so')
    assert name_now() != first


def test_a_library_of_other_sources_is_not_found(package: Path, compiler: Callable) -> None:
    compiler(WORKS)
    assert build.library_file() is None
    assert build.build() == build.library_file()
    (build.SOURCES / 'conv.h').write_text('// changed')
    build.fingerprint.cache_clear()
    assert build.library_file() is None


def test_a_stale_library_goes(package: Path, compiler: Callable) -> None:
    """That of other sources, and only once the new one is there; nothing else."""
    machine = build.platform.machine()
    stale, other, notes = (package / n for n in (f'mmuni_cpu-0123-{machine}.so', 'mmuni_cpu-0123-vax.so', 'notes.txt'))
    for file in (stale, other, notes):
        file.touch()
    compiler(FAILS)
    with pytest.raises(RuntimeError, match='did not compile'):
        build.build()
    assert stale.exists()
    compiler(WORKS)
    library = build.build()
    assert files_in(package) == sorted([library.name, other.name, notes.name])


def test_the_package_comes_before_the_cache(package: Path, compiler: Callable) -> None:
    compiler(WORKS)
    in_cache = build.build(build.cache_folder())
    assert build.library_file() == in_cache
    in_package = build.build()
    assert in_package.parent == package
    assert build.library_file() == in_package


def test_a_package_that_is_read_only(package: Path, compiler: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(WORKS)
    monkeypatch.setattr(build.os, 'access', lambda path, mode: Path(path) != package)
    library = build.build()
    assert library.parent == build.cache_folder()
    assert library == build.library_file()
    assert files_in(package) == []


def test_a_stale_library_in_a_package_that_is_read_only(
    package: Path, compiler: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays, and so does one in the cache: that may be of another version that is in use."""
    stale = f'mmuni_cpu-0123-{build.platform.machine()}.so'
    build.cache_folder().mkdir(parents=True)
    for folder in (package, build.cache_folder()):
        (folder / stale).touch()
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.parent == package:
            raise PermissionError(13, 'Permission denied', str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, 'unlink', refuse)
    monkeypatch.setattr(build.os, 'access', lambda path, mode: Path(path) != package)
    compiler(WORKS)
    library = build.build()
    assert files_in(package) == [stale]
    assert files_in(build.cache_folder()) == sorted([stale, library.name])


def test_a_cache_that_cannot_be_written(
    package: Path, compiler: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    monkeypatch.setattr(build.os, 'access', lambda path, mode: Path(path) != package)
    monkeypatch.setattr(sys, 'argv', ['build'])
    compiler(WORKS)
    with pytest.raises(SystemExit, match=r'cannot be written to .*Not a directory.*XDG_CACHE_HOME can name another'):
        build.main()


def test_no_folder_for_temporary_files(package: Path, compiler: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: object) -> None:
        raise FileNotFoundError(2, 'No usable temporary directory found')

    compiler(WORKS)
    monkeypatch.setattr(build.tempfile, 'mkdtemp', nowhere)
    monkeypatch.setattr(sys, 'argv', ['build'])
    with pytest.raises(SystemExit, match=r'kernels cannot be built: .*No usable temporary directory'):
        build.main()


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    assert build.cache_folder() == tmp_path / 'xdg' / 'mmunireplknet' / 'ops'
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert build.cache_folder() == tmp_path / '.cache' / 'mmunireplknet' / 'ops'


def test_commands(package: Path, compiler: Callable, tmp_path: Path) -> None:
    """Every source is compiled, with the flags and torch's headers; the library is linked from all of them."""
    compiler(WORKS)
    build.build()
    *compiled, linked = (line.split() for line in (tmp_path / 'compiler.py.log').read_text().splitlines())
    torch_folder = Path(torch.__file__).parent
    for command in compiled:
        assert {*build.FLAGS, build.TORCH_TARGET, f'-I{torch_folder / "include"}', '-c'} <= set(command)
    sources = sorted(str(file) for file in build.SOURCES.glob('*.cpp'))
    assert sorted(word for command in compiled for word in command if word.endswith('.cpp')) == sources
    assert len(sources) > 1
    objects = sorted(command[command.index('-o') + 1] for command in compiled)
    assert sorted(word for word in linked if word.endswith('.o')) == objects
    assert {'-shared', f'-L{torch_folder / "lib"}', '-ltorch_cpu'} <= set(linked)
    assert '-c' not in linked


def test_torch_is_not_imported(
    package: Path, compiler: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that cannot be imported has its headers all the same, and what setup.py catches is no ImportError."""
    broken = tmp_path / 'site' / 'torch'
    broken.mkdir(parents=True)
    (broken / '__init__.py').write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    compiler(WORKS)
    program = f'import runpy; runpy.run_path({str(package / "build.py")!r})["build"]()'
    shutil.copy(build.__file__, package / 'build.py')
    with_broken_torch = [sys.executable, '-c', f'import sys; sys.path.insert(0, {str(broken.parent)!r}); {program}']
    done = subprocess.run(with_broken_torch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f'-I{broken / "include"}' in (tmp_path / 'compiler.py.log').read_text()
    monkeypatch.setattr(build.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(RuntimeError, match='the files of torch are missing; install torch again'):
        build.build()


def test_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('CXX', 'ccache "my g++" -m64')
    assert build.compiler() == ['ccache', 'my g++', '-m64']
    monkeypatch.delenv('CXX')
    monkeypatch.setenv('PATH', str(tmp_path))
    assert build.compiler() == []
    for name in ('clang++', 'g++', 'c++'):  # the last to come is the first to be taken
        (tmp_path / name).touch(mode=0o755)
        assert build.compiler() == [str(tmp_path / name)]


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setattr(build.shutil, 'which', lambda name: None)


def on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.platform, 'system', lambda: 'Windows')


def with_torch(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setenv('CXX', sys.executable)
    monkeypatch.setattr(importlib.metadata, 'version', find)


@pytest.mark.parametrize(
    ('situation', 'reason'),
    [
        (without_compiler, 'there is no C++ compiler (install g++ or clang++, or set CXX)'),
        (on_windows, 'not built on Windows'),
        (partial(with_torch, None), 'torch is not installed where the build runs'),
        (partial(with_torch, '2.9.1+cpu'), 'torch 2.9.1+cpu has no LibTorch stable ABI; it takes 2.10 or newer'),
    ],
)
def test_why_not(
    situation: Callable, reason: str, package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    situation(monkeypatch)
    assert reason in build.why_not()
    with pytest.raises(RuntimeError, match='The CPU kernels cannot be built: ') as caught:
        build.build()
    assert reason in str(caught.value)
    monkeypatch.setattr(sys, 'argv', ['build'])
    with pytest.raises(SystemExit, match='cannot be built'):
        build.main()
    assert files_in(package) == []


@pytest.mark.parametrize('version', ['2.10.0', '2.10.0a0+git1234', '2.13.0+cpu', '3.0.0'])
def test_torch_that_is_new_enough(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_torch(version, monkeypatch)
    assert build.why_not() == ''


@pytest.mark.parametrize(
    ('program', 'message'), [(FAILS, 'expected a semicolon'), (FAILS_TO_LINK, 'cannot find -ltorch_cpu')]
)
def test_message_of_the_compiler(program: str, message: str, package: Path, compiler: Callable) -> None:
    compiler(program)
    with pytest.raises(RuntimeError, match=r'did not compile\.\n.*-o(.|\n)*' + message):
        build.build()
    assert files_in(package) == []


def test_compiler_that_does_not_exist(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('CXX', '/nowhere/c++')
    with pytest.raises(RuntimeError, match='/nowhere/c'):
        build.build()


def test_nothing_is_left_of_a_copy_that_fails(
    package: Path, compiler: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(source: Path, target: Path) -> None:
        Path(target).write_bytes(b'half')
        raise OSError('no space left on device')

    compiler(WORKS)
    monkeypatch.setattr(build.shutil, 'copyfile', full_disk)
    with pytest.raises((OSError, RuntimeError), match='no space left'):
        build.build()
    assert files_in(package) == []


def test_a_library_that_is_there_is_replaced_whole(package: Path, compiler: Callable) -> None:
    """Who has the old file open keeps it: it is another file, not one written over."""
    compiler(WORKS)
    library = build.build()
    before, text = library.stat().st_ino, library.read_text()
    with library.open() as old:
        build.build()
        assert old.read() == text
        assert library.stat().st_ino != before
    assert files_in(package) == [library.name]


def test_main(
    package: Path, compiler: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    compiler(WORKS)
    monkeypatch.setattr(sys, 'argv', ['build'])
    build.main()
    file = build.library_file()
    assert f'{file} built in ' in capsys.readouterr().out
    compiler(FAILS)
    build.main()
    assert capsys.readouterr().out == f'{file} is up to date\n'
    monkeypatch.setattr(sys, 'argv', ['build', '--force'])
    with pytest.raises(SystemExit, match='expected a semicolon'):
        build.main()


def test_module_can_be_run_by_its_path(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """As setup.py does, and a user who has not got mmengine."""
    monkeypatch.setattr(sys, 'argv', ['build.py', '--help'])
    with pytest.raises(SystemExit, match='0'):
        runpy.run_path(build.__file__, run_name='__main__')
    assert 'python -m mmunireplknet.ops.build' in capsys.readouterr().out


def test_module_can_be_run_by_its_name() -> None:
    """Nothing imports it before, of which runpy would warn."""
    command = [sys.executable, '-m', 'mmunireplknet.ops.build', '--help']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ''


def test_nothing_of_an_instruction_set_runs_when_the_library_is_loaded(cpp: Path) -> None:
    """Its constructors run on every processor. Those of the operators show that the names are there to be found."""
    names = cpp.read_bytes()
    assert b'_GLOBAL__sub_I_depthwise' in names
    assert b'_GLOBAL__sub_I_kernels' not in names


@pytest.mark.slow
@pytest.mark.skipif(not EMULATOR or bool(build.why_not()), reason='needs qemu-x86_64, an x86-64 compiler and Linux')
def test_a_processor_without_avx512(tmp_path: Path) -> None:
    """It starts a program with all kernels, and so it would load the library."""
    (tmp_path / 'main.cpp').write_text(MAIN)
    sources = [tmp_path / 'main.cpp', *build.SOURCES.glob('kernels_*.cpp')]
    command = [*build.compiler(), *build.FLAGS, '-static', f'-I{build.SOURCES}', *sources, '-o', tmp_path / 'main']
    subprocess.run(command, check=True)
    done = subprocess.run([EMULATOR, '-cpu', 'Haswell', tmp_path / 'main'], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ('portable avx2 avx512', 0), done.stderr


@pytest.mark.slow
def test_a_real_build(tmp_path: Path) -> None:
    """With the machine's own compiler, loaded by a process that has no other."""
    if reason := build.why_not():
        pytest.skip(reason)
    library = build.build(tmp_path / 'new' / 'folder')
    assert files_in(library.parent) == [build.library_name()]
    done = subprocess.run([sys.executable, '-c', LOAD_AND_COMPUTE, str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
