"""COCO in small: its check and its download, from a server on this machine."""

import importlib.util
import os
import zipfile
from pathlib import Path

import pytest

from mmunireplknet.datasets import coco
from mmunireplknet.datasets.checks import missing_data_message, wrong_data_message, wrong_test_message

from ..coco_stand_in import FILE, NAMES, edit, generate
from .server import Server

TOOL = Path(__file__).parents[2] / 'tools/dataset_preparation/coco.py'
SMALL = {'train2017': 4, 'val2017': 2}


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(coco, 'CATEGORIES', 2)
    return generate(tmp_path / 'coco')


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location('coco_tool', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def faults(root, **options):
    report = coco.check(root, counts=SMALL, **options)
    assert report.whole == (not any(split.faults for split in report.splits.values()))
    assert ('NOT complete' in str(report)) != report.whole
    return {name: split.faults for name, split in report.splits.items()}


# ------------------------------------------------------------------------------------------------------ check


def test_whole(root):
    report = coco.check(root, counts=SMALL)
    assert report.whole, str(report)
    assert 'train2017: 4 images, 4 of them with a usable box, 8 annotations of 2 classes, 4 images opened' in str(
        report
    )


def test_the_published_counts():
    assert coco.COUNTS == {'train2017': 118287, 'val2017': 5000}
    assert {os.path.basename(path) for path, _ in coco.ARCHIVES.values()} == {
        'train2017.zip', 'val2017.zip', 'annotations_trainval2017.zip',
    }  # fmt: skip
    assert coco.URL.startswith('https://')


def test_another_number_of_images_or_classes(root, monkeypatch):
    edit(root, lambda content: (content['images'].pop(), content['annotations'].__delitem__(slice(-2, None))))
    assert 'lists 3 images instead of 4' in faults(root)['train2017'][0]
    monkeypatch.setattr(coco, 'CATEGORIES', 80)
    assert 'has 2 categories instead of 80' in faults(root)['val2017'][0]


def test_damaged_images_need_a_look_at_each(root):
    path = root / 'train2017/000000000002.jpg'
    path.write_bytes(path.read_bytes()[:1000])
    assert faults(root, samples=2)['train2017'] == []
    (fault,) = faults(root, deep=True)['train2017']
    assert fault.startswith(f'{path} (1,000 bytes) cannot be read')


def test_not_there(tmp_path, monkeypatch, tool, capsys):
    monkeypatch.chdir(tmp_path)
    assert tool.main([]) == 1
    out = capsys.readouterr().out
    assert 'data/coco/annotations/instances_train2017.json cannot be read' in out
    assert 'COCO 2017 must lie in data/coco, and python tools/dataset_preparation/coco.py --download brings' in out


def test_tool_for_any_annotation_file(root, tool, capsys):
    file = root / FILE.format('train2017')
    assert tool.main(['--annotations', str(file), '--images', str(root / 'train2017')]) == 0
    assert '8 annotations of 2 classes' in capsys.readouterr().out
    edit(root, lambda content: content['annotations'][0].update(image_id=50, bbox=[0, 0, 0, 0]))
    edit(root, lambda content: content['annotations'][1].update(category_id=50))
    assert tool.main(['--annotations', str(file), '--images', str(root / 'train2017')]) == 1
    out = capsys.readouterr().out
    assert 'annotation 1 belongs to image 50' in out
    assert 'has the category id 50' in out


# ------------------------------------------------------------------------------------------- before a training


def dataset(root, **more):
    return dict(
        type='CocoDataset',
        data_root=str(root),
        ann_file=FILE.format('train2017'),
        data_prefix=dict(img='train2017/'),
        metainfo=dict(classes=NAMES),
        pipeline=[dict(type='LoadAnnotations', with_mask=True)],
        **more,
    )


@pytest.mark.parametrize(
    'wrap', [lambda cfg: cfg, lambda cfg: dict(dataset=cfg), lambda cfg: dict(datasets=[dict(type='X'), cfg])]
)
def test_one_sentence_before_a_training(root, wrap):
    assert wrong_data_message(wrap(dataset(root))) is None
    edit(root, lambda content: content['annotations'][0].update(category_id=50))
    message = wrong_data_message(wrap(dataset(root)))
    assert 'annotation 1 of 000000000000.jpg has the category id 50' in message
    assert message.endswith('.')
    assert missing_data_message(wrap(dataset(root))) is None
    edit(root, lambda content: content['annotations'][4].update(image_id=50))
    message = wrong_data_message(wrap(dataset(root)))
    assert 'coco.py --annotations' in message
    assert 'there are 1 other kinds of faults' in message


def test_other_annotation_files_are_not_judged(root, tmp_path):
    cfg = {**dataset(root), 'type': 'Mine'}
    edit(root, lambda content: content['annotations'][0].update(category_id=50))
    assert 'category id 50' in wrong_data_message(cfg), 'a type of its own, the same format'
    (root / FILE.format('train2017')).write_text('{"data_list": []}')
    assert wrong_data_message(cfg) is None
    assert wrong_data_message({**cfg, 'backend_args': dict(backend='petrel')}) is None
    assert wrong_data_message({**cfg, 'data_root': 's3://bucket'}) is None


def test_nothing_to_train(root):
    edit(root, lambda content: content['annotations'].clear())
    cfg = dataset(root, filter_cfg=dict(filter_empty_gt=True))
    assert 'has no image with a box of a class of the config' in wrong_data_message(cfg)


def test_one_sentence_before_an_evaluation(root):
    cfg = dataset(root)
    metric = dict(type='CocoMetric', ann_file=str(root / FILE.format('train2017')))
    for evaluator in (None, metric, [dict(type='DumpResults'), metric], dict(type='CocoMetric')):
        assert wrong_test_message(dict(dataset=cfg), evaluator) is None
    edit(root, lambda content: content.pop('annotations'))
    assert 'has no list of annotations' in wrong_test_message(cfg, metric)
    assert 'has no list of annotations' in wrong_test_message(cfg, [metric, dict(metric, format_only=True)])
    assert wrong_test_message(cfg, dict(metric, format_only=True)) is None, 'image_info_test-dev2017.json has none'
    edit(root, lambda content: content.pop('images'))
    assert 'has no list of images' in wrong_test_message(cfg, dict(metric, format_only=True))


def test_the_file_that_a_metric_compares_with(root):
    lost = dict(type='mmdet.CocoMetric', ann_file='data/coco/lost.json')
    message = wrong_test_message(dict(dataset=dataset(root)), lost)
    assert message == (
        'The data is not there: data/coco/lost.json, which CocoMetric of test_evaluator compares with, does not exist; '
        f'put it there, or name another with --cfg-options test_evaluator.ann_file={root / FILE.format("train2017")}.'
    )
    assert wrong_test_message(dataset(root), dict(lost, backend_args=dict(backend='petrel'))) is None


def test_the_classes_of_the_type(root):
    pytest.importorskip('mmdet.datasets')
    message = wrong_data_message({**dataset(root), 'metainfo': None})
    assert 'has no category person, bicycle, car, motorcycle, airplane and 75 more' in message


# --------------------------------------------------------------------------------------------------- download


def zipped(source, folder, file):
    with zipfile.ZipFile(file, 'w') as archive:
        for path in sorted((source / folder).rglob('*')):
            archive.write(path, path.relative_to(source))
    return file.read_bytes()


def test_download(root, tmp_path):
    target = tmp_path / 'data/coco'
    for folder, (path, size) in coco.ARCHIVES.items():
        content = zipped(root, folder, tmp_path / f'{folder}.zip')
        with Server(content, cut=50) as server:
            url = server.url.rpartition('/')[0]
            with pytest.raises(ConnectionError, match=f'ended after 50 of {len(content)} bytes') as caught:
                coco.download(target, url, archives={folder: (path, size)})
            assert not (target / folder).exists()
            for part in (f'({size})', str(target / os.path.basename(path)), f'unpack it to {target / folder}'):
                assert part in str(caught.value)
            coco.download(target, url, archives={folder: (path, size)})
        assert server.requests == [None, 'bytes=50-']
    assert coco.check(target, counts=SMALL).whole
    assert coco.download(target, 'http://127.0.0.1:9') == [], 'all is there, so that nothing is asked for'


def test_an_archive_that_was_put_there_needs_no_network(root, tmp_path):
    target = tmp_path / 'data/coco'
    target.mkdir(parents=True)
    zipped(root, 'val2017', target / 'val2017.zip')
    only = {'val2017': coco.ARCHIVES['val2017']}
    assert coco.download(target, 'http://127.0.0.1:9', archives=only) == [target / 'val2017.zip']
    assert len(list((target / 'val2017').iterdir())) == 2


def test_a_damaged_or_another_archive_leaves_nothing(root, tmp_path):
    target = tmp_path / 'data/coco'
    target.mkdir(parents=True)
    only = {'val2017': coco.ARCHIVES['val2017']}
    content = zipped(root, 'val2017', target / 'val2017.zip')
    (target / 'val2017.zip').write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r'is damaged .*; delete it'):
        coco.download(target, archives=only)
    zipped(root, 'train2017', target / 'val2017.zip')
    with pytest.raises(ValueError, match=r'has no folder val2017; expected val2017.zip of COCO'):
        coco.download(target, archives=only)
    assert [path.name for path in target.iterdir()] == ['val2017.zip']


def test_tool_downloads(root, tmp_path, tool, capsys, monkeypatch):
    monkeypatch.setattr(coco.download, '__defaults__', (coco.ROOT, 'http://127.0.0.1:9', None, 1.0, coco.ARCHIVES))
    with pytest.raises(SystemExit) as stop:
        tool.main(['--root', str(tmp_path / 'new'), '--download'])
    assert 'annotations_trainval2017.zip could not be fetched' in stop.value.code
    assert '\n' not in stop.value.code
    monkeypatch.setattr(coco.check, '__defaults__', (coco.ROOT, 8, False, SMALL))
    assert tool.main(['--root', str(root), '--download']) == 0
    assert 'complete' in capsys.readouterr().out
