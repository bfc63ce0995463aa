"""The layer-decay constructor against the table of the published rule, and what it refuses and logs."""

import functools
import logging
import re

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmunireplknet.engine import LayerDecayOptimWrapperConstructor
from mmunireplknet.models import ARCHS
from mmunireplknet.models.layers import GRN

from .layer_decay_cases import (
    LR,
    WEIGHT_DECAY,
    Model,
    actual,
    assert_same,
    construct,
    published,
    published_depth,
    tiny,
)

# The scales that the rule gives at some depths, as printed: decay rate -> depth -> scale to four places.
SCALES = {
    0.8: {0: 0.0550, 1: 0.0687, 2: 0.0859, 3: 0.1074, 11: 0.64, 12: 0.8, 13: 1.0},
    0.7: {0: 0.0097, 1: 0.0138, 2: 0.0198, 3: 0.0282, 11: 0.49, 12: 0.7, 13: 1.0},
    0.9: {0: 0.2542, 1: 0.2824, 2: 0.3138, 3: 0.3487, 11: 0.81, 12: 0.9, 13: 1.0},
}
GRN_AFFINE = re.compile(r'.*stages\.\d+\.\d+\.act\.1\.(gamma|beta)')


def build(task, arch, **backbone):
    """A segmentor, detector, classifier or bare backbone on the meta device."""
    backbone = dict(type='UniRepLKNet', arch=arch, **backbone)
    dims = list(ARCHS[arch].dims if isinstance(arch, str) else arch['dims'])
    if task == 'segmentor':
        scope = pytest.importorskip('mmseg.models').__name__.partition('.')[0]
        head = dict(channels=8, num_classes=3, norm_cfg=dict(type='BN'))
        cfg = dict(
            type='EncoderDecoder',
            backbone=backbone,
            decode_head=dict(type='UPerHead', in_channels=dims, in_index=[0, 1, 2, 3], **head),
            auxiliary_head=dict(type='FCNHead', in_channels=dims[2], in_index=2, num_convs=1, **head),
            test_cfg=dict(mode='whole'),
        )
    elif task == 'detector':  # FCOS: its learnable scales have no dimension at all
        scope = pytest.importorskip('mmdet.models').__name__.partition('.')[0]
        head = dict(in_channels=8, feat_channels=8, stacked_convs=1, num_classes=3, norm_cfg=None)
        neck = dict(type='FPN', in_channels=dims, out_channels=8, num_outs=5)
        cfg = dict(type='FCOS', backbone=backbone, neck=neck, bbox_head=dict(type='FCOSHead', **head))
    elif task == 'classifier':
        scope = pytest.importorskip('mmpretrain.models').__name__.partition('.')[0]
        backbone.update(out_indices=(3,), gap_before_final_norm=True)
        head = dict(type='LinearClsHead', num_classes=3, in_channels=dims[-1])
        cfg = dict(type='ImageClassifier', backbone=backbone, head=head)
    else:
        scope, cfg = 'mmengine', backbone
    with DefaultScope.overwrite_default_scope(scope), torch.device('meta'):
        return MODELS.build(cfg)


@functools.cache
def meta_model(task, arch):
    return build(task, arch)


@pytest.mark.parametrize('decay_rate', [0.8, 0.85, 1.0])
@pytest.mark.parametrize('arch', ['t', 's', 'b', 'l', 'xl'])
@pytest.mark.parametrize('task', ['segmentor', 'detector', 'classifier'])
def test_published_rule(task, arch, decay_rate):
    model = meta_model(task, arch)
    expected = published(model, decay_rate)
    assert_same(actual(model, construct(model, decay_rate=decay_rate, num_layers=12)), expected)
    # What the rule says of the parts that are easily mistaken.
    decays = {name: decay for name, (_, decay) in expected.items()}
    assert {decays[name] for name in decays if GRN_AFFINE.fullmatch(name)} == {WEIGHT_DECAY}
    assert {decays[name] for name in decays if re.fullmatch(r'backbone\.stages\.\d\.\d+\.gamma', name)} == {0.0}
    behind = [name for name in expected if not name.startswith(('backbone.stages', 'backbone.downsample'))]
    assert {expected[name][0] for name in behind} == {1.0}
    assert any(name.startswith('backbone.norm') for name in behind)
    assert any(not name.startswith('backbone') for name in behind)


@pytest.mark.parametrize('arch', ['a', 'f', 'p', 'n', 't', 's', 'b', 'l', 'xl'])
def test_bare_backbone(arch):
    model = meta_model('backbone', arch)
    assert_same(actual(model, construct(model, decay_rate=0.9, num_layers=12)), published(model, 0.9, prefix=''))


@pytest.mark.parametrize('decay_rate', SCALES)
def test_printed_scales_and_groups(decay_rate):
    """Two groups a depth, and the scales as they are printed. Variant T has nothing at the depths 9 to 11."""
    for arch, depths in (('s', set(range(14))), ('t', {*range(9), 12, 13})):
        groups = construct(meta_model('segmentor', arch), decay_rate=decay_rate, num_layers=12).optimizer.param_groups
        by_depth = {}
        for group in groups:
            depth, _, kind = group['group_name'].removeprefix('layer_').partition('_')
            assert kind == ('decay' if group['weight_decay'] else 'no_decay')
            assert group['lr'] == pytest.approx(group['lr_scale'] * LR, rel=1e-12)
            by_depth.setdefault(int(depth), []).append(round(group['lr_scale'], 4))
        assert set(by_depth) == depths
        assert all(len(scales) == 2 and len(set(scales)) == 1 for scales in by_depth.values())
        assert {d: by_depth[d][0] for d in SCALES[decay_rate] if d in depths} == {
            d: scale for d, scale in SCALES[decay_rate].items() if d in depths
        }


def test_other_number_of_layers():
    """9 layers, as the published UperNet with T has: the last stage is at 9, what follows at 10."""
    model = meta_model('segmentor', 't')
    rule = actual(model, construct(model, decay_rate=0.9, num_layers=9))
    scales = {
        'backbone.downsample_layers.0.0.weight': 0.9**10,
        'backbone.stages.0.2.gamma': 0.9**9,
        'backbone.downsample_layers.1.0.weight': 0.9**8,
        'backbone.stages.1.0.gamma': 0.9**8,
        'backbone.downsample_layers.2.0.weight': 0.9**7,
        'backbone.stages.2.0.gamma': 0.9**7,
        'backbone.stages.2.17.gamma': 0.9**2,
        'backbone.downsample_layers.3.0.weight': 0.9,
        'backbone.stages.3.2.gamma': 0.9,
        'backbone.norm3.weight': 1.0,
        'decode_head.conv_seg.weight': 1.0,
    }
    assert {name: rule[name][0] for name in scales} == pytest.approx(scales, rel=1e-9)
    unset = actual(model, construct(model, decay_rate=0.9))
    assert_same(unset, published(model, 0.9))


def test_too_few_layers_are_warned_of(capture_log):
    """By the published rule the last blocks of S then learn faster than the base; this is said."""
    groups = construct(meta_model('backbone', 's'), decay_rate=0.9, num_layers=9).optimizer.param_groups
    assert max(group['lr_scale'] for group in groups) == pytest.approx(1 / 0.9)
    assert 'learning rate above the base' in capture_log()
    construct(meta_model('backbone', 's'), decay_rate=0.9, num_layers=12)
    assert capture_log().count('learning rate above the base') == 1


@pytest.mark.parametrize('task', ['segmentor', 'classifier'])
def test_grn_switch(task):
    model = meta_model(task, 's')
    kept, exempt = (actual(model, construct(model, decay_rate=0.9, decay_grn=grn)) for grn in (True, False))
    changed = {name for name in kept if kept[name] != exempt[name]}
    assert changed == {name for name, _ in model.named_parameters() if GRN_AFFINE.fullmatch(name)}
    assert len(changed) == 72  # gamma and beta of 36 blocks
    assert {exempt[name][1] for name in changed} == {0.0}
    assert all(kept[name][0] == exempt[name][0] for name in changed)


def test_frozen_parameters_are_left_out():
    model = Model(tiny(frozen_stages=2))
    model.head.bias.requires_grad_(False)
    rule = actual(model, construct(model, decay_rate=0.9))
    frozen = ('backbone.downsample_layers.0', 'backbone.downsample_layers.1', 'backbone.stages.0', 'backbone.stages.1')
    expected = {k: v for k, v in published(model, 0.9).items() if not k.startswith((*frozen, 'head.bias'))}
    assert 0 < len(expected) < len(list(model.parameters()))
    assert_same(rule, expected)


def test_biases_are_exempt_whatever_their_shape():
    model = Model()
    model.head.bias = nn.Parameter(torch.zeros(1, 3))
    model.head.scale = nn.Parameter(torch.zeros(()))
    rule = actual(model, construct(model, decay_rate=0.9))
    assert rule['head.bias'] == (1.0, 0.0)
    assert rule['head.scale'] == (1.0, WEIGHT_DECAY)  # as published, which exempts exactly one dimension


@torch.no_grad()
def randomise_parameters(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize('decay_grn', [True, False])
def test_a_step_uses_them(decay_grn):
    """Plain SGD: p - lr * scale * (gradient + weight decay * p), for every parameter."""
    torch.manual_seed(0)
    model = Model()
    randomise_parameters(model)
    wrapper = construct(model, dict(type='SGD', lr=0.5, weight_decay=0.3), decay_rate=0.7, decay_grn=decay_grn)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss = model(torch.randn(2, 3, 64, 64)).square().mean()
    gradients = dict(
        zip(
            before,
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True),
            strict=True,
        )
    )
    wrapper.update_params(loss)
    moved = 0
    for name, parameter in model.named_parameters():
        if gradients[name] is None:  # norms of maps that the head does not use
            assert torch.equal(parameter, before[name])
            continue
        exempt = parameter.dim() == 1 or name.endswith('.bias') or (not decay_grn and GRN_AFFINE.fullmatch(name))
        scale = 0.7 ** (13 - published_depth(name, 'backbone.'))
        step = gradients[name] + (0.0 if exempt else 0.3) * before[name]
        torch.testing.assert_close(parameter.detach(), before[name] - 0.5 * scale * step, rtol=1e-5, atol=1e-7)
        moved += not torch.equal(parameter, before[name])
    assert moved > 100


def test_learning_rate_schedules_keep_the_scales():
    from mmengine.registry import PARAM_SCHEDULERS

    model = Model()
    wrapper = construct(model, dict(type='SGD', lr=1.0), decay_rate=0.8)
    scheduler = PARAM_SCHEDULERS.build(dict(type='ConstantLR', factor=0.5, end=10, optimizer=wrapper))
    groups = wrapper.optimizer.param_groups
    assert [group['lr'] for group in groups] == pytest.approx([0.5 * group['lr_scale'] for group in groups])
    assert scheduler.last_step == 0
    assert wrapper.get_lr()['base_lr'] == [0.5]


def test_without_weight_decay_the_optimizer_keeps_its_own():
    groups = construct(Model(), dict(type='SGD', lr=1.0), decay_rate=0.8).optimizer.param_groups
    assert {group['weight_decay'] for group in groups} == {0}
    groups = construct(Model(), dict(type='AdamW', lr=1.0), decay_rate=0.8).optimizer.param_groups
    assert {group['weight_decay'] for group in groups} == {0.0, 0.01}  # torch's default, and the exempt


@pytest.mark.parametrize(
    ('paramwise', 'message'),
    [
        (
            dict(decay_rate=0.9, norm_decay_mult=0.0),
            "unknown keys 'norm_decay_mult'.*decay_rate, num_layers, decay_grn",
        ),
        (dict(decay_rate=0.9, decay_type='layer_wise', layers=3), "'decay_type', 'layers'"),
        (dict(num_layers=12), 'lacks decay_rate'),
        (dict(), 'lacks decay_rate'),
        (dict(decay_rate=0.0), 'above 0 and at most 1'),
        (dict(decay_rate=1.1), 'above 0 and at most 1'),
        (dict(decay_rate='0.9'), 'above 0 and at most 1'),
        (dict(decay_rate=True), 'above 0 and at most 1'),
        (dict(decay_rate=0.9, num_layers=0), 'positive int'),
        (dict(decay_rate=0.9, num_layers=12.0), 'positive int'),
        (dict(decay_rate=0.9, decay_grn=0.0), 'decay_grn=0.0 must be True'),
    ],
)
def test_wrong_settings(paramwise, message):
    with pytest.raises(ValueError, match=message):
        construct(None, **paramwise)


def test_no_learning_rate():
    with pytest.raises(ValueError, match='lr=None of the optimizer'):
        LayerDecayOptimWrapperConstructor(dict(optimizer=dict(type='SGD')), dict(decay_rate=0.9))


@pytest.fixture
def capture_log(monkeypatch):
    """What was logged so far, without debugging messages."""
    records = []
    monkeypatch.setattr(MMLogger.get_current_instance(), 'handle', records.append)
    return lambda: '\n'.join(record.getMessage() for record in records if record.levelno >= logging.INFO)


def test_one_compact_table_is_logged(capture_log):
    model = meta_model('segmentor', 't')
    construct(model, decay_rate=0.8, num_layers=12)
    lines = capture_log().splitlines()
    assert lines[0].startswith('Layer decay 0.8, base lr 0.0001, weight decay 0.05 (GRN decayed)')
    rows = [line.split() for line in lines[2:]]
    assert [int(row[0]) for row in rows] == [*range(9), 12, 13]
    assert rows[0][1:3] == ['0.0550', '5.498e-06']
    total = sum(int(number.replace(',', '')) for row in rows for number in row[3:])
    assert total == sum(parameter.numel() for parameter in model.parameters())
    exempt = [p.numel() for name, p in model.named_parameters() if p.dim() == 1 or name.endswith('.bias')]
    assert sum(int(row[4].replace(',', '')) for row in rows) == sum(exempt)


def test_the_table_covers_every_parameter_of_the_stages():
    """So that the tests above cannot pass by taking everything as depth 13."""
    for arch in ARCHS:
        names = [name for name, _ in meta_model('backbone', arch).named_parameters()]
        assert {published_depth(n, '') for n in names if n.startswith(('stages', 'downsample'))} <= set(range(13))
        assert sum(isinstance(m, GRN) for m in meta_model('backbone', arch).modules()) == sum(ARCHS[arch].depths)
