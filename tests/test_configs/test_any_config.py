"""Configs as mmdet, mmseg and mmpretrain ship them, with UniRepLKNet in the place of their backbones."""

import pytest

from .any_config import check
from .matrix import ROWS


@pytest.mark.parametrize('row', ROWS, ids=lambda row: f'{row.library}-{row.head}')
def test_shipped_config(row):
    check(row)
