import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

# There is none but for Linux on x86_64, and most of these files import it.
collect_ignore_glob = [] if importlib.util.find_spec('triton') else ['test_*.py']


@pytest.fixture(scope='session')
def interpreted_modules() -> Iterator[SimpleNamespace]:
    from .interpreted import interpreted_package

    with interpreted_package() as modules:
        yield modules


@pytest.fixture
def gpu(interpreted_modules: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """The modules of ``mmunireplknet.ops.gpu``, on a CPU."""
    from .interpreted import interpreting

    with interpreting():
        yield interpreted_modules
