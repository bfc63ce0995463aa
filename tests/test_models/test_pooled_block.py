"""The deploy form on a GPU, on one that is made of the CPU: the convolutions sum their maps for the SE."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from mmunireplknet import UniRepLKNet
from mmunireplknet.models.block import UniRepLKNetBlock

from ..procedural import image, relative_error
from ..test_ops.fake_gpu import FakeGPU, fake_gpu

ARCH = dict(depths=[1, 1, 1, 1], dims=[8, 8, 12, 12], kernel_sizes=[[3], [7], [13], [5]])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    with fake_gpu(monkeypatch) as gpu:
        gpu.milliseconds['triton'] = 0.5
        monkeypatch.setattr('mmunireplknet.ops.backends.suits_cpp', lambda x: False)
        yield gpu


def deployed(size: int = 7, **kwargs: object) -> UniRepLKNetBlock:
    torch.manual_seed(0)
    return UniRepLKNetBlock(8, size, deploy=True, **kwargs).eval()  # type: ignore[arg-type]


def layer_by_layer(module: nn.Module, x: Tensor) -> Tensor:
    """What ``module`` makes of ``x`` with torch's own layers alone."""
    blocks = [m for m in module.modules() if isinstance(m, UniRepLKNetBlock)]
    for block in blocks:
        block.fused = False
    try:
        return module(x)
    finally:
        for block in blocks:
            block.fused = True


@pytest.mark.parametrize('size', [3, 7])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_block(gpu: FakeGPU, size: int, layout: torch.memory_format) -> None:
    block, x = deployed(size), image((2, 8, 9, 10)).contiguous(memory_format=layout)
    y = block(x)
    assert 'pooled' in gpu.calls()['triton']
    assert relative_error(y, layer_by_layer(block, x)) < 1e-6
    assert 'pooled' not in gpu.calls()['triton']


@torch.no_grad()
def test_the_convolution_leaves_what_the_linear_layers_take(gpu: FakeGPU) -> None:
    block = deployed()
    seen: list[Tensor] = []
    block.pwconv1[1].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    block(image((2, 8, 9, 10)))
    assert seen[0].is_contiguous()
    assert 'pooled' in gpu.calls()['triton']


def test_backbone_and_its_gradients(gpu: FakeGPU) -> None:
    torch.manual_seed(0)
    model, x = UniRepLKNet(ARCH, deploy=True).eval(), image((1, 3, 64, 96))
    results = []
    for compute in (lambda: model(x), lambda: layer_by_layer(model, x)):
        loss = sum((out * image(out.shape, 5)).sum() for out in compute())
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
        results[-1].append(torch.tensor(float(gpu.calls()['triton'].count('pooled'))))
    (*mine, pooled), (*right, none) = results
    assert (int(pooled), int(none)) == (8, 0)  # four times to be timed, and four times to be used
    assert max(relative_error(a, b) for a, b in zip(mine, right, strict=True)) < 1e-5


@torch.no_grad()
def test_under_autocast(gpu: FakeGPU) -> None:
    block, x = deployed(), image((2, 8, 9, 10))
    with torch.autocast('cpu', torch.bfloat16):
        y = block(x)
        assert 'pooled' in gpu.calls()['triton']
        exact = layer_by_layer(block, x)
    assert y.dtype == exact.dtype
    assert relative_error(y, exact.double()) < 4e-3


@pytest.mark.parametrize('case', ['training form', 'not fused', 'hook on the convolution', 'hook on all', 'another SE'])
@torch.no_grad()
def test_layer_by_layer_otherwise(gpu: FakeGPU, case: str) -> None:
    block = deployed(fused=case != 'not fused')
    x, seen = image((2, 8, 9, 10)), []
    if case == 'training form':
        block = UniRepLKNetBlock(8, 7).eval()
    handle = None
    if case == 'hook on the convolution':
        block.dwconv.lk_origin.register_forward_hook(lambda *args: seen.append(args))
    elif case == 'hook on all':
        handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(args))
    elif case == 'another SE':
        block.se = nn.Identity()
    try:
        block(x)
    finally:
        if handle:
            handle.remove()
    assert 'pooled' not in gpu.calls()['triton']
    assert bool(seen) == case.startswith('hook')


def test_what_is_exported_is_a_plain_convolution(gpu: FakeGPU) -> None:
    block, x = deployed(), image((1, 8, 9, 10))
    program = torch.export.export(block, (x,))
    names = {str(node.target) for node in program.graph.nodes if node.op == 'call_function'}
    assert 'aten.conv2d.default' in names
    assert gpu.calls()['triton'] == []
    assert not any('mmuni' in name for name in names)
    traced = torch.jit.trace(block, x)
    assert 'mmuni::' not in str(traced.inlined_graph)
    assert relative_error(traced(x), block(x).detach()) < 1e-6


def test_what_is_compiled_chooses_when_it_runs(gpu: FakeGPU) -> None:
    block, x = deployed(), image((1, 8, 9, 10))
    with torch.no_grad():
        y = torch.compile(block, fullgraph=True, backend='aot_eager')(x)
        assert 'pooled' in gpu.calls()['triton']
        assert relative_error(y, layer_by_layer(block, x)) < 1e-6
