"""Reading a config with what the command line gives."""

from pathlib import Path

import pytest

from mmunireplknet.engine.launch import load_config

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'


@pytest.mark.parametrize('place', ['elsewhere/data', '/mnt/data/'])
def test_data_root_moves_every_data_set_and_evaluator(place):
    cfg = load_config(str(CONFIGS / 'mask-rcnn_unireplknet_a_nuclei.py'), {'data_root': place})
    plain = load_config(str(CONFIGS / 'mask-rcnn_unireplknet_a_nuclei.py'))
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        assert plain[name].dataset.data_root == 'data/nuclei/'
        assert cfg[name].dataset.data_root.rstrip('/') == place.rstrip('/')
        assert cfg[name].dataset.ann_file == plain[name].dataset.ann_file  # below data_root
    for name in ('val_evaluator', 'test_evaluator'):
        assert cfg[name].ann_file == f'{place.rstrip("/")}/annotations/val.json'


def test_data_root_of_a_config_that_names_it_in_its_data_sets_alone():
    cfg = load_config(str(CONFIGS / 'upernet_unireplknet_a_ade20k.py'), {'data_root': 'ade'})
    assert {cfg[f'{split}_dataloader'].dataset.data_root for split in ('train', 'val', 'test')} == {'ade'}


def test_one_data_set_elsewhere():
    options = {'val_dataloader.dataset.data_root': 'mine', 'data_root': 'data/camvid2'}
    cfg = load_config(str(CONFIGS / 'upernet_unireplknet_a_camvid.py'), options)
    assert cfg.val_dataloader.dataset.data_root == 'mine'
    assert cfg.train_dataloader.dataset.data_root == 'data/camvid2'
