"""The pointwise half of a block where a GPU is, and whatever a GPU alone can do wrong.

    python -m pytest -m cuda tests/test_ops/test_pointwise_on_gpu.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
        python -m pytest tests/test_ops/test_pointwise_on_gpu.py -k sanitized
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mmunireplknet import UniRepLKNet
from mmunireplknet.ops import backends, pointwise_kernels

from ..procedural import image, relative_error
from . import pointwise_device_cases as device_cases

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')]
DEVICE = 'cuda'
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def taken() -> Iterator[None]:
    """They are, and nothing has failed in the end."""
    if torch.cuda.get_device_capability() < backends.OLDEST:
        pytest.skip('the kernels are for newer GPUs')
    assert pointwise_kernels.why_not(torch.device(DEVICE, torch.cuda.current_device())) == ''
    yield
    assert pointwise_kernels._failures == []


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    monkeypatch.setattr(torch.backends.cuda.matmul, 'allow_tf32', False)


@pytest.mark.parametrize('dtype', DTYPES)
def test_sweep(dtype: torch.dtype) -> None:
    sizes = ((1, 7), (7, 7), (25, 42), (64, 64), (200, 304))
    device_cases.sweep(DEVICE, sizes, (3, 16, 37, 80, 384), [dtype])


def test_sanitized() -> None:
    device_cases.sweep(DEVICE, ((9, 7),), (21,), DTYPES)


def test_gelu() -> None:
    device_cases.gelu(DEVICE)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('dtype', DTYPES[1:])
def test_autocast(dtype: torch.dtype, training: bool) -> None:
    device_cases.check_autocast(DEVICE, dtype, training)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('options', [{}, dict(deploy=True), dict(channels_last=True), dict(with_cp=True)], ids=str)
def test_backbones(training: bool, options: dict) -> None:
    device_cases.check_backbone(DEVICE, 1e-4, training, **options)


def test_determinism() -> None:
    device_cases.check_determinism(DEVICE)


@pytest.mark.parametrize(('dtype', 'limit'), list(zip(DTYPES, (1e-5, 1e-2, 1e-3), strict=True)))
def test_inference(dtype: torch.dtype, limit: float) -> None:
    device_cases.check_inference(DEVICE, dtype, limit)


@pytest.mark.parametrize('training', [True, False])
def test_nobody_waits_for_the_gpu(training: bool) -> None:
    model, _ = device_cases.blocks(DEVICE, drop_path_rate=0.2)
    model.train(training)
    x = image((2, 16, 20, 21)).to(DEVICE)
    device_cases.step(model, x)
    with torch.no_grad():
        grad = torch.ones_like(model(x))
    x.requires_grad_()
    torch.cuda.set_sync_debug_mode('error')
    try:
        model(x).backward(grad)
        with torch.no_grad():
            model(x)
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_a_training_step_as_a_graph(layout: torch.memory_format) -> None:
    """What is captured computes anew at every replay."""
    model, other = device_cases.blocks(DEVICE)
    x, grad = (image((2, 16, 20, 21), s).to(DEVICE).contiguous(memory_format=layout) for s in (0, 9))
    x.requires_grad_()
    inputs = [x, *model.parameters()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.autograd.grad(model(x), inputs, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
        found = torch.autograd.grad(y, inputs, grad)
    for seed in (5, 6):
        with torch.no_grad():
            x.copy_(image(tuple(x.shape), seed))
        graph.replay()
        torch.cuda.synchronize()
        expected = [other(x), *torch.autograd.grad(other(x), [x, *other.parameters()], grad)]
        largest = max(float(e.norm()) for e in expected)
        for a, b in zip([y, *found], expected, strict=True):
            assert float((a - b).norm()) < 1e-4 * max(float(b.norm()), 1e-3 * largest)


def test_deployed_as_a_graph() -> None:
    model, other = device_cases.blocks(DEVICE)
    other.eval()
    model.eval().switch_to_deploy()
    x = image((2, 16, 20, 21)).to(DEVICE)
    with torch.inference_mode():
        model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        x.copy_(image(tuple(x.shape), 5))
        graph.replay()
        torch.cuda.synchronize()
        assert relative_error(y, other(x)) < 1e-5


def peak_of(model: torch.nn.Module, x: Tensor) -> int:
    device_cases.step(model, x, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    device_cases.step(model, x, torch.bfloat16)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_memory() -> None:
    """Of the training step of a backbone, at most 60 % of that of the layers."""
    arch = dict(depths=[2, 2, 6, 2], dims=[64, 128, 256, 512], kernel_sizes=[[3] * 2, [13] * 2, [13, 3] * 3, [13] * 2])
    x = image((4, 3, 256, 256)).to(DEVICE)
    peaks = []
    for fused in (True, False):
        model = UniRepLKNet(arch, fused=fused, out_indices=(3,)).to(DEVICE).train()
        for p in model.parameters():
            p.requires_grad_(True)
        peaks.append(peak_of(torch.nn.Sequential(model, First()), x))
    assert peaks[0] < 0.6 * peaks[1]


class First(torch.nn.Module):
    """The first of several maps."""

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        return maps[0]


def test_more_values_than_32_bits_count() -> None:
    """The last pixels of the last channel come out as by themselves, in both layouts."""
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip('needs 30 GiB')
    shape = (3, 8192, 8192, 11)
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_()
    kernels = pointwise_kernels.passes_for(x)
    scale = image((3, 11)).to(DEVICE)
    out = torch.empty((3, 11, 8192, 8192), dtype=x.dtype, device=DEVICE).permute(0, 2, 3, 1)
    kernels.apply(x, scale, None, None, out, True)
    corner = torch.nn.functional.gelu(x[-1, -1, -40:].double()) * scale[-1].double()
    assert relative_error(out[-1, -1, -40:], corner) < 4e-3
    result = torch.empty((3, 2, 11), device=DEVICE)
    kernels.sums(out, None, None, None, result)
    exact = torch.stack([out[-1, ..., -1].double().sum(), out[-1, ..., -1].double().square().sum()])
    assert relative_error(result[-1, :, -1], exact) < 1e-4


def test_streams() -> None:
    """Work goes to the stream that is current."""
    models = [device_cases.blocks(DEVICE)[0].eval() for _ in range(4)]
    inputs = [image((4, 16, 40, 40), seed).to(DEVICE) for seed in range(4)]
    with torch.no_grad():
        expected = [m(x) for m, x in zip(models, inputs, strict=True)]
        streams = [torch.cuda.Stream() for _ in inputs]
        torch.cuda.synchronize()
        for _ in range(5):
            found = []
            for stream, model, x in zip(streams, models, inputs, strict=True):
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(200_000)
                    found.append(model(x.clone()))
            torch.cuda.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_another_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip('needs two GPUs')
    device_cases.check_inference('cuda:1', torch.bfloat16, 1e-2)
    device_cases.check_backbone('cuda:1', 1e-4, True)
