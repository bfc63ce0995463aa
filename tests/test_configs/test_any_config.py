"""Configs as mmdet, mmseg and mmpretrain ship them, with UniRepLKNet in the place of their backbones."""

import pytest
from mmengine.logging import MMLogger

from .any_config import check
from .matrix import HEADINGS, PACKAGES, ROWS, record, rows, section

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    'row',
    [pytest.param(row, marks=pytest.mark.slow if row.slow else (), id=f'{row.library}-{row.head}') for row in ROWS],
)
def test_shipped_config(row):
    MMLogger.get_current_instance().setLevel('WARNING')  # the initialisation of every parameter is a line
    record(row, check(row))


@pytest.mark.parametrize('family', HEADINGS)
def test_the_page_lists_exactly_the_rows_that_are_tried(family):
    assert list(rows(family)) == [(row.library, row.config) for row in ROWS]
    first = section(family)[0]
    assert all(f'{package} ' in first for package in PACKAGES[family]), first
