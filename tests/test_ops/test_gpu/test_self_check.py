"""The check that every GPU makes before the kernels are first used passes with the shipped ones."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from mmunireplknet.ops.self_check import self_check

from .interpreted import NAME


@pytest.mark.slow
@pytest.mark.parametrize('part', ['convolutions', 'block', 'pointwise'])
def test_passes(gpu: SimpleNamespace, part: str) -> None:
    assert self_check('triton', importlib.import_module(f'{NAME}.backend'), torch.device('cpu'), part) == ''
