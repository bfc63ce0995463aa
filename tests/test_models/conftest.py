import pytest

from mmunireplknet.models import checkpoint


@pytest.fixture
def checkpoint_log(monkeypatch):
    """The log lines of the checkpoint module."""
    lines = []
    monkeypatch.setattr(checkpoint, 'print_log', lambda text, **_: lines.append(text))
    return lines
