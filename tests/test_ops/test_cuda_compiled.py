"""The CUDA library as it is built, without a GPU: what its machine code needs and is made of, and who can load it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from mmunireplknet.ops import build

ARCHITECTURES = ('sm_80', 'sm_90')
# Kernels by their types (Half, BFloat, float) and sizes.
FORWARD = {
    f'forward_kernel<{t}, {p}, {k}, false>' for t in ('Half', 'BFloat') for p, k in ((3, 0), (3, 7), (3, 13), (5, 0))
}
FORWARD_SINGLE = {f'forward_kernel<float, {p}, 0, {exact}>' for p in (3, 5) for exact in ('false', 'true')}
WEIGHT_GRAD = {f'weight_grad_kernel<{t}, {p}, false>' for t in ('Half', 'BFloat') for p in (3, 5)}
WEIGHT_GRAD_SINGLE = {f'weight_grad_kernel<float, {p}, {exact}>' for p in (3, 5) for exact in ('false', 'true')}
WIDEST = 'weight_grad_kernel<float, 5, true>'
KERNELS = FORWARD | FORWARD_SINGLE | WEIGHT_GRAD | WEIGHT_GRAD_SINGLE | {'sums_kernel<false>', 'sums_kernel<true>'}


def tool(name: str) -> str:
    """A program of the CUDA toolkit, or that which triton brings along; empty for none."""
    spec = importlib.util.find_spec('triton')
    bundled = Path(spec.origin).parent / 'backends/nvidia/bin' / name if spec and spec.origin else None
    return str(bundled) if bundled and bundled.exists() else shutil.which(name) or ''


def why_not() -> str:
    if reason := build.why_not():
        return reason
    if not build.nvcc()[0]:
        return 'there is no nvcc (pip install -r requirements/dev.txt)'
    return (
        '' if tool('cuobjdump') and shutil.which('c++filt') else 'there is no cuobjdump (triton has it) or no c++filt'
    )


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]


@pytest.fixture(scope='module')
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kernels for all architectures, though torch has no CUDA here. The objects are beside it."""
    file = tmp_path_factory.mktemp('cuda') / 'mmuni_cuda.so'
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv('TORCH_CUDA_ARCH_LIST', raising=False)
        build.compile_library(file, 'cuda')
    return file


def dump(*arguments: object) -> str:
    command = [tool('cuobjdump'), *map(str, arguments)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    text = subprocess.run(['c++filt'], input=text, check=True, capture_output=True, text=True).stdout
    return text.replace('mmuni::', '')


def resources(library: Path) -> dict[tuple[str, str], dict[str, int]]:
    """Of each kernel on each architecture."""
    found, architecture = {}, ''
    lines = iter(dump('-res-usage', library).splitlines())
    for line in lines:
        if named := re.search(r'^arch = (\w+)', line):
            architecture = named[1]
        elif named := re.search(r'Function (?:void )?(\w+<.*?>)\(', line):
            found[architecture, named[1]] = {k: int(v) for k, v in re.findall(r'(\w+):(\d+)', next(lines))}
    return found


def most_registers(kernel: str) -> int:
    """Of a thread; 65536 are there for the blocks side by side."""
    if 'weight_grad' in kernel:
        # One block of up to 256 threads. The widest has as many warps side by side as with 192: two in each quarter of
        # a multiprocessor.
        return 224 if kernel == WIDEST else 192
    if kernel in FORWARD and ', 0, ' in kernel:
        return 128  # two of 256
    return 200 if ', 13, ' in kernel or 'float, 5' in kernel else 168  # two, or three, of 128


def test_every_kernel_is_there_and_spills_nothing(library: Path) -> None:
    found = resources(library)
    architectures = {architecture for architecture, _ in found}
    assert architectures == {*ARCHITECTURES, *(['sm_120'] if build.nvcc()[1] >= build.KNOWS_NEWER else [])}
    assert set(found) == {(architecture, kernel) for architecture in architectures for kernel in KERNELS}
    for (architecture, kernel), needs in found.items():
        where = f'{kernel} on {architecture}: {needs}'
        assert (needs['STACK'], needs['LOCAL']) == (0, 0), where
        assert needs['REG'] <= most_registers(kernel), where
        assert needs['SHARED'] <= 1024, where  # what sm_90 keeps for itself; the rest is asked for at the launch


def test_later_gpus_get_ptx(library: Path) -> None:
    assert dump('-ptx', library).count('.target sm_90') > 0


@pytest.mark.skipif(not shutil.which('nm'), reason='there is no nm')
def test_nothing_of_its_runtime_is_shared(library: Path) -> None:
    """What nvcc's code calls is there in nvcc's own version: neither is it torch's, nor does torch get hold of it."""
    everything, dynamic = (
        subprocess.run(['nm', *option, str(library)], check=True, capture_output=True, text=True).stdout
        for option in ([], ['-D'])
    )
    for name in ('cudaGetDevice', 'cudaSetDevice', 'cudaFuncSetAttribute', '__cudaRegisterFatBinary'):
        assert re.search(rf' t {name}$', everything, re.MULTILINE)
    assert re.findall(r'\b_*(?:cuda|cu)[A-Z]\w*', dynamic) == []


def instructions(library: Path, name: str, kernel: str, architecture: str) -> list[tuple[int, str, str]]:
    """Address, name and operands of the machine code of a kernel."""
    text = dump('-sass', '-arch', architecture, library.with_name(f'{name}.o'))
    (body,) = (part for part in text.split('Function : ')[1:] if kernel in part.partition('(')[0])
    found = re.findall(r'/\*([0-9a-f]{4,})\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);', body)
    return [(int(address, 16), name, operands) for address, name, operands in found]


def between_products(code: list[tuple[int, str, str]]) -> Counter[str]:
    """What stands from the first product to the last: the loop over the kernel, which is unrolled."""
    at = [address for address, name, _ in code if name.startswith('HMMA')]
    return Counter(name.partition('.')[0] for address, name, _ in code if at[0] <= address <= at[-1])


@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize(('kernel', 'most'), [(7, 280), (13, 510)])
def test_fragments_of_the_weights_stay_in_registers(library: Path, kernel: int, most: int, architecture: str) -> None:
    """Per 16x32 outputs of a warp 8 products a row, and little besides; 3 loads of inputs a row, for one set or two."""
    code = instructions(library, 'forward_bfloat', f'forward_kernel<BFloat, 3, {kernel}, false>', architecture)
    counts = between_products(code)
    assert counts['HMMA'] == 8 * kernel + 16 * kernel  # one set, and two
    assert counts['LDS'] == 0
    assert sum(name.startswith('LDSM') for _, name, _ in code) == 3 * kernel + 3 * (kernel + 1)
    assert counts.total() <= most
    kinds = Counter(name for _, name, _ in code if name.startswith('HMMA'))
    assert kinds == {'HMMA.16816.F32.BF16': 12 * kernel, 'HMMA.1688.F32.BF16': 12 * kernel}


def loops(code: list[tuple[int, str, str]]) -> list[Counter[str]]:
    """The bodies of loops that have products, and no other loop within."""
    found: list[Counter[str]] = []
    for address, name, operands in code:
        target = re.search(r'0x([0-9a-f]+)', operands)
        if name == 'BRA' and target and int(target[1], 16) < address:
            body = Counter(n.partition('.')[0] for a, n, _ in code if int(target[1], 16) <= a <= address)
            found += [body] if body['HMMA'] and body.total() < 1000 else []
    return found


@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize(
    ('name', 'kernel', 'products', 'share'),
    [
        ('forward_bfloat', 'forward_kernel<BFloat, 3, 0, false>', 32, 0.5),
        ('forward_bfloat', 'forward_kernel<BFloat, 5, 0, false>', 48, 0.45),
        ('forward_single', 'forward_kernel<float, 3, 0, true>', 144, 0.5),
        ('forward_single', 'forward_kernel<float, 5, 0, true>', 240, 0.55),
        ('weight_grad_bfloat', 'weight_grad_kernel<BFloat, 3, false>', 32, 0.32),
        ('weight_grad_single', 'weight_grad_kernel<float, 3, true>', 192, 0.28),
    ],
)
def test_the_share_of_products_in_loops_over_the_kernel(
    library: Path, name: str, kernel: str, products: int, share: float, architecture: str
) -> None:
    found = {body['HMMA']: body for body in loops(instructions(library, name, kernel, architecture))}
    assert products in found
    assert products >= share * found[products].total(), found[products]


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_tiles_are_copied_asynchronously(library: Path, architecture: str) -> None:
    for name, kernel in (
        ('forward_half', 'forward_kernel<Half, 3, 13, false>'),
        ('weight_grad_half', 'weight_grad_kernel<Half, 3, false>'),
    ):
        code = instructions(library, name, kernel, architecture)
        assert {'LDGSTS.E.BYPASS.128', 'LDGDEPBAR'} <= {re.sub(r'(\.LTC\w+|\.ZFILL)', '', name) for _, name, _ in code}
        assert not [name for _, name, _ in code if name.startswith(('ATOM', 'RED', 'STL', 'LDL'))]


@pytest.mark.skipif(torch.version.cuda is not None, reason='this torch has CUDA')
def test_a_torch_without_cuda_refuses_it_and_lives_on(library: Path) -> None:
    code = """if True:
        import sys, torch
        from pathlib import Path
        from mmunireplknet.ops import build, cuda
        print(cuda.why_not())
        torch.version.cuda = '13.0'
        build.library_file = lambda kind: Path(sys.argv[1])
        cuda.why_not.cache_clear()
        print(cuda.why_not())
        print(float(torch.ones(2).sum()))
    """
    done = subprocess.run([sys.executable, '-c', code, str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    needs_cuda, undefined, lives = done.stdout.splitlines()
    assert 'need a torch for CUDA' in needs_cuda
    assert re.search(r'mmuni_cuda\.so does not work: .*undefined symbol: aoti_torch_get_current_cuda_stream', undefined)
    assert lives == '2.0'
