"""What the kernels are compiled to for GPUs that are not here."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip('triton')

from mmunireplknet.ops.gpu import convolution, gram, layouts, tuning  # noqa: E402

from .machine_code import TOOLS, Code, compile_forward, compile_weight_grad, compiling_for  # noqa: E402

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Instructions of a thread per pixel, for K = 13, of the division for large maps; a tenth above those in docs.
MOST = {
    ('forward', 80): {2: 36, 4: 88},
    ('forward', 90): {2: 31, 4: 63},
    ('forward', 120): {2: 39, 4: 87},
    ('weight_grad', 80): {2: 124, 4: 256},
    ('weight_grad', 90): {2: 113, 4: 189},
    ('weight_grad', 120): {2: 125, 4: 279},
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if not all(shutil.which(TOOLS / name) for name in ('cuobjdump', 'nvdisasm')):
        pytest.skip('this triton has no tools to read machine code')
    folder = tmp_path_factory.mktemp('compiled')
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder / 'cache')
        yield folder


def check(code: Code, products: str, registers: int = 232) -> None:
    assert code.spills == 0
    assert code.registers <= registers
    assert code.counts[products] > 0
    assert not code.counts.keys() & {'ATOM', 'ATOMG', 'RED'}


def products_of(capability: int, rows: int) -> str:
    return 'HGMMA' if capability == 90 and rows >= 64 else 'HMMA'


def test_forward_uses_the_tensor_cores(folder: Path) -> None:
    config = tuning.candidates('forward', 64, torch.bfloat16)[2]
    code, per_pixel = compile_forward(90, torch.bfloat16, 13, config, folder=folder)
    check(code, 'HGMMA')
    assert per_pixel <= MOST['forward', 90][2]


@pytest.mark.slow
@pytest.mark.parametrize('capability', [80, 90, 120])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_every_division_of_the_forward(folder: Path, dtype: torch.dtype, capability: int) -> None:
    for width in (32, 8) if (capability, dtype) == (90, torch.bfloat16) else (32,):
        for config in tuning.candidates('forward', width, dtype):
            code, per_pixel = compile_forward(capability, dtype, 13, config, width, folder)
            check(code, products_of(capability, config.block))
    assert width == 8 or per_pixel <= MOST['forward', capability][dtype.itemsize]


@pytest.mark.slow
@pytest.mark.parametrize('capability', [80, 90, 120])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_every_division_of_the_weight_gradient(folder: Path, dtype: torch.dtype, capability: int) -> None:
    for config in tuning.candidates('weight_grad', 32, dtype):
        code, per_pixel = compile_weight_grad(capability, dtype, 13, config, folder)
        check(code, products_of(capability, 64))
    assert per_pixel <= MOST['weight_grad', capability][dtype.itemsize]


@pytest.mark.slow
@pytest.mark.parametrize('capability', [80, 90, 120])
def test_float32_without_tf32(folder: Path, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tuning.candidates('forward', 32, torch.float32)[2]
    name = products_of(capability, config.block)
    rounded, _ = compile_forward(capability, torch.float32, 13, config, folder=folder)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    accurate, _ = compile_forward(capability, torch.float32, 13, config, folder=folder)
    check(accurate, name)
    assert accurate.counts[name] == 3 * rounded.counts[name]
    config = tuning.candidates('weight_grad', 32, torch.float32)[0]
    check(compile_weight_grad(capability, torch.float32, 13, config, folder)[0], products_of(capability, 64), 255)


@pytest.mark.slow
@pytest.mark.parametrize(('kernel', 'capability'), [(3, 80), (7, 90), (31, 90)])
def test_other_kernels(folder: Path, kernel: int, capability: int) -> None:
    for config in tuning.candidates('forward', 32, torch.bfloat16):
        code, _ = compile_forward(capability, torch.bfloat16, kernel, config, folder=folder)
        check(code, products_of(capability, config.block))
    config = tuning.candidates('weight_grad', 32, torch.bfloat16)[-1]
    check(compile_weight_grad(capability, torch.bfloat16, kernel, config, folder)[0], products_of(capability, 64))


@pytest.mark.slow
@pytest.mark.parametrize(('width', 'most'), [(28, 46), (30, 49), (33, 77)])
def test_widths_without_the_widest_reads(folder: Path, width: int, most: int) -> None:
    config = tuning.candidates('forward', 32, torch.bfloat16)[2]
    code, per_pixel = compile_forward(90, torch.bfloat16, 13, config, width, folder)
    check(code, 'HGMMA')
    assert per_pixel <= most


def sizes(count: int) -> list[tuple[int, int]]:
    """Sizes of maps as they come in detection, with some whose widths count 1 or 16 of the widest reads."""
    rng = random.Random(0)
    return [
        (16, 128),
        (9, 12),
        (128, 16),
        (124, 16),
        *((rng.randrange(9, 169), rng.randrange(9, 169)) for _ in range(count - 4)),
    ]


def test_few_compilations_for_many_sizes() -> None:
    weight, divisions = torch.empty(2, 1, 13, 13), set()
    with compiling_for(90, compile_=False) as compiled:
        for batch, (h, w) in enumerate(sizes(20), 1):
            x = torch.empty(batch, 2, h, w, dtype=torch.bfloat16)
            convolution.forward(x, weight, None, 1)
            gram.weight_grad(x, x, 13, 1)
            assert convolution.supports(x, 13, 1) == ''
            divisions.add((tuning.choose('forward', x, 13, 1), layouts.vector_of(w)))
    names = [launch.name for launch in compiled]
    # One for each division of the work and each widest read (1, 2, 4 or 8 pixels).
    assert names.count('_convolve') == len(divisions) <= 16
    assert names.count('_gram') <= 4  # wide reads only
    assert names.count('_expand') == names.count('_collect') == 1
