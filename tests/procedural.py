"""Deterministic weights and inputs: what the golden files in tests/data were made with, and randomised models.

The goldens are outputs of the official implementation (commit b5677d8, float32, CPU) whose every state-dict
entry was set to ``fill(key, shape)``, on ``image(shape)``. Both use NumPy's frozen legacy generator.
"""

from __future__ import annotations

import functools
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

DATA = Path(__file__).parent / 'data'
GOLDENS = {'a': 'a_2x3x96x128.npz', 't': 't_1x3x64x96.npz'}


def fill(key: str, shape: tuple) -> np.ndarray:
    """Value of the state-dict entry ``key`` of the training form."""
    return _fill(key, shape).copy()


@functools.lru_cache(maxsize=2048)  # some hundred tests fill the same few models
def _fill(key: str, shape: tuple) -> np.ndarray:
    if key.endswith('num_batches_tracked'):
        return np.zeros(shape, np.int64)
    rng = np.random.RandomState(zlib.crc32(key.encode()))
    if key.endswith('running_var'):
        value = rng.uniform(0.5, 1.5, shape)
    elif key.endswith('running_mean'):
        value = 0.1 * rng.standard_normal(shape)
    elif '.act.1.' in key:
        value = 0.3 * rng.standard_normal(shape)
    elif len(shape) >= 2:
        value = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    elif key.endswith('.gamma'):
        value = rng.uniform(0.1, 0.5, shape)
    elif key.endswith('weight'):
        value = rng.uniform(0.5, 1.5, shape)
    else:
        value = 0.1 * rng.standard_normal(shape)
    return np.asarray(value, np.float32)


def image(shape: tuple, seed: int = 0) -> Tensor:
    """Standard normal input."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Fill every state-dict entry, BN statistics and layer scale included, so that no fold is trivial."""
    for key, value in model.state_dict().items():
        value.copy_(torch.from_numpy(fill(key, tuple(value.shape))))
    return model


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over the L2 norm of the reference."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())
