"""All of a folder or nothing of it."""

import json

import pytest

from mmunireplknet.deploy.exportable import ExportError
from mmunireplknet.deploy.folder import build_folder, write_json


def names(path):
    return sorted(p.name for p in path.iterdir())


def build(out, overwrite=False, content='new', fail=False):
    with build_folder(out, overwrite) as folder:
        (folder / 'meta.json').write_text(content)
        if fail:
            raise KeyboardInterrupt


def test_new_folder(tmp_path):
    build(tmp_path / 'a' / 'b')
    assert names(tmp_path / 'a') == ['b']
    assert names(tmp_path / 'a' / 'b') == ['meta.json']
    assert (tmp_path / 'a' / 'b').stat().st_mode & 0o777 == tmp_path.joinpath('a').stat().st_mode & 0o777


def test_nothing_is_left_of_a_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / 'out', fail=True)
    assert names(tmp_path) == []


def test_overwrite(tmp_path):
    out = tmp_path / 'out'
    build(out, content='old')
    (out / 'more').touch()
    with pytest.raises(ExportError, match='--overwrite'):
        build(out)
    with pytest.raises(KeyboardInterrupt):
        build(out, overwrite=True, fail=True)
    assert (out / 'meta.json').read_text() == 'old'
    build(out, overwrite=True)
    assert (out / 'meta.json').read_text() == 'new'
    assert names(tmp_path) == ['out']
    assert names(out) == ['meta.json']


def test_only_exports_are_overwritten(tmp_path):
    out = tmp_path / 'home'
    out.mkdir()
    build(out)  # an empty folder is fine
    (out / 'meta.json').rename(out / 'thesis.tex')
    with pytest.raises(ExportError, match=r'no meta\.json'):
        build(out, overwrite=True)
    assert names(out) == ['thesis.tex']
    (tmp_path / 'file').touch()
    with pytest.raises(ExportError, match='no folder'):
        build(tmp_path / 'file', overwrite=True)


def test_json_stays_the_same_and_is_short(tmp_path):
    values = dict(
        classes=['a, [b]', 'c'], palette=[[1, 2, 3], [4, 5, 6]], shape=[None, 3], empty=[], deep=dict(x=[1.5])
    )
    write_json(values, tmp_path / 'x.json')
    text = (tmp_path / 'x.json').read_text()
    assert json.loads(text) == values
    assert '[1, 2, 3]' in text
