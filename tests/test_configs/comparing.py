"""Reading configs and comparing them with a table."""

import copy
import functools
from pathlib import Path

from mmengine.config import Config

CONFIGS = Path(__file__).parents[2] / 'configs'


@functools.cache
def _load(name):
    return Config.fromfile(CONFIGS / f'{name}.py')


def load(name):
    return copy.deepcopy(_load(name))  # mmengine's own copy() shares the parts


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
