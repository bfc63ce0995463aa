"""``python -m mmunireplknet.ops``: what works here, what is taken, and how fast it is."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmunireplknet.analysis.gpu_clock import CpuClock
from mmunireplknet.analysis.timing import Timing
from mmunireplknet.ops import __main__ as report
from mmunireplknet.ops import backends, build, fastest

from ..procedural import relative_error
from .fake_gpu import fake_gpu

FIGURE = r'\d+\.\d\d'


def rows(text: str) -> dict[str, list[str]]:
    """Cells of each line by its first cell; of equal ones the first."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        first, *rest = re.split(r'  +', line)
        found.setdefault(first, rest)
    return found


def test_what_works(cpp: Path, capsys: pytest.CaptureFixture) -> None:
    report.main(['--no-timing'])
    text = capsys.readouterr().out
    found = rows(text)
    assert f'torch {torch.__version__}\n' in text
    assert found['backend'] == ['works']
    assert found['torch'] == ['yes']
    assert found['cpp'] == ['yes', f'{cpp} ({torch.ops.mmuni_cpu.capability()})']
    for name in ('triton', 'cuda'):
        assert found[name] == ['no', backends.why_not(name)]
    assert 'Median' not in text


def test_what_is_taken(cpp: Path, capsys: pytest.CaptureFixture) -> None:
    report.main(['--no-timing'])
    text = capsys.readouterr().out
    assert 'MMUNI_DW_BACKEND is not set.' in text
    assert re.search(
        r"'auto' takes, for a map of \(1, 80, 56, 56\) on cpu:\ndtype +layout +3x3 +7x7 +13x13 +31x31\n", text
    )
    assert re.search(r'\nfloat32 +NCHW +cpp +cpp +cpp +cpp\n', text)
    assert re.search(r'\nfloat32 +channels_last +torch +cpp +cpp +cpp\n', text)
    assert re.search(r'\nbfloat16 +channels_last +cpp +cpp +cpp +cpp\n', text)
    assert re.search(r'\nfloat64 +NCHW +torch +torch +torch +torch\n', text)


def test_wish_of_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv('MMUNI_DW_BACKEND', 'torch')
    report.main(['--no-timing'])
    text = capsys.readouterr().out
    assert "MMUNI_DW_BACKEND is 'torch'." in text
    assert re.search(r'\nfloat32 +NCHW +torch +torch +torch +torch\n', text)


@pytest.mark.parametrize(
    ('backend', 'reason'), [('mkl', "backend='mkl' is unknown"), ('triton', 'there is no CUDA device')]
)
def test_wish_that_cannot_be_met(
    backend: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv('MMUNI_DW_BACKEND', backend)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    report.main(['--no-timing'])
    text = capsys.readouterr().out
    assert re.search(rf"'auto' fails on cpu: .*{reason}", text)
    assert rows(text)['torch'] == ['yes']


def test_kernels_that_are_not_built(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(build, 'library_file', lambda: None)
    monkeypatch.setattr(build, 'why_not', lambda: '')
    monkeypatch.setattr(report, 'SHAPE', (1, 4, 5, 6))
    monkeypatch.setattr(report, 'SECONDS', 0)
    backends._why_not_cpp.cache_clear()
    try:
        report.main([])
    finally:
        backends._why_not_cpp.cache_clear()
    text = capsys.readouterr().out
    assert rows(text)['cpp'] == ['no', 'the CPU kernels are not built: run python -m mmunireplknet.ops.build.']
    assert re.search(r'\nfloat32 +NCHW +torch +torch +torch +torch\n', text)
    assert re.search(r'\nlayout +direction +as torch has it +torch\n', text)


def test_timing(cpp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(report, 'SHAPE', (1, 4, 5, 6))
    monkeypatch.setattr(report, 'SECONDS', 0)
    report.main([])
    text = capsys.readouterr().out
    assert '13x13 on (1, 4, 5, 6) float32, CPU, threads: 1 ' in text
    assert re.search(r'\nlayout +direction +as torch has it +torch +cpp\n', text)
    for layout in ('NCHW', 'channels_last'):
        for direction in ('forward', 'input gradient', 'weight gradient'):
            assert re.search(rf'\n{layout} +{direction} +{FIGURE}( +{FIGURE} \(\d+\.\dx\)){{2}}\n', text)


def test_figures_of_a_line_are_measured_in_turn(
    cpp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """All at once by ``interleave``, whose medians are shown, beside how many times less than the first they are."""
    lines = []

    def interleave(functions: Mapping[str, Callable], seconds: float) -> dict[str, Timing]:
        results = [function() for function in functions.values()]
        first, *others = (next(t for t in r if t is not None) if isinstance(r, tuple) else r for r in results)
        assert [relative_error(other, first) < 1e-5 for other in others] == [True, True]
        lines.append((tuple(first.shape), seconds))
        medians = zip(functions, (6.0, 3.0, 1.5), strict=True)
        return {name: Timing(median, 0.0, 99.0, 5) for name, median in medians}

    monkeypatch.setattr(report, 'SHAPE', (1, 4, 5, 6))
    monkeypatch.setattr(report, 'interleave', interleave)
    report.main([])
    shapes = (report.SHAPE, report.SHAPE, (4, 1, 13, 13))
    assert lines == [(shape, report.SECONDS) for shape in shapes] * 2
    assert len(re.findall(r'gradient +6\.00 +3\.00 \(2\.0x\) +1\.50 \(4\.0x\)\n', capsys.readouterr().out)) == 4


def test_help(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match='0'):
        report.main(['--help'])
    text = capsys.readouterr().out
    assert '--no-timing' in text
    assert 'Example: OMP_NUM_THREADS=4' in text


@pytest.mark.slow
def test_figures_are_of_the_layer_they_name(cpp: Path, capsys: pytest.CaptureFixture) -> None:
    """In full: the compiled weight gradient is several times faster than torch's (95 times when this was written)."""
    report.main([])
    line = re.search(r'\nNCHW +weight gradient .*\((\d+\.\d)x\)\n', capsys.readouterr().out)
    assert float(line[1]) > 2


def test_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A GPU that is made of the CPU: it is named, and everything there is is timed on its maps."""
    properties = SimpleNamespace(name='NVIDIA H200', major=9, minor=0, total_memory=141 << 30)
    for name, fake in dict(
        is_available=lambda: True, device_count=lambda: 1, get_device_properties=lambda index: properties,
        get_device_name=lambda: 'NVIDIA H200',
    ).items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(report, 'GpuClock', lambda seconds: CpuClock())
    monkeypatch.setattr(report, 'GPU_SHAPES', ((2, 4, 9, 8),))
    monkeypatch.setattr(report, '_note', lambda name: '')
    with fake_gpu(monkeypatch) as gpu:
        monkeypatch.setattr(fastest, 'is_capturing', lambda *_: False)
        gpu.milliseconds['triton'] = 0.5
        monkeypatch.setattr(report, '_choices', lambda device: 'choices\n')
        report.main([])
        assert gpu.calls()['cuda'] != []
    text = capsys.readouterr().out
    assert '\ncuda:0: NVIDIA H200, compute capability 9.0, 141 GiB\n' in text
    assert {name: rows(text)[name] for name in ('triton', 'cuda')} == {'triton': ['yes'], 'cuda': ['yes']}
    assert '13x13, bfloat16, NVIDIA H200, from a cold cache' in text
    assert re.search(r'\nmap +layout +direction +as torch has it +cuda +triton +auto +auto took\n', text)
    for layout in ('NCHW', 'channels_last'):
        for direction in ('forward', 'input gradient', 'weight gradient'):
            line = rf'\n\(2, 4, 9, 8\) +{layout} +{direction} +\d+( +\d+ \(\d+\.\dx\)){{3}} +triton\n'
            assert re.search(line, text), line
