"""Fused blocks and backbones against the same computed layer by layer, in float64."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmunireplknet.ops import pointwise

from ..procedural import image, relative_error
from .fused_cases import DIM, block, check, check_model, differences, figures, layered, map_of, reference, results, spy
from .tiny import blocks, tiny

pytestmark = pytest.mark.usefixtures('cpp')
KERNELS = (3, 5, 13)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return spy(monkeypatch)


# ------------------------------------------------------------------------------------------ modes


@pytest.mark.parametrize('mode', ['train', 'eval', 'norm_eval'])
@pytest.mark.parametrize('kernel', KERNELS)
def test_modes(kernel: int, mode: str, fused: list[str]) -> None:
    model, x = block(kernel).train(mode != 'eval'), map_of()
    for module in model.modules():
        if mode == 'norm_eval' and isinstance(module, _BatchNorm):
            module.eval()
    check_model(model, x)
    large = ['batch' if mode == 'train' else 'merged'] if kernel == 13 else []
    assert fused == ['block', *large]


@pytest.mark.parametrize('still', ['norm', 'pwconv2.2', 'dwconv.origin_bn', 'dwconv.dil_bn_k3_5'])
@pytest.mark.parametrize('training', [True, False])
def test_one_norm_in_another_mode(still: str, training: bool, fused: list[str]) -> None:
    model, x = block().train(training), map_of()
    model.get_submodule(still).train(not training)
    check_model(model, x)
    assert fused[0] == 'block'
    assert len(fused) == (1 if 'dwconv' in still else 2)  # branches of both kinds are computed one by one


@pytest.mark.parametrize('kernel', KERNELS)
def test_deploy_form(kernel: int, fused: list[str]) -> None:
    """Folded from the training form; with and without gradients, and with a drop path in training."""
    model, x = block(kernel, drop_path_rate=0.5).eval(), map_of(8)
    exact = layered(model).double()(x.double()).detach()
    model.switch_to_deploy()
    with torch.no_grad():
        assert relative_error(model(x), exact) < 1e-5
    assert relative_error(model(x).detach(), exact) < 1e-5
    check_model(model, x)
    model.train()
    check(results(model, x), results(layered(model), x), 2e-5)
    assert fused == ['block'] * 4


@pytest.mark.parametrize('mode', ['train', 'eval', 'deploy'])
def test_without_gradients(mode: str, fused: list[str]) -> None:
    """Maps in between are overwritten then; the input is not, and outputs and statistics are the same."""
    model = tiny(deploy=mode == 'deploy').train(mode == 'train')
    other, x = layered(model), image((2, 3, 64, 64)).contiguous(memory_format=torch.channels_last)
    kept = x.clone()
    maps: list[Tensor] = []
    for part in blocks(model):
        part.register_forward_hook(lambda _, args, y: maps.extend((args[0], args[0].clone(), y, y.clone())))
    with torch.no_grad():
        outs, expected = model(x), other(x)
    assert torch.equal(x, kept)
    assert len(maps) == 24
    assert all(torch.equal(a, b) for a, b in zip(maps[::2], maps[1::2], strict=True))
    for a, b in zip(outs, expected, strict=True):
        assert relative_error(a, b) < 1e-5
    for (name, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
        assert relative_error(a, b) < 1e-6 or torch.equal(a, b), name
    assert fused.count('block') == 6


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    'options',
    [
        dict(layer_scale_init_value=None),
        dict(branches=()),
        dict(branches=[(5, 1), (3, 2)]),
        dict(norm_cfg=dict(type='BN', affine=False)),
        dict(norm_cfg=dict(type='BN', momentum=None)),
        dict(norm_cfg=dict(type='BN', momentum=0.3, eps=0.1)),
        dict(norm_cfg=dict(type='BN', track_running_stats=False)),
        dict(norm_cfg=dict(type='BN', requires_grad=False)),
        dict(norm_cfg=dict(type='SyncBN')),  # without a process group
        dict(with_cp=True),
    ],
    ids=str,
)
@pytest.mark.parametrize('training', [True, False])
def test_options(options: dict, training: bool, fused: list[str]) -> None:
    """Over two steps, so that the second sees the running statistics of the first."""
    model, x = block(7, **options).train(training), map_of()
    expected = reference(model, x, steps=2)
    results(model, x)
    check(results(model, x), expected)
    counts = {int(b) for name, b in model.named_buffers() if 'tracked' in name}
    assert counts <= {2 if training else 0}
    assert fused.count('block') == (4 if options.get('with_cp') else 2)


def bn_layers(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


@pytest.mark.parametrize('missing', ['weight', 'bias'])
@pytest.mark.parametrize('training', [True, False])
def test_half_of_an_affine_norm(missing: str, training: bool) -> None:
    """As of BatchNorm2d(bias=False), which has ``affine`` set."""
    model = block(7).train(training)
    for norm in bn_layers(model):
        norm.register_parameter(missing, None)
    check_model(model, map_of())


@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize('change', [dict(track_running_stats=False), dict(num_batches_tracked=None)], ids=str)
def test_tracking_changed_later(change: dict, momentum: float | None) -> None:
    """Running statistics that are not to be updated, and batches that are not counted."""
    model, x = block(7, norm_cfg=dict(type='BN', momentum=momentum)), map_of()
    for norm in bn_layers(model):
        for name, value in change.items():
            setattr(norm, name, value)
    before = {name: b.clone() for name, b in model.named_buffers()}
    check_model(model, x)
    still = 'track_running_stats' in change or momentum is None
    assert all(torch.equal(b, before[name]) == still for name, b in model.named_buffers())


@pytest.mark.parametrize('name', ['norm', 'pwconv2.2'])
@pytest.mark.parametrize('fused', [True, False])
def test_running_statistics_changed_before_the_backward_pass(name: str, fused: bool) -> None:
    """The gradient would be another one's, and nobody would know."""
    model = block(3, fused=fused).eval()
    y = model(map_of())
    model.get_submodule(name).running_mean.add_(5)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.sum().backward()


def test_running_statistics() -> None:
    """Equal to those of the layers, within 1e-6."""
    model = block()
    other = layered(model)
    for seed in range(3):
        found, expected = (results(m, map_of(seed=seed)) for m in (model, other))
    assert len(found.buffers) == 3 * 8
    for name, b in found.buffers.items():
        assert relative_error(b, expected.buffers[name]) < 1e-6, name


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('with_cp', [True, False])
def test_drop_path(training: bool, with_cp: bool) -> None:
    """The same seed drops the same samples; those that are dropped pass unchanged."""
    model, x = block(drop_path_rate=0.5, with_cp=with_cp).train(training), map_of(8)
    other = layered(model)
    for seed in range(3):
        found = results(model, x, seed)
        check(found, results(other, x, seed), 2e-5)
    dropped = [torch.equal(a, b) for a, b in zip(found.outputs[0], x, strict=True)]
    assert any(dropped) == training
    assert not all(dropped)


def test_drop_path_of_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left is divided by the probability to stay as exactly as in float32."""
    model, scales, normalize = block(3, drop_path_rate=0.3, layer_scale_init_value=None), [], pointwise.normalize
    monkeypatch.setattr(pointwise, 'normalize', lambda *args: scales.append(args[4]) or normalize(*args))
    model.bfloat16()(map_of(8).bfloat16())
    assert {float(scale) for scale in scales[0].flatten()} == {0.0, float(torch.tensor(1.0).div(0.7))}


@pytest.mark.parametrize('frozen', ['', 'dwconv', 'norm', 'se', 'pwconv1', 'act', 'pwconv2', 'gamma'])
@pytest.mark.parametrize('training', [True, False])
def test_frozen_parameters(frozen: str, training: bool) -> None:
    """They get no gradient, and the others the same as ever; '' freezes all, which leaves that of the input."""
    model, x = block(7).train(training), map_of()
    expected = reference(model, x)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    found = results(model, x)
    assert found.grads.keys() == {name for name in expected.grads if not name.startswith(frozen)}
    check(found, expected._replace(grads={name: expected.grads[name] for name in found.grads}))


def test_input_without_gradient() -> None:
    model, x = block(), map_of()
    expected = reference(model, x)
    model(x).backward(image(tuple(x.shape), 9))
    assert x.grad is None
    found = expected._replace(grads={name: p.grad for name, p in model.named_parameters()})
    check(found, expected)


@pytest.mark.parametrize('shape', [(1, DIM, 7, 7), (2, DIM, 1, 1), (5, DIM, 3, 2), (1, DIM, 40, 33)], ids=str)
@pytest.mark.parametrize('training', [True, False])
def test_sizes(shape: tuple, training: bool) -> None:
    model = block().train(training)
    x = image(shape).contiguous(memory_format=torch.channels_last)
    expected, own = reference(model, x), results(layered(model), x)
    found, limits = differences(results(model, x), expected), differences(own, expected)
    # Two values a channel leave gradients that are all but cancelled: there the layers are no more exact.
    assert {n: e for n, e in found.items() if not e < 1e-5 + 3 * limits[n]} == {}


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('momentum', [0.1, None])
def test_no_images(momentum: float | None, training: bool) -> None:
    """Empty maps, zeros as gradients, and running statistics as the layers leave them."""
    model, x = block(norm_cfg=dict(type='BN', momentum=momentum)).train(training), map_of()[:0]
    expected, found = results(layered(model), x), results(model, x)
    assert found.outputs[0].shape == found.input_grad.shape == x.shape
    assert found.grads.keys() == expected.grads.keys()
    assert not any(grad.any() for grad in found.grads.values())
    assert all(torch.equal(b, expected.buffers[name]) for name, b in found.buffers.items())


# ------------------------------------------------------------------------------------------ dtypes


def test_double_precision(fused: list[str]) -> None:
    model, x = block().double(), map_of().double()
    check_model(model, x, 1e-10)
    assert fused == ['batch']


def compare_16_bits(model: nn.Module, dtype: torch.dtype, autocast: bool) -> None:
    """Means over some inputs of the errors against float64: those of fused blocks are no larger than of the layers."""
    errors = torch.zeros(2, 4)
    for seed in range(4):
        x = map_of(seed=seed).to(torch.float32 if autocast else dtype)
        exact = reference(model, x)
        for i, net in enumerate((copy.deepcopy(model), layered(model))):
            with torch.autocast('cpu', dtype, enabled=autocast):
                actual = results(net, x)
            assert {t.dtype for t in actual.grads.values()} == {model.norm.weight.dtype}
            errors[i] += torch.tensor(figures(actual, exact))
    assert (errors[0] <= errors[1] * 1.05 + 1e-5).all(), errors / 4


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('kernel', [3, 13])
def test_autocast(kernel: int, dtype: torch.dtype, training: bool, fused: list[str]) -> None:
    compare_16_bits(block(kernel).train(training), dtype, autocast=True)
    assert fused[0] == 'block'


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('kernel', [3, 13])
def test_parameters_in_bfloat16(kernel: int, training: bool, fused: list[str]) -> None:
    compare_16_bits(block(kernel).train(training).bfloat16(), torch.bfloat16, autocast=False)
    assert fused[0] == 'block'


# ------------------------------------------------------------------------------------------ backbones


@pytest.mark.parametrize(
    'options',
    [{}, dict(norm_eval=True), dict(frozen_stages=2), dict(drop_path_rate=0.4), dict(with_cp=True), dict(deploy=True)],
    ids=str,
)
@pytest.mark.parametrize('training', [True, False])
def test_backbone(options: dict, training: bool, fused: list[str]) -> None:
    model, x = tiny(**options).train(training), image((3, 3, 64, 64))
    other = layered(model)
    for seed in range(2):
        found, expected = results(model, x, seed), results(other, x, seed)
    assert max(figures(found, expected)) < 2e-5  # single precision on both sides, over six blocks and two steps
    assert all(torch.equal(b, expected.buffers[name]) for name, b in found.buffers.items() if 'tracked' in name)
    assert fused.count('block') >= 12


@pytest.mark.slow
@pytest.mark.parametrize('kind', [torch.optim.SGD, torch.optim.AdamW])
def test_fifty_steps(kind: type, fused: list[str]) -> None:
    """Losses agree to 1e-4 at every step, and do fall."""
    x, target = image((4, 3, 64, 64)), image((4, 20, 2, 2), 1)
    losses = []
    for options in ({}, dict(fused=False)):
        model = tiny(out_indices=(3,), **options).train()
        rate = dict(lr=0.02, momentum=0.9) if kind is torch.optim.SGD else dict(lr=1e-3)
        optimizer = kind([p for p in model.parameters() if p.requires_grad], **rate)
        losses.append([])
        for _ in range(50):
            optimizer.zero_grad()
            loss = (model(x)[0] - target).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert fused.count('block') == 50 * 6
