"""Build the compiled kernels: ``python -m mmunireplknet.ops.build``.

One shared library on the LibTorch stable ABI, independent of the versions of Python and (from 2.10 on) torch. It takes
a C++17 compiler, GCC 9 or Clang 12 and newer, and seconds. The library lands beside this file, or in the user's cache
where that folder is read-only; its name carries a hash of the sources, so that a stale one is never loaded.

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
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ['build', 'library_file', 'why_not']

HERE = Path(__file__).resolve().parent
SOURCES = HERE / 'csrc' / 'cpu'
FLAGS = ('-std=c++17', '-O2', '-fPIC', '-ffp-contract=fast', '-fvisibility=hidden', '-w')
# The oldest torch whose stable ABI has all that is used: 2.10.
TORCH_TARGET = '-DTORCH_TARGET_VERSION=0x020a000000000000'


@functools.cache
def library_name() -> str:
    """File name of the library for the sources as they are now."""
    digest = hashlib.sha256(' '.join([*FLAGS, TORCH_TARGET]).encode())
    for file in sorted(f for f in SOURCES.iterdir() if f.suffix in ('.cpp', '.h', '.inc')):
        digest.update(file.name.encode() + file.read_bytes())
    return f'mmuni_cpu-{digest.hexdigest()[:12]}-{platform.machine()}.so'


def cache_folder() -> Path:
    """Where the library goes if the package itself cannot be written to."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'mmunireplknet', 'ops')


def library_file() -> Path | None:
    """The library that fits the sources, or None where it has not been built."""
    return next((f for f in (HERE / library_name(), cache_folder() / library_name()) if f.exists()), None)


def compiler() -> list[str]:
    """The C++ compiler as a command: ``CXX``, or the first of c++, g++ and clang++ that exists; empty for none."""
    if os.environ.get('CXX'):
        return shlex.split(os.environ['CXX'])
    found = next((path for name in ('c++', 'g++', 'clang++') if (path := shutil.which(name))), None)
    return [found] if found else []


def why_not() -> str:
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
    new_enough = tuple(int(part) for part in version.split('+')[0].split('.')[:2]) >= (2, 10)
    return '' if new_enough else f'torch {version} has no LibTorch stable ABI; it takes 2.10 or newer.'


def build(folder: Path | None = None) -> Path:
    """Compile the library into ``folder`` and return it.

    Args:
        folder: Default: beside the package's own files, or the user's cache where those are read-only.

    Raises:
        RuntimeError: It cannot be built, with the reason or the compiler's message.
    """
    if reason := why_not():
        raise RuntimeError(f'The CPU kernels cannot be built: {reason}')
    folder = folder or (HERE if os.access(HERE, os.W_OK) else cache_folder())
    root = _torch_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    command = [*compiler(), *FLAGS, TORCH_TARGET, f'-I{root / "include"}']
    sources = sorted(SOURCES.glob('*.cpp'))
    with tempfile.TemporaryDirectory() as scratch:
        objects = [Path(scratch, f'{source.stem}.o') for source in sources]
        steps = [[*command, '-c', str(s), '-o', str(o)] for s, o in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, steps))
        library = Path(scratch, library_name())
        # torch is in the process already when the library is loaded; its name alone is needed.
        _run([*compiler(), '-shared', *map(str, objects), '-o', str(library), f'-L{root / "lib"}', '-ltorch_cpu'])
        _install(library, folder)
    return folder / library_name()


def _torch_folder() -> Path:
    """Where torch's headers are. It is not imported: a torch that cannot be has them as well.

    Raises:
        RuntimeError: There is no such folder.
    """
    spec = importlib.util.find_spec('torch')
    if spec is None or spec.origin is None:
        raise RuntimeError('The CPU kernels cannot be built: the files of torch are missing; install torch again.')
    return Path(spec.origin).parent


def _install(library: Path, folder: Path) -> None:
    """Put the library into ``folder`` whole or not at all; if that is the package, those of other sources go."""
    partial = folder / f'{library.name}.{os.getpid()}.partial'
    try:
        shutil.copyfile(library, partial)
        partial.replace(folder / library.name)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _unwritable(folder, error) from error
    if not folder.samefile(HERE):
        return  # the user's cache is shared with other versions of this package
    for stale in folder.glob(f'mmuni_cpu-*-{platform.machine()}.so'):
        if stale.name != library_name():
            stale.unlink(missing_ok=True)


def _unwritable(folder: Path, error: OSError) -> RuntimeError:
    advice = ' XDG_CACHE_HOME can name another folder.' if folder == cache_folder() else ''
    return RuntimeError(f'The CPU kernels cannot be written to {folder}: {error}.{advice}')


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f'The CPU kernels did not compile.\n{shlex.join(command)}\n{done.stdout}')


def main() -> None:
    """Build the library unless it is there."""
    parser = argparse.ArgumentParser(
        prog='python -m mmunireplknet.ops.build', description='Build the compiled CPU kernels of mmunireplknet.'
    )
    parser.add_argument('--force', action='store_true', help='build even if the library is there')
    args = parser.parse_args()
    start = time.monotonic()
    try:
        file = library_file()
        if file and not args.force:
            sys.stdout.write(f'{file} is up to date\n')
            return
        file = build()
    except RuntimeError as error:
        sys.exit(str(error))
    except OSError as error:  # no folder for temporary files, for instance
        sys.exit(f'The CPU kernels cannot be built: {error}.')
    sys.stdout.write(f'{file} built in {time.monotonic() - start:.0f} s\n')


if __name__ == '__main__':
    main()
