"""Packaging of mmunireplknet: configs, tools and model index inside (OpenMMLab's ``.mim`` folder), compiled kernels.

The kernels are optional. The environment variable ``MMUNI_WITH_OPS`` says whether they are compiled: ``auto`` where
it can be done (the default; otherwise the package is pure Python), ``1`` or the build fails, ``0`` not at all. Those
for CUDA are compiled where nvcc and a torch for CUDA are, for the GPUs that ``TORCH_CUDA_ARCH_LIST`` names; ``cpu`` is
``auto`` without them.
"""

from __future__ import annotations

import logging
import os
import re
import runpy
import shutil
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError, OptionError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools below 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
MIM = Path('mmunireplknet', '.mim')
MIM_CONTENT = ('configs', 'tools', 'model-index.yml')
OPS = Path('mmunireplknet', 'ops')


def read(name: str) -> str:
    """Text of a file beside this one, empty where there is none."""
    file = ROOT / name
    return file.read_text(encoding='utf-8') if file.exists() else ''


def version() -> str:
    """The version, read as text: importing the package would need torch."""
    found = re.search(r"^__version__ = '([^']+)'$", read('mmunireplknet/__init__.py'), re.MULTILINE)
    if found is None:
        raise ValueError("mmunireplknet/__init__.py holds no line like __version__ = '0.1.0'")
    return found[1]


def at_least(file: str) -> list[str]:
    """The requirements of ``file`` with their pins turned into lower bounds; torch stands in install_requires."""
    lines = [line.split('#')[0].strip() for line in read(file).splitlines()]
    return [line.replace('==', '>=') for line in lines if line and not re.match(r'torch(vision)?\b', line)]


def frameworks(*names: str) -> list[str]:
    """Requirements on packages of the default family, at the versions that requirements.txt was tried with."""
    return [line for line in at_least('requirements.txt') if line.split('>=')[0] in names]


def copy_mim(target: Path) -> None:
    """Copy what belongs into ``.mim``; a stale copy of an earlier build goes first."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in MIM_CONTENT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns('__pycache__', '*.py[co]'))
        else:
            shutil.copyfile(source, target / name)


def link_mim(target: Path) -> None:
    """Link what belongs into ``.mim``, so that a development install follows every edit."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    try:
        for name in MIM_CONTENT:
            (target / name).symlink_to(os.path.relpath(ROOT / name, target))
    except OSError:  # Windows without the right to make links
        copy_mim(target)


def with_ops() -> str:
    """What ``MMUNI_WITH_OPS`` asks for: 'auto', 'cpu', '0' or '1'."""
    wish = os.environ.get('MMUNI_WITH_OPS') or 'auto'
    if wish not in ('auto', 'cpu', '0', '1'):
        raise OptionError(f'MMUNI_WITH_OPS={wish} is unknown: it must be 0, 1, cpu or auto.')
    return wish


class DistributionWithOps(Distribution):
    """Knows whether the compiled kernels are in it."""

    holds_library = False

    def has_ext_modules(self) -> bool:
        """Whether the files belong where a platform's own files go."""
        return self.holds_library


class BuildPyWithMimAndOps(build_py):
    """Builds the Python files and puts ``.mim`` and, as ``MMUNI_WITH_OPS`` says, the compiled kernels beside them."""

    def run(self) -> None:
        """Run after setuptools' own step, which makes the folder of the package."""
        wish = with_ops()
        root = ROOT if self.editable_mode else Path(self.build_lib)
        if not self.editable_mode:  # what an earlier build left there: its library, sources that are gone
            shutil.rmtree(root / OPS, ignore_errors=True)
        super().run()
        if self.editable_mode:
            link_mim(root / MIM)
        else:
            copy_mim(root / MIM)
        if wish != '0':
            self.compile_ops(root / OPS, wish)

    def compile_ops(self, folder: Path, wish: str) -> None:
        """Compile the kernels in ``folder``, whose own files give the library the name it is looked for by."""
        # By its path: importing the package needs mmengine. runpy leaves no __pycache__ that a wheel would pick up.
        ops = runpy.run_path(str(folder / 'build.py'))
        for kind in ('cpu',) if wish == 'cpu' else ops['KINDS']:
            # Those for CUDA are required of nobody who has no nvcc, or no torch for CUDA.
            if kind == 'cuda' and (reason := ops['why_not'](kind)):
                self.announce(f'goes without the CUDA kernels: {reason}', level=logging.INFO)
            else:
                self.compile_library(ops, folder, kind, required=wish == '1')

    def compile_library(self, ops: dict, folder: Path, kind: str, required: bool) -> None:
        """Compile one of the libraries, but where a development install has it already."""
        try:
            if self.editable_mode and (folder / ops['library_name'](kind)).exists():
                return
            library = ops['build'](folder, kind)
        except (RuntimeError, OSError) as error:
            if required:
                raise CompileError(f'MMUNI_WITH_OPS=1: {error}') from error
            reason = str(error).splitlines()[0]
            later = 'MMUNI_WITH_OPS=1 makes it an error, python -m mmunireplknet.ops.build tries again'
            without = 'pure Python' if kind == 'cpu' else 'a package without CUDA kernels'
            self.announce(f'mmunireplknet is built as {without}: {reason} ({later})', level=logging.WARNING)
            return
        self.distribution.holds_library = not self.editable_mode
        self.announce(f'compiled {library}', level=logging.INFO)


class BdistWheelWithOps(bdist_wheel):
    """Tags a wheel that holds the compiled kernels with the platform, but neither with Python nor with its ABI."""

    def run(self) -> None:
        """Build first: only then is it known what the wheel holds."""
        self.run_command('build')
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform of the wheel; the kernels use torch's stable ABI and nothing of Python's."""
        tag = super().get_tag()
        return tag if self.root_is_pure else ('py3', 'none', tag[2])


class SdistWithMim(sdist):
    """Makes the source archive with a copy of ``.mim`` in it."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Add ``.mim`` to the folder that is packed."""
        super().make_release_tree(base_dir, files)
        copy_mim(Path(base_dir, MIM))


setup(
    name='mmunireplknet',
    version=version(),
    description='UniRepLKNet, a large-kernel ConvNet backbone, for OpenMMLab 2.x: mmdet, mmseg and mmpretrain',
    long_description=read('README.md'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords='computer vision, backbone, large kernel, structural re-parameterization, OpenMMLab',
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    python_requires='>=3.10',
    packages=find_packages(include=['mmunireplknet', 'mmunireplknet.*']),
    # MANIFEST.in says which files: sources of the ops (csrc) and whatever data lies in a package.
    include_package_data=True,
    # Nothing here may name mmengine or mmcv. They exist in two families of distributions (onedl-mmengine, onedl-mmcv
    # and mmengine, mmcv) that bring the same import names: required by one name, pip would install the one family over
    # the other and break the environment. Install one of them first.
    install_requires=['torch>=2.4'],
    # det, seg and cls name the default family, the maintained forks. Users of the original family (mmdet,
    # mmsegmentation, mmpretrain) install without these extras. mmcv is in none of them: its build imports torch, and
    # in pip's isolated build it silently comes out without its ops. CONTRIBUTING.md shows how to install it.
    extras_require={
        'det': frameworks('onedl-mmengine', 'onedl-mmdetection'),
        'seg': frameworks('onedl-mmengine', 'onedl-mmsegmentation'),
        'cls': frameworks('onedl-mmengine', 'onedl-mmpretrain'),
        'export': at_least('requirements/export.txt'),
        'demo': at_least('requirements/demo.txt'),
        'dev': at_least('requirements/dev.txt'),
    },
    distclass=DistributionWithOps,
    cmdclass={'build_py': BuildPyWithMimAndOps, 'bdist_wheel': BdistWheelWithOps, 'sdist': SdistWithMim},
    zip_safe=False,
)
