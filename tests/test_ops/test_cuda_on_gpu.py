"""The CUDA kernels where a GPU is: all that was only emulated, and what their library has to know about devices.

    python -m mmunireplknet.ops.build --kernels cuda
    python -m pytest -m cuda tests/test_ops/test_cuda_on_gpu.py

``test_on_gpu`` runs them besides, as one of the backends.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmunireplknet.ops import backends, cuda, reference

from ..procedural import relative_error
from .cuda_cases import DTYPES, LAYOUTS, Case, check_forward, check_weight_grad, draw, set_tf32

DEVICE = 'cuda'
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')]


@pytest.fixture(autouse=True)
def _library() -> Iterator[None]:
    """Checked once, as before their first use; always the same cases; float32 that is."""
    if reason := backends.why_not('cuda'):
        pytest.skip(reason)
    random.seed(0)
    before = torch.backends.cudnn.conv.fp32_precision
    set_tf32(False)
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize('kernel', range(3, 32, 2))
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_everything_that_can_be_asked_for(dtype: torch.dtype, kernel: int) -> None:
    """Every layout in and out, odd sizes, dilation, bias, sums, weights of any type, against float64."""
    for _ in range(3):
        for case in draw(dtype, kernel, 8, 1_000_000):
            check_forward(case, DEVICE)
            check_weight_grad(case, DEVICE)


@pytest.mark.parametrize('layouts', [*itertools.product(LAYOUTS, LAYOUTS)], ids=str)
@pytest.mark.parametrize('kernel', [3, 7, 13, 21])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_rows_in_two_sets(dtype: torch.dtype, kernel: int, layouts: tuple[torch.memory_format, ...]) -> None:
    """Which take more planes than the cases above have: enough for every multiprocessor."""
    for height in (1, 16, 17, 31, 32, 33, 63, 64, 65):
        for channels, flipped in ((700, False), (1024, True)):
            check_forward(
                Case(dtype, kernel, 1, (height, 40), 3, channels, *layouts, dtype, True, flipped, False), DEVICE
            )


def arguments(device: str = DEVICE, seed: int = 0, size: tuple[int, int] = (40, 37)) -> tuple[Tensor, Tensor]:
    """Map and weight."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 16, *size, generator=generator).half()
    return x.to(device), torch.randn(16, 1, 13, 13, generator=generator).to(device)


def everything(x: Tensor, weight: Tensor, layout: torch.memory_format = torch.channels_last) -> list[Tensor]:
    """Output in another layout, its sums, and the gradient of the weight: all kernels there are."""
    return [*cuda.forward(x, weight, None, 1, pooled=True, layout=layout), cuda.weight_grad(x, x, 13, 1)]


def check(found: list[Tensor], x: Tensor, weight: Tensor) -> None:
    exact = reference.convolve(x.double(), weight.half().double(), None, 1)
    rights = (exact, exact.sum((2, 3)), reference.weight_grad(x.double(), x.double(), 13, 1))
    for mine, right, limit in zip(found, rights, (5e-4, 1e-3, 1e-5), strict=True):
        assert mine.device == x.device
        assert relative_error(mine, right) < limit


def test_operators_are_what_they_say() -> None:
    """They write into what they are given, and into nothing else; fake tensors go through."""
    x, weight = arguments()
    bias, out, sums = torch.zeros(16, device=DEVICE), torch.zeros_like(x), torch.zeros(2, 16, device=DEVICE)
    checks = ('test_schema', 'test_faketensor')
    forward, weight_grad = torch.ops.mmuni_cuda.forward.default, torch.ops.mmuni_cuda.weight_grad.default
    torch.library.opcheck(forward, (x, weight, bias, out, sums, 13, 1, False, False), test_utils=checks)
    torch.library.opcheck(forward, (x, weight, None, out, None, 13, 1, True, False), test_utils=checks)
    torch.library.opcheck(weight_grad, (x, x, torch.zeros_like(weight), 13, 1, False), test_utils=checks)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('out_layout', LAYOUTS)
def test_a_graph_is_captured_and_replayed(
    dtype: torch.dtype, layout: torch.memory_format, out_layout: torch.memory_format
) -> None:
    """Strictly: a call that waits for the GPU, or allocates behind torch's back, is an error."""
    x, weight = arguments()
    x = x.to(dtype).contiguous(memory_format=layout)
    everything(x, weight, out_layout)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode='global'):
        found = everything(x, weight, out_layout)
    for seed in (1, 2):
        for tensor, value in zip((x, weight), arguments(seed=seed), strict=True):
            tensor.copy_(value)
        graph.replay()
        expected = everything(x, weight, out_layout)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_nothing_waits_for_the_gpu() -> None:
    x, weight = arguments()
    everything(x, weight)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # a second or so
    asleep = torch.cuda.Event()
    asleep.record()
    found = everything(x, weight)
    assert not asleep.query()
    check(found, x, weight)


def test_threads_with_streams_of_their_own() -> None:
    """Kernels with much and with little shared memory, at once."""
    problems: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            x, weight = arguments(seed=seed, size=(40, 37) if seed % 2 else (7, 9))
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    late = x + 0
                    found = everything(late, weight)
                torch.cuda.current_stream().synchronize()
            check(found, x, weight)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


@pytest.fixture
def two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip('needs two GPUs')
    for index in (0, 1):
        if reason := backends.why_not('cuda', torch.device('cuda', index)):
            pytest.skip(reason)


@pytest.mark.usefixtures('two_gpus')
@pytest.mark.parametrize('current', [0, 1])
@pytest.mark.parametrize('index', [0, 1])
def test_streams_of_another_gpu(current: int, index: int) -> None:
    """The stream that is current on the GPU of the map is taken, whichever GPU is current."""
    x, weight = arguments(f'cuda:{index}')
    torch.cuda.synchronize(index)
    side = torch.cuda.Stream(index)
    before = torch.cuda.current_stream(index)
    with torch.cuda.device(current):
        torch.cuda.set_stream(side)
        torch.cuda.set_device(current)
        try:
            with torch.cuda.device(index):
                torch.cuda._sleep(200_000_000)
            late = x + 0  # on the side stream of its GPU, after the sleep
            found = everything(late, weight)
            assert torch.cuda.current_device() == current
        finally:
            torch.cuda.set_stream(before)
            torch.cuda.set_device(current)
    assert not side.query()
    side.synchronize()
    check(found, x, weight)


@pytest.mark.usefixtures('two_gpus')
def test_a_thread_that_never_saw_a_gpu() -> None:
    """It has no context; the first thing it does is a convolution on the second GPU."""
    x, weight = arguments('cuda:1')
    torch.cuda.synchronize(1)
    found: list[list[Tensor]] = []
    thread = threading.Thread(target=lambda: found.append(everything(x, weight)))
    thread.start()
    thread.join()
    torch.cuda.synchronize(1)
    check(found[0], x, weight)


def test_what_does_not_fit_is_an_error_and_no_more() -> None:
    """torch's kind of error; what comes after it works."""
    x, weight = arguments()
    forward = torch.ops.mmuni_cuda.forward
    for arguments_, message in (
        ((x, weight, None, x[:1], None, 13, 1, False, False), 'out has 1 elements in dimension 0'),
        ((x, weight, None, x.clone(), None, 13, 3, False, False), 'reach over at most 31 pixels'),
        ((x, weight.cpu(), None, x.clone(), None, 13, 1, False, False), 'weight must be 2704 contiguous values'),
        ((x.double(), weight, None, x.double(), None, 13, 1, False, False), 'must be float32, bfloat16 or float16'),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*arguments_)
    check(everything(x, weight), x, weight)


SANITIZED = 'test_sanitized'


@pytest.mark.skipif('COMPUTE_SANITIZER' in os.environ, reason='is run by compute-sanitizer itself')
@pytest.mark.parametrize('tool', ['memcheck', 'racecheck', 'synccheck', 'initcheck'])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    program = shutil.which('compute-sanitizer') or shutil.which('compute-sanitizer', path='/usr/local/cuda/bin')
    if program is None:
        pytest.skip('there is no compute-sanitizer (it is part of the CUDA toolkit)')
    command = [program, '--tool', tool, '--error-exitcode', '1', sys.executable, '-m', 'pytest', '-q', __file__]
    environment = {**os.environ, 'PYTORCH_NO_CUDA_MEMORY_CACHING': '1', 'COMPUTE_SANITIZER': tool}
    done = subprocess.run(
        [*command, '-k', SANITIZED], cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert '0 errors' in done.stdout, done.stdout[-4000:]
    assert '3 passed' in done.stdout, done.stdout[-4000:]


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_sanitized(dtype: torch.dtype) -> None:
    """Little enough for compute-sanitizer: every kind of kernel at sizes that fill no tile."""
    for kernel in (3, 7, 13, 31):
        for case in draw(dtype, kernel, 4, 4000):
            check_forward(case, DEVICE)
            check_weight_grad(case, DEVICE)
