"""The check of ImageNet folders, on stand-ins with three classes."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from mmunireplknet.datasets import imagenet
from mmunireplknet.datasets.checks import missing_data_message

from ..imagenet_stand_in import CLASSES, generate

TOOL = Path(__file__).parents[2] / 'tools/dataset_preparation/imagenet.py'
SMALL = dataclasses.replace(imagenet.DATA['1k'], classes=3, splits={'train': 12, 'val': 6})


@pytest.fixture
def root(tmp_path):
    return generate(tmp_path / 'imagenet')


def faults(root, **options):
    """Faults by split; each is one line and says what to do behind its semicolon, or names the unreadable file."""
    report = imagenet.check(root, SMALL, **options)
    assert report.whole == (not any(split.faults for split in report.splits.values()))
    assert ('NOT complete' in str(report)) != report.whole
    for split in report.splits.values():
        assert all('\n' not in fault and ('; ' in fault or 'cannot be read' in fault) for fault in split.faults)
    return {name: split.faults for name, split in report.splits.items()}


def flatten(root, lines=None):
    """Move val's images out of their folders and write the list of them."""
    listed = []
    for label, name in enumerate(CLASSES):
        for path in sorted((root / 'val' / name).iterdir()):
            path.rename(root / 'val' / path.name)
            listed.append(f'{path.name} {label}')
        (root / 'val' / name).rmdir()
    (root / 'meta').mkdir()
    (root / 'meta/val.txt').write_text('\n'.join(listed if lines is None else lines(listed)))


def test_whole(root):
    report = imagenet.check(root, SMALL)
    assert report.whole, str(report)
    assert 'train: 12 images of 12 in 3 classes of 3, 8 opened' in str(report)
    assert imagenet.check(root, SMALL, deep=True).splits['train'].opened == 12


def test_whole_with_a_list(root):
    flatten(root)
    report = imagenet.check(root, SMALL)
    assert report.whole, str(report)
    assert report.splits['val'].classes == ['0', '1', '2']


def test_not_there(tmp_path):
    found = faults(tmp_path)
    for split in ('train', 'val'):
        (message,) = found[split]
        assert f'{tmp_path / split} does not exist; download it from https://image-net.org' in message
        assert 'takes an account' in message


def test_a_class_is_missing(root):
    for path in (root / 'val' / CLASSES[2]).iterdir():
        path.unlink()
    assert f'no image in {CLASSES[2]}' in faults(root)['val'][0]
    (root / 'val' / CLASSES[2]).rmdir()
    found = faults(root)
    assert found['train'] == []
    folders, count, other = found['val']
    assert '2 class folders instead of 3' in folders
    assert '4 images instead of 6' in count
    assert other.startswith(f'{CLASSES[2]} is a class of one split')


def test_a_folder_that_is_no_class(root):
    for split in ('train', 'val'):
        (root / split / CLASSES[0]).rename(root / split / 'tench')
    assert 'tench of' in faults(root)['val'][0]
    assert 'is no WordNet id' in faults(root)['val'][0]


def test_archives_that_were_not_unpacked(root):
    for name in CLASSES:
        for path in (root / 'train' / name).iterdir():
            path.unlink()
        (root / 'train' / name).rmdir()
        (root / 'train' / f'{name}.tar').touch()
    assert f'holds archives ({CLASSES[0]}.tar' in faults(root)['train'][0]


def test_a_flat_val_without_a_list(root):
    flatten(root)
    (root / 'meta/val.txt').unlink()
    (message,) = faults(root)['val']
    assert 'holds 6 files and no class folders' in message
    assert f'write {root}/meta/val.txt with a line "{CLASSES[0]}_0.JPEG LABEL"' in message


@pytest.mark.parametrize(
    ('lines', 'part'),
    [
        (lambda lines: [*lines, 'nothing.JPEG 1'], 'nothing.JPEG of '),
        (lambda lines: [lines[0], 'x.JPEG 3'], "line 2: 'x.JPEG 3' is no file name and label from 0 to 2"),
        (lambda lines: [lines[0], 'x.JPEG'], "line 2: 'x.JPEG' is no file name and label"),
        (lambda lines: lines[:4], 'has 2 labels instead of 3'),
        (lambda lines: lines[1:], '5 images instead of 6'),
    ],
)
def test_a_wrong_list(root, lines, part):
    flatten(root, lines)
    found = faults(root)
    assert found['train'] == []
    assert part in ' | '.join(found['val'])


@pytest.mark.parametrize('damage', [lambda data: data[: len(data) // 2], lambda data: b'<html>', lambda data: b''])
def test_damaged_image(root, damage):
    path = sorted((root / 'train' / CLASSES[1]).iterdir())[1]
    path.write_bytes(damage(path.read_bytes()))
    assert faults(root, samples=2)['train'] == [], 'the first and the last image are whole'
    (message,) = faults(root, deep=True)['train']
    assert message.startswith(f'{path} (')
    assert 'cannot be read' in message


def test_a_long_list_of_faults_is_cut(root):
    for path in root.rglob('*.JPEG'):
        path.write_bytes(b'nothing')
    text = str(imagenet.check(root, SMALL, deep=True))
    assert 'and 2 more' in text
    assert text.count('cannot be read') == 16


def test_22k_has_no_val(root, tmp_path):
    data = dataclasses.replace(imagenet.DATA['22k'], classes=3)
    (root / 'val').rename(tmp_path / 'elsewhere')
    assert imagenet.check(root, data).whole
    assert imagenet.DATA['22k'].classes == 21841


def test_tool(root, capsys, monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location('imagenet_tool', TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.chdir(tmp_path)
    assert tool.main([]) == 1
    assert 'data/imagenet/train does not exist' in capsys.readouterr().out
    assert tool.main(['--data', '22k']) == 1
    assert 'data/imagenet21k/train does not exist' in capsys.readouterr().out
    monkeypatch.setattr(imagenet, 'DATA', {'1k': SMALL})
    assert tool.main(['--root', str(root), '--deep']) == 0
    assert '12 opened' in capsys.readouterr().out


def test_missing_data_names_the_tool(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = missing_data_message({'type': 'ImageNet', 'data_root': 'data/imagenet', 'split': 'val'})
    assert 'data/imagenet/val does not exist' in small
    assert 'takes an account, and python tools/dataset_preparation/imagenet.py says' in small
    large = missing_data_message({'type': 'ImageNet21k', 'data_root': '/nowhere/in21k', 'split': 'train'})
    assert 'ImageNet-22K must lie in /nowhere/in21k' in large
    assert 'imagenet.py --data 22k --root /nowhere/in21k says' in large
