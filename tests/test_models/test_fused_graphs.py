"""Fused blocks in what looks through a model or copies it: compilation, torch.func, tracing, export, pickling."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn

from mmunireplknet.models.block import UniRepLKNetBlock

from ..procedural import image, relative_error
from .fused_cases import Results, block, check, figures, layered, map_of, reference, results, small

pytestmark = pytest.mark.usefixtures('cpp')


@pytest.fixture(autouse=True)
def fresh(no_wish: None) -> None:
    """Nothing compiled before, nor with a wish for a backend, which compiled code takes for a constant."""
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------ torch.compile


def dilated_block(kernel: int = 7, **options: object) -> UniRepLKNetBlock:
    """With the fewest branches, each of which takes time to compile."""
    return block(kernel, branches=[(3, 2)], **options)


@pytest.mark.parametrize(
    ('make', 'training'),
    [pytest.param(block, True, marks=pytest.mark.slow), (dilated_block, True), (dilated_block, False)],
)
def test_compile_a_block(make: Callable, training: bool) -> None:
    """In one graph with its backward pass and the update of the statistics, over two steps."""
    eager = make(kernel=3 if make is block else 7).train(training)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    for seed in range(2):
        x = map_of(seed=seed).requires_grad_()
        y = compiled(x)
        (grad,) = torch.autograd.grad(y, x, image(tuple(y.shape), 9), retain_graph=True)
        model.zero_grad()
        y.backward(image(tuple(y.shape), 9))
        expected = results(eager, x)
        assert relative_error(y.detach(), expected.outputs[0]) < 1e-6
        assert relative_error(grad, expected.input_grad) < 1e-6
    for name, p in model.named_parameters():
        assert relative_error(p.grad, expected.grads[name]) < 1e-5 or expected.grads[name].norm() < 1e-3, name
    for name, b in model.named_buffers():
        assert torch.equal(b, expected.buffers[name]) or relative_error(b, expected.buffers[name]) < 1e-6, name


def test_compiled_code_is_fused() -> None:
    called = set()

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable:
        for node in graph.graph.nodes:
            called.update({str(node.target), *map(str, node.args[:1])})
        return graph.forward

    compiler = torch._dynamo.backends.common.aot_autograd(fw_compiler=keep)
    torch.compile(dilated_block(), fullgraph=True, backend=compiler)(map_of().requires_grad_())
    expected = {'mmuni.dilated_reparam_forward', 'mmuni_cpu.apply', 'mmuni_cpu.sums'}
    assert {f'{name}.default' for name in expected} <= called


@pytest.mark.parametrize('mode', ['train', 'deploy'])
def test_compile_without_gradients(mode: str) -> None:
    """Maps in between are overwritten then, and still nothing else is."""
    options = dict(deploy=True, layer_scale_init_value=None) if mode == 'deploy' else {}
    model = dilated_block(**options).train(mode == 'train')
    expected, x = layered(model), map_of()
    kept = x.clone()
    with torch.no_grad():
        y = torch.compile(model, fullgraph=True, backend='aot_eager')(x)
        assert relative_error(y, expected(x)) < 1e-5
    assert torch.equal(x, kept)
    for (name, a), b in zip(model.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(a, b) or relative_error(a, b) < 1e-6, name


@pytest.mark.slow
def test_compile_for_any_size() -> None:
    eager = block(3)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend='aot_eager', dynamic=True)
    for size in ((17, 19), (9, 30)):
        x = image((2, 12, *size)).contiguous(memory_format=torch.channels_last)
        assert max(figures(results(compiled, x), results(eager, x))) < 1e-6


@pytest.mark.slow
def test_compile_a_backbone() -> None:
    eager = small()
    compiled, x = torch.compile(copy.deepcopy(eager), fullgraph=True, backend='aot_eager'), image((2, 3, 64, 64))
    assert max(figures(results(compiled, x), results(eager, x))) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('grad', [True, False])
def test_compile_by_inductor(grad: bool) -> None:
    """The default of torch.compile, with a kernel of each kind: a plain one and a Dilated Reparam Block."""
    eager = block(3) if grad else dilated_block()
    compiled, x = torch.compile(copy.deepcopy(eager), fullgraph=True), map_of()
    if grad:
        assert max(figures(results(compiled, x), results(eager, x))) < 1e-6
    with torch.no_grad():
        assert relative_error(compiled(x), eager(x)) < 1e-6


# ------------------------------------------------------------------------------------------ torch.func


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('kernel', [3, 13])
def test_func_grad(kernel: int, training: bool) -> None:
    """The gradients of autograd, which silently would be none for operators that torch.func cannot look through."""
    model, x = block(kernel).train(training), map_of()
    params = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    expected = reference(model, x)

    def loss(params: dict, buffers: dict, x: Tensor) -> Tensor:
        y = torch.func.functional_call(model, (params, buffers), (x,))
        return (y * image(tuple(y.shape), 9)).sum()

    grads, grad_x = torch.func.grad(loss, argnums=(0, 2))(params, buffers, x)
    check(Results(expected.outputs, grad_x, grads, buffers), expected)


@pytest.mark.parametrize('kernel', [3, 13])
def test_forward_mode(kernel: int) -> None:
    model, x = block(kernel).eval(), map_of()
    _, tangent = torch.func.jvp(model, (x,), (map_of(seed=1),))
    _, exact = torch.func.jvp(layered(model).double(), (x.double(),), (map_of(seed=1).double(),))
    assert relative_error(tangent.detach(), exact.detach()) < 1e-5


@pytest.mark.parametrize('grad', [False, True])
def test_functional_call_without_transforms(grad: bool) -> None:
    """Weights that live for one call only, as in a Monte Carlo over weights: no result may be that of another."""
    model, x = block(13, branches=()).eval(), map_of()
    weight, other = model.dwconv.lk_origin.weight.detach().clone(), layered(model)

    def call(net: nn.Module, scale: float) -> Tensor:
        with torch.set_grad_enabled(grad):
            return torch.func.functional_call(net, {'dwconv.lk_origin.weight': weight * scale}, (x,)).detach()

    expected = [call(other, scale) for scale in range(1, 9)]
    errors = [relative_error(call(model, scale), y) for scale, y in enumerate(expected, 1)]
    assert max(errors) < 1e-5


# ------------------------------------------------------------------------------------------ tracing and export


@pytest.mark.parametrize('deploy', [False, True])
def test_trace(deploy: bool) -> None:
    model = small(deploy=deploy).eval()
    x, other = image((1, 3, 64, 64)), image((2, 3, 96, 64), 1)
    with torch.no_grad():
        model(x)  # a kernel that was merged for this must not get into the trace
        with warnings.catch_warnings():
            warnings.simplefilter('error', torch.jit.TracerWarning)
            traced = torch.jit.trace(model, x)
        kinds = {node.kind() for node in traced.inlined_graph.nodes()}
        assert 'aten::_convolution' in kinds
        assert not [kind for kind in kinds if kind.startswith('mmuni')]
        for value in (x, other):
            assert all(relative_error(a, b) < 1e-5 for a, b in zip(traced(value), model(value), strict=True))


@pytest.mark.parametrize(('deploy', 'strict'), [(False, False), pytest.param(True, True, marks=pytest.mark.slow)])
def test_export(deploy: bool, strict: bool) -> None:
    model, x = small(deploy=deploy).eval(), image((2, 3, 64, 64))
    expected = model(x)
    program = torch.export.export(model, (x,), strict=strict)
    called = {str(node.target) for node in program.graph.nodes if node.op == 'call_function'}
    assert 'aten.conv2d.default' in called
    assert not [name for name in called if name.startswith(('mmuni', 'mkldnn'))]
    assert len([name for name in called if 'batch_norm' in name]) == (0 if deploy else 1)
    for a, b in zip(program.module()(x), expected, strict=True):
        assert relative_error(a.detach(), b.detach()) < 1e-5


@pytest.mark.parametrize('training', [True, False])
def test_meta_device(training: bool) -> None:
    """Shapes without values, and without autocast, which this device does not have."""
    model, x = block().train(training).to('meta'), map_of().to('meta').requires_grad_()
    model(x).sum().backward()
    assert x.grad.shape == x.shape
    with torch.no_grad():
        assert model(x).shape == x.shape


# ------------------------------------------------------------------------------------------ copies


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize('how', [copy.deepcopy, copy.copy, pickled, saved])
@pytest.mark.parametrize('training', [True, False])
def test_copies(how: Callable, training: bool) -> None:
    """They compute the same, also after a kernel was merged, and in their own right after a change."""
    model, x = small().train(training), image((2, 3, 64, 64))
    with torch.no_grad():
        model(x)
        copied = how(model)
        expected = layered(model)(x)
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(copied(x), expected, strict=True))
    if how is not copy.copy:
        with torch.no_grad():
            for p in copied.parameters():
                p.mul_(1.5)
            changed = copied(x)
            assert all(relative_error(a, b) < 1e-5 for a, b in zip(changed, layered(copied)(x), strict=True))
            assert relative_error(changed[0], expected[0]) > 0.1


def test_a_pickle_holds_no_merged_kernel() -> None:
    model = block().eval()
    before = len(pickle.dumps(model))
    with torch.no_grad():
        model(map_of())
    assert len(pickle.dumps(model)) == before


def test_norms_that_mmengine_reverted() -> None:
    """What it makes of torch's SyncBatchNorm for a single process is a class of its own."""
    model, x = revert_sync_batchnorm(nn.SyncBatchNorm.convert_sync_batchnorm(block())), map_of()
    assert type(model.norm).__name__ == '_BatchNormXd'
    check(results(model, x), results(block(), x), 1e-7)
    assert model._is_fusible(x)


def test_a_block_in_another_model() -> None:
    """As part of a model that is not a backbone, with contiguous maps in between."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = block(13), block(3)
            self.middle = nn.Conv2d(12, 12, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.middle(self.first(x)).contiguous(memory_format=torch.channels_last))

    model, x = Net(), map_of()
    expected = results(layered(model), x)
    assert max(figures(results(model, x), expected)) < 2e-5
