"""What the profiler says of a function: its kernels, its fall-backs, and where its time goes."""

import time
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmunireplknet import UniRepLKNet
from mmunireplknet.analysis import peers, profiling

from ..test_models.tiny import TINY
from .small_work import IMAGE, MAP


@pytest.mark.parametrize(
    ('path', 'group'),
    [
        ('breakdown/mmuni::depthwise_conv2d/mmuni_cpu::forward', 'depthwise'),
        ('breakdown/aten::conv2d/aten::convolution (depthwise)/aten::mkldnn_convolution', 'depthwise'),
        ('breakdown/aten::conv2d/aten::convolution/aten::mkldnn_convolution', 'GEMM'),
        ('breakdown/_GrnMlp/mkldnn::_linear_pointwise', 'GEMM'),
        ('breakdown/_GrnMlp/mmuni_cpu::sums', 'GELU'),
        ('breakdown/_GrnMlp/mmuni_cpu::apply', 'GRN'),
        ('breakdown/aten::gelu', 'GELU'),
        ('breakdown/_Gate/aten::addmm', 'SE'),
        ('breakdown/aten::layer_norm/aten::native_layer_norm', 'LayerNorm'),
        ('breakdown/aten::add', 'rest'),
        ('breakdown', 'rest'),
    ],
)
def test_groups(path, group):
    assert profiling.group_of(path) == group


def test_breakdown_of_a_model(cpp):
    model = UniRepLKNet(TINY, deploy=True, channels_last=True).eval()
    groups = profiling.breakdown(torch.no_grad()(partial(model, torch.randn(IMAGE))), rounds=2)
    assert list(groups) == ['depthwise', 'SE', 'LayerNorm', 'GEMM', 'GELU', 'GRN', 'rest']
    assert all(ms > 0 for ms in groups.values()), groups


def test_a_convolution_of_torch_is_noticed(cpp, monkeypatch):
    x, small, large = torch.randn(MAP), torch.randn(6, 1, 3, 3), torch.randn(6, 1, 7, 7)
    for weight, found in ((small, False), (large, True), (torch.randn(6, 6, 7, 7), False)):
        events = profiling.profile_events(partial(F.conv2d, x, weight, groups=6 // weight.shape[1]))
        assert bool(profiling.torch_depthwise(events)) == found
    for direction in peers.DIRECTIONS:
        ours = peers.depthwise(MAP, 7, direction)['ours']
        assert profiling.why_void(ours.run, ours.kernels) == ''
        assert 'not 99' in profiling.why_void(ours.run, dict.fromkeys(ours.kernels, 99))
        monkeypatch.setenv('MMUNI_DW_BACKEND', 'torch')
        reason = profiling.why_void(ours.run, ours.kernels)
        assert 'ran 0 times' in reason
        assert 'torch computed aten::convolution' in reason
        monkeypatch.delenv('MMUNI_DW_BACKEND')


def test_breakdown_is_in_milliseconds():
    """As many as the clock says of the very same calls."""
    a, b = torch.randn(2, 512, 512)
    seconds = []

    def work():
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)

    groups = profiling.breakdown(work, rounds=5)
    measured = 1e3 * float(np.median(seconds[1:]))
    assert len(seconds) == 6, 'one to warm up'
    assert measured / 2 < sum(groups.values()) < 2 * measured
    assert max(groups, key=groups.__getitem__) == 'GEMM'
