"""The file that timings are kept in, and what is timed, on a GPU that is made of the CPU."""

import contextlib
import json
import math
import multiprocessing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmunireplknet.ops import backends, build, depthwise_conv2d, fastest

from ..procedural import image
from .fake_gpu import FakeGPU

X, WEIGHT = image((2, 6, 20, 21)), image((6, 1, 13, 13), 1)


def convolve(x: Tensor = X, weight: Tensor = WEIGHT) -> Tensor:
    return depthwise_conv2d(x, weight)


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu: FakeGPU) -> Path:
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA H200')
    monkeypatch.setenv('MMUNI_DW_TUNE', str(tmp_path / 'folder' / 'tune.jsonl'))
    return tmp_path / 'folder' / 'tune.jsonl'


def test_timings_outlast_the_process(gpu: FakeGPU, file: Path) -> None:
    gpu.milliseconds['triton'] = 0.5
    convolve()
    entry = json.loads(file.read_text())
    assert (entry['device'], entry['torch']) == ('NVIDIA H200', torch.__version__)
    assert entry['ms'] == {'cuda': 1.0, 'triton': 0.5, 'torch': 3.0}
    fastest.clear()
    gpu.milliseconds['triton'] = 9.0  # nobody asks again
    convolve()
    convolve()
    assert len(gpu.timed) == 3
    assert backends.choose('auto', X, 13) == 'triton'
    convolve(weight=WEIGHT[..., 3:10, 3:10])
    assert len(file.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    'line',
    [b'', b'{"kind"', b'[]', b'{"device": 3}', b'7', b'\xff\x00\x80'],
    ids=['empty', 'half', 'a list', 'incomplete', 'a number', 'no text'],
)
def test_lines_that_say_nothing(gpu: FakeGPU, file: Path, line: bytes) -> None:
    convolve()
    good = file.read_bytes()
    file.write_bytes(line + b'\n' + good)
    fastest.clear()
    convolve()
    assert len(gpu.timed) == 3


@pytest.mark.parametrize(
    'change',
    [{'ms': {'torch': 'fast'}}, {'ms': [1, 2]}, {'ms': {'torch': -1.0}}, {'ms': {'torch': math.nan}}, {'kind': [[1]]}],
    ids=str,
)
def test_figures_that_cannot_be(gpu: FakeGPU, file: Path, change: dict) -> None:
    convolve()
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}) + '\n')
    fastest.clear()
    convolve()
    assert len(gpu.timed) == 6


@pytest.mark.parametrize('key', ['device', 'torch', 'triton', 'mmunireplknet'])
def test_timings_of_something_else(gpu: FakeGPU, file: Path, key: str) -> None:
    convolve()
    file.write_text(json.dumps({**json.loads(file.read_text()), key: 'another'}) + '\n')
    fastest.clear()
    convolve()
    assert len(gpu.timed) == 6


def test_a_file_that_cannot_be_written(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA H200')
    monkeypatch.setenv('MMUNI_DW_TUNE', str(tmp_path / 'file' / 'tune.jsonl'))
    with pytest.warns(UserWarning, match='MMUNI_DW_TUNE=.* cannot be written'):
        convolve()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        convolve(weight=WEIGHT[..., 3:10, 3:10])
    assert backends.choose('auto', X, 13) == 'cuda'


def test_the_limit_is_that_of_the_fastest_so_far(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {}

    def time(candidate: Any, device: torch.device, limit: float) -> float:
        limits[gpu.label_of(candidate)] = limit
        return gpu.milliseconds[gpu.label_of(candidate)]

    monkeypatch.setattr(fastest, '_milliseconds', time)
    gpu.milliseconds |= {'cuda': 2.0, 'triton': 1.0}
    convolve()
    assert limits == {'cuda': math.inf, 'triton': 6.0, 'torch': 3.0}


def test_timings_are_kept_by_default(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA H200')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.delenv('MMUNI_DW_TUNE')
    convolve()
    assert len((build.cache_folder() / 'fastest.jsonl').read_text().splitlines()) == 1
    fastest.clear()  # as in the next process
    convolve()
    assert len(gpu.timed) == 3


@pytest.mark.parametrize('value', ['0', '1'])
def test_timings_that_are_not_kept(gpu: FakeGPU, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: pytest.fail('the driver was asked'))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setenv('MMUNI_DW_TUNE', value)
    convolve()
    assert [*tmp_path.iterdir()] == []
    assert len(gpu.timed) == 3 * int(value)


def test_a_user_whose_home_cannot_be_written(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Who has asked for no file need not hear of it."""
    (tmp_path / 'file').write_text('')
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA H200')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    monkeypatch.delenv('MMUNI_DW_TUNE')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        convolve()
        monkeypatch.delenv('XDG_CACHE_HOME')
        monkeypatch.setattr(Path, 'home', no_home)
        fastest.clear()
        convolve()
    assert len(gpu.timed) == 6


def no_home() -> Path:
    raise RuntimeError('Could not determine home directory.')


def test_a_backend_that_was_built_since_is_timed_as_well(gpu: FakeGPU, file: Path) -> None:
    cuda = gpu.backends.pop('cuda')
    convolve()
    assert gpu.timed == ['triton', 'torch']
    fastest.clear()
    gpu.backends['cuda'] = cuda
    convolve()
    assert gpu.timed == ['triton', 'torch', 'cuda']
    assert backends.choose('auto', X, 13) == 'cuda'
    fastest.clear()
    convolve()
    assert (len(gpu.timed), backends.choose('auto', X, 13)) == (3, 'cuda')


def test_the_file_is_bounded(gpu: FakeGPU, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, 'MOST_BYTES', 300)
    for kernel in (13, 11, 9, 7, 5):
        convolve(weight=WEIGHT[..., :kernel, :kernel])
        assert 0 < len(file.read_text()) < 800
    fastest.clear()
    convolve(weight=WEIGHT[..., :5, :5])  # the last one is there
    assert len(gpu.timed) == 15


def test_more_kinds_than_are_remembered(gpu: FakeGPU, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the file knows counts, however much that is, and keeps nothing else from being timed."""
    gpu.milliseconds['triton'] = 0.5
    for kernel in (13, 11):
        convolve(weight=WEIGHT[..., :kernel, :kernel])
    fastest.clear()
    monkeypatch.setattr(fastest, 'MOST', 1)
    for kernel in (13, 11, 9, 7):
        convolve(weight=WEIGHT[..., :kernel, :kernel])
    assert len(gpu.timed) == 9
    assert [backends.choose('auto', X, kernel) for kernel in (13, 11, 9, 7)] == [*['triton'] * 3, 'cuda']


def write(number: int) -> None:
    """A process that times something."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA H200')
        for kernel in range(3, 103, 2):
            kind = fastest.kind_of(f'function of {number}' + 200 * '.', X, kernel, 1)
            fastest._write_file(kind, {'torch': 1.0 + number, 'cuda': 7.0}, torch.device('cpu'))


def test_writers_at_the_same_time(gpu: FakeGPU, file: Path) -> None:
    """As the processes of a distributed training are."""
    context = multiprocessing.get_context('fork')
    writers = [context.Process(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({(entry['kind'][0], entry['kind'][1]) for entry in found}) == len(found) == 200


SHORT = torch.cuda.OutOfMemoryError('CUDA out of memory')


def test_what_memory_was_too_short_for_is_timed_again(
    gpu: FakeGPU, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The winner of the others is taken, but not remembered."""
    freed: list[int] = []
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: freed.append(1))
    gpu.backends['cuda'].fails = SHORT
    convolve()
    assert (sorted(gpu.timed), freed) == (['cuda', 'torch', 'triton'], [1])
    assert fastest.remembered(fastest.kind_of('forward', X, 13, 1)) is None
    assert 'cuda' not in json.loads(file.read_text())['ms']
    gpu.backends['cuda'].fails = None
    convolve()
    assert gpu.timed[3:] == ['cuda']
    assert backends.choose('auto', X, 13) == 'cuda'
    assert [set(json.loads(line)['ms']) for line in file.read_text().splitlines()] == [{'triton', 'torch'}, {'cuda'}]


def test_memory_that_is_always_too_short(gpu: FakeGPU) -> None:
    """Every attempt costs time: after some of them what there is memory for is taken, in this process."""
    gpu.backends['cuda'].fails = SHORT
    for _ in range(fastest.TRIES + 3):
        convolve()
    assert gpu.timed.count('cuda') == fastest.TRIES
    assert backends.choose('auto', X, 13) == 'triton'


@pytest.mark.parametrize(
    ('error', 'short'),
    [
        (SHORT, True),
        (RuntimeError('Triton Error [CUDA]: out of memory'), True),
        (RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate'), True),
        (RuntimeError('out of resource: shared memory, Required: 240000, Hardware limit: 232448'), False),
        (RuntimeError('CUDA error: an illegal memory access was encountered'), False),
    ],
)
def test_want_of_memory(error: Exception, short: bool) -> None:
    assert fastest.is_out_of_memory(error) == short


class Streams:
    """``torch.cuda`` as far as its streams capture; ``capturing`` are the GPUs whose current stream does."""

    def __init__(self, patch: pytest.MonkeyPatch, *capturing: int) -> None:
        self.current, self.capturing = 0, capturing
        patch.setattr(torch.cuda, 'is_available', lambda: True)
        patch.setattr(torch.cuda, 'current_device', lambda: self.current)
        patch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: self.current in self.capturing)
        patch.setattr(torch.cuda, 'device', self.device)

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        yield
        self.current = before


@pytest.mark.parametrize(('capturing', 'index', 'expected'), [
    ((), 0, False), ((0,), 0, True), ((1,), 1, True), ((1,), 0, False), ((1,), None, False), ((0,), 1, True),
])  # fmt: skip
def test_the_stream_of_the_map_is_asked(
    capturing: tuple[int, ...], index: int | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside that of the current GPU, while which captures nobody may wait."""
    streams = Streams(monkeypatch, *capturing)
    assert fastest.is_capturing(None if index is None else torch.device('cuda', index)) == expected
    assert streams.current == 0


LARGE, SMALL = image((2, 6, 31, 31)), image((2, 6, 20, 21))  # of one kind


@pytest.mark.parametrize('how', ['short of memory', 'built since'])
def test_times_of_maps_of_two_sizes_are_not_compared(gpu: FakeGPU, file: Path, how: str) -> None:
    """What comes late, on a map of less work, would win by that, in every later process too."""
    gpu.milliseconds |= {'cuda': 4.0, 'triton': 1.0}
    cuda = gpu.backends['cuda']
    if how == 'built since':
        del gpu.backends['cuda']
    cuda.fails = SHORT
    convolve(LARGE)
    cuda.fails, gpu.backends['cuda'] = None, cuda
    if how == 'built since':
        fastest.clear()
    gpu.milliseconds |= {'cuda': 0.8, 'triton': 0.2}
    convolve(SMALL)
    assert backends.choose('auto', LARGE, 13) == 'triton'
    fastest.clear()
    timed = len(gpu.timed)
    convolve(LARGE)
    assert (len(gpu.timed), backends.choose('auto', LARGE, 13)) == (timed, 'triton')


def test_lines_of_maps_of_two_sizes_are_not_mixed(gpu: FakeGPU, file: Path) -> None:
    """As two processes write them, each with maps of its own."""
    kind, device = fastest.kind_of('forward', SMALL, 13, 1), torch.device('cpu')
    fastest._write_file(kind, {'cuda': 4.0, 'triton': 1.0}, device, (2, 6, 31, 31))
    fastest._write_file(kind, {'torch': 0.9, 'triton': 0.2}, device, (2, 6, 20, 21))
    convolve(SMALL)
    assert (gpu.timed, backends.choose('auto', SMALL, 13)) == (['cuda'], 'triton')


def test_products_in_tf32_are_another_kind(gpu: FakeGPU) -> None:
    """They take a third of the work of the others on tensor cores, and torch's own kernel has no use for them."""
    before = torch.backends.cudnn.conv.fp32_precision
    kinds = {}
    try:
        for torch.backends.cudnn.conv.fp32_precision in ('tf32', 'ieee'):
            kinds |= {fastest.kind_of('forward', X.to(dtype), 13, 1): dtype for dtype in (torch.float32, torch.float16)}
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    assert sorted(map(str, kinds.values())) == ['torch.float16', 'torch.float32', 'torch.float32']


def test_timings_of_other_sources(gpu: FakeGPU, file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the same version of the package, as while it is worked on."""
    convolve()
    (tmp_path / 'gpu').mkdir()
    (tmp_path / 'gpu' / 'convolution.py').write_text('faster = True')
    monkeypatch.setattr(fastest, 'HERE', tmp_path)
    fastest.fingerprint.cache_clear()
    try:
        fastest.clear()
        convolve()
        assert len(gpu.timed) == 6
    finally:
        fastest.fingerprint.cache_clear()
