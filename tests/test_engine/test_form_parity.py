"""What rounding explains passes in every dtype; what a forgotten term of the fold does, does not."""

import copy

import pytest
import torch
from mmengine.model import ImgDataPreprocessor
from torch import nn

from mmunireplknet import UniRepLKNet, switch_to_deploy
from mmunireplknet.engine.form_parity import (
    Images,
    Parity,
    compare_forms,
    keep_few,
    prepare_images,
    random_images,
    tolerance_of,
)

from ..procedural import image
from ..test_models.tiny import tiny

SLOW = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float16, torch.float64)]
DTYPES = [torch.float32, torch.bfloat16, *SLOW]


def forms(dtype=torch.float32, **options):
    training = tiny(**options).eval().to(dtype)
    return training, switch_to_deploy(copy.deepcopy(training))


def compare(training, deploy):
    return compare_forms('backbone', training, deploy, Images(image((2, 3, 64, 64)), 'noise'))


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_rounding_passes(dtype, fused):
    parity = compare(*forms(dtype, fused=fused))
    assert parity.passed, parity
    unit = torch.finfo(dtype).eps / 2
    assert list(parity.errors) == [f'backbone[{i}]' for i in range(4)]
    for (name, error), blocks in zip(parity.errors.items(), (1, 3, 5, 6), strict=True):
        assert 0 < error < 6 * unit * blocks**0.5, name  # c of the module's text
        assert parity.tolerances[name] == (64 if dtype in (torch.float32, torch.float64) else 8) * unit * blocks**0.5
    assert parity.worst == max(parity.errors.values())


def forget_bias(model):
    model.stages[1][0].pwconv2[0].bias.zero_()


def forget_branch(model):
    kernel = model.stages[1][0].dwconv.lk_origin.weight
    kernel[..., 0, :] = kernel[..., -1, :] = 0


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('forget', [forget_bias, forget_branch], ids=lambda function: function.__name__)
def test_a_wrong_fold_does_not(dtype, forget):
    training, deploy = forms(dtype)
    with torch.no_grad():
        forget(deploy)
    parity = compare(training, deploy)
    assert not parity.passed, parity
    assert parity.errors['backbone[0]'] <= parity.tolerances['backbone[0]'], 'the first map is before the fault'
    assert parity.errors['backbone[1]'] > parity.tolerances['backbone[1]']


def test_nan_does_not():
    training, deploy = forms()
    with torch.no_grad():
        deploy.stages[3][0].pwconv2[0].bias.fill_(float('nan'))
    parity = compare(training, deploy)
    assert not parity.passed
    assert parity.worst != parity.worst
    assert 'backbone[3] nan' in str(parity)


def test_a_pooled_feature_and_a_given_tolerance():
    training, deploy = forms(out_indices=(3,), gap_before_final_norm=True)
    assert list(compare(training, deploy).errors) == ['backbone[3]']
    parity = compare_forms('backbone', training, deploy, None, tolerance=1e-12)
    assert not parity.passed
    assert parity.images == 'a random image'


def test_other_channels_take_a_random_image():
    training, deploy = forms(in_channels=4)
    parity = compare(training, deploy)
    assert parity.passed
    assert parity.images == 'a random image'


def test_tolerances_of_the_text():
    blocks = sum(UniRepLKNet('t').arch.depths)
    found = [tolerance_of(dtype, blocks) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    assert [f'{value:.1e}' for value in found] == ['2.0e-05', '2.0e-02', '1.6e-01']


def test_random_images_leave_no_trace():
    state = torch.get_rng_state()
    assert torch.equal(random_images(5).tensor, random_images(5).tensor)
    assert torch.equal(torch.get_rng_state(), state)


class TestImages:
    def test_keep_few(self):
        a, b = torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)
        assert len(keep_few(dict(inputs=[a, a, a]))) == 2
        assert len(keep_few(dict(inputs=[a, b]))) == 1
        assert keep_few(dict(inputs=torch.zeros(5, 3, 4, 4))).shape == (2, 3, 4, 4)
        for other in (None, [a], dict(), dict(inputs=[]), dict(inputs='x'), dict(inputs=[[a]]), dict(inputs=a)):
            assert not keep_few(other)

    def test_they_go_through_the_preprocessor(self):
        preprocessor = ImgDataPreprocessor(mean=[1.0, 2.0, 3.0], std=[2.0] * 3, bgr_to_rgb=True).train()
        raw = torch.full((3, 600, 20), 7, dtype=torch.uint8)
        images = prepare_images([raw, raw], preprocessor, 'somewhere')
        assert images.tensor.shape == (2, 3, 512, 20)
        assert images.tensor[0, :, 0, 0].tolist() == [3.0, 2.5, 2.0]
        assert images.origin == '2 images of somewhere, 512x20'
        assert preprocessor.training

    def test_without_a_preprocessor(self):
        assert prepare_images([torch.zeros(3, 4, 4)], None, 'x').tensor.shape == (1, 3, 4, 4)

    @pytest.mark.parametrize('inputs', [None, [], [torch.zeros(4, 4)]], ids=['none', 'empty', 'flat'])
    def test_none(self, inputs):
        assert prepare_images(inputs, None, 'x') is None

    def test_a_preprocessor_that_wants_more(self):
        class Demanding(nn.Module):
            def forward(self, data, training):
                return dict(inputs=data['prompts'])

        assert prepare_images([torch.zeros(3, 4, 4)], Demanding(), 'x') is None


def test_the_worst_of_none_finite():
    parity = Parity(dict(a=1.0, b=float('nan')), dict(a=2.0, b=2.0), 'x', 'float32')
    assert parity.worst != parity.worst
