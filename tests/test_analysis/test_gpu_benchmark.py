"""The benchmark on a GPU, as far as a machine without one can run it: its rows, its floors, its targets, its files."""

import json
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from mmunireplknet.analysis import gpu_benchmark
from mmunireplknet.analysis.gpu_benchmark import FULL, PARTS, QUICK, TINY, Work, plan, read, run
from mmunireplknet.analysis.gpu_clock import CpuClock, GpuClock, Measured
from mmunireplknet.analysis.gpu_pointwise import PASSES, table
from mmunireplknet.analysis.gpu_report import depthwise_verdicts, draw, markdown
from mmunireplknet.analysis.roofline import CARDS, Card, Floors, card_of, floors
from mmunireplknet.analysis.timing import Timing

from ..test_ops.fake_gpu import fake_gpu
from ..test_tools.test_command_line import run_tool

H200 = card_of('NVIDIA H200', 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ('shape', 'memory', 'fma', 'tensor'),
    [
        ((16, 160, 64, 64), 9.8, 59.1, 17.8),
        ((16, 320, 32, 32), 4.9, 29.5, 8.9),
        ((2, 320, 50, 84), 2.5, 15.1, 4.6),
        ((16, 1536, 16, 16), 5.9, 35.4, 10.7),
    ],
)
def test_floors_of_the_design(shape, memory, fma, tensor):
    """Microseconds of 13x13 in 16 bits on an H200, as worked out by hand when the kernels were designed."""
    least = floors(H200, shape, 13, 2)
    for value, expected in ((least.memory, memory), (least.fma, fma), (least.tensor, tensor)):
        assert 1e3 * value == pytest.approx(expected, abs=0.06)
    assert least.roofline == least.tensor
    single = floors(H200, shape, 13, 4)
    assert (single.memory, single.tensor) == (pytest.approx(2 * least.memory), pytest.approx(6 * least.tensor))
    assert single.roofline == single.fma


def test_memory_is_the_roofline_of_small_kernels():
    least = floors(H200, (16, 320, 32, 32), 3, 2)
    assert least.roofline == least.memory > least.fma


@pytest.mark.parametrize(
    ('name', 'found'), [('NVIDIA H100 PCIe', 'H100 PCIe'), ('NVIDIA H100 80GB HBM3', 'H100'), ('NVIDIA A10G', 'A10')]
)
def test_cards(name, found):
    assert card_of(name, 1.0, 2.0, 3.0) in CARDS
    assert card_of(name, 1.0, 2.0, 3.0).name == found


def test_a_card_that_nobody_knows_is_measured():
    card = card_of('NVIDIA B300', 8e12, 7e13, 2e15)
    assert (card.bandwidth, card.fma, card.tensor) == (8e12, 7e13, 2e15)
    assert 'measured' in card.source


def test_the_plan_is_that_of_the_issue():
    work = plan(FULL)
    assert list(dict.fromkeys(w.part for w in work)) == list(PARTS)
    shapes = {w.facts['shape'] for w in work if w.part == 'anchors-13'}
    assert len(shapes) == 36
    assert {(16, 160, 64, 64), (8, 384, 40, 40), (2, 1536, 25, 42)} <= shapes
    anchors = [w for w in work if w.part.startswith('anchors')]
    assert len(anchors) == 36 * 3 * 3 * 3 * 2
    assert {w.contender for w in anchors} == {'torch NCHW', 'torch channels_last'}
    assert {w.contender.split()[0] for w in work if w.part.startswith('ours')} == {'triton', 'cuda'}
    assert {w.contender.split()[0] for w in work if w.part == 'training'} == {'published', 'ConvNeXt', 'ours'}
    assert {w.facts['shape'] for w in work if w.part == 'inference'} == {
        (n, 3, s, s) for n in (1, 64) for s in (224, 512)
    }
    assert len({(w.row, w.contender) for w in work}) == len(work)
    assert len(plan(QUICK)) < len(work) / 20


class FakeClock(CpuClock):
    """Every timing takes as long as the work says."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.dead = False

    def measure(self, function: Callable[[], object], mode: str) -> Measured:
        self.calls.append(f'{function()} {mode}')
        return Measured(Timing(2.0, 1.0, 3.0, 7), 2**20)

    def synchronize(self) -> None:
        if self.dead:
            raise RuntimeError('CUDA error: an illegal memory access was encountered')


def work_named(name: str, part: str = 'block', fails: Exception | None = None, built: list | None = None) -> Work:
    def build(device: torch.device) -> Callable[[], object]:
        if built is not None:
            built.append(name)
        if fails:
            raise fails
        return lambda: name

    return Work(part, 'row', name, dict(shape=(1, 2, 3, 4)), build)


def test_results_are_kept_and_not_measured_again(tmp_path):
    file, clock, built = tmp_path / 'folder' / 'results.jsonl', FakeClock(), []
    work = [work_named('a', built=built), work_named('b', 'training', built=built)]
    assert run(work, clock, file, ('eager', 'graph')) == 0
    assert clock.calls == ['a eager', 'a graph', 'b eager']
    assert built == ['a', 'b']
    assert [(e['contender'], e['mode'], e['ms'], e['peak']) for e in read(file)] == [
        ('a', 'eager', 2.0, 2**20), ('a', 'graph', 2.0, 2**20), ('b', 'eager', 2.0, 2**20),
    ]  # fmt: skip
    assert run([*work, work_named('c')], clock, file, ('eager', 'graph')) == 0
    assert clock.calls[3:] == ['c eager', 'c graph']


def test_time_is_up(tmp_path):
    file, clock = tmp_path / 'results.jsonl', FakeClock()
    work = [work_named(name) for name in 'abc']
    assert run(work, clock, file, ('eager',), seconds=-1) == 3
    assert (clock.calls, read(file)) == ([], [])


def test_a_contender_that_fails_is_told_and_tried_again(tmp_path):
    file, clock = tmp_path / 'results.jsonl', FakeClock()
    bad = work_named('a', fails=ValueError('no kernel\nfor this'))
    assert run([bad, work_named('b')], clock, file, ('eager',)) == 0
    first, second = read(file)
    assert (first['error'], second['error']) == ('ValueError: no kernel\nfor this', '')
    run([work_named('a')], clock, file, ('eager',))
    assert [e['error'] for e in read(file)] == ['', '']


def test_an_error_that_ends_the_process_is_not_repeated(tmp_path):
    file, clock = tmp_path / 'results.jsonl', FakeClock()
    clock.dead = True
    bad = work_named('a', fails=RuntimeError('CUDA error'))
    with pytest.raises(RuntimeError, match='cannot be used any more in this process; run it again to go on'):
        run([bad, work_named('b')], clock, file, ('eager',))
    clock.dead = False
    assert run([bad, work_named('b')], clock, file, ('eager',)) == 0
    assert {e['contender']: e['error'] for e in read(file)} == {'a': 'fatal: RuntimeError: CUDA error', 'b': ''}


def test_a_line_that_was_cut_off(tmp_path):
    file, clock = tmp_path / 'results.jsonl', FakeClock()
    run([work_named('a'), work_named('b')], clock, file, ('eager',))
    file.write_text(file.read_text()[:-20])
    assert [e['contender'] for e in read(file)] == ['a']


FACTS = dict(kernel=13, dtype='bfloat16', direction='forward', shape=(16, 320, 32, 32))
LEAST = Floors(memory=0.005, fma=0.03, tensor=0.01)  # the roofline is 0.01


@pytest.mark.parametrize(
    ('facts', 'torch_ms', 'ours_ms', 'expected'),
    [
        ({}, 0.1, 0.025, ['4.0x (at least 3x: met)', '40% of Toeplitz (at least 35%: met)']),
        ({}, 0.1, 0.05, ['2.0x (at least 3x: **missed**)', '20% of Toeplitz (at least 35%: **missed**)']),
        ({}, 0.03, 0.02, ['50% of roofline (at least 60%: **missed**)', '50% of Toeplitz (at least 35%: met)']),
        (dict(shape=(2, 320, 50, 84)), 0.03, 0.0125, ['80% of roofline (at least 60%: met)']),
        (dict(direction='wgrad'), 0.1, 0.025, ['4.0x (at least 5x: **missed**)']),
        (dict(dtype='float32'), 0.1, 0.025, ['4.0x (at least 2x: met)']),
    ],
)
def test_targets(facts, torch_ms, ours_ms, expected):
    times = {
        'torch NCHW': {'eager': torch_ms}, 'torch channels_last': {'eager': 9.0},
        'cuda NCHW': {'eager': ours_ms}, 'triton NCHW': {'eager': 9.0},
    }  # fmt: skip
    verdicts = depthwise_verdicts({**FACTS, **facts}, times, LEAST)
    assert verdicts == [f'eager: {text}' for text in expected]


@pytest.mark.parametrize('times', [{}, {'torch NCHW': {'eager': 1.0}}, {'cuda NCHW': {'eager': 1.0}}])
def test_nothing_is_judged_that_was_not_measured(times):
    assert depthwise_verdicts(FACTS, times, LEAST) == []


def test_other_kernels_have_no_targets():
    times = {'torch NCHW': {'eager': 1.0}, 'cuda NCHW': {'eager': 1.0}}
    assert depthwise_verdicts({**FACTS, 'kernel': 7}, times, LEAST) == []


def entry(part, row, contender, mode, ms, peak=None, error='', **facts):
    return dict(part=part, row=row, contender=contender, mode=mode, ms=ms, peak=peak, error=error, **facts)


def test_tables():
    facts = dict(FACTS, where='T stage 3')
    entries = [
        entry('anchors-13', 'r', 'torch NCHW', 'graph', 0.24, **facts),
        entry('anchors-13', 'r', 'torch NCHW', 'eager', 0.25, **facts),
        entry('ours-13', 'r', 'cuda NCHW', 'graph', 0.016, **facts),
        entry('ours-13', 'r', 'triton NCHW', 'graph', None, error='RuntimeError: a | b', **facts),
        entry('block', 'b', 'published NCHW', 'eager', 8.0, 1000 << 20),
        entry('block', 'b', 'ours NCHW', 'eager', 3.0, 250 << 20),
        entry('block', 'b', 'ours channels_last', 'eager', 1.0, 500 << 20),
        entry('training', 't', 'published NCHW', 'eager', 300.0, 1000 << 20),
        entry('training', 't', 'ConvNeXt NCHW', 'eager', 150.0, 800 << 20),
        entry('training', 't', 'ours NCHW', 'eager', 160.0, 500 << 20),
    ]
    text = markdown(entries, {'card': 'NVIDIA H200'}, H200)
    assert '| forward, T stage 3, (16, 320, 32, 32) | 240 (250) | 16.0 (-) | - | 4.9 | 29.5 | 8.9 | 56% |' in text
    assert 'graph: 15.0x (at least 3x: met); graph: 56% of Toeplitz (at least 35%: met)' in text
    assert '| b | ours NCHW | - (3.0) | 250 |  |' in text
    assert 'published, eager: 8.0x (at least 4x: met); 50% of the memory of published NCHW (at most 35%: **miss' in text
    assert 'published, eager: 1.9x (at least 1.6x: met); ConvNeXt, eager: 0.9x (at least 1x: **missed**)' in text
    assert '| r | triton NCHW | graph | RuntimeError: a / b |' in text


def test_picture(tmp_path):
    entries = [
        entry(
            'anchors-13', f'{d}{n}', 'torch NCHW', 'graph', 0.1 * n, **{**FACTS, 'direction': d, 'shape': (n, 8, 9, 9)}
        )
        for d in ('forward', 'dgrad', 'wgrad')
        for n in (1, 2)
    ]
    draw(entries, H200, 'NVIDIA H200', tmp_path / 'a.png')
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
    draw([e for e in entries if e['mode'] == 'eager'], H200, '', tmp_path / 'b.png')
    assert not (tmp_path / 'b.png').exists()


def test_the_gpu_clock(monkeypatch):
    """The cache is emptied before every call, the first calls do not count, and samples fill the time given."""
    log, now = [], [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            self.time = now[0]

        def elapsed_time(self, end: 'Event') -> float:
            return end.time - self.time

    def function() -> None:
        log.append('call')
        now[0] += 4.0  # ms

    for name, fake in dict(
        Event=Event, synchronize=lambda: None, memory_allocated=lambda: 100, reset_peak_memory_stats=lambda: None,
        max_memory_allocated=lambda: 350,
    ).items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    clock = GpuClock.__new__(GpuClock)
    clock.seconds, clock.buffer = 0.04, SimpleNamespace(zero_=lambda: log.append('flush'))
    measured = clock.measure(function, 'eager')
    assert measured == Measured(Timing(4.0, 4.0, 4.0, 10), 250)
    assert log == ['call'] * 4 + ['flush', 'call'] * 12
    clock.seconds = 0.0
    assert clock.measure(function, 'eager').timing.rounds == 5


@pytest.mark.slow
def test_every_depthwise_contender_computes_the_same(monkeypatch):
    """On a GPU that is made of the CPU, so that all of the backends are there."""
    with fake_gpu(monkeypatch) as gpu:
        rows: dict[str, list[torch.Tensor]] = {}
        monkeypatch.setattr(gpu_benchmark, '_draw', drawn)
        for work in plan(TINY, ('anchors-13', 'ours-13')):
            result = work.build(torch.device('cpu'))()
            result = next(t for t in result if t is not None) if isinstance(result, tuple) else result
            rows.setdefault(work.row, []).append(result.double().contiguous())
        assert {name: backend != [] for name, backend in gpu.calls().items()} == {'triton': True, 'cuda': True}
    assert len(rows) == 6
    for row, results in rows.items():
        assert len(results) == 6
        limit = 2e-2 if 'bfloat16' in row else 1e-5
        assert all(float((r - results[0]).norm() / results[0].norm()) < limit for r in results), row


def drawn(shape, device, layout='NCHW'):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))
    return x.contiguous(memory_format=gpu_benchmark.LAYOUTS[layout])


@pytest.mark.slow
def test_rehearsal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)  # and as it was, behind the tool
    arguments = ('analysis/benchmark_gpu.py', '--device', 'cpu', '--out', tmp_path, '--part', 'anchors-7', 'block')
    assert run_tool(*arguments) is None
    assert '[40/40]' in capsys.readouterr().out
    found = json.loads((tmp_path / 'benchmark_gpu.json').read_text())
    assert [e['error'] for e in found['results']] == [''] * (12 * 2 + 8 * 2)
    text = (tmp_path / 'benchmark_gpu.md').read_text()
    assert text.startswith('**Rehearsal on a CPU: these figures say nothing.**')
    assert '**7x7, bfloat16**' in text
    assert '**block**' in text
    assert (tmp_path / 'benchmark_gpu.png').exists()
    assert run_tool(*arguments) is None
    assert '[1/' not in capsys.readouterr().out
    session = json.loads((tmp_path / 'session.json').read_text())
    assert len(session['commands']) == 2
    (tmp_path / 'session.json').write_text(json.dumps({**session, 'environment': {'card': 'another'}}))
    assert 'take another folder by --out' in run_tool(*arguments)


def test_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert 'There is no CUDA device; --device cpu' in run_tool('analysis/benchmark_gpu.py', '--out', tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('part', ['training', 'inference'])
def test_models_run(part):
    """Every contender once, in the size of a rehearsal."""
    names = []
    for work in plan(TINY, (part,)):
        work.build(torch.device('cpu'))()
        names.append(work.contender)
    everybody = [
        f'{kind} {layout}' for kind in ('published', 'ConvNeXt', 'ours') for layout in ('NCHW', 'channels_last')
    ]
    assert names == everybody


def test_card_rates_are_positive():
    assert all(min(card.bandwidth, card.fma, card.tensor) > 1e11 and isinstance(card, Card) for card in CARDS)


def test_pointwise_passes_run() -> None:
    """Each moves as many maps as its roofline is made of."""
    work = plan(TINY, ('pointwise',))
    assert len(work) == 2 * len(PASSES)
    for one in work:
        function = one.build(torch.device('cpu'))
        maps = [t for t in function.args if isinstance(t, torch.Tensor) and t.dim() == 4]
        _, count, channels = PASSES[one.facts['name']]
        assert len(maps) == count
        assert all(t.numel() == channels * math.prod(one.facts['shape']) for t in maps)
        function()


def test_table_of_pointwise_passes() -> None:
    """Of a map of 2 x 4 x 9 x 11 values, on a card that moves a megabyte a second: the bytes are the microseconds."""
    card = Card('slow', 1e6, 1.0, 1.0)
    facts = dict(shape=(2, 4, 9, 11), dtype='bfloat16', name='GELU and GRN')
    entries = [
        entry('pointwise', 'row', 'triton', mode, ms, **facts) for mode, ms in (('graph', 25.344), ('eager', 30))
    ]
    *_, line = table(entries, card)
    assert line == '| GELU and GRN | (2, 4, 9, 11), bfloat16 | 25344.0 (30000.0) | 12672.0 | 50% |'
    assert len(list(table([{**entries[0], 'error': 'RuntimeError'}], card))) == 5
