import importlib.util
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmunireplknet.datasets import ade20k

from .conftest import EXPECTED, make
from .server import Server

TOOL = Path(__file__).parents[2] / 'tools/dataset_preparation/ade20k.py'


@pytest.fixture
def archive(tmp_path):
    source = make(tmp_path / 'source/ADEChallengeData2016')
    path = tmp_path / 'served.zip'
    with zipfile.ZipFile(path, 'w') as file:
        for entry in sorted(source.rglob('*')):
            file.write(entry, entry.relative_to(source.parent))
    return path.read_bytes()


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


# ------------------------------------------------------------------------------------------------------ check


def test_a_whole_tree(root):
    report = ade20k.check(root, expected=EXPECTED)
    assert report.whole
    assert (report.images, report.masks, report.sampled) == (EXPECTED, EXPECTED, 5)
    assert 'training: 3 images and 3 masks of 3' in str(report)
    assert '5 masks opened, 5 as they should be' in str(report)
    assert ade20k.check(root, samples=1, expected=EXPECTED).sampled == 2


def test_the_published_counts():
    assert ade20k.COUNTS == {'training': 20210, 'validation': 2000}


def test_too_few_is_not_whole(root):
    report = ade20k.check(root)
    assert not report.whole
    assert 'of 20210' in str(report)
    assert 'NOT complete' in str(report)


def test_missing_partners_are_named(root):
    (root / 'annotations/training/ADE_1.png').unlink()
    (root / 'images/validation/ADE_0.jpg').unlink()
    report = ade20k.check(root, expected=EXPECTED)
    assert not report.whole
    assert report.unpaired == {'training': ['ADE_1'], 'validation': ['ADE_0']}
    assert 'without their image or mask: ADE_1' in str(report)


@pytest.mark.parametrize(
    ('mask', 'message'),
    [
        (np.full((6, 8), 151, np.uint8), 'label 151; expected 0 to 150'),
        (np.zeros((6, 8, 3), np.uint8), r'expected \(H, W\) uint8'),
        (np.zeros((8, 6), np.uint8), 'expected the same height and width'),
        (None, 'cannot be read'),
    ],
)
def test_a_wrong_mask_is_named(root, mask, message):
    path = root / 'annotations/validation/ADE_1.png'
    if mask is None:
        path.write_bytes(b'no picture')
    else:
        Image.fromarray(mask).save(path)
    report = ade20k.check(root, expected=EXPECTED)
    assert not report.whole
    assert len(report.faults) == 1
    assert 'ADE_1.png' in report.faults[0]
    assert re.search(message, report.faults[0])
    assert '5 masks opened, 4 as they should be' in str(report)


def test_nothing_there(tmp_path):
    report = ade20k.check(tmp_path / 'nowhere')
    assert not report.whole
    assert report.sampled == 0


# --------------------------------------------------------------------------------------------------- download


def test_download(tmp_path, archive):
    root = tmp_path / 'data/ade/ADEChallengeData2016'
    seen = []
    with Server(archive) as server:
        kept = ade20k.download(root, [server.url], progress=lambda *a: seen.append(a))
    assert seen[-1] == (len(archive), len(archive))
    assert ade20k.check(root, expected=EXPECTED).whole
    assert files(root) == files(tmp_path / 'source/ADEChallengeData2016')
    assert sorted(path.name for path in root.parent.iterdir()) == ['ADEChallengeData2016', ade20k.ARCHIVE]
    assert kept.read_bytes() == archive


@pytest.mark.parametrize('ranges', [True, False])
def test_a_broken_download_goes_on(tmp_path, archive, ranges):
    root = tmp_path / 'ade/ADEChallengeData2016'
    with Server(archive, cut=100, ranges=ranges) as server:
        with pytest.raises(ConnectionError, match=f'ended after 100 of {len(archive)} bytes'):
            ade20k.download(root, [server.url])
        assert not root.exists()
        assert (root.parent / f'{ade20k.ARCHIVE}.part').stat().st_size == 100
        kept = ade20k.download(root, [server.url])
    assert server.requests == [None, 'bytes=100-']
    assert kept.read_bytes() == archive
    assert ade20k.check(root, expected=EXPECTED).whole


def test_the_second_url_goes_on_where_the_first_broke_off(tmp_path, archive):
    root = tmp_path / 'ade/ADEChallengeData2016'
    with Server(archive, cut=77) as first, Server(archive) as second:
        ade20k.download(root, [first.url, second.url])
    assert second.requests == ['bytes=77-']
    assert ade20k.check(root, expected=EXPECTED).whole


def test_a_complete_partial_file_is_taken(tmp_path, archive):
    root = tmp_path / 'ade/ADEChallengeData2016'
    root.parent.mkdir()
    (root.parent / f'{ade20k.ARCHIVE}.part').write_bytes(archive)
    with Server(archive) as server:
        ade20k.download(root, [server.url])
    assert ade20k.check(root, expected=EXPECTED).whole


def test_a_partial_file_that_is_too_long_is_dropped(tmp_path, archive):
    root = tmp_path / 'ade/ADEChallengeData2016'
    root.parent.mkdir()
    partial = root.parent / f'{ade20k.ARCHIVE}.part'
    partial.write_bytes(archive + b'more')
    with Server(archive) as server:
        with pytest.raises(ConnectionError, match='is deleted; run this again'):
            ade20k.download(root, [server.url])
        assert not partial.exists()
        ade20k.download(root, [server.url])
    assert ade20k.check(root, expected=EXPECTED).whole


def test_without_network_one_sentence_says_what_to_do(tmp_path, archive):
    root = tmp_path / 'ade/ADEChallengeData2016'
    with Server(b'') as server:
        url = server.url
    with pytest.raises(ConnectionError) as caught:
        ade20k.download(root, [url])
    message = str(caught.value)
    for part in (ade20k.ARCHIVE, url, str(root.parent / ade20k.ARCHIVE), 'run this again'):
        assert part in message
    assert '\n' not in message
    # Doing what it says works, and needs no network.
    (root.parent / ade20k.ARCHIVE).write_bytes(archive)
    ade20k.download(root, [url])
    assert ade20k.check(root, expected=EXPECTED).whole


def test_https_is_tried_first():
    assert [url.partition(':')[0] for url in ade20k.URLS] == ['https', 'http']
    assert all(url.endswith('data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip') for url in ade20k.URLS)


def test_a_damaged_archive_leaves_nothing(tmp_path, archive):
    root = tmp_path / 'ade/ADEChallengeData2016'
    root.parent.mkdir()
    damaged = bytearray(archive)
    middle = archive.index(b'\xff\xd8\xff') + 20  # inside the first JPEG
    damaged[middle : middle + 8] = b'\0' * 8
    (root.parent / ade20k.ARCHIVE).write_bytes(damaged)
    with pytest.raises(ValueError, match=r'is damaged .*; delete it'):
        ade20k.download(root, [])
    assert [path.name for path in root.parent.iterdir()] == [ade20k.ARCHIVE]


def test_another_archive_is_refused(tmp_path):
    path = tmp_path / 'other.zip'
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('somewhere/readme.txt', 'hello')
    with pytest.raises(ValueError, match='no folder with images and annotations'):
        ade20k.unpack(path, tmp_path / 'out')
    assert [entry.name for entry in tmp_path.iterdir()] == ['other.zip']


def test_a_folder_with_content_is_left_alone(root):
    before = files(root)
    with pytest.raises(FileExistsError, match='left alone; move it away'):
        ade20k.download(root, [])
    assert files(root) == before


# ------------------------------------------------------------------------------------------------------- tool


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location('ade20k_tool', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tool(tool, tmp_path, root, archive, monkeypatch, capsys):
    assert tool.main(['--root', str(tmp_path / 'nowhere')]) == 1
    assert '--download brings it there' in capsys.readouterr().out
    assert tool.main(['--root', str(root)]) == 1
    assert f'Move {root} away' in capsys.readouterr().out
    fetched = tmp_path / 'new/ade'
    fetched.parent.mkdir()
    (fetched.parent / ade20k.ARCHIVE).write_bytes(archive)
    assert tool.main(['--root', str(fetched), '--download']) == 1
    out = capsys.readouterr().out
    assert f'unpacked to {fetched}' in out
    assert 'training: 3 images and 3 masks of 20210' in out
    monkeypatch.setattr(ade20k.check, '__defaults__', (ade20k.ROOT, 8, EXPECTED))
    assert tool.main(['--root', str(root)]) == 0
    assert tool.main(['--root', str(root), '--download']) == 0, 'nothing to fetch'
