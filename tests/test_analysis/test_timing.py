"""Timing in turn, the rate of matrix products, and the count of saved activations."""

import time
from functools import partial

import pytest
import torch
from torch import nn

from mmunireplknet import UniRepLKNet
from mmunireplknet.analysis import timing
from mmunireplknet.analysis.timing import Timing

from .small_work import IMAGE


def test_interleave_takes_turns_and_gives_up_on_the_hopeless():
    calls = []

    def work(name):
        calls.append(name)
        time.sleep(1.1 * timing.SAMPLE)  # so that a sample is one call

    functions = {name: partial(work, name) for name in 'abc'}
    timings = timing.interleave(
        functions, rounds=5, hopeless=lambda seconds: ['b'] if set(seconds) == set('abc') else []
    )
    assert ''.join(calls[6:]) == 'abc' * 3 + 'ac' * 2
    assert [timings[name].rounds for name in 'abc'] == [5, 3, 5]
    assert all(11 <= t.low <= t.median <= t.high for t in timings.values())


def test_threads_are_restored():
    with timing.thread_count(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1


def test_saved_bytes_counts_a_storage_once_and_no_parameters():
    x, linear = torch.randn(10, 20), nn.Linear(20, 30, bias=False)
    owned = [linear.weight]
    assert timing.saved_bytes(lambda: linear(x.requires_grad_()), owned) == 4 * 200
    assert timing.saved_bytes(lambda: x * x) == 4 * 200
    assert timing.saved_bytes(lambda: x[:5] * x[5:]) == 4 * 200
    assert timing.saved_bytes(lambda: (x.exp(), x.sin())) == 2 * 4 * 200
    assert timing.saved_bytes(lambda: linear(x).relu(), owned) == 4 * (200 + 300)


@pytest.mark.parametrize('fused', [True, False])
def test_saved_bytes_are_what_the_allocator_gave(fused):
    model = UniRepLKNet('a', channels_last=fused, fused=fused)
    x = torch.randn(IMAGE).contiguous(memory_format=torch.channels_last if fused else torch.contiguous_format)
    model(x)
    with torch.profiler.profile(profile_memory=True) as profiler:
        outs = model(x)
    kept = sum(event.self_cpu_memory_usage for event in profiler.events())
    kept -= sum(out.untyped_storage().nbytes() for out in outs)
    saved = timing.saved_bytes(lambda: model(x), [x, *model.parameters(), *model.buffers()])
    assert saved == pytest.approx(kept, rel=0.05)


def test_rate_of_matrix_products(monkeypatch):
    """Two operations a multiply-add; the best of the sizes: here the largest, as all take one millisecond."""
    monkeypatch.setattr(timing, 'interleave', lambda functions, **_: dict.fromkeys(functions, Timing(1.0, 1.0, 1.0, 1)))
    rates = timing.gemm_rates()
    assert set(rates) - {'oneDNN'} == {'torch.mm'}
    assert all(rate == pytest.approx(2e-6 * 2048**3) for rate in rates.values())
