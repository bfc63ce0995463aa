"""What a user installs (wheel, source archive, development install), make, and tools/make_env.py."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from mmengine.config import Config

from mmunireplknet.models import CHECKPOINTS

from .packaging_cases import LEFT_OUT, ROOT, call, hook, load_make_env, version


@pytest.fixture(scope='module')
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, so that no build leaves anything in it, with a file of each kind that must come along."""
    copy = tmp_path_factory.mktemp('tree') / 'source'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    (copy / 'configs' / '__pycache__').mkdir(parents=True)
    (copy / 'configs' / '__pycache__' / 'stale.pyc').write_bytes(b'')
    (copy / 'configs' / 'probe.py').write_text('model = dict()')
    (copy / 'mmunireplknet' / 'models' / 'csrc').mkdir()
    (copy / 'mmunireplknet' / 'models' / 'csrc' / 'probe.cu').touch()
    return copy


@pytest.fixture(scope='module')
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('wheel')
    call(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-build-isolation', '--no-deps', '-w', out, '.', cwd=source)
    (made,) = out.glob('*.whl')
    return made


def files_of(folder: Path, *suffixes: str) -> set[str]:
    return {str(p.relative_to(ROOT)) for p in folder.rglob('*') if p.is_file() and p.suffix in suffixes}


def read_index(folder: Path) -> dict:
    return yaml.safe_load((folder / 'model-index.yml').read_text())


@pytest.mark.slow
def test_wheel_holds_package_configs_and_tools(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    mim = {name.removeprefix('mmunireplknet/.mim/') for name in names if name.startswith('mmunireplknet/.mim/')}
    assert files_of(ROOT / 'configs', '.py', '.yml', '.md') <= mim
    assert files_of(ROOT / 'tools', '.py', '.sh') <= mim
    assert {'configs/probe.py', 'tools/make_env.py'} <= mim
    assert 'model-index.yml' in mim
    assert 'mmunireplknet/models/csrc/probe.cu' in names
    package = {name for name in names if name.startswith('mmunireplknet/') and '/.mim/' not in name}
    here = files_of(ROOT / 'mmunireplknet', '.py', '.cpp', '.cu', '.cuh', '.h', '.inc')
    assert {name for name in here if '/.mim/' not in name} <= package
    assert not [name for name in names if name.endswith(('.pyc', '.so')) or name.startswith(('tests/', 'configs/'))]


@pytest.mark.slow
def test_mim_finds_models_and_configs_in_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """Where openmim 0.3.9 looks: PACKAGE/.mim/model-index.yml, metafiles beside it, PACKAGE/.mim/CONFIG."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    mim = tmp_path / 'mmunireplknet' / '.mim'
    metafiles = [yaml.safe_load((mim / name).read_text()) for name in read_index(mim)['Import']]
    models = {model['Name']: model for metafile in metafiles for model in metafile['Models']}
    assert models.keys() == CHECKPOINTS.keys()
    assert [name for name, model in models.items() if not (mim / model['Config']).is_file()] == []
    config = Config.fromfile(mim / models['upernet_unireplknet_t_ade20k']['Config'])
    assert config.model.backbone.arch == 't'


@pytest.mark.slow
def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f'mmunireplknet-{version()}.dist-info'
    metadata = archive.read(f'{info}/METADATA').decode()
    assert f'\nVersion: {version()}\n' in metadata
    assert '\nLicense: Apache-2.0\n' in metadata
    assert any(name.startswith(info) and name.endswith('LICENSE') for name in archive.namelist())
    required = re.findall(r'^Requires-Dist: (.+)$', metadata, re.MULTILINE)
    assert [line for line in required if 'extra ==' not in line] == ['torch>=2.4']
    # mmcv's build imports torch: under pip's build isolation it would come without its ops.
    assert not [line for line in required if 'mmcv' in line]
    extras = {extra: [line for line in required if f'"{extra}"' in line] for extra in ('det', 'seg', 'cls', 'export')}
    assert {extra: len(lines) for extra, lines in extras.items()} == {'det': 2, 'seg': 2, 'cls': 2, 'export': 6}
    assert set(re.findall(r'^Provides-Extra: (.+)$', metadata, re.MULTILINE)) == {*extras, 'demo', 'dev'}


@pytest.mark.slow
def test_source_archive_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    archive = hook('build_sdist', source, tmp_path / 'sdist')
    shutil.unpack_archive(archive, tmp_path / 'unpacked')
    (unpacked,) = (tmp_path / 'unpacked').iterdir()
    assert (unpacked / 'mmunireplknet' / '.mim' / 'tools' / 'make_env.py').is_file()
    assert not list(unpacked.rglob('*.pyc'))
    again = hook('build_wheel', unpacked, tmp_path / 'wheel')
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_development_install_links(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / 'source'
    shutil.copytree(source, copy)
    for attempt in ('first', 'second'):  # the second meets the links of the first
        hook('build_editable', copy, tmp_path / attempt)
        mim = copy / 'mmunireplknet' / '.mim'
        for name in ('configs', 'tools', 'model-index.yml'):
            assert (mim / name).is_symlink()
            assert (mim / name).resolve() == copy / name
    assert (copy / 'tools' / 'make_env.py').is_file()


CONFIG = """
custom_imports = dict(imports=['mmunireplknet'], allow_failed_imports=False)
default_scope = 'mmseg'
head = dict(type='FCNHead', in_channels=320, channels=8, num_classes=4, num_convs=1, norm_cfg=dict(type='BN'))
model = dict(type='EncoderDecoder', backbone=dict(type='UniRepLKNet', arch='a'), decode_head=head,
             train_cfg=dict(), test_cfg=dict(mode='whole'))
"""
USE = """
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
cfg = Config.fromfile('config.py')
init_default_scope(cfg.default_scope)
model = MODELS.build(cfg.model).eval()
with torch.no_grad():
    print(tuple(model.encode_decode(torch.zeros(1, 3, 64, 96), [dict(img_shape=(64, 96))]).shape))
"""


@pytest.mark.slow
def test_wheel_installs_and_imports_elsewhere(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / 'venv'
    call(sys.executable, '-m', 'venv', '--without-pip', venv, cwd=tmp_path)
    python = venv / 'bin' / 'python'
    pip = (sys.executable, '-m', 'pip', '--python', python)
    call(*pip, 'install', '-q', '--no-deps', '--no-index', wheel, cwd=tmp_path)
    # What this interpreter has, behind what the new environment has. A path named in a .pth file is not searched
    # for .pth files itself, so this interpreter's development install of mmunireplknet does not come along.
    (site,) = venv.glob('lib/python*/site-packages')
    packages = [path for path in sys.path if Path(path).name in ('site-packages', 'dist-packages')]
    (site / 'others.pth').write_text('\n'.join(packages))
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    code = 'import json, mmunireplknet as m; print(json.dumps([m.__file__, m.__version__]))'
    file, found = json.loads(call(python, '-c', code, cwd=elsewhere).splitlines()[-1])
    assert Path(file).parent == site / 'mmunireplknet'
    assert found == version()
    assert (site / 'mmunireplknet' / '.mim' / 'configs' / 'probe.py').is_file()
    (elsewhere / 'config.py').write_text(CONFIG)
    assert call(python, '-c', USE, cwd=elsewhere).splitlines()[-1] == '(1, 4, 64, 96)'


def test_setup_needs_neither_torch_nor_pkg_resources(source: Path) -> None:
    code = (
        'import runpy, sys; sys.modules.update(torch=None, pkg_resources=None);'
        'sys.argv = ["setup.py", "--version"]; runpy.run_path("setup.py", run_name="__main__")'
    )
    assert call(sys.executable, '-W', 'ignore', '-c', code, cwd=source).split()[-1] == version()


def test_model_index_names_files_that_exist() -> None:
    index = read_index(ROOT)
    assert [name for name in index['Import'] if not (ROOT / name).is_file()] == []
    assert {str(file.relative_to(ROOT)) for file in ROOT.glob('configs/**/metafile*.yml')} <= set(index['Import'])


def test_pre_commit_runs_the_pinned_ruff() -> None:
    hooks = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos']
    revisions = [repo['rev'] for repo in hooks if 'ruff' in repo['repo']]
    pinned = re.search(r'^ruff==(.+)$', (ROOT / 'requirements/dev.txt').read_text(), re.MULTILINE)[1]
    assert revisions == [f'v{pinned}']


def test_make_lists_every_target() -> None:
    lines = call('make', '--no-print-directory', cwd=ROOT).splitlines()
    described = {line.split()[0]: line.split()[1:] for line in lines if line.startswith('  ')}
    targets = re.search(r'^\.PHONY: (.+)$', (ROOT / 'Makefile').read_text(), re.MULTILINE)[1].split()
    assert sorted(described) == sorted(targets)
    assert {'help', 'env', 'demo', 'test', 'test-fast', 'lint', 'clean'} <= set(targets)
    assert all(described.values())


@pytest.mark.parametrize(('stack', 'venv'), [('default', '.venv'), ('openmmlab', '.venv-openmmlab')])
def test_make_passes_its_variables_on(stack: str, venv: str) -> None:
    plan = call('make', '-n', 'test-fast', f'STACK={stack}', 'TORCH=2.8.0', 'PYTHON=py', 'ARGS=-x', cwd=ROOT)
    assert f'py tools/make_env.py --stack {stack} --torch 2.8.0' in plan
    assert re.search(rf'^{re.escape(venv)}/bin/python -m pytest .*not slow and not cuda.* -x$', plan, re.MULTILINE)


@pytest.fixture
def make_env(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/make_env.py on a machine that lacks nothing."""
    module = load_make_env()
    monkeypatch.setattr(sys, 'platform', 'linux')
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())
    monkeypatch.setattr(shutil, 'which', lambda name: f'/usr/bin/{name}')
    monkeypatch.setattr(module.sysconfig, 'get_paths', lambda: {'include': '/include'})
    monkeypatch.setattr(Path, 'exists', lambda self: True)
    monkeypatch.setattr(module, 'loads', lambda library: True)
    return module


PYTHON = f'python{sys.version_info[0]}.{sys.version_info[1]}'


def test_nothing_is_missing(make_env: ModuleType) -> None:
    assert make_env.missing_system_packages() == []
    make_env.preflight()


@pytest.mark.parametrize(
    ('target', 'name', 'value', 'package'),
    [
        (importlib.util, 'find_spec', lambda name: None if name == 'ensurepip' else object(), f'{PYTHON}-venv'),
        (shutil, 'which', lambda name: None, 'g++'),
        (Path, 'exists', lambda self: self.name != 'Python.h', f'{PYTHON}-dev'),
        ('loads', None, lambda library: 'GL' not in library, 'libgl1'),
        ('loads', None, lambda library: 'thread' not in library, 'libglib2.0-0'),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_each_missing_package_is_named(
    make_env: ModuleType, monkeypatch: pytest.MonkeyPatch, target: object, name: str | None, value: object, package: str
) -> None:
    monkeypatch.setattr(make_env if target == 'loads' else target, name or 'loads', value)
    assert make_env.missing_system_packages() == [package]


def test_preflight_names_one_command(make_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    monkeypatch.setattr(make_env, 'loads', lambda library: False)
    with pytest.raises(SystemExit) as stop:
        make_env.preflight()
    commands = [line.strip() for line in str(stop.value).splitlines() if 'apt-get' in line]
    assert commands == ['apt-get update && apt-get install -y g++ libgl1 libglib2.0-0']


@pytest.mark.parametrize(
    ('stack', 'refused', 'accepted'),
    [('default', [(3, 8), (3, 10), (3, 14)], [(3, 11), (3, 13)]), ('openmmlab', [(3, 10), (3, 13)], [(3, 11)])],
)
def test_other_pythons_are_refused(
    make_env: ModuleType, monkeypatch: pytest.MonkeyPatch, stack: str, refused: list, accepted: list
) -> None:
    for python in refused:
        monkeypatch.setattr(make_env.sys, 'version_info', (*python, 0))
        with pytest.raises(SystemExit, match=r'need 3\.11 to 3\.1\d\. Name one: make env PYTHON='):
            make_env.check_python(stack)
    for python in accepted:
        monkeypatch.setattr(make_env.sys, 'version_info', (*python, 0))
        make_env.check_python(stack)


def test_make_env_reaches_its_message_on_an_old_python() -> None:
    ast.parse((ROOT / 'tools/make_env.py').read_text(), feature_version=(3, 7))


@pytest.fixture
def tree(make_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A tree with only the files that the stamp covers."""
    monkeypatch.undo()
    for name in ('setup.py', 'requirements.txt', 'tools/make_env.py'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / 'requirements', tmp_path / 'requirements')
    monkeypatch.setattr(make_env, 'ROOT', tmp_path)
    return tmp_path


def test_stamp_follows_the_requirements(make_env: ModuleType, tree: Path) -> None:
    before = {stack: make_env.stamp_of(stack) for stack in ('default', 'openmmlab')}
    assert before == {stack: make_env.stamp_of(stack) for stack in before}
    (tree / 'requirements/openmmlab.txt').write_text('mmengine==0.10.8\n')
    assert make_env.stamp_of('default') == before['default']
    assert make_env.stamp_of('openmmlab') != before['openmmlab']
    (tree / 'requirements/dev.txt').write_text('pytest\n')
    assert make_env.stamp_of('default') != before['default']


def test_up_to_date_means_stamp_python_and_torch(make_env: ModuleType, tmp_path: Path) -> None:
    assert not make_env.is_up_to_date(tmp_path, 'hash', None)
    (tmp_path / 'mmunireplknet.json').write_text('{"wanted": "hash", "torch": "2.8.0"}')
    assert not make_env.is_up_to_date(tmp_path / 'elsewhere', 'hash', None)
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'python').touch()
    assert make_env.is_up_to_date(tmp_path, 'hash', None)
    assert make_env.is_up_to_date(tmp_path, 'hash', '2.8.0')
    assert not make_env.is_up_to_date(tmp_path, 'hash', '2.9.0')
    assert not make_env.is_up_to_date(tmp_path, 'other', None)
    (tmp_path / 'mmunireplknet.json').write_text('{"wan')
    assert not make_env.is_up_to_date(tmp_path, 'hash', None)


@pytest.fixture
def venv_calls(make_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Stands in for the interpreters that make_venv asks, and keeps the command it runs."""
    state = {'version': sys.version, 'pip': '1', 'torch': '2.13.0+cpu', 'system torch': '', 'ran': []}
    monkeypatch.undo()

    def ask(python: str, code: str) -> str:
        if 'torch' in code:
            return state['system torch' if python == make_env.BASE_PYTHON else 'torch']
        return state['pip' if 'pip' in code else 'version']

    monkeypatch.setattr(make_env, 'ask', ask)
    monkeypatch.setattr(make_env, 'run', lambda command: state['ran'].extend(command))
    return state


@pytest.mark.parametrize(
    ('change', 'torch', 'flags'),
    [
        ({}, None, None),
        ({}, '2.13.0', None),
        ({}, '2.8.0', {'--clear'}),
        ({'version': '3.9.1 (old)'}, None, {'--clear'}),
        ({'version': ''}, None, {'--clear'}),
        ({'pip': ''}, None, set()),
        ({'pip': '', 'system torch': '2.5.1+cu121'}, None, {'--system-site-packages'}),
        ({'pip': '', 'torch': '', 'system torch': '2.5.1+cu121'}, '2.5.1', {'--system-site-packages'}),
        ({'pip': '', 'torch': '', 'system torch': '2.5.1+cu121'}, '2.8.0', set()),
        ({'pip': '', 'system torch': '2.1.0'}, None, set()),
    ],
)
def test_environment_is_kept_completed_or_made_anew(
    make_env: ModuleType, venv_calls: dict, tmp_path: Path, change: dict, torch: str | None, flags: set | None
) -> None:
    venv_calls.update(change)
    made = make_env.make_venv(tmp_path, torch)
    assert made == (flags is not None)
    assert {part for part in venv_calls['ran'] if part.startswith('--')} == (flags or set())


def test_environment_that_a_killed_pip_left_is_made_anew(
    make_env: ModuleType, venv_calls: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = str(tmp_path / 'bin' / 'python')
    for code, marked in ((0, False), (1, False), (-9, True)):
        done = subprocess.CompletedProcess([], code)
        monkeypatch.setattr(make_env.subprocess, 'run', lambda command, env, done=done: done)
        assert make_env.install(python, 'x', check=False) == (code == 0)
        assert (tmp_path / 'installing').exists() == marked
    make_env.make_venv(tmp_path, None)
    assert '--clear' in venv_calls['ran']


def test_torch_is_pinned_by_the_version_that_pip_knows(
    make_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    (tmp_path / 'torch.py').write_text("__version__ = '2.13.0+cu130'")
    (tmp_path / 'torch-2.13.0.dist-info').mkdir()
    (tmp_path / 'torch-2.13.0.dist-info' / 'METADATA').write_text(
        'Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n'
    )
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    assert make_env.torch_arguments(sys.executable, 'default', None) == ['torch==2.13.0', 'torchvision']


@pytest.mark.parametrize(('release', 'cuda', 'fits'), [('12.4', 'cu128', True), ('12.4', 'cu130', False)])
def test_nvcc_must_be_of_the_major_version_of_torch(
    make_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str, cuda: str, fits: bool
) -> None:
    nvcc = tmp_path / 'bin' / 'nvcc'
    nvcc.parent.mkdir()
    nvcc.write_text(f'#!/bin/sh\necho "Cuda compilation tools, release {release}, V{release}.99"\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv('CUDA_HOME', str(tmp_path))
    assert make_env.nvcc_fits(cuda) == fits


def test_make_clean(tmp_path: Path) -> None:
    """What builds and test runs leave behind goes; sources and environments stay."""
    ops = 'mmunireplknet/ops'
    goes = [f'{ops}/a.so', f'{ops}/a.so.1.partial', f'{ops}/__pycache__/a.pyc', 'build/lib/a.py', 'dist/a.whl']
    goes += [f'{name}/a' for name in ('a.egg-info', '.pytest_cache', '.mypy_cache', '.ruff_cache', '.hypothesis')]
    stays = [f'{ops}/a.py', '.venv/lib/__pycache__/a.pyc', '.venv-openmmlab/a.so', 'Makefile']
    for name in (*goes, *stays):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(ROOT / 'Makefile', tmp_path)
    subprocess.run(['make', 'clean'], cwd=tmp_path, check=True, capture_output=True)
    assert {str(file.relative_to(tmp_path)) for file in tmp_path.rglob('*') if file.is_file()} == set(stays)
