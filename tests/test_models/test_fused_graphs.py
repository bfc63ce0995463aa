"""Fused blocks in what looks through a model or copies it: compilation, torch.func, tracing, export, pickling."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mmunireplknet.models.block import UniRepLKNetBlock

from ..procedural import image, relative_error
from ..test_ops.conftest import cpp  # noqa: F401
from .fused_cases import block, check, figures, layered, map_of, reference, results
from .tiny import tiny

pytestmark = pytest.mark.usefixtures('cpp')


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compiled before, and no wish for a backend, which compiled code takes for a constant."""
    monkeypatch.delenv('MMUNI_DW_BACKEND', raising=False)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('kernel', [3, 13])
def test_compile_a_block(kernel: int, training: bool) -> None:
    """In one graph with its backward pass and the update of the statistics, over two steps."""
    eager = block(kernel).train(training)
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


def graph_of(model: nn.Module, x: Tensor) -> set[str]:
    """Names of the operators in the forward graph, and of those that call them."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend=torch._dynamo.backends.common.aot_autograd(fw_compiler=keep))(x)
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    return {str(node.target) for node in nodes if node.op == 'call_function'}


def test_compiled_code_is_fused() -> None:
    called = graph_of(block(), map_of().requires_grad_())
    assert {'mmuni.dilated_reparam_forward.default', 'mmuni_cpu.apply.default', 'mmuni_cpu.sums.default'} <= called


@pytest.mark.parametrize('mode', ['train', 'eval', 'deploy'])
def test_compile_without_gradients(mode: str) -> None:
    """Maps in between are overwritten then, and still nothing else is."""
    model = tiny(deploy=mode == 'deploy').train(mode == 'train')
    expected, x = layered(model), image((2, 3, 64, 64))
    kept = x.clone()
    with torch.no_grad():
        outs = torch.compile(model, fullgraph=True, backend='aot_eager')(x)
        again = expected(x)
    assert torch.equal(x, kept)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(outs, again, strict=True))
    for (name, a), b in zip(model.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(a, b) or relative_error(a, b) < 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('dynamic', [None, True])
def test_compile_a_backbone(training: bool, dynamic: bool | None) -> None:
    """Of two sizes, the second of which recompiles."""
    eager = tiny().train(training)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager', dynamic=dynamic)
    for size in ((64, 64), (96, 64)):
        x = image((2, 3, *size))
        outs, expected = compiled(x), eager(x)
        assert all(relative_error(a.detach(), b.detach()) < 2e-5 for a, b in zip(outs, expected, strict=True))
    sum(y.square().mean() for y in outs).backward()
    sum(y.square().mean() for y in expected).backward()
    pairs = [(a.grad, b.grad) for a, b in zip(model.parameters(), eager.parameters(), strict=True)]
    assert relative_error(*(torch.cat([g.flatten() for g in side]) for side in zip(*pairs, strict=True))) < 2e-5
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), eager.buffers(), strict=True) if not a.dim())


@pytest.mark.slow
def test_compile_by_inductor() -> None:
    eager = block()
    model, x = copy.deepcopy(eager), map_of()
    expected = results(eager, x)
    y = torch.compile(model, fullgraph=True)(x)
    y.backward(image(tuple(y.shape), 9))
    assert relative_error(y.detach(), expected.outputs[0]) < 1e-6
    pairs = [(p.grad, expected.grads[name]) for name, p in model.named_parameters()]
    assert relative_error(*(torch.cat([g.flatten() for g in side]) for side in zip(*pairs, strict=True))) < 1e-5


# ------------------------------------------------------------------------------------------ torch.func


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('kernel', [3, 13])
def test_func_grad(kernel: int, training: bool) -> None:
    """The gradients of autograd, which silently would be none for operators that torch.func cannot look through."""
    model, x = block(kernel).train(training), map_of()
    # In training the statistics are replaced, not updated: torch.func refuses to change what it does not know.
    params = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    expected = reference(model, x)

    def loss(params: dict, buffers: dict, x: Tensor) -> Tensor:
        y = torch.func.functional_call(model, (params, buffers), (x,))
        return (y * image(tuple(y.shape), 9)).sum()

    grads, (_, grad_x) = (
        torch.func.grad(loss, argnums=(0,))(params, buffers, x)[0],
        (
            None,
            torch.func.grad(loss, argnums=2)(params, {n: b.clone() for n, b in model.named_buffers()}, x),
        ),
    )
    found = expected._replace(grads=grads, input_grad=grad_x)
    check(found, expected)


@pytest.mark.parametrize('kernel', [3, 13])
def test_forward_mode(kernel: int) -> None:
    model, x = block(kernel).eval(), map_of()
    _, tangent = torch.func.jvp(model, (x,), (map_of(seed=1),))
    _, exact = torch.func.jvp(layered(model).double(), (x.double(),), (map_of(seed=1).double(),))
    assert relative_error(tangent.detach(), exact.detach()) < 1e-5


def test_functional_call_without_transforms() -> None:
    """Weights that live for one call only, as in a Monte Carlo over weights: no result may be that of another."""
    models = [block(13).eval(), block(13, branches=()).eval()]
    for model in models:
        weight, other, x = model.dwconv.lk_origin.weight.detach().clone(), layered(model), map_of()
        for grad in (False, True):
            for scale in range(1, 9):
                with torch.set_grad_enabled(grad):
                    mine, expected = (
                        torch.func.functional_call(net, {'dwconv.lk_origin.weight': weight * scale}, (x,))
                        for net in (model, other)
                    )
                assert relative_error(mine.detach(), expected.detach()) < 1e-5, scale


# ------------------------------------------------------------------------------------------ tracing and export


@pytest.mark.parametrize('deploy', [False, True])
def test_trace(deploy: bool) -> None:
    model = tiny(deploy=deploy).eval()
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


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('deploy', [False, True])
def test_export(deploy: bool, strict: bool) -> None:
    model, x = tiny(deploy=deploy).eval(), image((2, 3, 64, 64))
    expected = model(x)
    program = torch.export.export(model, (x,), strict=strict)
    called = {str(node.target) for node in program.graph.nodes if node.op == 'call_function'}
    assert 'aten.conv2d.default' in called
    assert not [name for name in called if name.startswith(('mmuni', 'mkldnn'))]
    assert len([name for name in called if 'batch_norm' in name]) == (0 if deploy else 1)
    for a, b in zip(program.module()(x), expected, strict=True):
        assert relative_error(a.detach(), b.detach()) < 1e-5


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
    model, x = tiny().train(training), image((2, 3, 64, 64))
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
    assert isinstance(model.first, UniRepLKNetBlock)
