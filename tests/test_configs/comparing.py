"""Reading configs, building their models and comparing them with a table."""

import copy
import functools
import tempfile
from pathlib import Path

import pytest
from mmengine.config import Config

from mmunireplknet.analysis.flops import build_on_meta

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
NAMES = sorted(path.stem for path in CONFIGS.glob('*.py'))


@functools.cache
def _load(name):
    """Once for all tests, and from a folder from which no relative path leads to anything."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return Config.fromfile(CONFIGS / f'{name}.py')


def load(name):
    return copy.deepcopy(_load(name))  # mmengine's own copy() shares the parts


@functools.cache
def build(name, deploy=False):
    """The model of a config on the meta device: shapes without memory. Built once, so leave it as it is."""
    cfg = _load(name)
    pytest.importorskip(f'{cfg.default_scope}.models')
    return build_on_meta(cfg, deploy)


def header(name):
    """What the config says of itself."""
    return (CONFIGS / f'{name}.py').read_text().partition('_base_')[0]


def get(cfg, path, default=None):
    for key in path.split('.'):
        if key not in cfg:
            return default
        cfg = cfg[key]
    return cfg


def plain(value):
    """The value with lists for tuples, so that the two compare equal, and without mmengine's mark of its origin."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k != '_scope_'}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def differences(cfg, expected):
    """Fields of ``cfg`` that are not as expected, with both values."""
    pairs = {path: (plain(get(cfg, path)), plain(value)) for path, value in expected.items()}
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}
