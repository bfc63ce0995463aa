"""The rows of the benchmark: what is measured, when it is void, how it is judged; and the tool."""

import dataclasses
from functools import partial

import pytest

from mmunireplknet.analysis import benchmark, peers
from mmunireplknet.analysis.benchmark import ROWS, Check, Row, judge, measure, run
from mmunireplknet.analysis.peers import Contender
from mmunireplknet.analysis.timing import Timing

from ..test_tools.test_command_line import run_tool
from .small_work import result_of, tiny_rows


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


def test_models_are_compared_with_the_better_layout():
    """Of a peer that is measured in both layouts, neither is left out of a check."""
    checks = [check for row in ROWS for check in row.checks]
    for who in ('published', 'ConvNeXt'):
        mentioned = [check.peers for check in checks if any(peer.startswith(who) for peer in check.peers)]
        assert len(mentioned) >= 3
        assert set(mentioned) == {tuple(f'{who} {layout}' for layout in peers.LAYOUTS)}


def test_the_better_layout_counts():
    saved = dataclasses.replace(result_of(ours=10.0, a=30.0, b=20.0), saved={'ours': 30, 'a': 50, 'b': 60})
    speed, memory = judge(saved, [Check('speed-up', ('a', 'b'), 1.0), Check('memory', ('a', 'b'), 1.0)], 100.0)
    assert (speed.peer, memory.peer) == ('b', 'a')


def test_giga_is_a_billion(monkeypatch):
    one_millisecond = Timing(1.0, 1.0, 1.0, 1)
    monkeypatch.setattr(benchmark, 'interleave', lambda functions, *_: dict.fromkeys(functions, one_millisecond))
    row = Row('work', lambda: {'ours': Contender(lambda: None, flops=3e9, gemm_flops=2e9)}, ())
    result = measure(row)
    assert result.gflops['ours'] == pytest.approx(3000)  # a second
    assert result.gemm_gflop['ours'] == pytest.approx(2)


def test_the_better_rate_of_matrix_products_counts(monkeypatch):
    """Of before and after all rows: what disturbs either must not make ours look better."""
    rates = iter([{'torch.mm': 100.0, 'oneDNN': 400.0}, {'torch.mm': 200.0, 'oneDNN': 300.0}])
    monkeypatch.setattr(benchmark, 'gemm_rates', lambda rounds: next(rates))
    assert run([], threads=1).gemm == {'torch.mm': 200.0, 'oneDNN': 400.0}


def cannot_be_imported(error):
    raise error


@pytest.mark.parametrize(
    ('error', 'void'),
    [
        (ModuleNotFoundError('no module', name='mmwhatever'), 'mmwhatever is not installed'),
        (
            ImportError("cannot import name 'X' from 'mmpretrain'", name='mmpretrain'),
            "cannot import name 'X' from 'mmpretrain'",
        ),
    ],
)
def test_a_peer_that_cannot_be_imported(error, void):
    assert measure(Row('work', partial(cannot_be_imported, error), ())).void == void


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--rounds', '0'], "argument --rounds: '0' must be a whole number, 1 or more"),
        (['--rounds', '-3'], "argument --rounds: '-3' must be a whole number, 1 or more"),
        (['--threads', '0'], "argument --threads: '0' must be a whole number, 1 or more"),
        (['--threads', 'two'], "argument --threads: 'two' must be a whole number, 1 or more"),
        (['--rows', '['], "argument --rows: '[' is not a regular expression: unterminated character set"),
    ],
)
def test_tool_refuses_what_makes_no_sense(arguments, message, capsys):
    assert run_tool('analysis/benchmark.py', '--list', *arguments) == 2
    assert message in capsys.readouterr().err
