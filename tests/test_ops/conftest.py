from collections.abc import Iterator

import pytest

from mmunireplknet.ops import build

from .fake_gpu import FakeGPU, fake_gpu
from .fake_nvcc import cuda_package  # noqa: F401  (the fixture "package")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    with fake_gpu(monkeypatch) as gpu:
        yield gpu


@pytest.fixture(params=['torch', 'cpp', 'auto'])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend, and what is taken by itself."""
    if request.param == 'cpp' or (request.param == 'auto' and not build.why_not()):
        request.getfixturevalue('cpp')
    return request.param
