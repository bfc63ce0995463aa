"""Set up the development environment: a virtual environment with everything in it.

Example:
    python3 tools/make_env.py                      # .venv, maintained forks
    python3 tools/make_env.py --stack openmmlab    # .venv-openmmlab, original packages

Runs with the standard library alone, on the Python that is to be used. A second call
takes seconds: a stamp holds the hash of everything that was asked for.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import ssl
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# An activated virtual environment is not what the new one is to be made from.
BASE_PYTHON = getattr(sys, '_base_executable', sys.executable)
TORCH_CPU_INDEX = 'https://download.pytorch.org/whl/cpu'
# Where each family publishes mmcv wheels with ops: {cuda} like cpu, cu118; {torch} as each spells it.
MMCV_WHEELS = {
    'default': 'https://mmwheels.onedl.ai/{cuda}-torch{torch2}/simple/onedl-mmcv/index.html',
    'openmmlab': 'https://download.openmmlab.com/mmcv/dist/{cuda}/torch{torch1}/index.html',
}
REQUIREMENTS = {
    'default': ('requirements.txt', 'requirements/mmcv.txt', '.venv'),
    'openmmlab': ('requirements/openmmlab.txt', 'requirements/openmmlab-mmcv.txt', '.venv-openmmlab'),
}
COMMON = ('requirements/build.txt', 'requirements/demo.txt', 'requirements/dev.txt', 'requirements/export.txt')
PCH_HEADER = 'mmcv/ops/csrc/common/pytorch_cpp_helper.hpp'


def say(text: str) -> None:
    print(f'[env] {text}', flush=True)


def loads(library: str) -> bool:
    """Whether the dynamic linker finds the library."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def missing_system_packages() -> list[str]:
    """Debian names of the system packages that the environment cannot do without."""
    # With the version: for a second Python beside Debian's own, python3-venv would change nothing.
    python = f'python{sys.version_info[0]}.{sys.version_info[1]}'
    missing = []
    if importlib.util.find_spec('ensurepip') is None or importlib.util.find_spec('venv') is None:
        missing.append(f'{python}-venv')
    if shutil.which(os.environ.get('CXX', 'c++').split()[0]) is None:
        missing.append('g++')
    if not Path(sysconfig.get_paths()['include'], 'Python.h').exists():
        missing.append(f'{python}-dev')
    # opencv-python, which mmcv depends on, links both.
    libraries = {'libgl1': 'libGL.so.1', 'libglib2.0-0': 'libgthread-2.0.so.0'} if sys.platform == 'linux' else {}
    return missing + [package for package, library in libraries.items() if not loads(library)]


def check_python(stack: str) -> None:
    """Stop on a Python that the pinned packages do not install on."""
    # 3.11: scikit-learn, scikit-image, matplotlib. 3.13: the last with wheels of the pinned numpy.
    # The setup.py of mmcv 2.1.0 reads its version through locals(), which 3.13 changed.
    newest = (3, 12) if stack == 'openmmlab' else (3, 13)
    if not (3, 11) <= sys.version_info[:2] <= newest:
        sys.exit(
            f'[env] this Python is {sys.version.split()[0]}; the packages pinned in requirements/ need 3.11 to '
            f'{newest[0]}.{newest[1]}. Name one: make env PYTHON=python3.11'
        )


def preflight() -> None:
    """Stop where system packages are missing, naming them all in the one command that installs them."""
    missing = missing_system_packages()
    if missing:
        sys.exit(
            '[env] this system lacks what the build needs. Run, as root (elsewhere than on Debian or Ubuntu, '
            'install what these packages hold):\n'
            f'    apt-get update && apt-get install -y {" ".join(missing)}\nand then make env again.'
        )


def run(command: list[str], **kwargs: object) -> None:
    say(' '.join(Path(c).name if i == 0 else c for i, c in enumerate(command)))
    if subprocess.run(command, **kwargs).returncode:  # type: ignore[call-overload]
        sys.exit(f'[env] failed: {" ".join(command)}')


def install(python: str, *arguments: str, quiet: bool = True, check: bool = True) -> bool:
    """Run ``pip install`` in the environment and return whether it succeeded."""
    command = [python, '-m', 'pip', 'install', '--disable-pip-version-check', *(['-q'] if quiet else []), *arguments]
    say(' '.join(['pip install', *arguments]))
    # pip takes a package whose copying was cut short for installed: the mark outlives only a killed pip.
    mark = Path(python).parents[1] / 'installing'
    mark.touch()
    # This package's own kernels are left to build_ops.
    code = subprocess.run(command, env={**os.environ, 'MMUNI_WITH_OPS': '0'}).returncode
    if code >= 0:
        mark.unlink()
    if code and check:
        sys.exit(f'[env] failed: {" ".join(command)}')
    return code == 0


def ask(python: str, code: str) -> str:
    """What ``code`` prints in the interpreter ``python``; empty where it fails."""
    try:
        done = subprocess.run([python, '-c', code], capture_output=True, text=True)
    except OSError:
        return ''
    return done.stdout.strip() if done.returncode == 0 else ''


def reachable(url: str) -> bool:
    """Whether the page exists, decided within seconds: an absent index must not cost pip's retries."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method='HEAD'), timeout=5) as reply:
            return bool(reply.status < 400)
    except OSError as error:
        # pip brings its own certificates, so a system without any is no reason to give up here.
        return isinstance(getattr(error, 'reason', None), ssl.SSLCertVerificationError)


def requirements_of(file: Path) -> dict[str, str]:
    """The requirements in ``file``, by package name."""
    lines = [line.split('#')[0].strip() for line in file.read_text(encoding='utf-8').splitlines()]
    return {re.split(r'[^\w.-]', line)[0]: line for line in lines if line}


def has_gpu() -> bool:
    return shutil.which('nvidia-smi') is not None


def torch_version(python: str) -> str:
    """Version of the torch that ``python`` imports, as pip spells it; empty where there is none."""
    # torch.__version__ may say more: PyPI's 2.13.0 calls itself 2.13.0+cu130, which pip does not find.
    return ask(python, 'import importlib.metadata as m, torch; print(m.version("torch"))')


def torch_arguments(python: str, stack: str, torch: str | None) -> list[str]:
    """Arguments for pip that bring torch: the CPU build without a GPU, torchvision to match."""
    present = torch_version(python)
    if present:
        say(f'torch {present} is there already and is kept')
        return [f'torch=={present}', 'torchvision']
    pinned = requirements_of(ROOT / REQUIREMENTS[stack][0])
    arguments = [f'torch=={torch}', 'torchvision'] if torch else [pinned['torch'], pinned['torchvision']]
    if not has_gpu():
        if reachable(f'{TORCH_CPU_INDEX}/torch/'):
            return [*arguments, '--extra-index-url', TORCH_CPU_INDEX]
        say(f'{TORCH_CPU_INDEX} is out of reach: torch comes from the indexes that pip is set to')
    return arguments


def torch_tags(python: str) -> tuple[str, str]:
    """(torch version without local part, 'cpu' or 'cu' + digits)."""
    code = 'import torch; print(torch.__version__.split("+")[0], "cu" + (torch.version.cuda or "").replace(".", ""))'
    version, cuda = ask(python, code).split()
    return version, cuda if cuda != 'cu' and has_gpu() else 'cpu'


def nvcc_fits(cuda: str) -> bool:
    """Whether there is an nvcc of the major version that torch was built with: torch refuses any other."""
    home = os.environ.get('CUDA_HOME')
    nvcc = str(Path(home, 'bin', 'nvcc')) if home else shutil.which('nvcc')
    if nvcc is None or not Path(nvcc).exists():
        return False
    text = subprocess.run([nvcc, '--version'], capture_output=True, text=True).stdout
    release = re.search(r'release (\d+)\.', text)
    return release is not None and cuda.startswith(f'cu{release[1]}')


def mmcv_wheel_index(stack: str, version: str, cuda: str) -> str | None:
    """The official page of prebuilt mmcv wheels for this torch, where there is one."""
    major_minor = '.'.join(version.split('.')[:2])
    url = MMCV_WHEELS[stack].format(cuda=cuda, torch1=f'{major_minor}.0', torch2=f'{major_minor}.0'.replace('.', ''))
    return url if reachable(url) else None


def jobs() -> int:
    """Compilers to run at once: one a core that this process may use, and one for 2 GiB of memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return max(1, min(cores, memory // 2**31))


def precompile_header(python: str, source: Path, flags: str) -> None:
    """Precompile the header that every mmcv source file includes first: 4 minutes instead of 20 to 35."""
    code = (
        'import sysconfig, torch.utils.cpp_extension as c;'
        'print("\\n".join(c.include_paths() + [sysconfig.get_paths()["include"]]))'
    )
    includes = [f'-I{path}' for path in ask(python, code).splitlines()]
    header = source / PCH_HEADER
    command = [
        *os.environ.get('CXX', 'c++').split(), *flags.split(), '-fPIC', '-std=c++17', '-w',
        '-DTORCH_API_INCLUDE_EXTENSION_H', '-DTORCH_EXTENSION_NAME=_ext',
        f'-I{header.parent}', *includes, '-x', 'c++-header', str(header), '-o', f'{header}.gch',
    ]  # fmt: skip
    if subprocess.run(command).returncode:
        say('the header could not be precompiled; the build goes on without, and takes longer')
        Path(f'{header}.gch').unlink(missing_ok=True)


def build_mmcv(python: str, requirement: str, wheels: Path, with_cuda: bool) -> Path:
    """Build mmcv with its ops into ``wheels`` and return the wheel."""
    wheels.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run([python, '-m', 'pip', 'download', '-q', '--no-deps', '--no-binary', ':all:',
             '--no-build-isolation', requirement, '-d', folder])  # fmt: skip
        archive = next(Path(folder).glob('*.tar.gz'))
        with tarfile.open(archive) as tar:
            # Debian 12's Python 3.11.2 has no filters yet.
            tar.extractall(folder, **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))
        source = Path(folder, archive.name[: -len('.tar.gz')])
        flags = '-DNDEBUG -g0 -O2'
        env = {'MAX_JOBS': str(jobs()), **os.environ, 'CFLAGS': flags, 'CXXFLAGS': flags,
               'MMCV_WITH_OPS': '1', 'FORCE_CUDA': str(int(with_cuda)),
               # Where ninja is; without it the sources compile one after the other.
               'PATH': os.pathsep.join([str(Path(python).parent), os.environ.get('PATH', os.defpath)]),
               **({} if with_cuda else {'CUDA_VISIBLE_DEVICES': ''})}  # fmt: skip
        if not with_cuda:
            precompile_header(python, source, flags)
        return _build_wheel(python, source, wheels, env)


def _build_wheel(python: str, source: Path, wheels: Path, env: dict[str, str]) -> Path:
    log = wheels / 'build.log'
    say(f'building {source.name} with its ops; log: {log}')
    out = source / 'dist'
    start = time.monotonic()
    command = [python, '-m', 'pip', 'wheel', '-v', '--no-deps', '--no-build-isolation', '-w', str(out), '.']
    with log.open('w') as file, subprocess.Popen(
        command, cwd=source, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            step = re.match(r'\s*\[(\d+)/(\d+)\]', line)
            if step:
                done, total = map(int, step.groups())
                end = '\n' if not sys.stdout.isatty() or done == total else '\r'
                if sys.stdout.isatty() or done % 20 == 0 or done == total:
                    print(f'[env] mmcv {done}/{total}, {time.monotonic() - start:.0f} s', end=end, flush=True)
    if process.returncode:
        sys.exit(f'[env] mmcv did not build; the end of {log}:\n' + ''.join(log.open().readlines()[-30:]))
    wheel = next(out.glob('*.whl'))
    # The rename makes the cache entry appear whole or not at all.
    partial = wheels / f'{wheel.name}.partial'
    shutil.copyfile(wheel, partial)
    say(f'mmcv built in {time.monotonic() - start:.0f} s')
    return partial.rename(wheels / wheel.name)


def install_mmcv(python: str, stack: str) -> None:
    """Install mmcv with ops: the official wheel, else the cached own build, else a build."""
    requirement = next(iter(requirements_of(ROOT / REQUIREMENTS[stack][1]).values()))
    name, pinned = requirement.split('==')
    # The version too: a mmcv of the other family may shine through from the system's packages.
    works = f'import importlib.metadata as m, mmcv._ext; assert m.version("{name}") == "{pinned}"; print(1)'
    if ask(python, works):
        say(f'{requirement} with its ops is there already and is kept')
        return
    version, cuda = torch_tags(python)
    index = mmcv_wheel_index(stack, version, cuda)
    if index:
        if install(python, '--only-binary', ':all:', '-f', index, requirement, check=False) and ask(python, works):
            return
        say(f'no usable wheel of {requirement} for torch {version} ({cuda}) at {index}')
    with_cuda = cuda != 'cpu' and nvcc_fits(cuda)
    if cuda != 'cpu' and not with_cuda:
        say(
            f'no nvcc for {cuda}: mmcv gets its CPU ops only, so detection will not train on the GPU. Install the '
            'CUDA toolkit of that major version, or name a torch with prebuilt wheels: make env TORCH=2.8.0'
        )
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'mmunireplknet', 'wheels')
    tag = f'torch{version}-{cuda if with_cuda else "cpu"}-py{sys.version_info[0]}{sys.version_info[1]}'
    # The name carries the machine, for a home that several kinds of machine share.
    wheels = f'{name.replace("-", "_")}-{pinned}-*_{platform.machine()}.whl'
    wheel = next((cache / tag).glob(wheels), None) or build_mmcv(python, requirement, cache / tag, with_cuda)
    install(python, '--force-reinstall', '--no-deps', str(wheel))
    install(python, requirement)  # its dependencies; mmcv itself stands already
    if not ask(python, works):
        wheel.unlink()
        sys.exit(f'[env] {wheel.name} installs but mmcv._ext does not import; the wheel is removed, run make env again')


def stamp_of(stack: str) -> str:
    """Hash of everything that decides what is in the environment, but for the torch that was asked for."""
    files = [ROOT / name for name in (*REQUIREMENTS[stack][:2], *COMMON, 'setup.py', 'tools/make_env.py')]
    content = b''.join(file.read_bytes() for file in files)
    return hashlib.sha256(f'{ROOT} {sys.version}'.encode() + content).hexdigest()


def is_up_to_date(venv: Path, wanted: str, torch: str | None) -> bool:
    """Whether the environment holds what is wanted; ``torch=None`` takes the torch that is in it."""
    try:
        stamp = json.loads((venv / 'mmunireplknet.json').read_text())
    except (OSError, ValueError):
        return False
    alive = (venv / 'bin' / 'python').exists()
    return bool(alive and stamp.get('wanted') == wanted and torch in (None, stamp.get('torch')))


def make_venv(venv: Path, torch: str | None) -> bool:
    """Create the virtual environment, or make it anew where it is of no use. Returns whether it is new."""
    python = str(venv / 'bin' / 'python')
    reason = ''
    if venv.exists():
        version = ask(python, 'import sys; print(sys.version)')
        there = torch_version(python).split('+')[0]
        if (venv / 'installing').exists():
            reason = 'an installation in it was cut short'
        elif version != sys.version:
            reason = f'its Python is {version.split()[0] if version else "gone"}, this one is {sys.version.split()[0]}'
        elif torch and there and there != torch:
            reason = f'its torch is {there}, asked for is {torch}'
        elif ask(python, 'import pip; print(1)'):
            return False
    # A torch that this Python has already (a GPU build, say) is used, not downloaded again.
    found = torch_version(BASE_PYTHON).split('+')[0]
    new_enough = found and tuple(map(int, found.split('.')[:2])) >= (2, 4)
    site = ['--system-site-packages'] if new_enough and torch in (None, found) else []
    if reason:
        say(f'{venv.name} is made anew: {reason}')
    run([BASE_PYTHON, '-m', 'venv', *(['--clear'] if reason else []), *site, str(venv)])
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--stack', choices=list(REQUIREMENTS), default='default')
    parser.add_argument('--torch', help='torch version, 2.4 or newer; prebuilt mmcv wheels exist for older ones')
    parser.add_argument('--system-packages', action='store_true', help='only print the missing Debian packages')
    args = parser.parse_args()
    if args.system_packages:
        print(' '.join(missing_system_packages()))
        return
    # Two of them at once (make lint beside make test) would install over each other.
    fcntl.flock(os.open(ROOT, os.O_RDONLY), fcntl.LOCK_EX)
    make_env(args.stack, args.torch or None)
    build_ops(str(ROOT / REQUIREMENTS[args.stack][2] / 'bin' / 'python'))


def make_env(stack: str, torch: str | None) -> None:
    venv = ROOT / REQUIREMENTS[stack][2]
    wanted = stamp_of(stack)
    if is_up_to_date(venv, wanted, torch):
        say(f'{venv.name} is up to date')
        return
    check_python(stack)
    preflight()
    new = make_venv(venv, torch)
    python = str(venv / 'bin' / 'python')
    install(python, '-r', str(ROOT / COMMON[0]))
    install(python, *torch_arguments(python, stack, torch), quiet=not new)
    names = (REQUIREMENTS[stack][0], *COMMON[1:])
    wished = {k: v for name in names for k, v in requirements_of(ROOT / name).items()}
    # torch has been chosen already, and is held while the others are resolved.
    wished.update({'torch': f'torch=={torch_version(python)}', 'torchvision': 'torchvision'})
    install(python, *wished.values(), quiet=not new)
    install_mmcv(python, stack)
    install(python, '--no-build-isolation', '--no-deps', '-e', str(ROOT))
    version = torch_version(python).split('+')[0]
    (venv / 'mmunireplknet.json').write_text(json.dumps({'wanted': wanted, 'torch': version}))
    say(f'done: {venv.name} holds everything; make test and make demo use it')


def build_ops(python: str) -> None:
    """Compile those of the package's kernels that are not there; nothing requires them."""
    wish = os.environ.get('MMUNI_WITH_OPS')
    if wish != '0':
        command = [python, str(ROOT / 'mmunireplknet/ops/build.py'), '--quiet']
        if subprocess.run(command + (['--kernels', 'cpu'] if wish == 'cpu' else [])).returncode:
            say('mmunireplknet goes without the compiled kernels that are named above')


if __name__ == '__main__':
    main()
