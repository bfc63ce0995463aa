"""The kernel that a Dilated Reparam Block merges in evaluation: kept while it holds, and never a moment longer."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mmunireplknet.models import dilated_reparam
from mmunireplknet.models.dilated_reparam import DilatedReparamBlock

from ..procedural import fill, image, randomise, relative_error
from .fused_cases import layered, small

X = image((2, 6, 11, 12))
TOLERANCE = 1e-5


def block(kernel: int = 13, **options: object) -> DilatedReparamBlock:
    return randomise(DilatedReparamBlock(6, kernel, **options)).eval()


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each time that branches are merged."""
    calls: list[None] = []
    merge = dilated_reparam._merge

    def spy(layers: list) -> tuple[Tensor, Tensor]:
        calls.append(None)
        return merge(layers)

    monkeypatch.setattr(dilated_reparam, '_merge', spy)
    return calls


def check(model: DilatedReparamBlock, x: Tensor = X, tolerance: float = TOLERANCE) -> Tensor:
    """Compare a pass without gradients with that of the layers."""
    with torch.no_grad():
        y = model(x)
        assert relative_error(y, layered(model)(x)) < tolerance
    return y


# ------------------------------------------------------------------------------------------ kept


@pytest.mark.parametrize('guard', [torch.no_grad, torch.inference_mode])
def test_merged_once(guard: Callable, merges: list) -> None:
    model = block()
    with guard():
        first = model(X)
        kept = model._kept
        assert torch.equal(model(X), first)
        assert model._kept is kept
        model(X[:1])
    assert len(merges) == 1
    check(model)


def test_not_without_gradients_only(merges: list) -> None:
    """A kernel with gradients belongs to its pass."""
    model = block()
    for _ in range(2):
        model(X)
    assert model._kept is None
    assert len(merges) == 2
    check(model)
    grads = [torch.autograd.grad(net(X).square().sum(), net.lk_origin.weight)[0] for net in (model, layered(model))]
    assert relative_error(*grads) < TOLERANCE
    assert len(merges) == 4


def fake(model: DilatedReparamBlock) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        model(mode.from_tensor(X))


def traced(model: DilatedReparamBlock) -> None:
    with torch.no_grad():
        make_fx(model, tracing_mode='symbolic', _allow_non_fake_inputs=True)(X)


@pytest.mark.parametrize('look', [fake, traced], ids=lambda look: look.__name__)
@pytest.mark.parametrize('before', [False, True])
def test_not_of_tensors_without_values(look: Callable, before: bool) -> None:
    """What a mode that only looks at shapes merges does not stay; what was kept before does no harm."""
    model = block()
    if before:
        check(model)
    kept = model._kept
    look(model)
    assert model._kept is kept
    assert type(check(model)) is Tensor


def test_not_part_of_the_state() -> None:
    model = block()
    keys, buffers = set(model.state_dict()), len(list(model.buffers()))
    check(model)
    assert set(model.state_dict()) == keys
    assert len(list(model.buffers())) == buffers


# ------------------------------------------------------------------------------------------ forgotten


@pytest.mark.parametrize('mode', [True, False])
def test_forgotten_by_train_and_eval(mode: bool, merges: list) -> None:
    """Of the block itself and of a model around it; what was changed through ``.data`` counts from then on."""
    model = block()
    for parent in (model, nn.Sequential(model)):
        check(model)
        before = len(merges)
        model.lk_origin.weight.data.mul_(1.5)
        parent.train(mode)
        assert model._kept is None
        parent.eval()
        check(model)
        assert len(merges) > before


def scaled(model: nn.Module, factor: float = 1.5) -> dict[str, Tensor]:
    return {k: v * factor if v.is_floating_point() else v for k, v in model.state_dict().items()}


def optimizer_step(model: DilatedReparamBlock) -> None:
    model(X).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()


def in_place(name: str) -> Callable:
    """A change of one tensor by at least a third."""

    def change(model: DilatedReparamBlock) -> None:
        with torch.no_grad():
            model.state_dict()[name].add_(1.0)

    change.__name__ = f'in_place({name})'
    return change


def new_parameter(model: DilatedReparamBlock) -> None:
    model.dil_conv_k3_4.weight = nn.Parameter(model.dil_conv_k3_4.weight.detach() + 1)


def new_norm(model: DilatedReparamBlock) -> None:
    model.origin_bn = randomise(nn.BatchNorm2d(6)).eval()


def new_eps(model: DilatedReparamBlock) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1.0


def training_step(model: DilatedReparamBlock) -> None:
    """Changes running statistics only."""
    model.train()
    with torch.no_grad():
        model(X)
    model.eval()


CHANGES = [
    optimizer_step,
    training_step,
    new_parameter,
    new_norm,
    new_eps,
    in_place('lk_origin.weight'),
    in_place('dil_conv_k3_5.weight'),
    in_place('dil_bn_k3_3.weight'),
    in_place('dil_bn_k3_3.bias'),
    in_place('origin_bn.running_mean'),
    in_place('dil_bn_k7_2.running_var'),
]


@pytest.mark.parametrize('change', CHANGES, ids=lambda change: change.__name__)
def test_forgotten_after_a_change(change: Callable) -> None:
    model = block()
    before = check(model).clone()
    change(model)
    assert relative_error(check(model), before) > 1e-3


@pytest.mark.parametrize('assign', [False, True])
def test_forgotten_after_loading(assign: bool) -> None:
    model = block()
    before = check(model).clone()
    for factor in (1.5, 0.7, 1.2):
        model.load_state_dict(scaled(model, factor), assign=assign)
        assert relative_error(check(model), before) > 0.01


def test_forgotten_after_a_change_in_inference_mode() -> None:
    """Tensors that were made in it count no changes."""
    with torch.inference_mode():
        model = block()
        before = check(model).clone()
        model.load_state_dict(scaled(model))
        assert relative_error(check(model), before) > 0.01


def test_forgotten_after_a_conversion() -> None:
    """To other dtypes and back."""
    model = block()
    for dtype, tolerance in (
        (torch.float32, 1e-5),
        (torch.float64, 1e-12),
        (torch.bfloat16, 2e-2),
        (torch.float32, 1e-5),
    ):
        y = check(model.to(dtype), X.to(dtype), tolerance)
        assert y.dtype == dtype


def test_round_trip_through_16_bits() -> None:
    """The rounded weights may lie at the same place in memory."""
    model = block()
    before = check(model).clone()
    for _ in range(5):
        model.bfloat16().float()
        assert relative_error(check(model, tolerance=1e-6), before) > 1e-4


def test_deploy_form_after_it_was_kept() -> None:
    model = block()
    before = check(model).clone()
    model.switch_to_deploy()
    with torch.no_grad():
        assert relative_error(model(X), before) < TOLERANCE


def test_hooks_and_modes_come_before_it() -> None:
    """A kernel that is kept does not hide a hook, or a norm that was switched to the statistics of the batch."""
    model, seen = block(), []
    check(model)
    handle = model.dil_conv_k3_3.register_forward_hook(lambda *_: seen.append(None))
    check(model)
    assert seen
    handle.remove()
    model.dil_bn_k3_3.train()
    with torch.no_grad():
        other = layered(model)
        assert relative_error(model(X), other(X)) < TOLERANCE


def test_backend_of_the_layer() -> None:
    """What its convolution asks for counts in every form."""
    model = block()
    model.lk_origin.backend = 'triton'
    for training in (True, False):
        for guard in (torch.no_grad, torch.enable_grad):
            with guard(), pytest.raises(RuntimeError, match='triton'):
                model.train(training)(X)


# ------------------------------------------------------------------------------------------ with mmengine


class Net(BaseModel):
    """A backbone that is trained to be zero."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = small(out_indices=(3,))

    def forward(self, inputs: Tensor, label: Tensor, mode: str = 'tensor') -> dict | list:
        y = self.backbone(inputs)[0]
        if mode == 'loss':
            return dict(loss=y.square().mean())
        with torch.no_grad():
            expected = layered(self.backbone)(inputs)[0]
        return [dict(mine=a, layers=b) for a, b in zip(y, expected, strict=True)]


class Outputs(BaseMetric):
    """Whether what is validated is what the weights of the moment give."""

    def process(self, data_batch: object, data_samples: list) -> None:
        self.results += data_samples

    def compute_metrics(self, results: list) -> dict:
        mine, layers = (torch.stack([result[name] for result in results]) for name in ('mine', 'layers'))
        return dict(error=relative_error(mine, layers), norm=float(mine.norm()))


class Peek(Hook):
    """Looks at the weights of training by a pass in evaluation right before each validation, and keeps what it saw."""

    priority = 'HIGHEST'

    def __init__(self) -> None:
        self.norms: list[dict[str, float]] = []

    def before_val(self, runner: Runner) -> None:
        runner.model.eval()
        with torch.no_grad():
            raw = runner.model(image((2, 3, 64, 64)), None, 'predict')
        self.norms.append(dict(raw=float(torch.stack([r['mine'] for r in raw]).norm())))

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        (ema,) = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
        # Swapped: the model holds the averages, and the averaged one what is being trained.
        assert metrics['error'] < TOLERANCE
        self.norms[-1]['ema'] = metrics['norm']
        with torch.no_grad():
            trained = layered(ema.ema_model.module.backbone).eval()(image((2, 3, 64, 64)))[0]
        self.norms[-1]['trained'] = float(trained.norm())


@pytest.fixture
def kept_random_state() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def test_weights_swapped_by_mmengine(tmp_path: Path, kept_random_state: None) -> None:
    """EMAHook exchanges the weights for their averages through ``.data``, and the loop calls ``eval()`` after that."""
    data, peek = [dict(inputs=x, label=torch.zeros(())) for x in image((2, 3, 64, 64))], Peek()
    loader = dict(
        dataset=data,
        batch_size=2,
        sampler=dict(type='DefaultSampler', shuffle=False),
        num_workers=0,
        collate_fn=dict(type='default_collate'),
    )
    runner = Runner(
        model=Net(),
        work_dir=str(tmp_path),
        train_dataloader=loader,
        val_dataloader=loader,
        val_evaluator=[Outputs()],
        train_cfg=dict(by_epoch=True, max_epochs=3, val_interval=1),
        val_cfg=dict(),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.3)),
        custom_hooks=[peek, dict(type='EMAHook', momentum=0.5)],
        default_hooks=dict(checkpoint=None, logger=None),
        experiment_name='merged_kernel',
        log_level='ERROR',
        randomness=dict(seed=0),
    )
    runner.train()
    assert len(peek.norms) == 3
    for norms in peek.norms[1:]:
        assert norms['raw'] == pytest.approx(norms['trained'], rel=1e-5)
        assert norms['ema'] != pytest.approx(norms['raw'], rel=1e-3)


def test_saved_and_loaded(tmp_path: Path) -> None:
    """A checkpoint into a model that has evaluated before."""
    source, target = block(), block()
    check(target)
    with torch.no_grad():
        for p in source.parameters():
            p.copy_(torch.from_numpy(fill('another', tuple(p.shape))))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(check(target), check(source))
    assert F.mse_loss(check(target), check(block())) > 1e-3
