"""The table, the JSON file and the picture of the results."""

import json

import pytest

from mmunireplknet.analysis import benchmark, benchmark_report
from mmunireplknet.analysis.benchmark import PUBLISHED, Check, Report, Row, Verdict, run

from ..test_tools.test_command_line import run_tool
from .small_work import result_of, tiny_rows


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
    assert set(training.saved) == {'ours', *PUBLISHED}
    assert 0 < training.saved['ours'] < min(training.saved[name] for name in PUBLISHED)
    assert set(sizes.groups) == {'K=7'}
    table = benchmark_report.markdown(report)
    assert '| 7x7 wgrad | ' in table
    assert ' (at least 99: **missed**); ' in table
    assert ' (at most 99: met, goal 50: reached); ' in table
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


@pytest.mark.parametrize(
    ('check', 'ratio', 'met', 'text'),
    [
        (Check('speed-up', limit=2.2), 2.2, True, ' (at least 2.2: met)'),
        (Check('speed-up', limit=2.2, goal=2.7), 2.62, True, ' (at least 2.2: met, goal 2.7: not reached)'),
        (Check('speed-up', limit=2.2, goal=2.7), 2.7, True, ' (at least 2.2: met, goal 2.7: reached)'),
        (Check('time', limit=1.0, goal=0.9), 0.95, True, ' (at most 1: met, goal 0.9: not reached)'),
        (Check('time', limit=1.0, goal=0.9), 0.54, True, ' (at most 1: met, goal 0.9: reached)'),
        (Check('time', limit=1.0, goal=0.9), 1.1, False, ' (at most 1: **missed**, goal 0.9: not reached)'),
        (Check('memory', limit=0.35), 0.2, True, ' (at most 35%: met)'),
        (Check('rate'), 0.2, None, ''),
    ],
)
def test_target_and_goal(check, ratio, met, text):
    assert benchmark_report._target(Verdict(check, 'peer', ratio, met)) == text


def test_time_of_the_matrix_products():
    result = result_of(ours=185.0, peer=350.0)
    result.gemm_gflop = {'ours': 49.2, 'peer': 20.0}
    table = benchmark_report.markdown(Report({}, {'torch.mm': 214.0, 'oneDNN': 400.0}, [result]))
    assert table.splitlines()[-4:] == [
        '| model | ms | GFLOP in matrix products | ms for them at the rate of torch.mm / of oneDNN |',
        '|---|---|---|---|',
        '| 7x7 work | 185 | 49.2 | 230 / 123 |',
        '| 7x7 work: peer | 350 | 20.0 | 93.5 / 50.0 |',
    ]


@pytest.mark.parametrize(
    ('what', 'ratio', 'factor'),
    [('speed-up', 4.0, 4.0), ('rate', 0.5, 0.5), ('time', 0.25, 4.0), ('memory', 0.5, 2.0), ('time', None, 0.0)],
)
def test_a_bar_is_long_where_we_are_good(what, ratio, factor):
    assert benchmark_report._times_better(Check(what), ratio) == factor
