"""What is not computed by the fused operators: it is right all the same, and whoever looks into a block sees it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from mmunireplknet.models import dilated_reparam
from mmunireplknet.models.dilated_reparam import DilatedReparamBlock

from ..procedural import image, randomise, relative_error
from .fused_cases import DIM, block, check, check_model, layered, map_of, reference, results, spy
from .tiny import tiny

pytestmark = pytest.mark.usefixtures('cpp')


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return spy(monkeypatch)


def test_contiguous_maps_are_computed_by_the_layers(fused: list[str]) -> None:
    model, x = block(), map_of().contiguous()
    check_model(model, x)
    assert fused == ['batch']


@pytest.mark.parametrize('norm_cfg', [dict(type='GN', num_groups=3), dict(type='LN')], ids=str)
@pytest.mark.parametrize('training', [True, False])
def test_other_norms(norm_cfg: dict, training: bool, fused: list[str]) -> None:
    model, x = block(norm_cfg=norm_cfg).train(training), map_of()
    check_model(model, x)
    assert fused == []


def test_an_unknown_subclass_of_bn(fused: list[str]) -> None:
    """It might compute anything, and this one does."""

    class Twice(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model, x = block(), map_of()
    model.norm.__class__ = Twice
    check_model(model, x)
    assert fused == ['batch']
    model.dwconv.origin_bn.__class__ = Twice
    check_model(model, x)
    assert fused == ['batch']


@pytest.mark.parametrize(
    'name', ['act.0', 'act.1', 'pwconv1.1', 'pwconv2.0', 'se', 'se.down', 'dwconv.lk_origin', 'dwconv.dil_conv_k3_4']
)
def test_a_replaced_layer_is_computed(name: str) -> None:
    """An adapter, or another activation, in the place of a layer."""
    model, x = block().eval(), map_of()
    layer = model.get_submodule(name)

    class Adapted(type(layer)):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.5

    layer.__class__ = Adapted
    error = relative_error(model(x).detach(), layered(model)(x).detach())
    assert error < 1e-5


@pytest.mark.parametrize('name', ['pwconv1', 'act', 'pwconv2'])
def test_an_appended_layer_is_computed(name: str) -> None:
    model, x = block().eval(), map_of()
    model.get_submodule(name).append(nn.Hardtanh(-0.1, 0.1))
    error = relative_error(model(x).detach(), layered(model)(x).detach())
    assert error < 1e-5


def test_another_drop_path_is_computed() -> None:
    """One that drops pixels, not samples."""
    model, x = block(3), map_of()
    model.drop_path = nn.Dropout(0.5)
    expected = results(layered(model), x)
    check(results(model, x), expected, 2e-5)


INSIDE = ['dwconv.lk_origin', 'dwconv.origin_bn', 'dwconv.dil_bn_k3_4', 'norm', 'se', 'se.down', 'pwconv1.1', 'act']
INSIDE += ['act.0', 'act.1', 'pwconv2', 'pwconv2.0', 'pwconv2.2']


@pytest.mark.parametrize('name', INSIDE)
def test_a_hook_inside_is_called(name: str, fused: list[str]) -> None:
    """With the map that the layer computes, in this block and not in others; removed, it is fused again."""
    models, x = [block(), block()], map_of()
    chain = nn.Sequential(*models)
    expected, seen = reference(chain, x), []
    handle = models[0].get_submodule(name).register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    check(results(chain, x), expected, 3e-5)
    assert len(seen) == 1
    assert all(t.shape[0] == 3 and t.numel() >= 3 for t in seen[0])
    assert fused.count('block') == (2 if 'dwconv' in name else 1)
    handle.remove()
    results(chain, x)
    assert len(seen) == 1
    assert fused.count('block') == (4 if 'dwconv' in name else 3)


@pytest.mark.parametrize(
    'register',
    ['register_forward_pre_hook', 'register_full_backward_hook', 'register_full_backward_pre_hook'],
)
def test_every_kind_of_hook_is_called(register: str) -> None:
    model, seen = block(), []
    for name in ('pwconv1.1', 'dwconv.lk_origin'):
        getattr(model.get_submodule(name), register)(lambda *args: seen.append(len(args)))
    results(model, map_of())
    assert len(seen) == 2


@pytest.mark.parametrize('name', [name for name in INSIDE if name != 'dwconv.dil_bn_k3_4'])
def test_a_forward_of_its_own_is_called(name: str) -> None:
    """Set on the layer itself, as libraries do that wrap layers."""
    model, x = block().eval(), map_of()
    layer = model.get_submodule(name)
    forward = layer.forward
    layer.forward = lambda *args: forward(*args) * 1.5
    y = model(x).detach()
    assert relative_error(y, layered(model)(x).detach()) < 1e-5
    assert relative_error(y, layered(block().eval())(x).detach()) > 1e-3


def test_hooks_on_all_modules_are_called(fused: list[str]) -> None:
    """Those that torch calls for every module see the layers; ``FlopCounterMode``, which has some, changes nothing."""
    model, x, seen = block(), map_of(), set()
    handle = register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        model(x)
    finally:
        handle.remove()
    assert seen == {*model.modules()}
    assert fused == []
    with FlopCounterMode(display=False):
        model(x)
    assert fused == ['block', 'batch']


def test_a_hook_on_the_drop_path_sees_the_map() -> None:
    model, seen = block(drop_path_rate=0.5), []
    model.drop_path.register_forward_hook(lambda _, args, y: seen.append(y.shape))
    model(map_of())
    assert seen == [map_of().shape]


def test_fused_is_an_option(fused: list[str]) -> None:
    check_model(block(fused=False), map_of())
    results(tiny(fused=False).train(), image((2, 3, 64, 64)))
    assert fused == []


def test_torch_as_backend(fused: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the compiled kernels is used; the Dilated Reparam Block is one operator all the same."""
    monkeypatch.setenv('MMUNI_DW_BACKEND', 'torch')
    for name in ('apply', 'sums', 'forward', 'block_forward'):
        monkeypatch.setattr(torch.ops.mmuni_cpu, name, None)
    for training in (True, False):
        model, x = block().train(training), map_of()
        check_model(model, x)
    assert fused == ['batch', 'merged']


def test_it_cannot_be_differentiated_twice() -> None:
    for model in (block(), block(3)):
        x = map_of().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r'cannot be differentiated twice .* fused=False'):
            grad.sum().backward()


@pytest.mark.parametrize('training', [True, False])
def test_norms_without_any_tensor_on_another_device(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in for their scales and shifts is made where the map is."""
    norm_cfg, given = dict(type='BN', affine=False, track_running_stats=False), []
    model = DilatedReparamBlock(4, 13, norm_cfg=norm_cfg).to('meta').train(training)
    function = dilated_reparam.dilated_reparam_conv
    monkeypatch.setattr(dilated_reparam, 'dilated_reparam_conv', lambda *args: given.append(args) or function(*args))
    assert model(torch.empty(2, 4, 9, 9, device='meta')).device.type == 'meta'
    assert {t.device.type for tensors in given[0][3:5] for t in tensors} == {'meta'}


@pytest.fixture
def reductions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """One entry for each all-reduce, in a group of one process that looks as if it were of two."""
    calls: list[None] = []
    dist.init_process_group('gloo', init_method=(tmp_path / 'store').as_uri(), rank=0, world_size=1)
    all_reduce = dist.all_reduce
    monkeypatch.setattr(dist, 'get_world_size', lambda group=None: 2)
    monkeypatch.setattr(dist, 'all_reduce', lambda *args, **options: calls.append(None) or all_reduce(*args, **options))
    yield calls
    dist.destroy_process_group()


@pytest.mark.parametrize('fused', [True, False])
def test_no_synchronisation_in_evaluation(fused: bool, reductions: list[None]) -> None:
    """Not even of the statistics of the batch, which norms without running ones use then."""
    model = block(norm_cfg=dict(type='SyncBN', track_running_stats=False), fused=fused)
    model.eval()(map_of())
    assert not reductions
    model.train()(map_of())
    assert reductions


@pytest.mark.parametrize('name', ['origin_bn', 'dil_bn_k3_4'])
def test_a_norm_of_another_group(name: str, fused: list[str], reductions: list[None]) -> None:
    """A plain BN among synchronised ones stays one."""
    model = block(norm_cfg=dict(type='SyncBN')).dwconv
    model(map_of())
    assert (fused, len(reductions)) == (['batch'], 1)
    setattr(model, name, randomise(nn.BatchNorm2d(DIM)))
    model(map_of())
    assert (fused, len(reductions)) == (['batch'], 1 + len(model.branches))
