"""How kernels are launched: the shipped host code, as nvcc compiles it, on a runtime that knows CUDA's rules alone."""

from __future__ import annotations

import ctypes
import subprocess

import pytest

from mmunireplknet.ops import build

from .cuda_emulation import HERE, SOURCES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(build.why_not()), reason=build.why_not()),
    pytest.mark.skipif(not build.nvcc()[0], reason='there is no nvcc (pip install -r requirements/dev.txt)'),
]
MEANWHILE = ctypes.CFUNCTYPE(None)
NOTHING = ctypes.cast(None, MEANWHILE)


@pytest.fixture(scope='module')
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp('launch')
    compile_cu = [build.nvcc()[0], *build.NVCC_FLAGS, '-arch=sm_80', f'-I{SOURCES}', '-c', str(HERE / 'launches.cu')]
    # What the kernels hide from others is asked for by its name here.
    subprocess.run([*compile_cu, '-Xcompiler=-fvisibility=default', '-o', str(folder / 'launches.o')], check=True)
    files = [str(HERE / 'runtime.cpp'), str(folder / 'launches.o')]
    # Bound at home: a torch with CUDA has the same names.
    command = [*build.compiler(), '-std=c++17', '-fPIC', '-shared', '-Wl,-Bsymbolic', *files]
    subprocess.run([*command, '-o', str(folder / 'host.so')], check=True)
    library = ctypes.CDLL(str(folder / 'host.so'))
    library.start.restype = library.use.restype = ctypes.c_char_p
    return library


def test_threads_that_launch_a_kernel_with_different_shared_memory(host: ctypes.CDLL) -> None:
    """One may come between the two steps of another."""
    seen = []
    other = MEANWHILE(lambda: seen.append(host.start(60 * 1024)))
    host.begin(other)
    assert host.start(90 * 1024) == b''
    assert seen == [b'']


def test_an_error_is_reported_once(host: ctypes.CDLL) -> None:
    """As of a GPU that the library has no code for, before one that it has."""
    host.begin(NOTHING)
    host.has_code(False)
    assert [host.start(1024 * size) for size in (96, 1)] == [b'no kernel image is available'] * 2
    host.has_code(True)
    assert [host.start(1024 * size) for size in (1, 96)] == [b''] * 2
    host.has_code(False)
    assert host.start(96 * 1024) == b'no kernel image is available'
    host.has_code(True)
    assert host.start(1024) == b''


def test_the_device_of_the_maps_is_made_current(host: ctypes.CDLL) -> None:
    """Where it is not; a device that is not there is named as an error, which the next launch does not report again."""
    host.begin(NOTHING)
    host.has_devices(2, 0)
    assert (host.use(0), host.switched()) == (b'', 0)
    assert (host.use(1), host.current_device(), host.switched()) == (b'', 1, 1)
    assert host.use(2) == b'invalid device ordinal'
    assert (host.current_device(), host.start(1024)) == (1, b'')
    host.has_devices(0, 0)
    assert host.use(0) == b'invalid device ordinal'
    assert host.start(1024) == b''


def test_kernels_that_never_launched_with_so_much_may(host: ctypes.CDLL) -> None:
    """The attribute is set where it is needed, and up to what a block has on every GPU."""
    host.begin(NOTHING)
    assert [host.start(1024 * size) for size in (48, 49, 96)] == [b''] * 3
