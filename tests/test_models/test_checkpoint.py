"""Loading: what a file may leave out or bring along, what is refused, and how it says so."""

import argparse
import re
from collections import OrderedDict

import mmengine
import numpy as np
import pytest
import torch
from torch import nn

from mmunireplknet import CheckpointError, UniRepLKNet, load_checkpoint
from mmunireplknet.models.checkpoint import identify
from mmunireplknet.models.checkpoint_file import read_checkpoint, unwrap

from .checkpoint_files import NORMS, Net, assert_loaded, blank, deployed, prefixed, published, saved
from .tiny import CLASSES, TINY, classifier, segmentor, tiny

WRAPPED = {
    'raw': lambda s: s,
    'plain dict': dict,
    'model': lambda s: dict(model=s, optimizer={}, epoch=3),
    'state_dict': lambda s: dict(meta=dict(epoch=1), state_dict=s),
    'model_ema': lambda s: dict(model_ema=s, epoch=3),
    'module': lambda s: dict(module=s),
    'raw, module.': lambda s: prefixed(s, 'module.'),
    'model, module.': lambda s: dict(model=prefixed(s, 'module.')),
    'state_dict, module.backbone.': lambda s: dict(state_dict=prefixed(s, 'module.backbone.')),
    'args': lambda s: dict(model=s, args=argparse.Namespace(lr=4e-3, opt_betas=None, model='a')),
    'numpy': lambda s: dict(model=s, best=np.float64(1.5), seed=np.int64(3), history=np.arange(3.0)),
}


@pytest.mark.parametrize('wrap', WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize('zipped', [True, False])
def test_wrappers(tmp_path, wrap, zipped):
    """A classification file in every wrapping, in torch's new and old format, into a dense backbone."""
    state = published()
    file = saved(tmp_path / 'x.pth', wrap(state), _use_new_zipfile_serialization=zipped)
    model = blank()
    report = load_checkpoint(model, file)
    assert_loaded(model, state, untouched=NORMS)
    assert report['missing'] == NORMS
    prefix = 'backbone.' if 'state_dict' in wrap(state) and 'meta' not in wrap(state) else ''
    assert prefix or sorted(report['unexpected']) == ['head.bias', 'head.weight', 'norm.bias', 'norm.weight']


@pytest.mark.parametrize('classes', [1000, 21841])
def test_published_classifiers(tmp_path, classes):
    """Variant A with its real number of keys, as a trunk and as a dense backbone."""
    state = published(classes, 'a')
    assert len(state) == 626
    file = saved(tmp_path / 'a.pth', state)
    trunk = UniRepLKNet('a', out_indices=(3,), gap_before_final_norm=True)
    assert load_checkpoint(trunk, file) == dict(missing=[], unexpected=['head.weight', 'head.bias'])
    assert_loaded(trunk, state)
    dense = UniRepLKNet('a', out_indices=(1, 3))
    report = load_checkpoint(dense, file)
    assert report['missing'] == ['norm1.weight', 'norm1.bias', 'norm3.weight', 'norm3.bias']
    assert report['unexpected'] == ['norm.weight', 'norm.bias', 'head.weight', 'head.bias']


def test_both_averages(tmp_path):
    state = published()
    other = OrderedDict((k, v + 1) for k, v in state.items())
    file = saved(tmp_path / 'x.pth', dict(model=state, model_ema=other))
    for key, expected in ((None, state), ('model', state), ('model_ema', other)):
        model = blank()
        load_checkpoint(model, file, key=key)
        assert_loaded(model, expected, untouched=NORMS)
    for key in ('ema', 'epoch'):
        with pytest.raises(CheckpointError, match=f'no weights as .{key}.; its entries are model, model_ema'):
            load_checkpoint(blank(), file, key=key)


def test_prefix(tmp_path):
    """A file with two backbones, as of a teacher and a student."""
    teacher, student = tiny().state_dict(), OrderedDict((k, v + 1) for k, v in tiny().state_dict().items())
    file = saved(tmp_path / 'x.pth', {**prefixed(teacher, 'teacher.net.'), **prefixed(student, 'student.net.')})
    for prefix, state in (
        (None, teacher),
        ('teacher.net', teacher),
        ('student.net.', student),
        ('student.net', student),
    ):
        model = blank()
        report = load_checkpoint(model, file, prefix=prefix)
        assert_loaded(model, state)
        assert len(report['unexpected']) == len(state)
        model = blank(init_cfg=dict(type='Pretrained', checkpoint=str(file), prefix=prefix))
        model.init_weights()
        assert_loaded(model, state)
    with pytest.raises(
        CheckpointError, match=r"under the prefix 'backbone\.', but under 'teacher\.net\., student\.net\.'"
    ):
        load_checkpoint(blank(), file, prefix='backbone')


def upernet():
    """A published UperNet file in small: weights, optimizer state, meta with the config's text."""
    model = segmentor()
    state = prefixed(model.state_dict(), '')
    optimizer = dict(
        state={0: dict(step=3, exp_avg=torch.zeros(2), exp_avg_sq=torch.zeros(2))},
        param_groups=[dict(lr=1e-4, betas=(0.9, 0.999), params=[0], param_names=['backbone.norm0.weight'])],
    )
    meta = dict(CLASSES=('wall', 'sky'), PALETTE=[[1, 2, 3]], config='model = dict()', epoch=1, iter=160000)
    return state, dict(meta=meta, state_dict=state, optimizer=optimizer)


def test_segmentation_file(tmp_path):
    state, data = upernet()
    file = saved(tmp_path / 'upernet.pth', data)
    model = segmentor()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7)
    assert load_checkpoint(model, file) == dict(missing=[], unexpected=[])
    assert_loaded(model, state)
    backbone = blank()
    report = load_checkpoint(backbone, file)
    assert_loaded(backbone, state, prefix='backbone.')
    assert report['missing'] == []
    assert report['unexpected'] == [k for k in state if not k.startswith('backbone.')]
    assert {k.partition('.')[0] for k in report['unexpected']} == {'decode_head', 'auxiliary_head'}
    backbone = blank(out_indices=(2,))
    assert set(load_checkpoint(backbone, file)['unexpected']) >= {'norm0.weight', 'norm3.bias'}
    assert_loaded(backbone, state, prefix='backbone.')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda s: s.pop('decode_head.conv_seg.bias'), 'missing decode_head.conv_seg.bias; unexpected none'),
        (lambda s: s.update({'neck.x': torch.ones(1)}), 'missing none; unexpected neck.x'),
        (
            lambda s: s.update({'decode_head.conv_seg.weight': torch.ones(9, 8, 1, 1)}),
            r'shape decode_head.conv_seg.weight \[9, 8, 1, 1\] for \[.*\]. Heads must agree with the config',
        ),
        (lambda s: s.pop('backbone.norm2.weight'), 'missing backbone.norm2.weight'),
        (lambda s: s.pop('backbone.stages.2.1.se.up.bias'), 'lacks 1 of .* first stages.2.1.se.up.bias'),
    ],
    ids=['missing', 'unexpected', 'shape', 'norm', 'backbone'],
)
def test_segmentation_file_that_does_not_fit(tmp_path, change, message):
    state, data = upernet()
    change(state)
    model = segmentor()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, saved(tmp_path / 'x.pth', data))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_classifier(tmp_path):
    """``head`` of the published file is ``head.fc`` of an ImageClassifier; its own file loads too."""
    state = published()
    model = classifier()
    load_checkpoint(model, saved(tmp_path / 'x.pth', state))
    assert_loaded(model.backbone, state)
    assert torch.equal(model.head.fc.weight, state['head.weight'])
    assert torch.equal(model.head.fc.bias, state['head.bias'])
    own = saved(tmp_path / 'own.pth', dict(state_dict=model.state_dict()))
    other = classifier()
    assert load_checkpoint(other, own) == dict(missing=[], unexpected=[])
    assert_loaded(other, model.state_dict())
    with pytest.raises(CheckpointError, match=r'shape head\.fc\.weight .*, head\.fc\.bias .* for .*num_classes'):
        load_checkpoint(model, saved(tmp_path / 'y.pth', published(CLASSES + 1)))
    backbone = blank()
    report = load_checkpoint(backbone, own)
    assert report['missing'] == NORMS
    assert set(report['unexpected']) == {'norm.weight', 'norm.bias', 'head.fc.weight', 'head.fc.bias'}


def test_classification_file_into_a_segmentor(tmp_path):
    """Not silently: it says how to load the backbone only."""
    file = saved(tmp_path / 'x.pth', published())
    with pytest.raises(CheckpointError, match=r'of another task: it holds classification weights .*backbone\.init_cfg'):
        load_checkpoint(segmentor(), file)
    with pytest.raises(CheckpointError, match=r'no weights under "backbone\.downsample_layers".*init_cfg'):
        mmengine.runner.load_checkpoint(segmentor(), str(file))


def test_model_without_backbone(tmp_path):
    file = saved(tmp_path / 'x.pth', published())
    with pytest.raises(CheckpointError, match='the file does not fit Linear: missing weight, bias'):
        load_checkpoint(nn.Linear(3, 3), file)
    with pytest.raises(
        CheckpointError, match=r'no UniRepLKNet: no entry ends with downsample_layers.0.0.weight, it has'
    ):
        load_checkpoint(tiny(), saved(tmp_path / 'y.pth', nn.Linear(3, 3).state_dict()))


def test_ema_copies(tmp_path, checkpoint_log):
    """mmdet 2 keeps the raw weights as ema_*; the plain entries, the averages, are taken and the copies named."""
    state = prefixed(tiny().state_dict(), 'backbone.')
    copies = {'ema_' + k.replace('.', '_'): v + 1 for k, v in state.items()}
    file = saved(tmp_path / 'x.pth', dict(state_dict={**state, **copies}))
    model = blank()
    report = load_checkpoint(model, file)
    assert_loaded(model, state, prefix='backbone.')
    assert report == dict(missing=[], unexpected=list(copies))
    assert len(checkpoint_log) == 1
    assert re.search(
        rf'{len(copies)} unexpected entries.*: ema_backbone_\w+, .* and {len(copies) - 4} more', checkpoint_log[0]
    )
    assert unwrap(read_checkpoint(file)).keys() == state.keys()


def test_report_is_logged(tmp_path, checkpoint_log):
    load_checkpoint(blank(), saved(tmp_path / 'x.pth', published()))
    assert len(checkpoint_log) == 2
    assert re.search('8 missing entries, as it should be: norm0.weight, .* and 4 more', checkpoint_log[0])
    assert re.search('4 unexpected entries, as it should be: .*norm.weight.*head.bias', checkpoint_log[1])


def test_init_cfg(tmp_path):
    """A full training file and a classification file, by the way a config takes."""
    state = published()
    file = saved(tmp_path / 'x.pth', dict(model=state, model_ema={k: v + 1 for k, v in state.items()}))
    model = blank(init_cfg=dict(type='Pretrained', checkpoint=str(file)))
    model.init_weights()
    assert_loaded(model, state, untouched=NORMS)
    with torch.no_grad():
        model.stages[0][0].gamma.zero_()
    model.init_weights()  # a second time changes nothing
    assert not model.stages[0][0].gamma.any()
    model = blank(init_cfg=dict(type='Pretrained', checkpoint=str(file), key='model_ema', map_location='cpu'))
    model.init_weights()
    assert torch.equal(model.stages[0][0].gamma, state['stages.0.0.gamma'] + 1)
    model = Net(backbone_init=dict(type='Pretrained', checkpoint=str(file)))
    model.init_weights()
    assert torch.equal(model.backbone.stages[0][0].gamma, state['stages.0.0.gamma'])
    for wrong in (dict(checkpoint=''), dict(checkpoint=str(file), strict=False), {}):
        with pytest.raises(ValueError, match='expected type, checkpoint and optionally prefix, map_location, key'):
            blank(init_cfg=dict(type='Pretrained', **wrong)).init_weights()


def test_dtype_of_the_model_is_kept(tmp_path):
    state = OrderedDict((k, v.half() if v.is_floating_point() else v) for k, v in published().items())
    model = blank()
    load_checkpoint(model, saved(tmp_path / 'x.pth', state))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.stages[0][0].gamma, state['stages.0.0.gamma'].float())


def test_old_files_without_num_batches_tracked(tmp_path):
    state = OrderedDict((k, v) for k, v in published().items() if not k.endswith('num_batches_tracked'))
    model = blank()
    assert load_checkpoint(model, saved(tmp_path / 'x.pth', state))['missing'] == NORMS


def test_identify():
    assert str(identify(published(arch='a'))) == 'UniRepLKNet-A in training form'
    assert str(identify(deployed().state_dict())).startswith('a custom UniRepLKNet with depths (1, 2, 2, 1)')
    assert identify(deployed().state_dict()).form == 'deploy'
    assert identify(tiny(in_channels=4).state_dict()).in_channels == 4
    assert str(identify({})) == 'an incomplete UniRepLKNet in training form'


@pytest.mark.parametrize('into_deploy', [True, False])
def test_wrong_form(tmp_path, into_deploy):
    state = tiny().state_dict() if into_deploy else deployed().state_dict()
    names = ('training', 'deploy') if into_deploy else ('deploy', 'training')
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(UniRepLKNet(TINY, deploy=into_deploy), saved(tmp_path / 'x.pth', state))
    message = str(caught.value)
    assert message.startswith(f'{tmp_path / "x.pth"}: the checkpoint holds a custom UniRepLKNet')
    assert re.search(rf'in {names[0]} form, but the model is .* in {names[1]} form\.', message)
    way_out = 'python tools/reparameterize.py CONFIG CHECKPOINT OUT' if into_deploy else 'model.backbone.deploy=True'
    assert way_out in message


def test_wrong_variant(tmp_path):
    with torch.device('meta'):
        shapes = {k: v.shape for k, v in UniRepLKNet('f').state_dict().items()}
        model = UniRepLKNet('a')
    file = saved(tmp_path / 'f.pth', {k: torch.zeros(()).expand(s) for k, s in shapes.items()})
    with pytest.raises(CheckpointError, match='UniRepLKNet-F in training form, but the model is UniRepLKNet-A in'):
        load_checkpoint(model, file)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda s: s.pop('stages.3.0.dwconv.dil_conv_k3_8.weight'), 'lacks 1 of .* first stages.3.0.dwconv.dil_'),
        (lambda s: s.pop('stages.0.0.gamma'), 'lacks 1 of .* first stages.0.0.gamma'),
        (lambda s: s.pop('downsample_layers.2.0.weight'), 'lacks 1 of'),
        (lambda s: s.update({'stages.0.0.extra': torch.ones(1)}), '0 misshapen and 1 unknown .* stages.0.0.extra'),
        (lambda s: s.update({'stages.0.0.gamma': torch.ones(9)}), r'1 misshapen .*gamma is \(9,\), not \(8,\)'),
        (lambda s: s.update({'neck.weight': torch.ones(9)}), 'not in the model: neck.weight'),
        (lambda s: s.pop('norm1.bias'), 'missing in the file: norm1.bias; not in the model: none'),
    ],
)  # fmt: skip
def test_other_entries(tmp_path, change, message):
    state = OrderedDict(tiny().state_dict())
    change(state)
    model = blank()
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, saved(tmp_path / 'x.pth', state))
    assert all((p == 7).all() for p in model.parameters())  # nothing was loaded


@pytest.mark.parametrize(
    'options',
    [
        dict(norm_cfg=dict(type='GN', num_groups=2)),
        dict(layer_scale_init_value=None),
        dict(branches={13: [(3, 1)]}),
        dict(kernel_sizes=5),
        dict(in_channels=4),
    ],
    ids=str,
)
def test_other_configurations(tmp_path, options):
    """Neither into such a model nor out of one; without a word it would leave weights at random."""
    plain, other = tiny().state_dict(), tiny(**options).state_dict()
    adapts = 'in_channels' in options
    for model, state in ((UniRepLKNet(TINY, **options), plain), (UniRepLKNet(TINY), other)):
        if adapts and model.in_channels == 4:
            continue
        with pytest.raises(CheckpointError, match=r'lacks|unknown|misshapen|but the model is'):
            load_checkpoint(model, saved(tmp_path / 'x.pth', state))
        with pytest.raises(CheckpointError):
            model.load_state_dict(state, strict=False)


def test_gap_trunk_needs_its_norm(tmp_path):
    file = saved(tmp_path / 'x.pth', prefixed(tiny().state_dict(), 'backbone.'))
    trunk = UniRepLKNet(TINY, out_indices=(3,), gap_before_final_norm=True)
    with pytest.raises(CheckpointError, match=r'missing in the file: norm\.weight, norm\.bias; not in the model: none'):
        load_checkpoint(trunk, file)
