"""Who does the work that is measured: the same work, in the layout that the name says, and counted right."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmunireplknet import UniRepLKNet
from mmunireplknet.analysis import peers, profiling
from mmunireplknet.models.arch_zoo import get_arch

from ..procedural import relative_error
from ..test_models.tiny import TINY
from .small_work import IMAGE, MAP


@pytest.mark.parametrize('direction', peers.DIRECTIONS)
def test_all_contenders_compute_the_same(direction):
    results = {name: contender.run() for name, contender in peers.depthwise(MAP, 7, direction).items()}
    results = {n: next(t for t in r if t is not None) if isinstance(r, tuple) else r for n, r in results.items()}
    for name, result in results.items():
        assert relative_error(result, results['torch NCHW']) < 1e-5, name


def test_the_published_form_has_nothing_of_ours():
    for contenders, layout in itertools.product(
        (peers.block_training(MAP, 13), peers.training(TINY, IMAGE)), peers.LAYOUTS
    ):
        names = {event.name for event in profiling.profile_events(contenders[f'published {layout}'].run)}
        assert not [name for name in names if name.startswith(('mmuni', '_GrnMlp', '_Gate', '_Dilated'))]
        assert [name for name in names if name.startswith('aten::convolution_backward')]


def test_the_identity_keeps_all_but_the_large_kernels(cpp):
    names = [event.name for event in profiling.profile_events(peers.training(TINY, IMAGE)['identity'].run)]
    assert not [name for name in names if 'dilated_reparam' in name]
    assert names.count('mmuni::depthwise_conv2d') == 3, 'the blocks with 3x3 and 5x5 stay'


def test_flops_of_the_published_variant():
    total, gemm = peers._count_flops('t', (1, 3, 224, 224), None)
    assert total / 2 == pytest.approx(4.9e9, rel=0.02), (
        'multiply-adds, as published in https://arxiv.org/abs/2311.15599'
    )
    assert 0.9 < gemm / total < 1


@pytest.mark.parametrize('direction', peers.DIRECTIONS)
def test_flops_of_a_depthwise_convolution(direction):
    """Those of the forward pass; either gradient takes as many."""
    with FlopCounterMode(display=False) as counter:
        F.conv2d(torch.randn(MAP), torch.randn(6, 1, 7, 7), padding=3, groups=6)
    assert {c.flops for c in peers.depthwise(MAP, 7, direction).values()} == {counter.get_total_flops()}


def test_flops_grow_with_the_kernel():
    """By two a tap and value of every map that a large kernel is applied to; what is no convolution stays."""
    k7, k31 = peers.growth('a', (1, 3, 128, 128), (7, 31)).values()
    arch = get_arch('a')
    values = [dim * (128 // 2 ** (stage + 2)) ** 2 for stage, dim in enumerate(arch.dims)]
    large = sum(sum(size >= 7 for size in sizes) * n for sizes, n in zip(arch.kernel_sizes, values, strict=True))
    assert k31.flops - k7.flops == 2 * (31**2 - 7**2) * large > 0
    assert k31.gemm_flops == k7.gemm_flops > 0


def test_what_must_run():
    """The kernels of 7x7, 13x13 and 19x19 are large, and there are six blocks."""
    counts = peers._kernels(UniRepLKNet(TINY), 'mmuni_cpu::forward')
    assert counts == {'mmuni_cpu::forward': 3, 'mmuni_cpu::sums': 6}


@pytest.mark.parametrize(('layout', 'memory_format'), peers.LAYOUTS.items())
def test_layout_of_an_image(layout, memory_format):
    other = next(value for value in peers.LAYOUTS.values() if value != memory_format)
    image = peers._image(IMAGE, layout)
    assert image.is_contiguous(memory_format=memory_format)
    assert not image.is_contiguous(memory_format=other)
    assert torch.equal(image, peers._image(IMAGE))


@pytest.fixture
def made_of(monkeypatch):
    """The module and the input of every contender that is built, by its ``run``."""
    found = {}

    def spy(function):
        def call(module, x, *rest):
            made = function(module, x, *rest)
            found[getattr(made, 'run', made)] = module, x
            return made

        return call

    for name in ('_train', '_infer'):
        monkeypatch.setattr(peers, name, spy(getattr(peers, name)))
    return found


def layouts_of(tensors):
    formats = peers.LAYOUTS.items()
    return {name for tensor in tensors for name, form in formats if tensor.is_contiguous(memory_format=form)}


@pytest.mark.parametrize(
    ('build', 'peer', 'training'),
    [
        (partial(peers.block_training, MAP, 13), 'published', True),
        (partial(peers.training, TINY, IMAGE), 'published', True),
        (partial(peers.convnext_training, TINY, IMAGE, 'atto'), 'ConvNeXt', True),
        (partial(peers.convnext_forward, TINY, IMAGE, 'atto'), 'ConvNeXt', False),
    ],
)
def test_a_peer_in_either_layout(build, peer, training, made_of):
    """In its input and in its weights: torch asks for both, and is slower with channels_last in one alone."""
    if peer == 'ConvNeXt':
        pytest.importorskip('mmpretrain')
    contenders = build()
    assert len(made_of) == len(contenders)
    for layout in peers.LAYOUTS:
        module, x = made_of[contenders[f'{peer} {layout}'].run]
        weights = [p for p in module.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
        assert layouts_of([x, *weights]) == {layout}
        assert len(weights) > 0 or build.func is peers.block_training, 'a depthwise weight is in both layouts at once'
    assert {module.training for module, _ in made_of.values()} == {training}
    assert {x.requires_grad for _, x in made_of.values()} == {build.func is peers.block_training}
