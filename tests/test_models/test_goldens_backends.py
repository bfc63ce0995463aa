"""The official implementation's outputs, gradients and BN updates with every backend, fused and layer by layer."""

import functools
from collections.abc import Iterator

import pytest
from torch import Tensor

from mmunireplknet import UniRepLKNet
from mmunireplknet.models.block import UniRepLKNetBlock

from ..procedural import GOLDENS
from . import test_goldens

pytestmark = pytest.mark.usefixtures('cpp')
ARCHS = [arch if arch == 'a' else pytest.param(arch, marks=pytest.mark.slow) for arch in GOLDENS]


@pytest.fixture(params=['auto', 'torch', 'cpp'])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv('MMUNI_DW_BACKEND', request.param)
    return request.param


@pytest.fixture(params=[True, False], ids=['fused', 'layers'])
def form(request: pytest.FixtureRequest, backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models are built in that form; what they compute is seen to be fused, or not."""
    calls: list[None] = []
    method = UniRepLKNetBlock._forward_fused

    def spy(self: UniRepLKNetBlock, x: Tensor) -> Tensor:
        calls.append(None)
        return method(self, x)

    monkeypatch.setattr(UniRepLKNetBlock, '_forward_fused', spy)
    monkeypatch.setattr(test_goldens, 'UniRepLKNet', functools.partial(UniRepLKNet, fused=request.param))
    yield
    assert bool(calls) == (request.param and backend != 'torch')


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('arch', ARCHS)
@pytest.mark.usefixtures('form')
def test_maps(arch: str, deploy: bool) -> None:
    test_goldens.test_maps(arch, deploy, channels_last=None)


@pytest.mark.parametrize('arch', ARCHS)
@pytest.mark.usefixtures('form')
def test_training_step(arch: str) -> None:
    test_goldens.test_training_step(arch, with_cp=False)
