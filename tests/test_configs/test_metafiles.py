"""model-index.yml and the metafiles it names: what mim and mmpretrain's metafile check ask for, and the figures."""

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from mmunireplknet.models.arch_zoo import CHECKPOINTS, PAGE

ROOT = Path(__file__).parents[2]

# Tables of the official README at b5677d8, and of arXiv 2410.08049: parameters in M, FLOPs in G, results. Of
# classifiers the README rounds top-1 to one digit; the second is from the names of the files.
PUBLISHED = {
    'unireplknet_a_in1k': (4.4, 0.6, {'Top 1 Accuracy': 77.03}),
    'unireplknet_f_in1k': (6.2, 0.9, {'Top 1 Accuracy': 78.58}),
    'unireplknet_p_in1k': (10.7, 1.6, {'Top 1 Accuracy': 80.23}),
    'unireplknet_n_in1k': (18.3, 2.8, {'Top 1 Accuracy': 81.64}),
    'unireplknet_t_in1k': (31, 4.9, {'Top 1 Accuracy': 83.21}),
    'unireplknet_s_in1k': (56, 9.1, {'Top 1 Accuracy': 83.91}),
    'unireplknet_s_in22k': (56, 26.7, {}),
    'unireplknet_b_in22k': (98, 47.2, {}),
    'unireplknet_l_in22k': (218, 105.4, {}),
    'unireplknet_xl_in22k': (386, 187, {}),
    'unireplknet_s_in22k_in1k-384': (56, 26.7, {'Top 1 Accuracy': 86.44}),
    'unireplknet_b_in22k_in1k-384': (98, 47.2, {'Top 1 Accuracy': 87.40}),
    'unireplknet_l_in22k_in1k-384': (218, 105.4, {'Top 1 Accuracy': 87.88}),
    'unireplknet_xl_in22k_in1k-384': (386, 187, {'Top 1 Accuracy': 87.96}),
    'upernet_unireplknet_t_ade20k': (61, 946, {'mIoU': 48.6, 'mIoU(ms+flip)': 49.1}),
    'upernet_unireplknet_s_ade20k': (86, 1036, {'mIoU': 50.5, 'mIoU(ms+flip)': 51.0}),
    'upernet_unireplknet_s-in22k_ade20k-512': (86, 1036, {'mIoU': 51.9, 'mIoU(ms+flip)': 52.7}),
    'upernet_unireplknet_s-in22k_ade20k-640': (86, 1618, {'mIoU': 52.3, 'mIoU(ms+flip)': 52.7}),
    'upernet_unireplknet_b-in22k_ade20k-640': (130, 1850, {'mIoU': 53.5, 'mIoU(ms+flip)': 53.9}),
    'upernet_unireplknet_l-in22k_ade20k-640': (254, 2507, {'mIoU': 54.5, 'mIoU(ms+flip)': 55.0}),
    'upernet_unireplknet_xl-in22k_ade20k-640': (425, 3420, {'mIoU': 55.2, 'mIoU(ms+flip)': 55.6}),
    'cascade-mask-rcnn_unireplknet_t_coco': (89, 749, {'box AP': 51.7, 'mask AP': 44.9}),
    'cascade-mask-rcnn_unireplknet_s_coco': (113, 835, {'box AP': 53.0, 'mask AP': 45.9}),
    'cascade-mask-rcnn_unireplknet_s-in22k_coco': (113, 835, {'box AP': 54.3, 'mask AP': 47.1}),
    'cascade-mask-rcnn_unireplknet_b-in22k_coco': (155, 978, {'box AP': 54.8, 'mask AP': 47.4}),
    'cascade-mask-rcnn_unireplknet_l-in22k_coco': (276, 1385, {'box AP': 55.8, 'mask AP': 48.4}),
    'cascade-mask-rcnn_unireplknet_xl-in22k_coco': (443, 1952, {'box AP': 56.4, 'mask AP': 49.0}),
}
# Name of the file against table: 54.70 and 54.5; 51.75 and 51.7, which the second paper rounds to 51.8.
NOT_ROUNDED = {'upernet_unireplknet_l-in22k_ade20k-640': 0.21, 'cascade-mask-rcnn_unireplknet_t_coco': 0.051}

INDEX = yaml.safe_load((ROOT / 'model-index.yml').read_text())
METAFILES = {name: yaml.safe_load((ROOT / name).read_text()) for name in INDEX['Import']}
MODELS = {model['Name']: model for file in METAFILES.values() for model in file['Models']}
TASKS = {
    'classification': ({'Image Classification'}, {'ImageNet-1k'}),
    'segmentation': ({'Semantic Segmentation'}, {'ADE20K'}),
    'detection': ({'Object Detection', 'Instance Segmentation'}, {'COCO'}),
}


def test_every_published_file_is_named_once():
    names = [model['Name'] for file in METAFILES.values() for model in file['Models']]
    assert Counter(names) == Counter(CHECKPOINTS.keys())
    assert set(PUBLISHED) == set(CHECKPOINTS)
    assert len({model['Weights'] for model in MODELS.values()}) == len(MODELS)


def test_index_names_every_metafile():
    assert sorted(INDEX['Import']) == sorted(str(p.relative_to(ROOT)) for p in ROOT.glob('configs/**/metafile*.yml'))


@pytest.mark.parametrize('name', MODELS)
def test_figures(name):
    model, (params, flops, metrics) = MODELS[name], PUBLISHED[name]
    assert model['Metadata']['Parameters'] == round(params * 1e6)
    assert model['Metadata']['FLOPs'] == round(flops * 1e9)
    results = model['Results'] or []
    assert {key: value for result in results for key, value in result['Metrics'].items()} == metrics
    if found := re.search(r'(?:top-1|mIoU|box AP) ([\d.]+)', CHECKPOINTS[name].figure):
        assert next(iter(metrics.values())) == pytest.approx(float(found[1]), abs=NOT_ROUNDED.get(name, 0.0501))
    else:
        assert metrics == {}, 'of pre-training nothing is published'
    if results:
        assert ({r['Task'] for r in results}, {r['Dataset'] for r in results}) == TASKS[CHECKPOINTS[name].task]


@pytest.mark.parametrize('name', MODELS)
def test_origin(name):
    model = MODELS[name]
    assert model['Weights'] == CHECKPOINTS[name].url == model['Converted From']['Weights']
    assert model['Weights'].startswith(PAGE)
    assert model['Converted From']['Code'].startswith('https://github.com/AILab-CVC/UniRepLKNet/tree/b5677d8')


@pytest.mark.parametrize('name', MODELS)
def test_config(name):
    """The config is there, is the one the name says, and starts from or is what the file was trained with."""
    config = MODELS[name]['Config']
    assert (ROOT / config).is_file()
    assert Path(config).stem.replace('-in22k', '_in22k') == name.replace('-in22k', '_in22k')


@pytest.mark.parametrize('name', METAFILES)
def test_collection(name):
    """What mmpretrain's check asks for; and each figure says whose it is."""
    (collection,) = METAFILES[name]['Collections']
    assert (ROOT / collection['README']).is_file()
    assert collection['Paper']['Title'].startswith('UniRepLKNet: ')
    assert collection['Paper']['URL'] == 'https://arxiv.org/abs/2311.15599'
    assert collection['Code']['URL'] == 'https://github.com/AILab-CVC/UniRepLKNet'
    assert collection['Metadata']['Figures'] == 'published by the authors, not measured by this project'
    assert {model['In Collection'] for model in METAFILES[name]['Models']} == {collection['Name']}


def test_names_survive_mim():
    """Mim compares what is asked for in lower case, and joins lists of texts only."""
    assert [name for name in MODELS if name != name.lower()] == []
    metadata = [model['Metadata'] for model in MODELS.values()]
    metadata += [file['Collections'][0]['Metadata'] for file in METAFILES.values()]
    lists = [value for entry in metadata for value in entry.values() if isinstance(value, list)]
    assert lists
    assert all(isinstance(item, str) for value in lists for item in value)
