from collections.abc import Iterator
from types import SimpleNamespace

import pytest

pytest.importorskip('triton')

from .interpreted import interpreted_package


@pytest.fixture(scope='package')
def gpu() -> Iterator[SimpleNamespace]:
    """The modules of ``mmunireplknet.ops.gpu``, on a CPU."""
    with interpreted_package() as modules:
        yield modules
