"""The compiled kernels run in a real training step, and are faster than what they replace.

Speed is guarded by ratios, measured in turn in one process, with margins that a busy machine keeps: the targets
themselves are those of ``tools/analysis/benchmark.py``. Seconds decide nothing.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from mmunireplknet import UniRepLKNet
from mmunireplknet.analysis import profiling
from mmunireplknet.analysis.benchmark import PUBLISHED, ROWS, Check, judge, measure

pytestmark = pytest.mark.slow

PLAIN, LARGE, BRANCHES = 12, 15, 6  # blocks of UniRepLKNet-T without and with a Dilated Reparam Block, and its branches
DEPTHWISE = 'mmuni::depthwise_conv2d'
ATTEMPTS = 2


def training_step(fused: bool) -> Any:
    model = UniRepLKNet('t', channels_last=True, fused=fused).train()
    image = torch.randn(1, 3, 64, 64)
    return lambda: sum(out.square().mean() for out in model(image)).backward()


@pytest.mark.parametrize('fused', [True, False])
def test_kernels_run_in_forward_and_both_gradients(fused: bool, cpp: Path) -> None:
    step = training_step(fused)
    step()
    events = profiling.profile_events(step)
    calls = profiling.compiled_calls(events)
    convolutions = PLAIN if fused else PLAIN + LARGE * BRANCHES
    assert calls[f'{DEPTHWISE} > mmuni_cpu::forward'] == convolutions
    assert calls[f'{DEPTHWISE}_input_grad > mmuni_cpu::forward'] == convolutions
    assert calls[f'{DEPTHWISE}_weight_grad > mmuni_cpu::weight_grad'] == convolutions
    assert calls['mmuni::dilated_reparam_forward > mmuni_cpu::block_forward'] == (LARGE if fused else 0)
    assert calls['mmuni::dilated_reparam_backward > mmuni_cpu::block_backward'] == (LARGE if fused else 0)
    assert profiling.torch_depthwise(events) == []


def test_the_profiler_shows_a_fall_back(cpp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('MMUNI_DW_BACKEND', 'torch')
    events = profiling.profile_events(training_step(fused=True))
    assert not profiling.compiled_calls(events)
    assert len(profiling.torch_depthwise(events)) >= 2 * LARGE * BRANCHES


TORCH = ('torch NCHW', 'torch channels_last')
SHAPE = '(1, 320, 32, 32)'
GUARDS = {
    f'13x13 forward {SHAPE}': Check('speed-up', ('torch channels_last',), 1.0),
    f'13x13 dgrad {SHAPE}': Check('speed-up', TORCH, 0.9),
    f'13x13 wgrad {SHAPE}': Check('speed-up', TORCH, 3.0),
    f'31x31 forward {SHAPE}': Check('speed-up', TORCH, 1.0),
    f'31x31 wgrad {SHAPE}': Check('speed-up', TORCH, 3.0),
    f'Dilated Reparam Block, training, {SHAPE}': Check('speed-up', PUBLISHED, 2.5),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', GUARDS)
def test_not_slower_than_before(name: str, cpp: Path, benchmark: Any) -> None:
    row = next(row for row in ROWS if row.name == name)
    contenders = row.contenders()
    guarded = dataclasses.replace(row, contenders=lambda: contenders, checks=(GUARDS[name],))
    for _ in range(ATTEMPTS):
        result = measure(guarded, rounds=7)
        assert not result.void
        (verdict,) = judge(result, guarded.checks, sgemm=1.0)
        if verdict.met:
            break
    benchmark.extra_info.update(peer=verdict.peer, ratio=verdict.ratio, limit=verdict.check.limit)
    benchmark.pedantic(contenders['ours'].run, rounds=5)
    assert verdict.met, f'{verdict.ratio:.2f} times as fast as {verdict.peer}: {result.timings}'
