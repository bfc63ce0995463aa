import pytest

from mmunireplknet.ops import build


@pytest.fixture(params=['torch', 'cpp', 'auto'])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend, and what is taken by itself."""
    if request.param == 'cpp' or (request.param == 'auto' and not build.why_not()):
        request.getfixturevalue('cpp')
    return request.param
