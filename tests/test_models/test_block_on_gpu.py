"""Fused blocks as on a GPU, in Triton's interpreter, against the same computed layer by layer, in float64.

The convolutions are torch's. What a GPU alone can do wrong is in ``test_ops/test_on_gpu.py``.
"""

import copy
import importlib.util
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmunireplknet.ops import pointwise_kernels

from ..procedural import image, relative_error
from ..test_ops.triton_pointwise import pointwise_on_gpu
from .fused_cases import DIM, block, check, check_model, differences, layered, reference, results, small

pytestmark = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='needs the package triton')
LAYOUTS = (torch.contiguous_format, torch.channels_last)
GATE, MLP, LAST = ['moments', 'excite', 'apply'], ['sums', 'grn', 'apply'], ['moments', 'affine', 'apply']
FORWARD = {
    'train': [*GATE, *MLP, *LAST],
    'eval': ['sums', *GATE[1:], *MLP, *LAST[1:]],
    'deploy': ['gates', 'apply', *MLP, 'apply'],
}


@pytest.fixture(scope='module')
def triton() -> Iterator[SimpleNamespace]:
    from ..test_ops.test_gpu.interpreted import interpreted_package, interpreting

    with interpreted_package() as modules, interpreting():
        yield modules.backend


@pytest.fixture
def calls(triton: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is computed in Triton from now on."""
    with pointwise_on_gpu(monkeypatch, triton) as calls:
        yield calls


def map_of(layout: torch.memory_format = torch.contiguous_format, n: int = 2, seed: int = 0) -> Tensor:
    return image((n, DIM, 9, 11), seed).contiguous(memory_format=layout)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('mode', ['train', 'eval', 'deploy'])
@pytest.mark.parametrize('kernel', [3, 13])
def test_modes(calls: list[str], kernel: int, mode: str, layout: torch.memory_format) -> None:
    """Outputs, all gradients and statistics; maps and gradients have the layout of the input."""
    model, x = block(kernel, deploy=mode == 'deploy').train(mode == 'train'), map_of(layout)
    expected = reference(model, x)
    found = results(model, x)
    check(found, expected)
    assert found.outputs[0].stride() == found.input_grad.stride() == x.stride()
    assert calls[:3] == (FORWARD['eval'] if mode == 'deploy' else FORWARD[mode])[:3]
    assert calls.count('grad') == (2 if mode == 'deploy' else 3)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('mode', FORWARD)
def test_without_gradients(calls: list[str], mode: str, layout: torch.memory_format) -> None:
    model, x = block(7, deploy=mode == 'deploy').train(mode == 'train'), map_of(layout)
    kept, other = x.clone(), layered(model)
    with torch.no_grad():
        y, expected = model(x), other(x)
    assert relative_error(y, expected) < 1e-5
    assert torch.equal(x, kept)
    assert y.stride() == x.stride()
    assert calls == FORWARD[mode]
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b) or relative_error(a, b) < 1e-6


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('grad', [False, True])
def test_drop_path(calls: list[str], deploy: bool, grad: bool) -> None:
    model, x = block(3, drop_path_rate=0.5, deploy=deploy), map_of(n=8)
    other = layered(model)
    with torch.set_grad_enabled(grad):
        for seed in range(2):
            torch.manual_seed(seed)
            y = model(x).detach()
            torch.manual_seed(seed)
            assert relative_error(y, other(x).detach()) < 1e-5
    assert any(torch.equal(a, b) for a, b in zip(y, x, strict=True))
    assert 'grn' in calls


@pytest.mark.parametrize(
    'options',
    [
        dict(layer_scale_init_value=None),
        dict(branches=()),
        dict(norm_cfg=dict(type='BN', affine=False)),
        dict(norm_cfg=dict(type='BN', momentum=None)),
        dict(norm_cfg=dict(type='BN', track_running_stats=False)),
        dict(norm_cfg=dict(type='SyncBN')),  # without a process group
        dict(with_cp=True),
    ],
    ids=str,
)
def test_options(calls: list[str], options: dict) -> None:
    check_model(block(7, **options), map_of())
    assert calls.count('grn') == (2 if options.get('with_cp') else 1)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('mode', FORWARD)
def test_autocast(calls: list[str], mode: str, dtype: torch.dtype) -> None:
    """No less exact than the layers under autocast; maps between blocks stay in float32, but not what is kept."""
    model, x = block(3, deploy=mode == 'deploy').train(mode == 'train'), map_of()
    exact, layers = reference(model, x), layered(copy.deepcopy(model))
    kept: list[Tensor] = []
    with (
        torch.autocast('cpu', dtype),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        mine = results(model, x)
    with torch.autocast('cpu', dtype):
        theirs = results(layers, x)
    assert mine.outputs[0].dtype == theirs.outputs[0].dtype == torch.float32
    assert {t.dtype for t in kept if t.numel() >= x.numel()} == {dtype}
    errors, others = differences(mine, exact), differences(theirs, exact)
    wrong = {
        name: (e, others[name]) for name, e in errors.items() if not e < 1.2 * others[name] + 4 * torch.finfo(dtype).eps
    }
    assert not wrong, wrong
    with torch.no_grad(), torch.autocast('cpu', dtype):
        assert relative_error(model(x), layers(x)) < torch.finfo(dtype).eps


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('deploy', [False, True])
def test_models_in_16_bits(calls: list[str], deploy: bool, dtype: torch.dtype) -> None:
    model, x = block(3, deploy=deploy).eval(), map_of()
    exact = layered(model).double()(x.double()).detach()
    with torch.no_grad():
        y = model.to(dtype)(x.to(dtype))
        assert y.dtype == dtype
        assert 'grn' in calls
        assert relative_error(y, exact) < 1.2 * relative_error(layered(model)(x.to(dtype)), exact)


def test_a_backbone(calls: list[str]) -> None:
    """Maps of every stage, and the gradients of all parameters."""
    check_model(small(), image((2, 3, 64, 64)))
    assert calls.count('grn') == 4


def test_what_a_block_keeps(calls: list[str]) -> None:
    """Four maps and the hidden layer: 8 maps of C channels; layer by layer it is 18, and 24 with six branches."""
    for kernel, most in ((3, 18), (13, 24)):
        sizes = []
        for fused in (True, False):
            model, x, kept = (
                block(kernel, drop_path_rate=0.1, fused=fused),
                image((2, DIM, 32, 32)).requires_grad_(),
                {},
            )

            def pack(t: Tensor, kept: dict = kept) -> Tensor:
                kept[t.untyped_storage().data_ptr()] = t
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                model(x)
            sizes.append(sum(t.numel() / x.numel() for t in kept.values() if t.numel() >= x.numel()))
        assert sizes == [8, most]


# ------------------------------------------------------------------------------------------ what is not computed so


class Look(TorchDispatchMode):
    """Somebody who wants to see every operator."""

    def __torch_dispatch__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    'case',
    ['not fused', 'torch', 'float64', 'neither layout', 'hook', 'a mode', 'subclass', 'group norm', 'failed before'],
)
def test_layer_by_layer(calls: list[str], case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, seen = block(3, fused=case != 'not fused').eval(), map_of(), []
    if case == 'group norm':
        model = block(3, norm_cfg=dict(type='GN', num_groups=3)).eval()
    exact = layered(model)(x).detach()
    if case == 'torch':
        monkeypatch.setenv('MMUNI_DW_BACKEND', 'torch')
    elif case == 'float64':
        model, x = model.double(), x.double()
    elif case == 'neither layout':
        x = torch.cat([x, x], 3)[..., :11]
    elif case == 'hook':
        model.se.register_forward_hook(lambda *args: seen.append(args))
    elif case == 'subclass':
        x = nn.Parameter(x)
    elif case == 'failed before':
        pointwise_kernels._failures.append('apply')
    with Look() if case == 'a mode' else torch.enable_grad():
        y = model(x).detach()
    assert relative_error(y, exact) < 1e-5
    assert calls == []
    assert bool(seen) == (case == 'hook')
    pointwise_kernels._failures.clear()


@pytest.mark.parametrize('wish', ['triton', 'cuda'])
def test_a_wish_for_a_convolution_on_the_gpu(calls: list[str], wish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('MMUNI_DW_BACKEND', wish)
    assert pointwise_kernels.suits(map_of())


def test_flop_counter(calls: list[str]) -> None:
    """It counts the products that are computed, and changes nothing."""
    counts = []
    for fused in (True, False):
        model = block(3, fused=fused).eval()
        with FlopCounterMode(display=False) as counter:
            model(map_of())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] - 2 * 2 * 2 * DIM * DIM // 4  # those of the SE are in kernels of Triton
    assert 'grn' in calls


def test_what_looks_at_operators_gets_those_of_torch(calls: list[str]) -> None:
    """torch.compile, export, tracing, torch.func, and tensors without memory."""
    torch._dynamo.reset()
    model, x = block(3).eval(), map_of()
    expected = layered(model)(x).detach()
    with torch.no_grad():
        assert relative_error(torch.compile(model, fullgraph=True, backend='aot_eager')(x), expected) < 1e-6
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            assert relative_error(torch.jit.trace(model, x, check_trace=False)(x), expected) < 1e-6
    assert relative_error(torch.export.export(model, (x,)).module()(x).detach(), expected) < 1e-6
    params = {name: p.detach() for name, p in model.named_parameters()}
    loss = lambda params: torch.func.functional_call(model, params, (x,)).sum()  # noqa: E731
    assert torch.func.grad(loss)(params)['gamma'].any()
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(x)).shape == x.shape
    graph = torch.fx.experimental.proxy_tensor.make_fx(model)(x)
    assert relative_error(graph(x).detach(), expected) < 1e-6
    assert calls == []


def test_a_compiled_training_step(calls: list[str]) -> None:
    torch._dynamo.reset()
    model, x = block(3, branches=()), map_of()
    expected = results(layered(model), x)
    check(results(torch.compile(model, fullgraph=True, backend='aot_eager'), x), expected, 1e-5)
    assert calls == []


def test_the_layout_between_blocks(calls: list[str]) -> None:
    """That of the input: nothing turns maps around but the passes themselves."""
    first, second = block(3).eval(), block(3).eval()
    seen: list[tuple] = []
    second.register_forward_pre_hook(lambda layer, args: seen.append(args[0].stride()))
    for layout in LAYOUTS:
        nn.Sequential(first, second)(map_of(layout))
    assert seen == [map_of(layout).stride() for layout in LAYOUTS]


def test_kernels_that_fail_before_a_block_is_recomputed(
    calls: list[str], triton: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recomputation must save what the forward pass has saved, whatever is known by then."""

    def fail(*_: object) -> None:
        raise RuntimeError('ptxas fatal')

    monkeypatch.setattr(triton, 'grn', fail)
    with pytest.warns(UserWarning, match='pointwise layers fail in grn'):
        check_model(block(7, with_cp=True), map_of())
    pointwise_kernels._failures.clear()


def test_kernels_that_fail_in_one_of_several_processes(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are in the all-reduce of the fused operators, which no layer of torch takes part in."""
    x, models = map_of(), {name: block(7, norm_cfg=dict(type=name)) for name in ('BN', 'SyncBN')}
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda group: 2)
    monkeypatch.setattr(models['SyncBN'].norm, 'process_group', object())
    pointwise_kernels._failures.append('apply')
    assert {name: model._is_fusible(x) for name, model in models.items()} == {'BN': False, 'SyncBN': True}
    pointwise_kernels._failures.clear()
