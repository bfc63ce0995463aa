"""The depthwise convolution as an operator of torch: derivatives, compilation, export, vmap and counting of FLOPs."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from mmunireplknet.ops import DepthwiseConv2d, depthwise_conv2d

from ..procedural import image, randomise, relative_error
from .cases import plain

OPS = torch.ops.mmuni
DIMS = [(0, None, None), (3, None, None), (None, 2, None), (None, None, 0), (1, 0, None), (0, None, 1), (4, 4, 1)]


def values(kernel: int = 5, layout: torch.memory_format = torch.contiguous_format) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and bias that require gradients."""
    tensors = (image((2, 3, 6, 7)).contiguous(memory_format=layout), image((3, 1, kernel, kernel), 1), image((3,), 2))
    return tuple(t.requires_grad_() for t in tensors)


def layer(backend: str = 'auto') -> nn.Module:
    """Convolution, norm and activation."""
    conv = DepthwiseConv2d(3, 3, 7, padding=3, groups=3, backend=backend)
    return randomise(nn.Sequential(conv, nn.BatchNorm2d(3), nn.ReLU())).eval()


@pytest.mark.parametrize(('kernel', 'layout'), [(3, torch.channels_last), (5, torch.contiguous_format)], ids=str)
def test_opcheck(kernel: int, layout: torch.memory_format, backend: str) -> None:
    x, weight, bias = values(kernel, layout)
    opcheck(OPS.depthwise_conv2d.default, (x, weight, bias, 1, backend))
    opcheck(OPS.depthwise_conv2d.default, (x, weight, None, 2, backend))
    opcheck(OPS.depthwise_conv2d_input_grad.default, (x, weight, 2, backend))
    opcheck(
        OPS.depthwise_conv2d_weight_grad.default, (x, image(tuple(x.shape), 3).requires_grad_(), kernel, 2, backend)
    )


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64], ids=str)
def test_opcheck_of_other_dtypes(dtype: torch.dtype, backend: str) -> None:
    x, weight, bias = (t.detach().to(dtype).requires_grad_() for t in values())
    opcheck(OPS.depthwise_conv2d.default, (x, weight, bias, 1, backend), test_utils=('test_schema', 'test_faketensor'))
    opcheck(OPS.depthwise_conv2d_weight_grad.default, (x, x, 5, 1, backend), test_utils='test_faketensor')


@pytest.mark.parametrize('dilation', [1, 2])
def test_gradcheck(dilation: int, backend: str) -> None:
    x, weight, bias = image((2, 2, 3, 4)).double(), image((2, 1, 3, 3), 1).double(), image((2,), 2).double()
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    function = lambda *inputs: depthwise_conv2d(*inputs, dilation, backend)  # noqa: E731
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def second_derivatives(function: Callable, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradient of a random product with the gradients of a function that is not linear in the convolution."""
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    out = function(*inputs)
    first = torch.autograd.grad(out, inputs, out.square(), create_graph=True)
    total = sum((g * image(tuple(g.shape), i).to(g.dtype)).sum() for i, g in enumerate(first))
    return torch.autograd.grad(total, inputs)


@pytest.mark.parametrize('dilation', [1, 2])
def test_second_derivatives_in_single_precision(dilation: int, backend: str) -> None:
    inputs = values(7)
    mine = second_derivatives(lambda *inputs: depthwise_conv2d(*inputs, dilation, backend), *inputs)
    exact = second_derivatives(lambda *inputs: plain(*inputs, dilation), *(t.double() for t in inputs))
    assert [t.dtype for t in mine] == [torch.float32] * 3
    for name, a, b in zip(('x', 'weight', 'bias'), mine, exact, strict=True):
        assert relative_error(a, b) < 2e-6, name


@pytest.mark.parametrize('needs', [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_needed(needs: tuple, backend: str) -> None:
    inputs = [t.detach().requires_grad_(need) for t, need in zip(values(), needs, strict=True)]
    with FlopCounterMode(display=False) as counter:
        depthwise_conv2d(*inputs, 1, backend).sum().backward()
    assert [t.grad is not None for t in inputs] == list(needs)
    names = ('depthwise_conv2d', 'depthwise_conv2d_input_grad', 'depthwise_conv2d_weight_grad')
    counted = {str(op).rpartition('.')[2] for op in counter.get_flop_counts()['Global']}
    assert counted == {name for name, need in zip(names, (True, *needs[:2]), strict=True) if need}


def test_forward_mode_is_right_or_refused(backend: str) -> None:
    """A derivative that is silently zero would be neither."""
    x, weight, bias = (t.detach() for t in values())
    tangent = image(tuple(x.shape), 3)
    try:
        _, mine = torch.func.jvp(lambda x: depthwise_conv2d(x, weight, bias, 1, backend), (x,), (tangent,))
    except (RuntimeError, NotImplementedError):
        return
    assert relative_error(mine, plain(tangent.double(), weight.double(), None, 1)) < 1e-6


@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
@pytest.mark.parametrize('transform', ['jvp', 'grad', 'vjp', 'vmap'])
def test_transforms_inside_of_compiled_code(transform: str, backend: str) -> None:
    """A derivative that is silently zero, again; and where the operator would have none, an error."""
    x, weight, bias = (t.detach() for t in values())
    tangent = image(tuple(x.shape), 3)

    def conv(x: Tensor) -> Tensor:
        return depthwise_conv2d(x, weight, bias)

    functions: dict[str, Callable] = {
        'jvp': lambda x: torch.func.jvp(conv, (x,), (tangent,))[1],
        'grad': torch.func.grad(lambda x: (conv(x) * tangent).sum()),
        'vjp': lambda x: torch.func.vjp(conv, x)[1](tangent)[0],
        'vmap': lambda x: torch.vmap(lambda t: conv(t[None])[0])(x),
    }
    torch._dynamo.reset()
    y = torch.compile(functions[transform], backend=backend)(x)
    exact_weight = weight.double()
    if transform == 'jvp':
        exact = plain(tangent.double(), exact_weight, None, 1)
    elif transform == 'vmap':
        exact = plain(x.double(), exact_weight, bias.double(), 1)
    else:
        exact = plain(tangent.double(), exact_weight.flip(2, 3), None, 1)
    assert relative_error(y, exact) < 1e-6


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize('way', ['vmap', 'trace', 'export', 'jvp'])
def test_mixed_dtypes_where_it_is_a_plain_convolution(way: str, dtype: torch.dtype, autocast: bool) -> None:
    """A map of another dtype than the weight, which the operator takes; the result has that of the map."""
    model = randomise(DepthwiseConv2d(3, 3, 5, padding=2, groups=3)).requires_grad_(False)
    x = image((2, 3, 6, 7)).to(dtype)
    ways: dict[str, Callable] = {
        'vmap': lambda: torch.vmap(lambda t: model(t[None])[0])(x),
        'trace': lambda: torch.jit.trace(model, (x,), check_trace=False)(x),
        'export': lambda: torch.export.export(model, (x,), strict=False).module()(x),
        'jvp': lambda: torch.func.jvp(model, (x,), (x,))[0],
    }
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        y = ways[way]()
    assert y.dtype == dtype
    assert relative_error(y, model.double()(x.double())) < 6e-3


def test_arguments_are_checked_where_it_is_a_plain_convolution() -> None:
    x, weight, _ = (t.detach() for t in values())
    with pytest.raises(ValueError, match=r'must be \(3, 1, K, K\) with an odd K'):
        torch.vmap(lambda x: depthwise_conv2d(x[None], weight[..., 1:, 1:]))(x)


def compiled_step(model: nn.Module, x: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Output, and gradients of input and parameters, of the model compiled with ``options``."""
    torch._dynamo.reset()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = torch.compile(model, fullgraph=True, **options)(x)
    return out, *torch.autograd.grad(out.square().sum(), (x, *model.parameters()))


def check_compiled(model: nn.Module, layout: torch.memory_format, **options: Any) -> None:
    x = image((2, 3, 20, 21)).contiguous(memory_format=layout)
    expected = compiled_step(model, x, backend='eager')
    for a, b in zip(compiled_step(model, x, **options), expected, strict=True):
        assert a.stride() == b.stride()
        assert relative_error(a.detach(), b.detach()) < 1e-6


@pytest.mark.parametrize(
    ('dynamic', 'layout'), [(False, torch.channels_last), (True, torch.contiguous_format)], ids=str
)
def test_compile(dynamic: bool, layout: torch.memory_format, backend: str) -> None:
    check_compiled(layer(backend), layout, dynamic=dynamic, backend='aot_eager')


@pytest.mark.slow
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
def test_compile_by_inductor(layout: torch.memory_format, cpp: Path) -> None:
    check_compiled(layer('cpp'), layout)


def test_compile_keeps_the_operator() -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(layer(), fullgraph=True, backend=keep)(image((1, 3, 9, 9)))
    assert OPS.depthwise_conv2d in {getattr(n.target, 'overloadpacket', n.target) for n in graphs[0].graph.nodes}


@pytest.mark.parametrize('strict', [True, False])
def test_export_gives_a_standard_convolution(strict: bool) -> None:
    model, x = layer(), image((2, 3, 9, 10))
    program = torch.export.export(model, (x,), strict=strict)
    called = [str(n.target) for n in program.graph.nodes if n.op == 'call_function']
    assert called.count('aten.conv2d.default') == 1
    assert not [name for name in called if name.startswith('mmuni')]
    assert relative_error(program.module()(x).detach(), model(x).detach()) < 1e-6


def test_trace_gives_a_standard_convolution() -> None:
    model, x = layer(), image((2, 3, 9, 10))
    with warnings.catch_warnings():
        warnings.simplefilter('error', torch.jit.TracerWarning)
        traced = torch.jit.trace(model, x)
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert kinds.count('aten::_convolution') == 1
    assert not [kind for kind in kinds if kind.startswith('mmuni')]
    other = image((1, 3, 12, 5), 1)  # of another size than the one it was traced with
    assert relative_error(traced(other).detach(), model(other).detach()) < 1e-6


def test_compiled_code_is_not_taken_for_an_export() -> None:
    """After an export, the operator is itself again."""
    torch.export.export(layer(), (image((2, 3, 9, 10)),), strict=False)
    with FlopCounterMode(display=False) as counter:
        layer()(image((2, 3, 9, 10)))
    assert list(counter.get_flop_counts()['Global']) == [OPS.depthwise_conv2d]


@pytest.mark.parametrize('dims', DIMS, ids=str)
def test_vmap(dims: tuple, backend: str) -> None:
    """Over batches of inputs, of weights, of biases and of several at once, each along any dimension."""
    inputs = [
        t.detach() if dim is None else torch.stack([t.detach() * (i + 1) for i in range(3)], dim)
        for t, dim in zip(values(), dims, strict=True)
    ]
    y = torch.vmap(lambda *inputs: depthwise_conv2d(*inputs, 2, backend), in_dims=dims)(*inputs)
    for i in range(3):
        one = [t if dim is None else t.select(dim, i) for t, dim in zip(inputs, dims, strict=True)]
        assert relative_error(y[i], plain(*(t.double() for t in one), 2)) < 1e-6


def test_vmap_without_bias(backend: str) -> None:
    x, weight, _ = (t.detach() for t in values())
    weights = torch.stack([weight, 2 * weight])
    y = torch.vmap(lambda w: depthwise_conv2d(x, w, None, 1, backend))(weights)
    assert relative_error(y[1], plain(x.double(), 2 * weight.double(), None, 1)) < 1e-6


@pytest.mark.parametrize('bias', [False, True])
def test_flop_counter(bias: bool, backend: str) -> None:
    """2 N C H W K^2, and three times that with the backward pass."""
    x, model = image((2, 6, 8, 9)), DepthwiseConv2d(6, 6, 7, padding=3, groups=6, bias=bias, backend=backend)
    forward = 2 * 2 * 6 * 8 * 9 * 7**2
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        model(x.requires_grad_()).sum().backward()
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize('bias', [False, True])
def test_complexity_is_that_of_a_conv2d(bias: bool) -> None:
    """mmengine's analysis, which traces the model; a factor of 2 in the layer behind tells the two apart."""
    counts = []
    for kind in (DepthwiseConv2d, nn.Conv2d):
        model = nn.Sequential(kind(6, 6, 7, padding=3, groups=6, bias=bias), nn.Conv2d(6, 12, 1))
        info = get_model_complexity_info(model, (6, 20, 21), show_table=False, show_arch=False)
        counts.append([info[name] for name in ('flops', 'activations', 'params')])
    assert counts[0] == counts[1]
    assert counts[0][0] >= 6 * 20 * 21 * (7**2 + 12)
