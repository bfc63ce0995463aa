"""A loss that is not finite ends the run, with the last good checkpoint as it was."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner
from torch import nn

from mmunireplknet.engine import AtomicCheckpointHook, NonFiniteLossHook
from mmunireplknet.engine.non_finite_loss_hook import NonFiniteLossError


class Model(BaseModel):
    """Its loss is ``value`` from iteration ``at`` on (from 1)."""

    def __init__(self, at=99, value=math.nan):
        super().__init__()
        self.line = nn.Linear(2, 1)
        self.at, self.value, self.count = at, value, 0

    def forward(self, inputs, mode='loss'):
        self.count += 1
        loss = self.line(inputs).mean()
        return dict(loss_a=loss * (self.value if self.count >= self.at else 1), loss_b=loss.detach() * 0 + 1)


@OPTIM_WRAPPERS.register_module(force=True)
class ScalingOptimWrapper(OptimWrapper):
    """What AmpOptimWrapper does with fp16: scale the loss, leave out the steps whose gradients are infinite."""

    def __init__(self, scale, **kwargs):
        super().__init__(**kwargs)
        self.scaler = torch.amp.GradScaler('cpu', init_scale=scale)

    def update_params(self, loss, **kwargs):
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def train(work_dir, model, iterations=6, optim_wrapper=None, hook=None, save_every=2, hooks=(), **more):
    runner = Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=[dict(inputs=torch.ones(2))] * 4, sampler=dict(type='InfiniteSampler'), batch_size=1,
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=False, max_iters=iterations),
        optim_wrapper=optim_wrapper or dict(optimizer=dict(type='SGD', lr=0.01)),
        default_hooks=dict(
            checkpoint=dict(type='AtomicCheckpointHook', by_epoch=False, interval=save_every, max_keep_ckpts=1)
        ),
        custom_hooks=[hook or dict(type='NonFiniteLossHook'), *hooks],
        experiment_name=work_dir.name,
        log_level='ERROR',
        **more,
    )  # fmt: skip
    runner.train()
    return runner


def weights(file):
    return torch.load(file, weights_only=False)['state_dict']


@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('at', [3, 4])
def test_the_run_ends_and_the_checkpoint_stays(tmp_path, at, value):
    with pytest.raises(NonFiniteLossError) as caught:
        train(tmp_path, Model(at, value))
    message = str(caught.value)
    assert re.search(
        rf'the loss of iteration {at} is not finite \(loss -?{value}, loss_a -?{value}\): the run', message
    )
    assert f'{tmp_path / "iter_2.pth"} is kept' in message
    assert '\n' not in message
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == ['iter_2.pth']
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / 'iter_2.pth').values())
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'iter_2.pth')


def test_the_first_iteration(tmp_path):
    with pytest.raises(NonFiniteLossError, match='no checkpoint is there yet'):
        train(tmp_path, Model(1))
    assert not list(tmp_path.glob('*.pth'))


def test_a_finite_loss_goes_on(tmp_path):
    assert train(tmp_path, Model()).iter == 6
    assert (tmp_path / 'iter_6.pth').exists()


def test_a_step_that_loss_scaling_leaves_out_goes_on(tmp_path):
    """2 ** 127 times a gradient of 2 overflows in float32; the loss does not, and the scale is halved."""
    wrapper = dict(type='ScalingOptimWrapper', scale=2.0**127, optimizer=dict(type='SGD', lr=0.01))
    model = Model()
    nn.init.zeros_(model.line.weight), nn.init.zeros_(model.line.bias)
    model.at, model.value = 1, 4.0  # gradients of 4 times 2 ** 127
    runner = train(tmp_path, model, optim_wrapper=wrapper)
    assert runner.iter == 6
    assert runner.optim_wrapper.scaler.get_scale() < 2.0**127, 'no step was left out, so this test shows nothing'


def test_a_look_now_and_then_never_saves_what_it_missed(tmp_path):
    """The loss is looked at every fifth iteration, and is NaN from the third on; the fourth is to be saved."""
    with pytest.raises(NonFiniteLossError, match=r'the weights are not finite \(line.weight, line.bias\) .*not saved'):
        train(tmp_path, Model(3), hook=NonFiniteLossHook(interval=5))
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == ['iter_2.pth']
    with pytest.raises(NonFiniteLossError, match='the loss of iteration 5'):
        train(tmp_path, Model(3), hook=NonFiniteLossHook(interval=5), save_every=100)


class Averages(Hook):
    """Says what EMAHook would have seen."""

    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.append(runner.iter + 1)


def test_it_comes_before_average_and_checkpoint(tmp_path):
    averages = Averages()
    with pytest.raises(NonFiniteLossError):
        train(tmp_path, Model(2), hooks=[averages])
    assert averages.seen == [1]
    assert AtomicCheckpointHook.priority == 'VERY_LOW'


def test_the_images_are_named():
    hook = NonFiniteLossHook()
    samples = [SimpleNamespace(img_path=f'{index}.jpg') for index in range(6)]
    runner = SimpleNamespace(iter=0, message_hub=SimpleNamespace(runtime_info={}))
    with pytest.raises(NonFiniteLossError, match=r'for 0\.jpg, 1\.jpg, 2\.jpg, 3\.jpg and 2 more: the run ends'):
        hook.after_train_iter(runner, 0, dict(data_samples=samples), dict(loss=torch.tensor(math.nan)))
    with pytest.raises(NonFiniteLossError, match=r'\(loss_gan inf\): the run'):
        hook.after_train_iter(runner, 0, [1], dict(loss_gan=torch.tensor(math.inf), other=1.0))
    hook.after_train_iter(runner, 0, None, dict(loss=torch.tensor(1.0)))
    hook.after_train_iter(runner, 0, None, None)


def _train_as_one_of_two(rank, store, work_dir):
    torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    torch.manual_seed(0)
    model = MMDistributedDataParallel(module=Model(3 if rank else 99))
    with pytest.raises((NonFiniteLossError, RuntimeError)) as caught:  # the other one loses its connection
        train(Path(work_dir), model, save_every=1)
    if isinstance(caught.value, NonFiniteLossError):
        Path(work_dir, f'message_{rank}').write_text(str(caught.value))


@pytest.mark.slow
def test_a_loss_of_another_process(tmp_path):
    """The third step of process 1 is bad; process 0, whose own loss is fine, is to save the weights after it."""
    torch.multiprocessing.spawn(_train_as_one_of_two, (str(tmp_path / 'store'), str(tmp_path / 'run')), nprocs=2)
    assert 'the loss of iteration 3' in (tmp_path / 'run/message_1').read_text()
    assert 'the weights are not finite' in (tmp_path / 'run/message_0').read_text()
    assert [path.name for path in (tmp_path / 'run').glob('*.pth')] == ['iter_2.pth']
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / 'run/iter_2.pth').values())
