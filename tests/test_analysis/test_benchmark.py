"""Timing, counting of saved activations, the profiler's verdicts, the peers, and how the benchmark reports them."""

import dataclasses
import json
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmunireplknet import UniRepLKNet
from mmunireplknet.analysis import benchmark, benchmark_report, peers, profiling, timing
from mmunireplknet.analysis.benchmark import ROWS, Check, Result, Row, judge, measure, run
from mmunireplknet.analysis.peers import Contender
from mmunireplknet.analysis.timing import Timing
from mmunireplknet.ops import backends

from ..procedural import relative_error
from ..test_models.tiny import TINY
from ..test_tools.test_command_line import run_tool

MAP = (2, 6, 9, 8)
IMAGE = (1, 3, 64, 64)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.delenv('MMUNI_DW_BACKEND', raising=False)
    with timing.thread_count(1):
        yield


@pytest.fixture
def cpp():
    if reason := backends.why_not('cpp'):
        pytest.skip(reason)


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


@pytest.mark.parametrize('direction', peers.DIRECTIONS)
def test_all_contenders_compute_the_same(direction):
    results = {name: contender.run() for name, contender in peers.depthwise(MAP, 7, direction).items()}
    results = {n: next(t for t in r if t is not None) if isinstance(r, tuple) else r for n, r in results.items()}
    for name, result in results.items():
        assert relative_error(result, results['torch NCHW']) < 1e-5, name


def test_the_published_form_has_nothing_of_ours():
    for contenders in (peers.block_training(MAP, 13), peers.training(TINY, IMAGE)):
        names = {event.name for event in profiling.profile_events(contenders['published'].run)}
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


def result_of(**milliseconds):
    timings = {name: Timing(ms, 0.9 * ms, 1.1 * ms, 5) for name, ms in milliseconds.items()}
    return Result('7x7 work', timings, {'ours': 90.0}, {'ours': 30, 'a': 100, 'b': 60})


@pytest.mark.parametrize(
    ('check', 'peer', 'ratio', 'met'),
    [
        (Check('speed-up', ('a', 'b'), 2.0), 'b', 2.0, True),
        (Check('speed-up', ('a', 'b'), 2.1), 'b', 2.0, False),
        (Check('speed-up', ('a',), 3.0), 'a', 3.0, True),
        (Check('time', ('a', 'b'), 0.5), 'b', 0.5, True),
        (Check('time', ('a', 'b'), 0.4, goal=0.3), 'b', 0.5, False),
        (Check('time', ('ours',), ours='a'), 'ours', 3.0, None),
        (Check('memory', ('a',), 0.3), 'a', 0.3, True),
        (Check('memory', ('b',), 0.3), 'b', 0.5, False),
        (Check('rate', limit=0.6), 'torch.mm', 0.9, True),
        (Check('rate', limit=1.0), 'torch.mm', 0.9, False),
    ],
)
def test_judge(check, peer, ratio, met):
    (verdict,) = judge(result_of(ours=10.0, a=30.0, b=20.0), [check], sgemm=100.0)
    assert (verdict.peer, verdict.met) == (peer, met)
    assert verdict.ratio == pytest.approx(ratio)


def test_the_void_is_not_judged():
    void = dataclasses.replace(result_of(ours=1.0, a=9.0), void='fall-back')
    assert judge(void, [Check('time', ('a',), 1.0)], 100.0) == []


def test_hopeless_is_who_decides_nothing():
    checks = [Check('speed-up', ('a', 'b'), 1.0), Check('speed-up', ('c',), 1.0)]
    seconds = dict(ours=1.0, a=4.0, b=1.2, c=50.0, unasked=2.0, slow=4.0)
    assert benchmark._hopeless(checks, seconds) == ['a', 'slow']


def test_rows_are_told_apart_and_name_their_contenders():
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        if row.contenders.func is peers.depthwise:
            kernel, direction = row.contenders.args[1:]
            names = set(peers.depthwise((1, 2, 3, 3), kernel, direction))
            assert {name for check in row.checks for name in (check.ours, *check.peers)} <= names


@pytest.mark.slow
def test_models_of_the_rows_can_be_built():
    for row in ROWS:
        if row.contenders.func is not peers.depthwise:
            contenders = row.contenders()
            assert {name for check in row.checks for name in (check.ours, *check.peers)} <= set(contenders)
            assert set(row.broken_down) <= set(contenders)


def tiny_rows():
    rate = Check('rate', limit=0.01)
    operator = Row(
        '7x7 wgrad', partial(peers.depthwise, MAP, 7, 'wgrad'), (Check('speed-up', ('torch NCHW',), 99), rate)
    )
    checks = (Check('time', ('identity',), 99.0, goal=50.0), Check('memory', ('published',), 0.99))
    training = Row('tiny training', partial(peers.training, TINY, IMAGE), checks)
    sizes = Row(
        'tiny sizes', partial(peers.growth, 'a', IMAGE, (7, 9)), (Check('time', ('K=7',), ours='K=9'),), 1.0, ('K=7',)
    )
    return operator, training, sizes


def missing():
    raise ModuleNotFoundError('no module', name='mmwhatever')


@pytest.fixture
def report(cpp, monkeypatch):
    monkeypatch.setattr(benchmark, 'gemm_rates', lambda rounds: {'torch.mm': 100.0, 'oneDNN': 200.0})
    lines = []
    rows = (*tiny_rows(), Row('no peer', missing, ()))
    report = run(rows, threads=1, rounds=2, progress=lines.append)
    assert len(lines) == 1 + len(rows)
    return report


def test_report(report, tmp_path):
    operator, training, sizes, absent = report.results
    assert [result.void for result in (operator, training, sizes)] == ['', '', '']
    assert absent.void == 'mmwhatever is not installed'
    assert set(training.saved) == {'ours', 'published'}
    assert 0 < training.saved['ours'] < training.saved['published']
    assert set(sizes.groups) == {'K=7'}
    table = benchmark_report.markdown(report)
    assert '| 7x7 wgrad | ' in table
    assert ' (at least 99: **missed**); ' in table
    assert ' (at most 99, goal 50: met); ' in table
    assert '| no peer | void | | | mmwhatever is not installed |' in table
    assert '| tiny sizes: K=9 | ' in table
    assert '| ms in the profiler | depthwise | ' in table
    widths = [[line.count('|') for line in part.splitlines() if line[:1] == '|'] for part in table.split('\n\n')]
    assert all(len(set(width)) <= 1 for width in widths), 'a table with lines of several lengths'
    benchmark_report.write_json(report, tmp_path / 'new' / 'benchmark.json')
    written = json.loads((tmp_path / 'new' / 'benchmark.json').read_text())
    assert written['results'][1]['verdicts'][1]['ratio'] == training.verdicts[1].ratio
    assert written['gemm'] == {'torch.mm': 100.0, 'oneDNN': 200.0}
    benchmark_report.draw(report, tmp_path / 'all.png')
    assert (tmp_path / 'all.png').stat().st_size > 10_000
    report.results = [absent]
    benchmark_report.draw(report, tmp_path / 'none.png')
    assert not (tmp_path / 'none.png').exists()


def test_a_fall_back_makes_the_row_void(monkeypatch):
    monkeypatch.setenv('MMUNI_DW_BACKEND', 'torch')
    result = measure(tiny_rows()[0], rounds=1)
    assert 'ours: mmuni_cpu::weight_grad ran 0 times' in result.void


def test_contenders_without_kernels_are_not_void():
    row = Row('any', lambda: {'ours': Contender(lambda: None), 'peer': Contender(lambda: None)}, ())
    assert measure(row, rounds=1).void == ''


def test_tool_lists_rows_and_knows_when_there_are_none(capsys):
    assert run_tool('analysis/benchmark.py', '--list', '--rows', '^13x13 dgrad') is None
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert '--list prints them' in run_tool('analysis/benchmark.py', '--rows', 'nothing of the kind')


@pytest.mark.slow
def test_tool_writes_table_figures_and_picture(cpp, tmp_path, capsys):
    out = tmp_path / 'out'
    arguments = ['--rows', r'^7x7 wgrad \(1, 320, 32', '--rounds', 1, '--threads', 1, '--out', out]
    assert run_tool('analysis/benchmark.py', *arguments) is None
    table = (out / 'benchmark.md').read_text()
    assert table in capsys.readouterr().out
    assert 'threads: 1' in table
    assert '- command: `python ' in table
    assert json.loads((out / 'benchmark.json').read_text())['gemm']['torch.mm'] > 1
    assert (out / 'benchmark.png').exists()
