"""Statistics over processes whose count stays where they are computed, as on a GPU; for two: test_fused_distributed."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmunireplknet.models.norms import update_running_statistics
from mmunireplknet.ops import dilated_reparam_conv, moments

from ..procedural import image, relative_error
from .reparam_cases import Case, differentiate, errors, inputs_of

CASE = Case('7', (9, 10), 4)


class NoWaiting(TorchDispatchMode):
    """Refuse what waits for a GPU: to look at a number, and to make a tensor of a list."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = function.name()
        assert name not in ('aten::_local_scalar_dense', 'aten::lift_fresh', 'aten::nonzero'), f'{name} waits'
        return function(*args, **(kwargs or {}))


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, process_group: None) -> None:
    """What is computed cannot be looked at without waiting."""
    monkeypatch.setattr(moments, '_is_at_hand', lambda values: False)


def block(*args: object) -> tuple[Tensor, ...]:
    return dilated_reparam_conv(*args, dist.group.WORLD, 'torch')  # type: ignore[arg-type]


@pytest.mark.parametrize('look', [lambda t: t.item(), lambda t: int(t), lambda t: t.new_tensor([3]), torch.nonzero])
def test_waiting_is_noticed(look: object) -> None:
    with pytest.raises(AssertionError, match='waits'), NoWaiting():
        look(torch.ones(()))  # type: ignore[operator]


def test_the_count_stays_where_it_is(on_gpu: None) -> None:
    x = image((3, 5)).requires_grad_()
    with NoWaiting():
        mean, var, count = moments.share_moments(x.mean(0), x.var(0, correction=0), 3, dist.group.WORLD)
        (mean * var).sum().backward()
    assert isinstance(count, Tensor)
    assert (count.dtype, count.dim(), int(count), count.requires_grad) == (torch.int64, 0, 3, False)
    exact = x.detach().double().requires_grad_()
    expected = exact.mean(0), exact.var(0, correction=0)
    (expected[0] * expected[1]).sum().backward()
    assert max(relative_error(a.detach(), b.detach()) for a, b in zip((mean, var), expected, strict=True)) < 1e-6
    assert relative_error(x.grad, exact.grad) < 1e-5


def test_a_number_on_the_cpu(process_group: None) -> None:
    count = moments.share_moments(torch.zeros(5), torch.ones(5), 3, dist.group.WORLD)[2]
    assert (type(count), count) == (int, 3)


def test_a_block_without_waiting(on_gpu: None) -> None:
    inputs = inputs_of(CASE)
    with NoWaiting():
        actual = differentiate(block, inputs)
        count = block(*inputs[:6])[3]
    assert max(errors(actual, CASE).values()) < 1e-5
    assert isinstance(count, Tensor)
    assert (int(count), count.grad_fn) == (180, None)


@pytest.mark.slow
def test_a_block_that_is_compiled(on_gpu: None) -> None:
    """Without a break in the graph, as nothing is looked at."""
    compiled = torch.compile(lambda *args: block(*args)[:3], backend='aot_eager', fullgraph=True)
    assert max(errors(differentiate(compiled, inputs_of(CASE)), CASE).values()) < 1e-5


def test_one_value_in_one_process_is_known(on_gpu: None) -> None:
    with pytest.raises(ValueError, match='more than 1 value per channel when training, got 1 in all processes'):
        moments.share_moments(torch.zeros(5), torch.zeros(5), 1, dist.group.WORLD)


def test_one_value_in_several_processes(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which process has it is known nowhere: its mean is the value, and its variance 0."""
    monkeypatch.setattr(dist, 'get_world_size', lambda group: 2)
    with NoWaiting():
        mean, var, count = moments.share_moments(torch.full((5,), 3.0), torch.zeros(5), 1, dist.group.WORLD)
    assert (mean.tolist(), var.tolist(), int(count)) == ([3.0] * 5, [0.0] * 5, 1)


def test_no_value_anywhere(on_gpu: None) -> None:
    mean, var, count = moments.share_moments(torch.zeros(5), torch.zeros(5), 0, dist.group.WORLD)
    assert (mean.tolist(), var.tolist(), int(count)) == ([0.0] * 5, [0.0] * 5, 0)


@pytest.mark.parametrize('count', [0, 1, 2, 30])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('momentum', [0.1, 1.0])
def test_running_statistics(count: int, dtype: torch.dtype, momentum: float) -> None:
    """As with a number: nothing is learnt of no values, and the variance is that of a sample."""
    norms = [[nn.BatchNorm2d(5, momentum=momentum, dtype=dtype) for _ in range(2)] for _ in range(2)]
    found = [image((5,), seed).to(dtype) for seed in range(4)]
    update_running_statistics(norms[0], found[:2], [v.square() for v in found[2:]], count)
    number = torch.tensor(count)
    with NoWaiting():
        update_running_statistics(norms[1], found[:2], [v.square() for v in found[2:]], number)
    for left, right in zip(*norms, strict=True):
        assert int(left.num_batches_tracked) == int(right.num_batches_tracked) == 1
        for name in ('running_mean', 'running_var'):
            mine, exact = getattr(right, name), getattr(left, name)
            assert mine.dtype == dtype
            torch.testing.assert_close(mine, exact, rtol=8 * torch.finfo(dtype).eps, atol=0)
            assert torch.equal(mine, getattr(nn.BatchNorm2d(5, dtype=dtype), name)) == (count == 0)
