"""What the tests of packaging share: commands as a user runs them, and tools/make_env.py as a module."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = ('.*', '*.egg-info', '__pycache__', 'build', 'dist', 'work_dirs', 'outputs', 'checkpoints')


def version() -> str:
    return re.search(r"__version__ = '(.+)'", (ROOT / 'mmunireplknet/__init__.py').read_text())[1]


def attempt(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Run a command, which compiles no kernels unless ``env`` says so; stdout has all of its output."""
    kept = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'MAKEFLAGS', 'MAKELEVEL')}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, 'MMUNI_WITH_OPS': '0', **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def call(*command: object, cwd: Path, **env: str) -> str:
    """Run a command that must succeed; its output."""
    done = attempt(*command, cwd=cwd, **env)
    assert done.returncode == 0, done.stdout
    return done.stdout


def hook(name: str, source: Path, out: Path, **env: str) -> Path:
    """Call setuptools' PEP 517 hook ``name``, as pip does; the file it made in ``out``."""
    out.mkdir()
    code = f'import sys; from setuptools import build_meta; build_meta.{name}(sys.argv[1])'
    call(sys.executable, '-c', code, out, cwd=source, **env)
    (made,) = out.iterdir()
    return made


def load_make_env() -> ModuleType:
    """tools/make_env.py, anew at each call."""
    spec = importlib.util.spec_from_file_location('make_env', ROOT / 'tools/make_env.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
