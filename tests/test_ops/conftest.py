"""One thread, no wish of the environment for a backend, and the compiled kernels wherever they can be built."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mmunireplknet.ops import backends, build


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('MMUNI_DW_BACKEND', raising=False)


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


@pytest.fixture(params=['torch', 'cpp', 'auto'])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend, and what is taken by itself."""
    if request.param == 'cpp' or (request.param == 'auto' and not build.why_not()):
        request.getfixturevalue('cpp')
    return request.param
