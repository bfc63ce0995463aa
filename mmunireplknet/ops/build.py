"""Build the compiled kernels: ``python -m mmunireplknet.ops.build``.

Two shared libraries on the LibTorch stable ABI, independent of the versions of Python and (from 2.10 on) torch. ``cpu``
takes a C++17 compiler, GCC 9 or Clang 12 and newer, and seconds; ``cuda`` takes nvcc besides, of the major version of
CUDA that torch has. A library lands beside this file, or in the user's cache where that folder is read-only; its name
carries a hash of the sources, so that a stale one is never loaded, and for CUDA what GPUs it is for.

``setup.py`` runs this file by its path: it imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ['KINDS', 'build', 'library_file', 'why_not']

KINDS = ('cpu', 'cuda')
HERE = Path(__file__).resolve().parent
SOURCES = HERE / 'csrc' / 'cpu'
CUDA_SOURCES = HERE / 'csrc' / 'cuda'
FLAGS = ('-std=c++17', '-O2', '-fPIC', '-ffp-contract=fast', '-fvisibility=hidden', '-w')
NVCC_FLAGS = ('-std=c++17', '-O3', '-w', '-Xcompiler=-fPIC,-fvisibility=hidden')
# The oldest torch whose stable ABI has all that is used: 2.10.
TORCH_TARGET = '-DTORCH_TARGET_VERSION=0x020a000000000000'
CUDA_FOLDER = Path('/usr/local/cuda')  # of CUDA's own installer, which leaves it to the user to put it into PATH
# A100, H100, and whatever comes after them by way of PTX. What is built for 8.0 runs on 8.6 and 8.9 too.
ARCHITECTURES = '8.0;9.0+PTX'
# Besides, where nvcc knows it: GPUs in workstations, whose drivers are often older than nvcc and refuse its PTX.
NEWER, KNOWS_NEWER = ';12.0', (12, 8)
OLDEST = 8
COMPILER_BYTES = 2**29  # of memory that one takes at most: nvcc's steps were seen to take 130 MiB, g++ 170
# Names of generations that TORCH_CUDA_ARCH_LIST may have instead, as torch reads them.
GENERATIONS = {
    'Volta': '7.0+PTX',
    'Turing': '7.5+PTX',
    'Ampere': '8.0;8.6+PTX',
    'Ada': '8.9+PTX',
    'Hopper': '9.0+PTX',
    'Blackwell': '10.0;10.3;12.0;12.1+PTX',
}


@functools.cache
def fingerprint(kind: str = 'cpu') -> str:
    """Hash of the sources as they are now, and of how they are compiled."""
    folder, flags = (CUDA_SOURCES, [*NVCC_FLAGS, *FLAGS]) if kind == 'cuda' else (SOURCES, FLAGS)
    digest = hashlib.sha256(' '.join([*flags, TORCH_TARGET]).encode())
    for file in sorted(f for f in folder.iterdir() if f.suffix in ('.cpp', '.cu', '.cuh', '.h', '.inc')):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def library_name(kind: str = 'cpu') -> str:
    """File name of the library for the sources as they are now; that for CUDA says for which CUDA and GPUs it is.

    Raises:
        RuntimeError: It is not known for which: ``TORCH_CUDA_ARCH_LIST`` is wrong, or torch is missing.
    """
    parts = [f'mmuni_{kind}', fingerprint(kind)]
    if kind == 'cuda':
        # Of -gencode=arch=compute_90,code=sm_90 what follows code=.
        targets = {flag.rpartition('=')[2].replace('_', '').replace('compute', 'ptx') for flag in architectures()}
        parts += [f'cu{_cuda_of_torch()}', *sorted(targets)]
    return '-'.join([*parts, platform.machine()]) + '.so'


def cache_folder() -> Path:
    """Where the library goes if the package itself cannot be written to."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'mmunireplknet', 'ops')


def library_file(kind: str = 'cpu', others: bool = True) -> Path | None:
    """The library that fits the sources, or None where it has not been built.

    Args:
        kind: 'cpu' or 'cuda'.
        others: Where there is none for the GPUs and the CUDA that are asked for, take one for others: a wheel may have
            brought it along from where it was built. The package's comes first, then the newest.
    """
    found = []
    for folder in (lambda: HERE, cache_folder):
        try:
            files = list(folder().glob(f'mmuni_{kind}-{fingerprint(kind)}-*{platform.machine()}.so'))
            found += sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)
        except (OSError, RuntimeError):  # a user without a home, or whose home may not be read; no sources
            continue
    if others and len(found) < 2:  # without asking nvcc and the GPUs for the name
        return found[0] if found else None
    try:
        name = library_name(kind)
    except (OSError, RuntimeError):
        name = ''
    return next((file for file in found if file.name == name), found[0] if others else None)


def compiler() -> list[str]:
    """The C++ compiler as a command: ``CXX``, or the first of c++, g++ and clang++ that exists; empty for none."""
    if os.environ.get('CXX'):
        return shlex.split(os.environ['CXX'])
    found = next((path for name in ('c++', 'g++', 'clang++') if (path := shutil.which(name))), None)
    return [found] if found else []


def nvccs() -> dict[str, tuple[int, int] | str]:
    """CUDA's compilers and their releases, the first to be taken first; what one says instead where it names none.

    They are looked for in ``CUDA_HOME`` (or ``CUDA_PATH``), ``PATH``, the package nvidia-cuda-nvcc and CUDA's own
    folder.
    """
    home = os.environ.get('CUDA_HOME') or os.environ.get('CUDA_PATH')
    spec = importlib.util.find_spec('nvidia')
    packages = [] if spec is None else spec.submodule_search_locations or []
    bundled = sorted((f for folder in packages for f in Path(folder).glob('cu[0-9]*/bin')), reverse=True)
    folders = [Path(home, 'bin')] if home else []
    folders += [Path(folder) for folder in os.environ.get('PATH', '').split(os.pathsep) if folder]
    folders += [*bundled, CUDA_FOLDER / 'bin']
    found = (shutil.which('nvcc', path=str(folder)) for folder in folders)
    return {command: _release_of(command) for command in dict.fromkeys(found) if command}


def _release_of(command: str) -> tuple[int, int] | str:
    try:
        done = _call([command, '--version'])
    except OSError as error:
        return f'{command} cannot be run: {error}'
    found = re.search(r'release (\d+)\.(\d+)', done.stdout)
    return (int(found[1]), int(found[2])) if found else f'{command} --version names no release: {done.stdout.strip()!r}'


def nvcc() -> tuple[str, tuple[int, int]]:
    """The first of ``nvccs`` with the major version of CUDA that torch has, any where it has none; '' for none."""
    wanted = _cuda_of_torch()
    usable = ((command, release) for command, release in nvccs().items() if isinstance(release, tuple))
    return next((found for found in usable if wanted in ('', str(found[1][0]))), ('', (0, 0)))


def architectures() -> list[str]:
    """What nvcc is to make machine code for, from ``TORCH_CUDA_ARCH_LIST`` as torch has it.

    Raises:
        OSError: The default depends on torch's CUDA, and torch cannot be read.
        RuntimeError: It names something else, only GPUs that are too old, or those of a machine that has none.
    """
    given = wish = os.environ.get('TORCH_CUDA_ARCH_LIST', '').strip()
    if given == 'native':
        wish = ';'.join(_gpus())
        given = f'native, which is {wish} here'
    wish = wish or ARCHITECTURES + (NEWER if nvcc()[1] >= KNOWS_NEWER else '')
    flags = []
    for name in re.split(r'[;,\s]+', re.sub(r'[A-Z][a-z]+', lambda word: GENERATIONS.get(word[0], word[0]), wish)):
        found = re.fullmatch(r'(\d+)\.(\d[af]?)(\+PTX)?', name)
        if found is None and name:
            raise RuntimeError(
                f'TORCH_CUDA_ARCH_LIST={given}: {name!r} is no architecture; write it as {ARCHITECTURES}.'
            )
        if found is None or int(found[1]) < OLDEST:  # it may be a list for everything in a container
            continue
        number = found[1] + found[2]
        for code in ('sm', 'compute') if found[3] else ('sm',):
            flags.append(f'-gencode=arch=compute_{number},code={code}_{number}')
    if not flags:
        raise RuntimeError(f'TORCH_CUDA_ARCH_LIST={given}: the CUDA kernels take {OLDEST}.0 (Ampere) and newer.')
    return list(dict.fromkeys(flags))


def _gpus() -> list[str]:
    """Compute capabilities of the GPUs here, by the driver's own program: this process does not start CUDA."""
    command = ['nvidia-smi', '--query-gpu=compute_cap', '--format=csv,noheader']
    try:
        said = _call(command).stdout
    except OSError as error:
        said = str(error)
    found = sorted(set(re.findall(r'^\d+\.\d$', said, re.MULTILINE)), key=float)
    if not found:
        raise RuntimeError(
            f'TORCH_CUDA_ARCH_LIST=native: no GPU is seen here, {said.strip()!r}; name those to build for, as in '
            f'{ARCHITECTURES}.'
        )
    return found


def why_not(kind: str = 'cpu') -> str:
    """Why nothing can be built here; empty where it can."""
    if platform.system() == 'Windows':
        return 'the kernels need GCC or Clang, and are not built on Windows.'
    command = compiler()
    if not command or shutil.which(command[0]) is None:
        return f'there is no C++ compiler{f" {command[0]}" if command else ""} (install g++ or clang++, or set CXX).'
    try:
        version = importlib.metadata.version('torch')
    except importlib.metadata.PackageNotFoundError:
        return 'torch is not installed where the build runs (pip hides it unless --no-build-isolation is given).'
    if tuple(int(part) for part in version.split('+')[0].split('.')[:2]) < (2, 10):
        return f'torch {version} has no LibTorch stable ABI; it takes 2.10 or newer.'
    return _why_no_cuda(version) if kind == 'cuda' else ''


def _why_no_cuda(version: str) -> str:
    try:
        wanted = _cuda_of_torch()
    except (OSError, RuntimeError) as error:
        return str(error)
    if not wanted:
        return f'torch {version} has no CUDA.'
    if not any(CUDA_SOURCES.glob('*.cu')):
        return f'their sources are missing in {CUDA_SOURCES}.'
    if nvcc()[0]:
        return ''
    seen = ', '.join(f'{name} of {of[0]}.{of[1]}' if isinstance(of, tuple) else of for name, of in nvccs().items())
    return (
        f'there is no nvcc of CUDA {wanted}, which torch {version} is for{f" (seen: {seen})" if seen else ""}; install '
        f'CUDA {wanted} (pip has that of 13 and newer: nvidia-cuda-nvcc=={wanted}.*), or set CUDA_HOME to where it is.'
    )


def _cuda_of_torch() -> str:
    """The major version of CUDA that torch has; '' for none."""
    said = (_torch_folder() / 'version.py').read_text()
    found = re.search(r"^cuda\b[^=]*= *'(\d+)", said, re.MULTILINE)
    return found[1] if found else ''


def jobs() -> int:
    """Compilers to run at once: ``MAX_JOBS``, as for torch's extensions, or one a core that there is memory for."""
    if (wish := os.environ.get('MAX_JOBS', '')).isdecimal() and int(wish):
        return int(wish)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return max(1, min(cores, memory // COMPILER_BYTES))


def build(folder: Path | None = None, kind: str = 'cpu') -> Path:
    """Compile a library into ``folder`` and return it.

    Args:
        folder: Default: beside the package's own files, or the user's cache where those are read-only.
        kind: 'cpu' or 'cuda'.

    Raises:
        RuntimeError: It cannot be built, with the reason or the compiler's message.
    """
    if reason := why_not(kind):
        raise RuntimeError(f'The {_title(kind)} kernels cannot be built: {reason}')
    folder = folder or (HERE if os.access(HERE, os.W_OK) else cache_folder())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error, kind) from error
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch, library_name(kind))
        compile_library(library, kind)
        _install(library, folder, kind)
    return folder / library_name(kind)


def compile_library(library: Path, kind: str) -> None:
    """Compile and link ``library``; what the compilers leave behind lies beside it.

    Raises:
        RuntimeError: It did not compile, with the compiler's message.
    """
    root = _torch_folder()
    compile_cpp, link = [*compiler(), *FLAGS, TORCH_TARGET, f'-I{root / "include"}'], [*compiler(), '-shared']
    compile_cu = link_cuda = list[str]()
    if kind == 'cuda':
        # nvcc brings CUDA's runtime into the library, which then needs no other; -ccbin takes one word.
        host = ['-allow-unsupported-compiler', *(['-ccbin', compiler()[0]] if len(compiler()) == 1 else [])]
        command, _ = nvcc()
        compile_cu, link = [command, *NVCC_FLAGS, *host, *architectures()], [command, '-shared', *host]
        # Where torch has no CUDA, as in tests, the library lacks the one function of torch_cuda that it calls.
        link_cuda = ['-ltorch_cuda'] if (root / 'lib' / 'libtorch_cuda.so').exists() else []
    sources = sorted(f for f in (CUDA_SOURCES if kind == 'cuda' else SOURCES).iterdir() if f.suffix in ('.cpp', '.cu'))
    objects = [library.with_name(f'{source.stem}.o') for source in sources]
    steps = [
        [*(compile_cu if source.suffix == '.cu' else compile_cpp), '-c', str(source), '-o', str(target)]
        for source, target in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(jobs()) as pool:
        list(pool.map(functools.partial(_run, kind), steps))
    # torch is in the process already when the library is loaded; its name alone is needed.
    _run(kind, [*link, *map(str, objects), '-o', str(library), f'-L{root / "lib"}', '-ltorch_cpu', *link_cuda])


def _title(kind: str) -> str:
    return kind.upper()


def _torch_folder() -> Path:
    """Where torch's headers are. It is not imported: a torch that cannot be has them as well.

    Raises:
        RuntimeError: There is no such folder.
    """
    spec = importlib.util.find_spec('torch')
    if spec is None or spec.origin is None:
        raise RuntimeError('The kernels cannot be built: the files of torch are missing; install torch again.')
    return Path(spec.origin).parent


def _install(library: Path, folder: Path, kind: str) -> None:
    """Put the library into ``folder`` whole or not at all; if that is the package, all others of its kind go."""
    partial = folder / f'{library.name}.{os.getpid()}.partial'
    try:
        shutil.copyfile(library, partial)
        partial.replace(folder / library.name)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _unwritable(folder, error, kind) from error
    if not folder.samefile(HERE):
        return  # the user's cache is shared with other versions of this package
    for stale in folder.glob(f'mmuni_{kind}-*-{platform.machine()}.so'):
        if stale.name != library.name:
            stale.unlink(missing_ok=True)


def _unwritable(folder: Path, error: OSError, kind: str) -> RuntimeError:
    advice = ' XDG_CACHE_HOME can name another folder.' if folder == cache_folder() else ''
    return RuntimeError(f'The {_title(kind)} kernels cannot be written to {folder}: {error}.{advice}')


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    """With what it says, which may be in any encoding."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace')


def _run(kind: str, command: list[str]) -> None:
    done = _call(command)
    if done.returncode:
        raise RuntimeError(f'The {_title(kind)} kernels did not compile.\n{shlex.join(command)}\n{done.stdout}')


def main() -> None:
    """Build the libraries unless they are there."""
    parser = argparse.ArgumentParser(
        prog='python -m mmunireplknet.ops.build', description='Build the compiled kernels of mmunireplknet.'
    )
    parser.add_argument('--force', action='store_true', help='build even what is there')
    parser.add_argument('--quiet', action='store_true', help='say nothing of what is there')
    parser.add_argument(
        '--kernels', choices=KINDS, help='only these; by default those for the CPU, and those for CUDA where that works'
    )
    args = parser.parse_args()
    failed = []
    for kind in [args.kernels] if args.kernels else KINDS:
        start = time.monotonic()
        try:
            if kind == 'cuda' and not args.kernels and why_not(kind):
                continue
            file = library_file(kind, others=False)
            if file and not args.force:
                sys.stdout.write('' if args.quiet else f'{file} is up to date\n')
                continue
            sys.stdout.write(f'compiling the {_title(kind)} kernels\n')
            sys.stdout.flush()
            file = build(kind=kind)
        except RuntimeError as error:
            failed.append(str(error))
        except OSError as error:  # no folder for temporary files, for instance
            failed.append(f'The {_title(kind)} kernels cannot be built: {error}.')
        else:
            sys.stdout.write(f'{file} built in {time.monotonic() - start:.0f} s\n')
    if failed:
        sys.exit('\n'.join(failed))


if __name__ == '__main__':
    main()
