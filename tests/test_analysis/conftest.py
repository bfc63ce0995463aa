"""One thread, no wish of the environment for a backend, and tests that need the compiled kernels."""

import pytest

from mmunireplknet.analysis import timing
from mmunireplknet.ops import backends


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.delenv('MMUNI_DW_BACKEND', raising=False)
    with timing.thread_count(1):
        yield


@pytest.fixture
def cpp():
    if reason := backends.why_not('cpp'):
        pytest.skip(reason)
