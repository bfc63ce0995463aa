"""Two processes with a part of the batch each compute what one process computes with all of it."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmunireplknet import UniRepLKNet
from mmunireplknet.models import norms
from mmunireplknet.models.norms import SyncBatchNorm

from ..procedural import image, randomise, relative_error
from .tiny import TINY

TOLERANCE = 1e-4  # relative L2, of the loss, of all gradients together and of the running statistics
SIZES = {'even': (2, 2), 'uneven': (1, 3), 'one empty': (4, 0)}  # images of each process
CASES = {
    'frozen BN': dict(norm_cfg=dict(type='BN'), norm_eval=True),
    'frozen BN, with_cp': dict(norm_cfg=dict(type='BN'), norm_eval=True, with_cp=True),
    'SyncBN': dict(norm_cfg=dict(type='SyncBN')),
    'SyncBN, with_cp': dict(norm_cfg=dict(type='SyncBN'), with_cp=True),
    'SyncBN, uneven': dict(norm_cfg=dict(type='SyncBN')),
    'SyncBN, one empty': dict(norm_cfg=dict(type='SyncBN')),
    'SyncBN, one empty, layers': dict(norm_cfg=dict(type='SyncBN'), fused=False),
    'SyncBN, cumulative': dict(norm_cfg=dict(type='SyncBN', momentum=None)),
    'frozen SyncBN': dict(norm_cfg=dict(type='SyncBN'), norm_eval=True),
    'BN': dict(norm_cfg=dict(type='BN')),  # which two processes must not get right
}


class Net(nn.Module):
    """The backbone and a 1x1 convolution on each of its maps."""

    def __init__(self, **options):
        super().__init__()
        self.backbone = UniRepLKNet(TINY, **options)
        self.heads = nn.ModuleList(nn.Conv2d(dim, 2, 1) for dim in TINY['dims'])

    def forward(self, x):
        """Sum over the images of a loss in which no map cancels out."""
        maps = [head(y) for head, y in zip(self.heads, self.backbone(x), strict=True)]
        return sum((y * image((1, *y.shape[1:]), 5).to(y)).tanh().mean((1, 2, 3)).sum() for y in maps)


def two_steps(model, x, share, group_loss):
    """Losses of two steps, the gradients of the second, and the buffers after it."""
    model.train()
    losses = []
    for scale in (1.0, 0.5):
        model.zero_grad()
        loss = model(scale * x) * share
        loss.backward()
        losses.append(group_loss(loss.detach()))
    inner = getattr(model, 'module', model)
    return dict(
        losses=torch.stack(losses),
        gradients={name: p.grad for name, p in inner.named_parameters()},
        buffers=dict(inner.named_buffers()),
    )


def work(rank, folder, device):
    """One of the two processes: every case, one after the other."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)

    def mean_over_group(loss):
        dist.all_reduce(loss)
        return loss / 2

    for name, options in CASES.items():
        model = DistributedDataParallel(randomise(Net(**options)).to(device))
        first, second = next((sizes for key, sizes in SIZES.items() if f', {key}' in name), SIZES['even'])
        x = image((4, 3, 64, 64))[slice(0, first) if rank == 0 else slice(first, first + second)]
        # DDP averages the gradients over processes: 2 / 4 makes that the mean over the four images.
        torch.save(two_steps(model, x.to(device), 2 / 4, mean_over_group), f'{folder}/{name}-{rank}.pth')
    dist.destroy_process_group()


NEEDS_GPU = (pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'))


@pytest.fixture(scope='module', params=['cpu', pytest.param('cuda', marks=NEEDS_GPU)])
def folder(request, tmp_path_factory):
    """Where the two processes have left their results; both use the same GPU, if any."""
    path = tmp_path_factory.mktemp('two')
    mp.spawn(work, (str(path), request.param), nprocs=2)
    return path


def compare(name, folder):
    """Relative errors of both processes against one: losses, gradients, float buffers; and equality of the counts."""
    expected = two_steps(randomise(Net(**CASES[name])), image((4, 3, 64, 64)), 1 / 4, lambda loss: loss)
    for rank in range(2):
        actual = torch.load(folder / f'{name}-{rank}.pth', map_location='cpu', weights_only=True)
        errors = [relative_error(actual['losses'], expected['losses'])]
        for part in ('gradients', 'buffers'):
            assert actual[part].keys() == expected[part].keys()
            pairs = [(actual[part][k], v) for k, v in expected[part].items() if v.is_floating_point()]
            errors.append(
                relative_error(*(torch.cat([v.flatten() for v in side]) for side in zip(*pairs, strict=True)))
            )
        assert all(torch.equal(actual['buffers'][k], v) for k, v in expected['buffers'].items() if 'tracked' in k)
        yield errors


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in CASES if name != 'BN'])
def test_two_processes(folder, name):
    for errors in compare(name, folder):
        assert max(errors) < TOLERANCE
    left = torch.load(folder / f'{name}-0.pth', map_location='cpu', weights_only=True)['buffers']
    assert {int(b) for k, b in left.items() if 'tracked' in k} == {0 if 'frozen' in name else 2}


@pytest.mark.slow
def test_it_matters(folder):
    """BN without synchronisation does not compute the same, so that the comparison above can fail."""
    for losses, gradients, buffers in compare('BN', folder):
        assert losses > 10 * TOLERANCE
        assert gradients > 100 * TOLERANCE
        assert buffers > 100 * TOLERANCE


@pytest.fixture
def logged(monkeypatch):
    lines = []
    monkeypatch.setattr(norms, 'print_log', lambda text, **_: lines.append(text))
    monkeypatch.setattr(SyncBatchNorm, '_told', False)
    return lines


@pytest.mark.parametrize(
    'options', [{}, dict(momentum=None), dict(affine=False), dict(track_running_stats=False)], ids=str
)
def test_outside_of_a_group(logged, options):
    """BN, bit by bit, and one log line for all layers and steps."""
    plain, norm = nn.BatchNorm2d(6, **options), SyncBatchNorm(6, **options)
    assert plain.state_dict().keys() == norm.state_dict().keys()
    randomise(plain)
    randomise(norm)
    for mode in (True, True, False):
        x = image((4, 6, 5, 7))
        assert torch.equal(norm.train(mode)(x), plain.train(mode)(x))
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in norm.state_dict().items())
    SyncBatchNorm(3)(image((2, 3, 4, 4)))
    assert logged == ['SyncBN without a process group: it normalizes like BN.']


def test_evaluation_needs_no_group(logged):
    SyncBatchNorm(3).eval()(image((2, 3, 4, 4)))
    assert not logged


@pytest.mark.parametrize('training', [True, False])
def test_has_what_the_forward_of_torch_uses(training):
    """On CUDA it computes by the method of torch's class, of which it is no subclass."""
    plain, norm = randomise(nn.BatchNorm2d(6)).train(training), randomise(SyncBatchNorm(6)).train(training)
    assert not isinstance(norm, nn.SyncBatchNorm)
    assert vars(norm).keys() == vars(nn.SyncBatchNorm(6)).keys()
    x = image((4, 6, 5, 7))
    assert torch.equal(nn.SyncBatchNorm.forward(norm, x), plain(x))
    with pytest.raises(ValueError, match='expected at least 2D input'):
        nn.SyncBatchNorm.forward(norm, x[0, 0, 0])


def test_group_of_one(process_group, logged):
    """torch's own refuses the CPU here; this one is BN, and needs not say so."""
    x = image((4, 6, 5, 7))
    with pytest.raises(ValueError, match='on GPU'):
        nn.SyncBatchNorm(6)(x)
    plain, norm = randomise(nn.BatchNorm2d(6)), randomise(SyncBatchNorm(6))
    assert torch.equal(norm(x), plain(x))
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in norm.state_dict().items())
    assert not logged


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('shape', [(8, 6, 5, 7), (8, 6), (8, 6, 9)], ids=str)
def test_formula(process_group, dtype, shape):
    """The synchronised formula itself, in a group of one, against BN: outputs, gradients, statistics."""
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    plain, norm = randomise(kind(6)), randomise(SyncBatchNorm(6))
    if dtype == torch.float64:
        plain, norm = plain.double(), norm.double()
    results = []
    for module in (plain, norm._forward_synchronised):
        x = (3 * image(shape) + 100).to(dtype).requires_grad_()  # a mean far from 0: E[x^2] - E[x]^2 cancels
        y = module(x)
        assert y.dtype == dtype
        (y * image(shape, 1).to(dtype)).sum().backward()
        results.append((y.detach(), x.grad))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 1e-2}[dtype]
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert relative_error(ours, theirs) < tolerance
    for name, p in norm.named_parameters():
        assert relative_error(p.grad, dict(plain.named_parameters())[name].grad) < tolerance
    for name, b in norm.named_buffers():
        assert relative_error(b, dict(plain.named_buffers())[name]) < (tolerance if b.dim() else 0.1), name
