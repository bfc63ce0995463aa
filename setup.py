"""Packaging of mmunireplknet: pure Python, with configs, tools and model index inside (OpenMMLab's ``.mim`` folder)."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
MIM = Path('mmunireplknet', '.mim')
MIM_CONTENT = ('configs', 'tools', 'model-index.yml')


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


class BuildPyWithMim(build_py):
    """Builds the Python files and puts ``.mim`` beside them."""

    def run(self) -> None:
        """Run after setuptools' own step, which makes the folder of the package."""
        super().run()
        if self.editable_mode:
            link_mim(ROOT / MIM)
        else:
            copy_mim(Path(self.build_lib, MIM))


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
        'export': ['onnx', 'onnxruntime', 'onnxscript'],
        'demo': at_least('requirements/demo.txt'),
        'dev': at_least('requirements/dev.txt'),
    },
    cmdclass={'build_py': BuildPyWithMim, 'sdist': SdistWithMim},
    zip_safe=False,
)
