"""One thread, no wish for a backend, no file of timings, the compiled kernels, and a process group of one."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mmunireplknet.ops import backends, build

gc.disable()  # until all tests are imported: what that makes stays


def pytest_collection_finish() -> None:
    """Look for garbage among what the tests make, and less often: it took a sixth of the time of many tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


@pytest.fixture(scope='session', autouse=True)
def single_thread() -> None:
    """The tests are too small to gain from more, and several test runs on one machine lose much."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """One thread, and algorithms of any kind, whatever a test does."""
    yield
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('MMUNI_DW_BACKEND', raising=False)
    monkeypatch.setenv('MMUNI_DW_TUNE', '1')  # what is timed on a GPU is not written to the user's file


@pytest.fixture(scope='session')
def cpp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The library of the compiled kernels, built into a folder of its own where the package has none."""
    with pytest.MonkeyPatch.context() as patch:
        if build.library_file() is None:
            if reason := build.why_not():
                pytest.skip(reason)
            patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
            build.build(build.cache_folder())
            backends._why_not_cpp.cache_clear()
        backends.require('cpp')
        yield build.library_file()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """This process is a group of one."""
    dist.init_process_group('gloo', init_method=(tmp_path / 'store').as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
