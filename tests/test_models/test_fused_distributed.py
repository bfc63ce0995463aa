"""Fused blocks with SyncBN in two processes with a part of the batch each, against one process with all of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmunireplknet.models import norms
from mmunireplknet.models.dilated_reparam import DilatedReparamBlock
from mmunireplknet.ops import moments

from ..procedural import image, randomise
from .fused_cases import DIM, Results, block, differences, figures, layered, results, small

pytestmark = [pytest.mark.usefixtures('cpp'), pytest.mark.slow]
SYNC = dict(type='SyncBN')


class Case(NamedTuple):
    """A model, its input, how many of the images each process gets, and the all-reduces of one step."""

    model: nn.Module
    x: Tensor
    shares: tuple[int, int] = (2, 2)
    reductions: tuple[int, int] = (1, 1)  # forward, backward; but for those of DDP, which are not of this package
    parallel: bool = False
    hooked: str = ''  # a layer with a hook in the second process, which then computes layer by layer
    at_hand: bool = True  # whether the counts can be looked at, as on the CPU, or stay where they are, as on a GPU


def dilated(**options: Any) -> DilatedReparamBlock:
    return randomise(DilatedReparamBlock(DIM, 13, norm_cfg=dict(SYNC, **options))).train()


def cases() -> dict[str, Case]:
    """Every case; a mean far from zero makes E[x^2] - E[x]^2 cancel."""
    x = image((4, DIM, 9, 14)).contiguous(memory_format=torch.channels_last)
    x[:2] += 3  # the statistics of the processes differ
    blocks, backbone = (3, 3), (9, 9)  # three blocks of the latter are plain
    return {
        'dilated': Case(dilated(), x),
        'dilated, uneven': Case(dilated(), x, (1, 3)),
        'dilated, offset': Case(dilated(), x + 30, (3, 1)),
        'dilated, float64': Case(dilated().double(), x.double(), (1, 3)),
        'dilated, cumulative': Case(dilated(momentum=None), x),
        'block': Case(block(13, norm_cfg=SYNC), x, reductions=blocks),
        'block, uneven': Case(block(7, norm_cfg=SYNC), x, (3, 1), blocks),
        'plain block': Case(block(3, norm_cfg=SYNC), x, reductions=(2, 2)),
        'with_cp': Case(block(13, norm_cfg=SYNC, with_cp=True), x, reductions=(3, 6)),
        'DDP': Case(small(norm_cfg=SYNC), image((4, 3, 64, 64)), (1, 3), backbone, parallel=True),
        'dilated, one empty': Case(dilated(), x, (4, 0)),
        'block, one empty': Case(block(13, norm_cfg=SYNC), x, (0, 4), blocks),
        'plain block, one empty': Case(block(3, norm_cfg=SYNC), x, (4, 0), (2, 2)),
        'DDP, one empty': Case(small(norm_cfg=SYNC), image((4, 3, 64, 64)), (4, 0), backbone, parallel=True),
        'block, hook in one': Case(block(13, norm_cfg=SYNC), x, reductions=blocks, hooked='norm'),
        'dilated, as on a GPU': Case(dilated(), x + 30, (3, 1), at_hand=False),
        'dilated, float64, as on a GPU': Case(dilated().double(), x.double(), (1, 3), at_hand=False),
        'dilated, one empty, as on a GPU': Case(dilated(), x, (4, 0), at_hand=False),
        'block, as on a GPU': Case(block(13, norm_cfg=SYNC, with_cp=True), x, (1, 3), (3, 6), at_hand=False),
        'block, hook in one, as on a GPU': Case(
            block(13, norm_cfg=SYNC), x, reductions=blocks, hooked='norm', at_hand=False
        ),
        'BN': Case(block(13), x, reductions=(0, 0)),  # which two processes must not get right
    }


def two_steps(model: nn.Module, x: Tensor, rows: slice, total: int) -> Results:
    """Results of the second step; the gradients of the outputs are those that the rows have in the whole batch."""
    for scale in (1.0, 0.5):
        leaf = (scale * x[rows]).detach().requires_grad_()
        model.zero_grad()
        outs = model(leaf)
        outs = [outs] if isinstance(outs, Tensor) else list(outs)
        grads = [image((total, *y.shape[1:]), 9 + i)[rows].to(y) for i, y in enumerate(outs)]
        torch.autograd.backward(outs, grads)
    inner = getattr(model, 'module', model)
    grads = {name: p.grad for name, p in inner.named_parameters()}
    return Results([y.detach() for y in outs], leaf.grad, grads, dict(inner.named_buffers()))


def work(rank: int, folder: str) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    all_reduce, calls = dist.all_reduce, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append('backward' if torch._C._current_graph_task_id() >= 0 else 'forward')
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counted
    for name, case in cases().items():
        first = case.shares[0]
        rows = slice(0, first) if rank == 0 else slice(first, None)
        model = DistributedDataParallel(case.model) if case.parallel else case.model
        if rank and case.hooked:
            case.model.get_submodule(case.hooked).register_forward_hook(lambda *_: None)
        moments._is_at_hand = lambda _, at_hand=case.at_hand: at_hand
        calls.clear()
        found = two_steps(model, case.x, rows, len(case.x))
        counts = calls.count('forward') / 2, calls.count('backward') / 2
        grads = {n: g * 2 if case.parallel else g for n, g in found.grads.items()}  # DDP has averaged them
        torch.save(dict(found._replace(grads=grads)._asdict(), counts=counts), f'{folder}/{name}-{rank}.pth')
    moments._is_at_hand = lambda _: True
    torch.save([few_values(model, rank) for model in few_value_models()], f'{folder}/few-{rank}.pth')
    moments._is_at_hand = lambda _: False
    torch.save([few_values(model, rank) for model in few_value_models()], f'{folder}/few-gpu-{rank}.pth')
    dist.destroy_process_group()


def few_value_models() -> list[nn.Module]:
    """Fused and layer by layer; a block on a map in another layout than those of the fused operators, too."""
    return [dilated(), layered(dilated()), block(13, norm_cfg=SYNC)]


def few_values(model: nn.Module, rank: int) -> tuple[str, list[Tensor]]:
    """What is raised for a single value in the first process, and the buffers after a step without any."""
    said = ''
    try:
        y = copy.deepcopy(model)(torch.ones(1 - rank, DIM, 1, 1))
        assert y.isfinite().all()
    except ValueError as error:
        said = str(error)
    x = torch.ones(0, DIM, 5, 5, requires_grad=True)
    model(x).sum().backward()
    return said, [b.clone() for b in model.buffers()]


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('fused')
    mp.spawn(work, (str(path),), nprocs=2)
    return path


def joined(name: str, case: Case, folder: Path) -> tuple[Results, list[dict]]:
    """Both processes' results as those of one: outputs side by side, gradients of parameters added up."""
    parts = [torch.load(folder / f'{name}-{rank}.pth', weights_only=True) for rank in range(2)]
    left, right = (Results(**{k: v for k, v in part.items() if k != 'counts'}) for part in parts)
    outputs = [torch.cat(pair) for pair in zip(left.outputs, right.outputs, strict=True)]
    grads = {n: g if case.parallel else g + right.grads[n] for n, g in left.grads.items()}
    return Results(outputs, torch.cat([left.input_grad, right.input_grad]), grads, left.buffers), parts


@pytest.mark.parametrize('name', [name for name in cases() if name != 'BN'])
def test_two_processes(name: str, folder: Path) -> None:
    """1e-5 in single precision, 1e-10 in double; as a reference one process with BN, layer by layer in float64."""
    case = cases()[name]
    found, parts = joined(name, case, folder)
    expected = two_steps(layered(case.model).double(), case.x.double(), slice(None), len(case.x))
    tolerance = 1e-10 if case.x.dtype == torch.float64 else 1e-5
    assert max(figures(found, expected)) < tolerance
    if not case.parallel:
        wrong = {n: e for n, e in differences(found, expected).items() if not e < (3 * tolerance)}
        assert not wrong, wrong
    for key, value in parts[0]['buffers'].items():
        assert torch.equal(value, parts[1]['buffers'][key]), key


@pytest.mark.parametrize('name', cases())
def test_all_reduces(name: str, folder: Path) -> None:
    """One forward and one backward for a Dilated Reparam Block, and for each of the two other norms of a block."""
    for rank in range(2):
        counts = torch.load(folder / f'{name}-{rank}.pth', weights_only=True)['counts']
        assert tuple(counts) == cases()[name].reductions


@pytest.mark.parametrize('file', ['few', 'few-gpu'])
def test_few_values(folder: Path, file: str) -> None:
    """One in all processes raises in each of them, but on a GPU; none at all leaves the running statistics alone."""
    for rank in range(2):
        found = torch.load(folder / f'{file}-{rank}.pth', weights_only=True)
        for (said, buffers), model in zip(found, few_value_models(), strict=True):
            assert ('more than 1 value per channel' in said) == (file == 'few')
            assert ('in all processes' in said) == (file == 'few')
            for (name, before), after in zip(model.named_buffers(), buffers, strict=True):
                assert 'tracked' in name or torch.equal(before, after)


def test_it_matters(folder: Path) -> None:
    """BN without synchronisation does not compute the same, so that the comparison can fail."""
    case = cases()['BN']
    found, _ = joined('BN', case, folder)
    expected = two_steps(layered(case.model).double(), case.x.double(), slice(None), len(case.x))
    assert min(figures(found, expected)) > 1e-3


def test_all_processes_have_the_same_gradients_under_ddp(folder: Path) -> None:
    left, right = (torch.load(folder / f'DDP-{rank}.pth', weights_only=True)['grads'] for rank in range(2))
    assert all(torch.equal(g, right[name]) for name, g in left.items())


def test_without_a_group_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, as the layer does when it is computed by itself."""
    lines: list[str] = []
    monkeypatch.setattr(norms, 'print_log', lambda text, **_: lines.append(text))
    for model in (layered(block(norm_cfg=SYNC)), block(norm_cfg=SYNC), dilated()):
        monkeypatch.setattr(norms.SyncBatchNorm, '_told', False)
        lines.clear()
        for _ in range(2):
            results(model, image((2, DIM, 9, 14)).contiguous(memory_format=torch.channels_last))
        assert lines == ['SyncBN without a process group: it normalizes like BN.']


@pytest.mark.parametrize('training', [True, False])
def test_a_group_of_one(training: bool, process_group: None) -> None:
    """It is BN, and nothing is reduced."""
    x = image((4, DIM, 9, 14)).contiguous(memory_format=torch.channels_last)
    alone = results(block(13).train(training), x)
    synchronised = results(block(13, norm_cfg=SYNC).train(training), x)
    assert torch.equal(alone.outputs[0], synchronised.outputs[0])
    assert all(torch.equal(g, synchronised.grads[name]) for name, g in alone.grads.items())
    assert all(torch.equal(b, synchronised.buffers[name]) for name, b in alone.buffers.items())
