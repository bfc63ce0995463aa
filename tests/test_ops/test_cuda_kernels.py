"""The CUDA kernels that are shipped, with their plans and the Python around them, run on the CPU against float64.

``cuda_emulation`` says what is checked besides the results. What it cannot show: how the compiler for GPUs translates
the kernels, and how fast they are.
"""

from __future__ import annotations

import itertools
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmunireplknet.ops import build, cuda, reference
from mmunireplknet.ops.self_check import self_check

from ..procedural import relative_error
from .cuda_cases import DTYPES, LAYOUTS, Case, check_forward, check_weight_grad, draw, set_tf32, tensors
from .cuda_emulation import SOURCES, Emulation, compile_emulation

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not build.compiler(), reason='there is no C++ compiler')]


@pytest.fixture(scope='module')
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulation]:
    """The operators of operators.cpp, by its schema, with kernels that run on the CPU."""
    emulation = Emulation(compile_emulation(tmp_path_factory.mktemp('emulation'), 'emulate'))
    text = re.sub(r'"\s*"', '', (SOURCES / 'operators.cpp').read_text())
    schemas = re.findall(r'm\.def\(\s*"([^"]+)"', text)
    assert [schema.partition('(')[0] for schema in schemas] == ['forward', 'weight_grad']
    library = torch.library.Library('mmuni_cuda', 'DEF')
    for schema in schemas:
        library.define(schema)
    library.impl('forward', emulation.forward, 'CPU')
    library.impl('weight_grad', emulation.weight_grad, 'CPU')
    yield emulation
    library._destroy()


@pytest.fixture(autouse=True)
def _state() -> Iterator[None]:
    """Always the same order of threads, and float32 that is."""
    random.seed(0)
    before = torch.backends.cudnn.conv.fp32_precision
    set_tf32(False)
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize('kernel', [3, 5, 7, 13, 17, 31])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_forward(emulation: Emulation, dtype: torch.dtype, kernel: int) -> None:
    for i, case in enumerate(draw(dtype, kernel, 5, 4000)):
        emulation.processors = i % 3
        check_forward(case)


@pytest.mark.parametrize(
    ('kernel', 'size'), [(13, (31, 37)), (7, (64, 16)), (3, (17, 9)), (5, (33, 20)), (19, (17, 24))]
)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_rows_in_two_sets_and_in_one(
    emulation: Emulation, dtype: torch.dtype, kernel: int, size: tuple[int, int]
) -> None:
    """As warps make them where there are more than enough of them, and where there are not."""
    for layout, out_layout in itertools.product(LAYOUTS, LAYOUTS):
        case = Case(dtype, kernel, 1, size, 1, 3, layout, out_layout, dtype, True, False, False)
        x = tensors(case)[0]
        for emulation.processors, sets in ((0, 1 if size == (33, 20) else 2), (10**6, 1)):
            if dtype != torch.float32 or (layout == out_layout and kernel < 19):  # or two have no room
                assert emulation.planned_sets(x, x.contiguous(memory_format=out_layout), kernel) == sets
            check_forward(case)


def test_the_check_before_the_first_use_takes_rows_in_both_ways(emulation: Emulation) -> None:
    """For a GPU of 132 or of 200 multiprocessors, on which all maps of a network in training have two sets."""
    sets: dict[tuple[torch.dtype, bool], set[int]] = {}

    def forward(
        x: Tensor, weight: Tensor, bias: None, dilation: int, flipped: bool = False, pooled: bool = False,
        layout: torch.memory_format = torch.preserve_format,
    ) -> Any:  # fmt: skip
        y = reference.forward(x, weight, bias, dilation, flipped).clone(memory_format=layout)
        if dilation == 1:
            of_map = sets.setdefault((x.dtype, x.is_contiguous()), set())
            of_map.add(emulation.planned_sets(x, y, weight.shape[-1]))
        return (y, y.float().sum((2, 3))) if pooled else y

    backend = SimpleNamespace(forward=forward, weight_grad=reference.weight_grad)
    for emulation.processors in (132, 200):
        sets.clear()
        assert self_check('cuda', backend, torch.device('cpu'), 'convolutions') == ''
        assert all(2 in of_map for of_map in sets.values()), sets
        assert {1, 2} in sets.values()


@pytest.mark.parametrize('kernel', [3, 7, 13, 31])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_weight_grad(emulation: Emulation, dtype: torch.dtype, kernel: int) -> None:
    for i, case in enumerate(draw(dtype, kernel, 4, 2000)):
        emulation.processors = i % 3
        check_weight_grad(case)


@pytest.mark.parametrize('kernel', [3, 19])
def test_weight_grad_of_positive_maps(emulation: Emulation, kernel: int) -> None:
    """As accurate for many images as float32 summed in one order: that tensor cores cut off does not add up.

    One block has all of the 32 images, of which every one is a tile or two.
    """
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.rand(2, 32, 1, 64 if kernel == 3 else 32, 32, generator=generator)
    out = cuda.weight_grad(x, grad, kernel, 1)
    exact = reference.weight_grad(x.double(), grad.double(), kernel, 1)
    assert relative_error(out, exact) < 1.5e-6


@pytest.mark.parametrize('count', [1, 8, 9, 33, 4096])
@pytest.mark.parametrize('together', [True, False])
def test_sums_over_parts(emulation: Emulation, count: int, together: bool) -> None:
    """Of planes, whose parts lie together, and of weights; the lanes of a warp share a long one."""
    parts = torch.rand(7, count, generator=torch.Generator().manual_seed(0))
    first, second = torch.empty(7), torch.empty(7)
    for out in (first, second):  # in another order of threads
        emulation.add_up(parts if together else parts.T.contiguous(), out, *((count, 1) if together else (1, 7)))
    assert torch.equal(first, second)
    assert relative_error(first, parts.double().sum(1)) < (2e-7 if together else 1e-5)


def test_sums_of_planes_of_many_parts(emulation: Emulation) -> None:
    x = torch.rand(1, 3, 150, 70, generator=torch.Generator().manual_seed(0))
    weight = torch.rand(3, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    out, sums = cuda.forward(x, weight, None, 1, pooled=True)
    assert relative_error(sums, out.double().sum((2, 3))) < 1e-6


def test_matrices_are_read_from_all_banks_at_once(emulation: Emulation) -> None:
    before = emulation.library.conflicts()
    for dtype, kernel, layout in itertools.product(DTYPES, (13, 31), LAYOUTS):
        x = torch.randn(1, 2, 20, 40).to(dtype).contiguous(memory_format=layout)
        cuda.forward(x, torch.randn(2, 1, kernel, kernel), None, 1)
        cuda.weight_grad(x[:, :1], x[:, 1:], kernel, 1)
    assert emulation.library.conflicts() == before


@pytest.mark.parametrize(('width', 'bytes_at_once'), [(48, 16), (36, 8), (42, 4), (37, 0)])
def test_rows_are_copied_by_as_many_bytes_as_are_aligned(emulation: Emulation, width: int, bytes_at_once: int) -> None:
    """Of 16-bit numbers; those that are aligned by nothing are loaded one by one."""
    count = emulation.library.copies
    before = {size: count(size) for size in (4, 8, 16)}
    x = torch.randn(1, 1, 6, width).half()
    cuda.forward(x, torch.randn(1, 1, 5, 5), None, 1)
    expected = {size: 6 * width * 2 // size if size == bytes_at_once else 0 for size in before}
    tiles = -(-width // 32)
    taken = {size: count(size) - before[size] for size in before}
    assert {size: n > 0 for size, n in taken.items()} == {size: n > 0 for size, n in expected.items()}
    assert expected.get(bytes_at_once, 0) <= taken.get(bytes_at_once, 0) <= tiles * expected.get(bytes_at_once, 0)


def test_maps_of_any_strides(emulation: Emulation) -> None:
    """Half the planes of a map, rows that are not aligned, one pixel in two, and a map of a single column."""
    whole = torch.randn(2, 6, 11, 26, generator=torch.Generator().manual_seed(0)).half()
    weight = torch.randn(3, 1, 5, 5, generator=torch.Generator().manual_seed(1))
    for x in (whole[:, 3:], whole[:, ::2], whole[:, :3, :, 1:25], whole[:, :3, ::2, ::2], whole[:, 3:, :, 7:8]):
        out = torch.empty_like(x)
        emulation.forward(x, weight, None, out, None, 5, 1, False, False)
        assert relative_error(out, reference.convolve(x.double(), weight.half().double(), None, 1)) < 5e-4
        assert relative_error(cuda.forward(x, weight, None, 1), out.double()) < 1e-6
        grad = torch.empty(3, 1, 5, 5)
        emulation.weight_grad(x, x, grad, 5, 1, False)
        assert relative_error(grad, reference.weight_grad(x.double(), x.double(), 5, 1)) < 1e-5


def test_images_that_are_far_apart(emulation: Emulation) -> None:
    """More than 2**31 elements; what lies between takes no memory."""
    near = torch.randn(2, 1, 9, 40, generator=torch.Generator().manual_seed(0)).half()
    far = [
        torch.empty(2**31 + 1024, dtype=torch.float16).as_strided(near.shape, (2**31 + 64, 360, 40, 1)) for _ in '12'
    ]
    x, out = far
    x.copy_(near)
    weight, grad = torch.randn(1, 1, 7, 7, generator=torch.Generator().manual_seed(1)), torch.empty(1, 1, 7, 7)
    emulation.forward(x, weight, None, out, None, 7, 1, False, False)
    assert relative_error(out, reference.convolve(near.double(), weight.half().double(), None, 1)) < 5e-4
    emulation.weight_grad(x, out, grad, 7, 1, False)
    assert relative_error(grad, reference.weight_grad(near.double(), out.double(), 7, 1)) < 1e-5


def test_numbers_that_are_not_finite_stay_so(emulation: Emulation) -> None:
    """Within the kernel they reach what they reach in torch; outside of the 39 columns nothing changes."""
    for dtype in DTYPES:
        x = torch.ones(1, 1, 9, 64).to(dtype)
        x[0, 0, 4, 20] = torch.nan
        out = cuda.forward(x, torch.ones(1, 1, 3, 3), None, 1)
        assert out[0, 0, 3:6, 19:22].isnan().all()
        assert out[0, 0, :3].isfinite().all()
        assert out[0, 0, 6:].isfinite().all()
        assert out[0, 0, :, 40:].isfinite().all()


def test_weights_in_double_precision(emulation: Emulation) -> None:
    x, weight = torch.randn(1, 2, 5, 6), torch.randn(2, 1, 3, 3, dtype=torch.float64)
    out = cuda.forward(x, weight, torch.ones(2, dtype=torch.float64), 1)
    assert relative_error(out, reference.convolve(x.double(), weight, torch.ones(2).double(), 1)) < 3e-6


BARRIERS = (
    ('forward.cuh', '    __syncthreads();\n    stage ^= job.stages - 1;'),
    ('weight_grad.cuh', '    __syncthreads();\n    const uint32_t tiles'),
)


def test_barriers_that_are_missing_are_seen(tmp_path: Path) -> None:
    """Whether or not it would change the result."""
    broken = tmp_path / 'cuda'
    shutil.copytree(SOURCES, broken)
    for file, lines in BARRIERS:
        text = (broken / file).read_text()
        assert text.count(lines) == 1
        (broken / file).write_text(text.replace(lines, lines.replace('    __syncthreads();\n', '')))
    emulation = Emulation(compile_emulation(tmp_path, 'emulate', broken))
    x, weight = torch.randn(3, 1, 20, 40).half(), torch.randn(1, 1, 13, 13)
    message = r'race|while a copy to it is under way|never written'
    with pytest.raises(RuntimeError, match=message):
        emulation.forward(x, weight, None, torch.empty_like(x), None, 13, 1, False, False)
    with pytest.raises(RuntimeError, match=message):
        emulation.weight_grad(x, x, torch.empty_like(weight), 13, 1, False)
