"""Conversion of checkpoint files: what is kept, cast, checked and refused, and the way back."""

import hashlib
import json
import os

import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmunireplknet import CheckpointError, load_checkpoint
from mmunireplknet.engine import convert
from mmunireplknet.engine.convert import convert_checkpoint
from mmunireplknet.models.checkpoint_file import read_checkpoint

from ..test_models import published_files
from ..test_models.checkpoint_files import blank, prefixed, published, saved
from ..test_models.published_files import cascade_mask_rcnn, file_of, upernet
from ..test_models.tiny import classifier, tiny

SHAPES = dict(
    cascade=cascade_mask_rcnn('a', width=8, fc=8, classes=2),
    upernet=upernet('a', width=8, auxiliary=8, classes=2),
    classifier=published_files.classifier('a', 10),
)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('published')
    return {kind: (folder / f'{kind}.pth', file_of(folder / f'{kind}.pth', SHAPES[kind], ema=True)) for kind in SHAPES}


def raw(path):
    return torch.load(path, weights_only=True)


def assert_same(a, b):
    assert list(a) == list(b)
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('kind', SHAPES)
def test_round_trip(files, kind, suffix, tmp_path):
    """Published to ours and back: every entry bit-equal and in its order, the meta equal, the optimizer gone."""
    if suffix == '.safetensors':
        pytest.importorskip('safetensors')
    source, state = files[kind]
    ours, back = tmp_path / f'ours{suffix}', tmp_path / 'back.pth'
    done = convert_checkpoint(source, ours)
    assert done.left_out == f'optimizer, {len(state)} EMA copies'
    assert done.entries == len(state)
    task = dict(cascade='detection', upernet='segmentation', classifier='classification')[kind]
    assert done.weights == f'UniRepLKNet-A in training form, {task}'
    convert_checkpoint(ours, back, layout='published')
    returned, original = read_checkpoint(back), read_checkpoint(source)
    assert set(returned) == {'meta', 'state_dict'}
    if suffix == '.pth':
        assert_same(returned['state_dict'], state)
        assert returned['meta'] == original['meta']
    else:  # sorts its entries, and knows neither tuples nor numpy
        assert_same({name: returned['state_dict'][name] for name in state}, state)
        assert returned['meta'] == json.loads(json.dumps(original['meta'], default=float))
    again = convert_checkpoint(back, tmp_path / f'again{suffix}')
    assert again.sha256 == done.sha256


def test_published_classifier_is_raw(tmp_path):
    """As the published classification files: nothing around the tensors."""
    state = published()
    convert_checkpoint(saved(tmp_path / 'x.pth', state), tmp_path / 'ours.pth')
    assert list(raw(tmp_path / 'ours.pth')['state_dict'])[-2:] == ['head.fc.weight', 'head.fc.bias']
    convert_checkpoint(tmp_path / 'ours.pth', tmp_path / 'back.pth', layout='published')
    assert_same(raw(tmp_path / 'back.pth'), state)
    model = classifier()
    load_checkpoint(model, tmp_path / 'ours.pth')
    assert torch.equal(model.head.fc.weight, state['head.weight'])


def test_size_and_digest(files, tmp_path):
    """The moments and copies are gone from the file, and the digest is the file's."""
    source, state = files['cascade']
    done = convert_checkpoint(source, tmp_path / 'x.pth')
    data = (tmp_path / 'x.pth').read_bytes()
    assert done.sha256 == hashlib.sha256(data).hexdigest()
    assert done.size == len(data)
    numbers = sum(value.numel() * value.element_size() for value in state.values())
    assert numbers < len(data) < numbers + 400 * len(state)
    assert [p.name for p in tmp_path.iterdir()] == ['x.pth']


def test_views_do_not_bring_their_storage(tmp_path):
    whole = torch.zeros(1000, 20)
    state = {**tiny().state_dict(), 'norm.weight': whole[0], 'norm.bias': whole[1]}
    done = convert_checkpoint(saved(tmp_path / 'x.pth', state), tmp_path / 'y.pth')
    assert done.size < (tmp_path / 'x.pth').stat().st_size - whole.numel() * 3


@pytest.mark.parametrize('dtype', ['fp16', 'bf16', 'fp32'])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_dtypes(tmp_path, dtype, suffix):
    if suffix == '.safetensors':
        pytest.importorskip('safetensors')
    state = tiny().state_dict()
    file = saved(tmp_path / 'x.pth', dict(state_dict=prefixed(state, 'backbone.')))
    done = convert_checkpoint(file, tmp_path / f'y{suffix}', dtype=dtype)
    assert done.weights.endswith('backbone only or unknown heads')
    written = read_checkpoint(tmp_path / f'y{suffix}')['state_dict']
    expected = {torch.float32: convert.DTYPES[dtype], torch.int64: torch.int64}
    for name, value in state.items():
        assert written[f'backbone.{name}'].dtype == expected[value.dtype]
        assert torch.equal(written[f'backbone.{name}'], value.to(expected[value.dtype]))
    model = blank()
    load_checkpoint(model, tmp_path / f'y{suffix}')
    assert torch.equal(model.stages[0][0].gamma, state['stages.0.0.gamma'].to(convert.DTYPES[dtype]).float())


def test_number_that_the_dtype_cannot_hold(tmp_path):
    state = tiny().state_dict()
    state['stages.3.0.norm.running_var'][1] = 1e6
    file = saved(tmp_path / 'x.pth', state)
    with pytest.raises(
        CheckpointError, match=r'x\.pth: backbone\.stages\.3\.0\.norm\.running_var has values up to 1e\+06'
    ):
        convert_checkpoint(file, tmp_path / 'y.pth', dtype='fp16')
    assert not (tmp_path / 'y.pth').exists()
    convert_checkpoint(file, tmp_path / 'y.pth', dtype='bf16')


def test_meta(files, tmp_path):
    """Classes and palette stand where mmengine looks, and no text stands where it would execute it."""
    convert_checkpoint(files['upernet'][0], tmp_path / 'x.pth')
    meta = read_checkpoint(tmp_path / 'x.pth')['meta']
    assert meta['dataset_meta'] == dict(classes=('cat', 'dog'), palette=[(220, 20, 60), (119, 11, 32)])
    assert meta['mmcv1_config'] == "model = dict(type='X')\n"
    assert not {'config', 'CLASSES', 'PALETTE'} & set(meta)
    assert meta['hook_msgs']['best_score'] == np.float64(0.449)


def test_own_checkpoint(tmp_path):
    """A training checkpoint of mmengine: what a run needs is left out; --key takes other weights."""
    state = prefixed(tiny().state_dict(), 'backbone.')
    averages = prefixed({k: v + 1 for k, v in tiny().state_dict().items()}, 'module.backbone.')
    data = dict(meta=dict(epoch=3, dataset_meta=dict(classes=('a',), name='d')), state_dict=state, optimizer={},
                message_hub={}, ema_state_dict={**averages, 'steps': torch.tensor(3)})  # fmt: skip
    file = saved(tmp_path / 'x.pth', data)
    assert convert_checkpoint(file, tmp_path / 'y.pth').left_out == 'optimizer, message_hub, ema_state_dict'
    assert_same(raw(tmp_path / 'y.pth')['state_dict'], state)
    assert raw(tmp_path / 'y.pth')['meta'] == data['meta']
    convert_checkpoint(file, tmp_path / 'z.pth', key='ema_state_dict', layout='published')
    written = raw(tmp_path / 'z.pth')
    assert list(written['state_dict']) == list(state)
    assert torch.equal(written['state_dict']['backbone.stages.0.0.gamma'], state['backbone.stages.0.0.gamma'] + 1)
    assert written['meta'] == dict(epoch=3, CLASSES=('a',), dataset_meta=dict(name='d'))


def test_config(files, tmp_path):
    """With a config every entry is checked, without one only the backbone."""
    pytest.importorskip('mmpretrain.models')
    model = dict(
        type='ImageClassifier',
        backbone=dict(type='UniRepLKNet', arch='a', out_indices=(3,), gap_before_final_norm=True),
        head=dict(type='LinearClsHead', num_classes=10, in_channels=320),
    )
    cfg = Config(dict(model=model, default_scope='mmpretrain'))
    convert_checkpoint(files['classifier'][0], tmp_path / 'x.pth', cfg)
    with pytest.raises(CheckpointError, match=r'it holds detection weights .* but the model is for classification'):
        convert_checkpoint(files['cascade'][0], tmp_path / 'y.pth', cfg)
    cfg.model.head.num_classes = 11
    with pytest.raises(CheckpointError, match=r'of another shape head\.fc\.weight .*, head\.fc\.bias '):
        convert_checkpoint(files['classifier'][0], tmp_path / 'y.pth', cfg)
    cfg.model.backbone.arch = 'f'
    with pytest.raises(CheckpointError, match='UniRepLKNet-A in training form, but the model is UniRepLKNet-F'):
        convert_checkpoint(files['classifier'][0], tmp_path / 'y.pth', cfg)
    assert [p.name for p in tmp_path.iterdir()] == ['x.pth']


def mixed():
    model = tiny().eval()
    model.stages[0][0].switch_to_deploy()
    return model.state_dict()


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (lambda: dict(state_dict={'x.weight': torch.ones(1)}), 'there is no UniRepLKNet: no entry ends with'),
        (mixed, 'in mixed form; expected all of a UniRepLKNet, in one form'),
        (lambda: {k: v for k, v in tiny().state_dict().items() if 'layers.2' not in k}, 'an incomplete UniRepLKNet'),
        (lambda: dict(meta={}), 'no tensors in the checkpoint'),
    ],
    ids=['other', 'mixed', 'incomplete', 'empty'],
)  # fmt: skip
def test_wrong_sources(tmp_path, data, message):
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(saved(tmp_path / 'x.pth', data()), tmp_path / 'y.pth')
    assert not (tmp_path / 'y.pth').exists()


def test_existing_file(tmp_path):
    source, target = saved(tmp_path / 'x.pth', tiny().state_dict()), tmp_path / 'y.pth'
    target.write_text('precious')
    with pytest.raises(FileExistsError, match=r'y\.pth exists: .* --overwrite'):
        convert_checkpoint(source, target)
    assert target.read_text() == 'precious'
    convert_checkpoint(source, target, overwrite=True)
    convert_checkpoint(target, target, dtype='fp16', overwrite=True)  # onto itself
    assert raw(target)['state_dict']['backbone.stages.0.0.gamma'].dtype == torch.float16


def test_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    source, target = saved(tmp_path / 'x.pth', tiny().state_dict()), tmp_path / 'y.pth'
    target.write_text('precious')

    def full(data, file):
        file.write(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match='No space'):
        convert_checkpoint(source, target, overwrite=True)
    assert target.read_text() == 'precious'
    assert sorted(os.listdir(tmp_path)) == ['x.pth', 'y.pth']


@pytest.mark.parametrize('options', [dict(target='x.bin'), dict(dtype='fp8'), dict(layout='timm')], ids=str)
def test_wrong_options(tmp_path, options):
    target = tmp_path / options.pop('target', 'y.pth')
    with pytest.raises(ValueError, match='one of'):
        convert_checkpoint(saved(tmp_path / 'x.pth', {}), target, **options)


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'safetensors', None)
    monkeypatch.setitem(__import__('sys').modules, 'safetensors.torch', None)
    source = saved(tmp_path / 'x.pth', tiny().state_dict())
    with pytest.raises(CheckpointError, match=r'y\.safetensors: this format takes the package safetensors'):
        convert_checkpoint(source, tmp_path / 'y.safetensors')
    (tmp_path / 'z.safetensors').write_bytes(b'')
    with pytest.raises(CheckpointError, match=r'z\.safetensors: reading this format takes the package safetensors'):
        read_checkpoint(tmp_path / 'z.safetensors')


def test_damaged_safetensors(tmp_path):
    pytest.importorskip('safetensors')
    target = tmp_path / 'y.safetensors'
    convert_checkpoint(saved(tmp_path / 'x.pth', tiny().state_dict()), target)
    os.truncate(target, target.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r'y\.safetensors .* cannot be read'):
        read_checkpoint(target)
