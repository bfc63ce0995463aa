"""What the pointwise passes launch and are compiled to, at the sizes of the third stage of UniRepLKNet-S."""

import inspect
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip('triton')

from mmunireplknet.ops import coefficients  # noqa: E402
from mmunireplknet.ops import passes as passes_in_torch  # noqa: E402
from mmunireplknet.ops.gpu import backend  # noqa: E402

from ..triton_pointwise import in_layout  # noqa: E402
from .launches import Launch, launches_of  # noqa: E402
from .machine_code import TOOLS, compiling_for  # noqa: E402

ELEMENTS = 64 * 64  # of a tile
# Instructions of a thread for each element of a tile, of the whole kernel; a tenth above what was counted.
MOST = {
    'gate': 19, 'last': 25, 'last of float32': 25, 'grn': 30, 'grn backward': 53, 'sums': 36, 'sums of gelu': 46,
    'moments': 41, 'grad of gelu': 52, 'grad': 30, 'grad of the gate': 30,
}  # fmt: skip


def maps(c: int, *layouts: bool, dtype: torch.dtype = torch.bfloat16, size: tuple[int, int] = (32, 32)) -> list[Tensor]:
    """(16, *size, c) on the meta device, in NHWC or, as planes, in NCHW."""
    return [in_layout(torch.empty(16, *size, c, dtype=dtype, device='meta'), planes) for planes in layouts]


def rows(c: int, *shapes: int) -> list[Tensor]:
    """(c,) or (n, c) in float32."""
    return [torch.empty((n, c) if n else (c,), device='meta') for n in shapes]


def passes(c: int = 384, dtype: torch.dtype = torch.bfloat16, size: tuple[int, int] = (32, 32)) -> dict[str, Launch]:
    """Those of a training step, by what they do."""
    (row, many), (wide_row, wide) = rows(c, 0, 16), rows(4 * c, 0, 16)
    rows_, planes = maps(c, False, True, dtype=dtype, size=size)
    hidden = maps(4 * c, False, dtype=dtype, size=size)[0]
    (single,) = maps(c, True, dtype=torch.float32, size=size)
    result, wide_result = (torch.empty(16, 2, n, device='meta') for n in (c, 4 * c))
    calls: dict[str, tuple[Callable, tuple]] = {
        'gate': (backend.apply, (planes, many, many, None, rows_)),
        'last': (backend.apply, (rows_, many, many, planes, planes)),
        'last of float32': (backend.apply, (rows_, many, many, single, single)),
        'grn': (backend.apply, (hidden, wide, wide_row, None, hidden, True)),
        'sums': (backend.sums, (rows_, planes, row, None, result)),
        'sums of gelu': (backend.sums, (hidden, None, None, None, wide_result, True)),
        'grn backward': (backend.sums, (hidden, hidden, None, hidden, wide_result, True, wide, wide_row)),
        'moments': (backend.moments, (planes,)),
        'grad of gelu': (backend.grad, (hidden, hidden, wide, None, wide, hidden, True, wide_row)),
        'grad': (backend.grad, (planes, rows_, many, row, row, rows_)),
        'grad of the gate': (backend.grad, (rows_, planes, many, many, row, planes)),
    }
    return {name: launches_of(function, *args)[0] for name, (function, args) in calls.items()}


def small() -> list[Launch]:
    """The kernels for images and channels alone."""
    from .test_pointwise import given_coefficients

    found = []
    for name, given in given_coefficients(16, 384):
        found += launches_of(getattr(backend, name), *given)
    (x,) = maps(384, True)
    result = torch.empty(16, 2, 384, device='meta')
    return [*found, launches_of(backend.moments, x)[1], launches_of(backend.sums, x, None, None, None, result)[1]]


def widths(folder: Path) -> set[str]:
    """Kinds of reads and writes of the memory in the machine code that was compiled last."""
    file = max(folder.glob('*.cubin'), key=lambda file: file.stat().st_mtime_ns)
    listing = subprocess.run([TOOLS / 'cuobjdump', '-sass', file], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r'\b(LDG|STG)\.E(?:\.(\d+|U16))?', listing))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if not all(shutil.which(TOOLS / tool) for tool in ('cuobjdump', 'nvdisasm')):
        pytest.skip('this triton has no tools to read machine code')
    return tmp_path


@pytest.mark.parametrize(
    ('name', 'capability'),
    [
        pytest.param(name, capability, marks=[] if (name, capability) == ('gate', 90) else pytest.mark.slow)
        for name in MOST
        for capability in (80, 90, 120)
    ],
)
def test_machine_code(folder: Path, name: str, capability: int) -> None:
    """Nothing is spilled, all maps are read and written by 16 bytes, no atomics, and few instructions."""
    launch = passes()[name]
    code = launch.code(capability, folder, 1)
    assert code.spills == 0
    assert code.registers <= 128  # two programs of 256 threads on a multiprocessor
    assert not code.counts.keys() & {'ATOM', 'ATOMG', 'RED'}
    found = widths(folder)
    assert ('LDG', '128') in found
    assert ('LDG', 'U16') not in found
    assert ('STG', 'U16') not in found
    writes = any(isinstance(t, Tensor) and name.endswith('out_ptr') for name, t in launch.arguments().items())
    assert writes == (('STG', '128') in found)
    assert code.instructions * 32 * launch.arguments()['num_warps'] / ELEMENTS <= MOST[name]


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32], ids=str)
def test_other_dtypes(folder: Path, dtype: torch.dtype) -> None:
    for name in ('gate', 'grn backward', 'grad of gelu', 'moments'):
        code = passes(dtype=dtype)[name].code(90, folder, 1)
        assert code.spills == 0, name
        assert ('LDG', '128') in widths(folder), name


@pytest.mark.slow
@pytest.mark.parametrize(('size', 'kind'), [((25, 42), ''), ((7, 7), 'U16')], ids=str)
def test_planes_that_are_no_multiple_of_16_bytes(folder: Path, size: tuple[int, int], kind: str) -> None:
    """They are read in parts, the rows of channels still by 16 bytes."""
    for name in ('gate', 'sums'):
        code = passes(size=size)[name].code(90, folder, 1)
        found = widths(folder)
        assert code.spills == 0, name
        assert ('LDG', kind) in found, name
        assert ('STG' if name == 'gate' else 'LDG', '128') in found, name


@pytest.mark.slow
def test_kernels_of_coefficients(folder: Path) -> None:
    launches = {str((launch.name, sorted(launch.kwargs))): launch for launch in small()}
    assert {launch.name for launch in launches.values()} >= {'_merge_kernel', '_combine_kernel', '_norm_sums_kernel'}
    for launch in launches.values():
        code = launch.code(90, folder, 1)
        assert code.spills == 0, launch.name
        assert not code.counts.keys() & {'ATOM', 'ATOMG', 'RED'}


def test_few_compilations_for_many_sizes() -> None:
    """One of each kernel for each widest read of planes, and one where no map is of planes."""
    rng, aligned = random.Random(0), set()
    weight, row = torch.empty(64), torch.empty(64)
    with compiling_for(90, compile_=False) as compiled:
        for n in range(1, 25):
            h, w = rng.randrange(1, 20), rng.randrange(1, 20)
            aligned.add(next(v for v in (8, 4, 2, 1) if h * w % v == 0))
            x = torch.empty(n, h, w, 64, dtype=torch.bfloat16)
            flat, planes = (in_layout(x, turned) for turned in (False, True))
            result, many = torch.empty(n, 2, 64), torch.empty(n, 64)
            backend.apply(planes, many, many, None, flat)
            backend.grad(planes, flat, many, row, row, flat)
            backend.sums(flat, None, None, None, result, True)
            backend.moments(planes)
            backend.grn(result.unbind(1)[1], weight)
            backend.affine(row, row, 1e-5, row, row, many)
    names = [launch.name for launch in compiled]
    assert len(aligned) == 4
    for name in ('_apply_kernel', '_grad_kernel', '_moments_kernel'):
        assert names.count(name) == 4, name
    assert names.count('_sums_kernel') == names.count('_grn_kernel') == names.count('_affine_kernel') == 1
    assert names.count('_combine_kernel') <= 1
    assert names.count('_merge_kernel') <= 4  # for 1, 2, 4 and 8 parts of an image


def test_the_interfaces_are_the_same() -> None:
    """What is plain takes over where a kernel fails."""
    functions = {
        f.__name__: f for m in (passes_in_torch, coefficients) for f in vars(m).values() if inspect.isfunction(f)
    }
    names = functions.keys() & {*passes_in_torch.__all__, *coefficients.__all__}
    assert len(names) == 11
    for name in names:
        mine, theirs = (inspect.signature(f).parameters for f in (functions[name], getattr(backend, name)))
        assert [*mine] == [*theirs], name
