from collections.abc import Iterator
from types import SimpleNamespace

import pytest


@pytest.fixture(scope='session')
def interpreted_modules() -> Iterator[SimpleNamespace]:
    pytest.importorskip('triton')
    from .interpreted import interpreted_package

    with interpreted_package() as modules:
        yield modules


@pytest.fixture
def gpu(interpreted_modules: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """The modules of ``mmunireplknet.ops.gpu``, on a CPU."""
    from .interpreted import interpreting

    with interpreting():
        yield interpreted_modules
