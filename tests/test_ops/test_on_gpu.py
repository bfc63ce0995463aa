"""What runs where a GPU is: every backend there, over the full sweep, and whatever a GPU alone can do wrong.

    python -m pytest -m cuda
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --target-processes all --error-exitcode 1 \
        python -m pytest tests/test_ops/test_on_gpu.py -k sanitized

The second one also with ``--tool racecheck``, ``synccheck`` and ``initcheck``.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmunireplknet.ops import backends, depthwise_conv2d, depthwise_conv2d_pooled, dilated_reparam_conv, fastest

from ..procedural import image, relative_error
from . import device_cases, reparam_cases
from .cases import KERNELS

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')]
DEVICE = 'cuda'
OPS = torch.ops.mmuni
HUGE = (3, 11, 8192, 8192)  # 2.2e9 values


@pytest.fixture(params=['triton', 'cuda', 'auto'])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that should be here: a Triton that does not work on a GPU that is new enough is a failure."""
    name = request.param
    if name != 'auto' and (reason := backends.why_not(name)):
        should = name == 'triton' and torch.cuda.get_device_capability() >= backends.OLDEST
        (pytest.fail if should else pytest.skip)(reason)
    return name


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    monkeypatch.setattr(torch.backends.cuda.matmul, 'allow_tf32', False)


@pytest.mark.parametrize('kernel', KERNELS)
def test_sweep(backend: str, kernel: int) -> None:
    device_cases.sweep(DEVICE, backend, (kernel,))


def test_large(backend: str) -> None:
    device_cases.large(DEVICE, backend)


@pytest.mark.parametrize('name', reparam_cases.BRANCHES)
def test_block_sweep(backend: str, name: str) -> None:
    device_cases.block_sweep(DEVICE, backend, [name], [(9, 14), (40, 37)])


def test_block_again_and_again(backend: str) -> None:
    device_cases.check_block(DEVICE, backend)


def test_sanitized(backend: str) -> None:
    """Little enough for compute-sanitizer: every kernel once, at sizes that fill no tile."""
    device_cases.sweep(DEVICE, backend, (3, 13), 4)
    device_cases.block_sweep(DEVICE, backend, ['7'], [(9, 14)])


def test_operators(backend: str) -> None:
    device_cases.check_operators(DEVICE, backend)


def test_gradients(backend: str) -> None:
    device_cases.check_gradients(DEVICE, backend)


def test_compiled(backend: str) -> None:
    device_cases.check_compiled(DEVICE, backend)


def test_autocast(backend: str) -> None:
    device_cases.check_autocast(DEVICE, backend)


def test_determinism(backend: str) -> None:
    device_cases.check_determinism(DEVICE, backend)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(
    'kwargs', [{}, dict(deploy=True), dict(channels_last=True), dict(deploy=True, channels_last=True)]
)
def test_models(backend: str, training: bool, kwargs: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('MMUNI_DW_BACKEND', backend)
    device_cases.check_model(DEVICE, 1e-4, training, **kwargs)


def test_tf32_where_torch_allows_it(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = image((2, 6, 40, 40)).to(DEVICE), image((6, 1, 13, 13), 1).to(DEVICE)
    exact = F.conv2d(x.double(), weight.double(), padding=6, groups=6)
    assert relative_error(depthwise_conv2d(x, weight, None, 1, backend), exact) < 1e-5
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)
    assert relative_error(depthwise_conv2d(x, weight, None, 1, backend), exact) < 2e-3


def everything(x: Tensor, weight: Tensor, grad: Tensor, backend: str) -> list[Tensor]:
    """Every operator of the convolution."""
    y, sums = depthwise_conv2d_pooled(x, weight, None, 1, backend)
    return [
        depthwise_conv2d(x, weight, None, 1, backend), y, sums,
        OPS.depthwise_conv2d_input_grad(grad, weight, 1, backend),
        OPS.depthwise_conv2d_weight_grad(x, grad, weight.shape[-1], 1, backend),
    ]  # fmt: skip


@pytest.mark.parametrize('dtype', device_cases.DTYPES)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_graphs(backend: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """What is captured computes anew at every replay, on whatever lies in its inputs by then."""
    shape = (2, 33, 40, 37)
    x, grad = (image(shape, i).to(DEVICE, dtype).contiguous(memory_format=layout) for i in range(2))
    weight = image((33, 1, 13, 13), 2).to(DEVICE)
    everything(x, weight, grad, backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = everything(x, weight, grad, backend)
    for seed in (5, 6):
        for i, tensor in enumerate((x, grad, weight)):
            tensor.copy_(image(tensor.shape, seed + i))
        graph.replay()
        torch.cuda.synchronize()
        device_cases.equal(results, everything(x, weight, grad, backend), 1e-6 if dtype == torch.float32 else 4e-3)


def test_a_graph_of_a_kind_that_was_never_seen() -> None:
    """Nothing is timed inside; whatever is taken, it is right."""
    fastest.clear()
    x, weight = image((2, 6, 23, 29)).to(DEVICE), image((6, 1, 11, 11), 1).to(DEVICE)
    backends.why_not('triton')  # the self-check of a backend cannot be captured, and is left out where it is missing
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = depthwise_conv2d(x, weight)
    graph.replay()
    torch.cuda.synchronize()
    assert relative_error(y, F.conv2d(x.double(), weight.double(), padding=5, groups=6)) < 1e-5


def test_a_training_step_as_a_graph(backend: str) -> None:
    """The Dilated Reparam Block, forward and backward."""
    case = reparam_cases.Case('13', (20, 21), 9)
    inputs = reparam_cases.inputs_of(case).to(DEVICE)
    function = lambda *args: dilated_reparam_conv(*args, None, backend)  # noqa: E731
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        reparam_cases.differentiate(function, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = reparam_cases.differentiate(function, inputs)
    graph.replay()
    torch.cuda.synchronize()
    found = reparam_cases.errors({name: [t.cpu() for t in tensors] for name, tensors in results.items()}, case)
    assert max(found.values()) < 3e-5, found


def test_streams(backend: str) -> None:
    """Work goes to the stream that is current, and waits for nothing on others but what it is told to."""
    shapes = ((4, 64, 64, 64), (64, 1, 13, 13), (4, 64, 64, 64))
    inputs = [[image(shape, 3 * seed + i).to(DEVICE) for i, shape in enumerate(shapes)] for seed in range(4)]
    expected = [everything(*tensors, backend) for tensors in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(10):
        found = []
        for stream, (x, weight, grad) in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(200_000)
                late = x.clone()  # on this stream alone: whoever reads it on another reads it too early
                found.append(everything(late, weight, grad, backend))
        torch.cuda.synchronize()
        for mine, right in zip(found, expected, strict=True):
            device_cases.equal(mine, right, 1e-6)


def test_another_gpu(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip('needs two GPUs')
    x, weight, grad = image((2, 6, 20, 21)), image((6, 1, 13, 13), 1), image((2, 6, 20, 21), 2)
    there = everything(*(t.to('cuda:1') for t in (x, weight, grad)), backend)
    assert {t.device.index for t in there} == {1}
    device_cases.equal(there, everything(*(t.to('cuda:0') for t in (x, weight, grad)), backend), 1e-6)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_more_values_than_32_bits_count(backend: str, layout: torch.memory_format) -> None:
    """The last image and channel come out as by themselves."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip('needs 24 GiB')
    x = torch.empty(HUGE, dtype=torch.bfloat16, device=DEVICE, memory_format=layout).normal_()
    weight = image((HUGE[1], 1, 7, 7)).to(DEVICE)
    corner = x[-1:, -1:, -40:, -40:].contiguous()
    y = depthwise_conv2d(x, weight, None, 1, backend)[-1:, -1:, -30:, -30:].clone()
    exact = F.conv2d(F.pad(corner, (0, 3, 0, 3)).double(), weight[-1:].bfloat16().double())[..., -30:, -30:]
    assert relative_error(y, exact) < 4e-3
    sparse = torch.zeros_like(x)
    sparse[-1, -1, -20, -20] = 1
    grad = OPS.depthwise_conv2d_weight_grad(x, sparse, 7, 1, backend)
    assert relative_error(grad[-1, 0], x[-1, -1, -23:-16, -23:-16]) < 4e-3
    assert int(grad[:-1].count_nonzero()) == 0


def test_auto_times_and_remembers() -> None:
    fastest.clear()
    x, weight = image((2, 6, 40, 40)).to(DEVICE), image((6, 1, 13, 13), 1).to(DEVICE)
    kind = fastest.kind_of('forward', x, 13, 1)
    assert fastest.remembered(kind) is None
    depthwise_conv2d(x, weight)
    taken = (fastest.remembered(kind) or '').partition(' ')[0]
    assert taken in ('torch', 'triton', 'cuda')
    assert backends.choose('auto', x, 13) == taken
    divisions = backends.module_of('triton').divisions('forward', x, 1)
    assert fastest.division(kind, 'triton') in divisions
    assert {f'triton {label}' for label in divisions} | {'torch'} <= fastest._times[kind].keys()


def test_a_second_start_times_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A block, forward and backward, with everything that is timed as a part of it."""
    monkeypatch.setenv('MMUNI_DW_TUNE', str(tmp_path / 'fastest.jsonl'))
    inputs = reparam_cases.inputs_of(reparam_cases.Case('13', (20, 21), 9)).to(DEVICE)
    fastest.clear()
    for _ in range(3):
        reparam_cases.differentiate(dilated_reparam_conv, inputs)
    before = (tmp_path / 'fastest.jsonl').read_text()
    assert 'block_forward' in before
    assert 'block_backward' in before
    fastest.clear()
    monkeypatch.setattr(fastest, '_milliseconds', lambda *_: pytest.fail('it was timed again'))
    reparam_cases.differentiate(dilated_reparam_conv, inputs)
    assert (tmp_path / 'fastest.jsonl').read_text() == before


@pytest.mark.parametrize('milliseconds', [0.001, 1000.0])
def test_a_block_by_branches_and_fused(milliseconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever was the fastest, it is right."""
    case = reparam_cases.Case('13', (20, 21), 9)
    inputs = reparam_cases.inputs_of(case).to(DEVICE)
    backends.why_not('triton')
    fastest.clear()
    kernel = [w.shape[-1] for w in inputs.weights]
    for function in ('block_forward', 'block_sums', 'block_backward'):
        kind = fastest.kind_of(function, inputs.x, max(kernel), len(kernel))
        for label in ('triton', fastest.BRANCHES):
            fastest._learn(kind, label, 1.0 if label == 'triton' else milliseconds)
    found = reparam_cases.differentiate(dilated_reparam_conv, inputs)
    taken = fastest.remembered(fastest.kind_of('block_forward', inputs.x, max(kernel), len(kernel)))
    assert taken == ('triton' if milliseconds > 1 else fastest.BRANCHES)
    wrong = reparam_cases.errors({name: [t.cpu() for t in tensors] for name, tensors in found.items()}, case)
    assert max(wrong.values()) < 3e-5, wrong


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group('nccl', init_method=(tmp_path / 'store').as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_synchronised_statistics_wait_for_nothing(backend: str, nccl: None) -> None:
    """Neither forward nor backward, so that both can be captured."""
    case = reparam_cases.Case('13', (20, 21), 9)
    inputs = reparam_cases.inputs_of(case).to(DEVICE)
    function = lambda *args: dilated_reparam_conv(*args, dist.group.WORLD, backend)  # noqa: E731
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        reparam_cases.differentiate(function, inputs)
        torch.cuda.set_sync_debug_mode('error')
        try:
            reparam_cases.differentiate(function, inputs)
        finally:
            torch.cuda.set_sync_debug_mode('default')
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = reparam_cases.differentiate(function, inputs)
    graph.replay()
    torch.cuda.synchronize()
    found = reparam_cases.errors({name: [t.cpu() for t in tensors] for name, tensors in results.items()}, case)
    assert max(found.values()) < 3e-5, found


def test_distributed(backend: str, nccl: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP with SyncBN on one GPU: the gradients are those of the model by itself."""
    monkeypatch.setenv('MMUNI_DW_BACKEND', backend)
    model = device_cases.models(DEVICE, norm_cfg=dict(type='SyncBN'))[0].train()
    x = image((2, 3, 64, 96)).to(DEVICE)
    loss = lambda outs: sum((o * image(o.shape, 3).to(DEVICE)).sum() for o in outs)  # noqa: E731
    expected = torch.autograd.grad(loss(model(x)), list(model.parameters()), allow_unused=True)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    loss(parallel(x)).backward()
    pairs = [(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True) if g is not None]
    pairs = [(mine, right) for mine, right in pairs if right.norm() > 1e-3]
    device_cases.equal(*zip(*pairs, strict=True), 1e-4)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_memory_of_the_block(dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward take less than half of what it takes branch after branch, where nothing is timed.

    Of a map of 32 MiB: what the input gradient keeps of some channels is as much, however small the map.
    """
    if backend != 'auto' and not hasattr(backends.module_of(backend), 'block_forward'):
        pytest.skip(f'{backend} has no kernels for the block, and takes branch after branch')
    monkeypatch.setenv('MMUNI_DW_TUNE', '0')
    case = reparam_cases.Case('13', (128, 128), 128, 8, dtype=dtype)
    inputs = reparam_cases.inputs_of(case).to(DEVICE)
    peaks = []
    for function in (lambda *args: dilated_reparam_conv(*args, None, backend), reparam_cases.per_branch):
        given = inputs._replace(weights=[w.to(dtype) for w in inputs.weights]) if peaks else inputs
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        reparam_cases.differentiate(function, given)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] < peaks[1] / 2
