import pytest

from mmunireplknet.datasets import ade20k
from mmunireplknet.datasets.checks import missing_data_message


def ade(root, **changes):
    return {
        'type': 'ADE20KDataset',
        'data_root': str(root),
        'data_prefix': {'img_path': 'images/training', 'seg_map_path': 'annotations/training'},
        **changes,
    }


def test_data_that_is_there(root, monkeypatch):
    monkeypatch.chdir(root.parents[1])
    for cfg in (
        ade(root),
        ade('ade/ADEChallengeData2016'),
        str(root),
        root,
        None,
        {'dataset': ade(root)},
        {'type': 'ConcatDataset', 'datasets': [ade(root), ade(root)]},
        {'type': 'RepeatDataset', 'times': 2, 'dataset': {'type': 'ConcatDataset', 'datasets': [ade(root)]}},
    ):
        assert missing_data_message(cfg) is None, cfg


def one_sentence(message):
    return '\n' not in message and message.endswith('.') and '. ' not in message


@pytest.mark.parametrize(
    'wrap',
    [
        lambda cfg: cfg,
        lambda cfg: {'batch_size': 1, 'dataset': cfg},
        lambda cfg: {'type': 'RepeatDataset', 'dataset': {'type': 'MultiImageMixDataset', 'dataset': cfg}},
        lambda cfg: {'type': 'ConcatDataset', 'datasets': [{'type': 'X'}, cfg]},
    ],
)
def test_missing_ade20k(wrap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = missing_data_message(wrap(ade(ade20k.ROOT)))
    assert one_sentence(message)
    for part in (
        'data/ade/ADEChallengeData2016/images/training does not exist',
        str(tmp_path),
        'nor do 1 more',
        'tools/dataset_preparation/ade20k.py --download',
        ade20k.URLS[0],
    ):
        assert part in message
    elsewhere = missing_data_message(wrap(ade('/nowhere/ade')))
    assert 'ade20k.py --root /nowhere/ade --download' in elsewhere


def test_one_missing_folder_is_enough(root):
    folder = root / 'annotations/training'
    folder.rename(root / 'elsewhere')
    assert f'{folder} does not exist; ' in missing_data_message(ade(root))
    folder.mkdir()
    assert f'{folder} is empty; ' in missing_data_message(ade(root))


def test_missing_digit_scenes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = {
        'type': 'CocoDataset',
        'data_root': 'data/digit_scenes/',
        'ann_file': 'annotations/instances_train.json',
        'data_prefix': {'img': 'images/training/'},
    }
    message = missing_data_message(cfg)
    assert one_sentence(message)
    assert 'data/digit_scenes/annotations/instances_train.json does not exist' in message
    assert 'python tools/dataset_preparation/digit_scenes.py --out data/digit_scenes makes it' in message
    ten = missing_data_message({**cfg, 'metainfo': {'classes': ['background', *'0123456789']}})
    assert '--out data/digit_scenes makes it' in ten
    hard = missing_data_message({**cfg, 'data_root': 'data/digit_scenes_hard', 'metainfo': {'classes': [*'01234']}})
    assert '--out data/digit_scenes_hard --difficulty hard --num-classes 5 makes it' in hard


@pytest.mark.parametrize(
    ('cfg', 'part'),
    [
        ({'type': 'CocoDataset', 'data_root': 'data/coco/', 'ann_file': 'a.json'}, 'https://cocodataset.org'),
        ({'type': 'ImageNet', 'data_root': 'data/imagenet', 'split': 'val'}, 'data/imagenet/val does not exist'),
        ({'type': 'ImageNet', 'data_root': 'data/imagenet', 'data_prefix': 'train'}, 'https://image-net.org'),
        ({'type': 'Mine', 'data_root': 'data/mine'}, "--cfg-options data_root=PLACE (now 'data/mine')"),
        ({'type': 'Mine', 'ann_file': 'list.txt'}, 'list.txt does not exist'),
        ('data/mine', 'data/mine does not exist'),
    ],
)
def test_other_data(cfg, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = missing_data_message(cfg)
    assert part in message
    assert one_sentence(message)


@pytest.mark.parametrize(
    'cfg',
    [
        {'type': 'CIFAR10', 'data_root': 'data/cifar10'},
        {'type': 'mmpretrain.CIFAR10', 'data_prefix': 'data/cifar10'},
        {'type': 'CocoDataset', 'data_root': 's3://bucket/coco', 'ann_file': 'a.json'},
        {'type': 'CocoDataset', 'data_root': 'data/coco', 'backend_args': {'backend': 'petrel'}},
        {'type': 'BaseSegDataset'},
        {'dataset': None},
    ],
)
def test_what_cannot_be_looked_up_is_taken_to_be_there(cfg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert missing_data_message(cfg) is None


def test_configs_of_mmengine(tmp_path, monkeypatch):
    from mmengine.config import Config

    monkeypatch.chdir(tmp_path)
    cfg = Config({'train_dataloader': {'batch_size': 1, 'dataset': ade(ade20k.ROOT)}})
    assert 'ade20k.py --download' in missing_data_message(cfg.train_dataloader)
    assert 'ade20k.py --download' in missing_data_message(cfg.train_dataloader.dataset)
