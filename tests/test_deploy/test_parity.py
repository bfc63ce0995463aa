"""Differences, and the layer that a difference begins at."""

import copy
import math

import numpy as np
import pytest
import torch

from mmunireplknet.deploy.exportable import make_exportable
from mmunireplknet.deploy.parity import Difference, compare, first_difference_of_forms
from mmunireplknet.deploy.report import make_report, parity_shapes, to_markdown, worst

from ..procedural import image
from .cases import build, segmentor_config


def test_difference():
    a = torch.tensor([3.0, -4.0])
    d = Difference.of(a, np.array([3.0, -3.0], np.float32))
    assert (d.relative, d.maximum, d.mean) == pytest.approx((0.2, 0.25, 1 / 7))
    assert Difference.of(a, a) == Difference(0, 0, 0)
    for other in (a[:1], torch.tensor([3.0, math.nan]), torch.tensor([3.0, math.inf])):
        assert Difference.of(a, other).relative == math.inf
    assert Difference.of(torch.zeros(2), torch.zeros(2)).relative == 0
    assert Difference.of(torch.zeros(2), torch.ones(2)).relative == math.inf
    assert Difference.of(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 0])).relative == 0.5
    assert Difference.of(torch.zeros(0, 5), torch.zeros(0, 5)).relative == 0


@pytest.fixture(scope='module')
def forms():
    pytest.importorskip('mmseg')
    cfg = segmentor_config()
    model = build(cfg)
    return make_exportable(copy.deepcopy(model), cfg, deploy=False), make_exportable(model, cfg)


def test_report(forms):
    training, deploy = forms

    def exported(x):
        return [deploy(torch.from_numpy(x))[0].detach().numpy() * (1 + 1e-3)]

    models = {'training form': training, 'deploy form': deploy}
    facts = dict(config='x.py', format='onnx', file='model.onnx', images='noise')
    inputs = [image((1, 3, 32, 64)), image((2, 3, 40, 33))]
    report = make_report(models, exported, inputs, 1e-2, 1, facts, seconds=0)
    assert report['passed']
    assert worst(report) == pytest.approx(1e-3, rel=0.01)
    pair = report['cases'][1]['differences']['exported - deploy form']['logits']
    assert pair['relative'] == pytest.approx(1e-3, rel=0.01)
    assert report['cases'][1]['differences']['deploy form - training form']['logits']['relative'] < 1e-5
    text = to_markdown(report)
    assert '| 2 x 3 x 40 x 33 | exported - deploy form | logits | 1.0e-03 |' in text
    failed = make_report(models, exported, inputs, 1e-4, 1, facts, seconds=0)
    assert not failed['passed']
    assert 'FAILED' in to_markdown(failed)
    assert 'latency_ms' not in report['cases'][0]


def test_latencies(forms):
    _, deploy = forms
    x = image((1, 3, 32, 32))
    facts = dict(config='x.py', format='onnx', file='model.onnx', images='noise')
    run = lambda x: [deploy(torch.from_numpy(x))[0].numpy()]  # noqa: E731
    report = make_report({'deploy form': deploy}, run, [x], 1e-4, 1, facts, seconds=0.01)
    times = report['cases'][0]['latency_ms']
    assert set(times) == {'deploy form', 'exported'}
    assert all(t['median'] > 0 for t in times.values())
    text = to_markdown(report)
    assert 'no training form' in text
    assert '1 thread(s)' in text


def test_compare_names_outputs(forms):
    x = image((1, 3, 32, 32))
    a, b = (form(x) for form in forms)
    assert list(compare(forms[1], a, b)) == ['logits']
    with pytest.raises(ValueError, match='2 outputs'):
        compare(forms[1], a, (*b, *b))


def test_the_block_that_is_merged_wrongly_is_named(forms):
    training, deploy = forms
    x = image((1, 3, 64, 64))
    assert 'none of the' in first_difference_of_forms(training, deploy, x, 1e-4)
    wrong = copy.deepcopy(deploy)
    with torch.no_grad():
        wrong.model.backbone.stages[2][0].dwconv.lk_origin.weight.mul_(1.1)
    assert 'backbone.stages.2.0,' in first_difference_of_forms(training, wrong, x, 1e-4)


@pytest.mark.parametrize(
    ('rules', 'expected'),
    [
        (dict(resize=dict(mode='none'), center_crop=None), (320, 480)),
        (dict(resize=dict(mode='short_edge', scale=256), center_crop=[224, 224]), (224, 224)),
        (dict(resize=dict(mode='keep_ratio', scale=[2048, 512]), center_crop=None), (426, 640)),
        (dict(resize=dict(mode='exact', scale=[96, 64]), center_crop=None), (64, 96)),
        (dict(resize=dict(mode='exact', factor=0.5), center_crop=None), (160, 240)),
        (dict(resize=dict(mode='exact', factor=1.33), center_crop=None), (426, 638)),
        (dict(resize=dict(mode='keep_ratio', scale=[300, 300]), center_crop=None, size_divisor=32), (224, 320)),
        (dict(resize=dict(mode='short_edge', scale=160), center_crop=None), (160, 240)),
    ],
    ids=str,
)
def test_sizes_of_the_comparison(rules, expected):
    rules = dict(mean=[0.0] * 3, std=[1.0] * 3, **rules)
    meta = dict(preprocess=rules, input=dict(shape=[None, 3, None, None], channels='RGB', dtype='float32'))
    shapes = parity_shapes(meta, np.zeros((320, 480, 3)), True)
    assert shapes[0] == (1, *expected)
    assert len(set(shapes)) == 3
    assert shapes[1][0] == 2
    assert any(h % 32 and w % 32 for _, h, w in shapes)
    fixed = dict(meta, input=dict(meta['input'], shape=[2, 3, 64, 96]))
    assert parity_shapes(fixed, np.zeros((9, 9, 3)), True) == [(2, 64, 96)]
