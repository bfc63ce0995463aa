"""A run that is killed and resumed ends bit-equal to the one that was not."""

import io
import logging
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import loops
from torch.utils.data import DataLoader

from mmunireplknet.engine import random_state_hook
from mmunireplknet.engine.random_state_hook import RandomStateHook, capture_random_state, restore_random_state

from .fake_loops import IterLoop, LegacyIterator, Noise, draw, fake_runner, seed
from .tiny_run import differences, output_of, start


@pytest.fixture(autouse=True)
def _own_randomness():
    state = capture_random_state()
    seed(0)
    yield
    restore_random_state(state)


def saved_by(hook, runner):
    """The states as they come back from a checkpoint file that is loaded safely."""
    checkpoint = dict(meta=dict(seed=5))
    hook.before_save_checkpoint(runner, checkpoint)
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class TestStates:
    def test_restored_states_give_the_same_numbers(self):
        draw()
        state = capture_random_state()
        numbers = draw()
        draw()
        restore_random_state(state)
        assert draw() == numbers

    def test_capturing_changes_nothing(self):
        capture_random_state()
        numbers = draw()
        seed(0)
        assert draw() == numbers

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
    def test_cuda(self):
        torch.rand(2, device='cuda')
        state = capture_random_state()
        numbers = torch.rand(2, device='cuda')
        # Resuming maps every tensor of the checkpoint to the device of the run.
        state['cuda'] = [device.cuda() for device in state['cuda']]
        state['torch'] = state['torch'].cuda()
        restore_random_state(state)
        assert torch.equal(torch.rand(2, device='cuda'), numbers)

    def test_wrong_replay(self):
        with pytest.raises(ValueError, match="True, False or 'auto', but got 'always'"):
            RandomStateHook(replay='always')

    def test_registered(self):
        assert HOOKS.get('RandomStateHook') is RandomStateHook


@pytest.mark.parametrize('iterator', [loops._InfiniteDataloaderIterator, LegacyIterator])
@pytest.mark.parametrize('sampler', [InfiniteSampler, DefaultSampler])
@pytest.mark.parametrize(('num_workers', 'replay'), [(0, 'auto'), (0, True), (2, True)])
def test_iter_based(monkeypatch, iterator, sampler, num_workers, replay):
    """Seven batches in one go, and four, a checkpoint and three: the same. Epochs of DefaultSampler have three."""
    monkeypatch.setattr(loops.time, 'sleep', lambda _: None)
    hook, loop = RandomStateHook(), IterLoop(sampler, iterator, num_workers)
    runner = fake_runner(loop)
    hook.before_train(runner)
    hook.before_train_epoch(runner)
    for _ in range(4):
        loop.train()
    checkpoint = saved_by(hook, runner)
    expected = [loop.train() for _ in range(3)]

    seed(99)
    hook, loop = RandomStateHook(replay), IterLoop(sampler, iterator, num_workers, done=4)
    runner = fake_runner(loop, iter=4)
    hook.after_load_checkpoint(runner, checkpoint)
    hook.before_train(runner)
    hook.before_train_epoch(runner)
    draw()
    Noise.loaded = 0
    loop.skip()
    assert loop.train() == expected[0]
    if replay == 'auto':
        assert Noise.loaded <= 8  # this batch, and at most one for starting the sampler anew
    assert type(loop.dataloader_iterator) is iterator
    assert [loop.train() for _ in range(2)] == expected[1:]
    # The checkpoints of the resumed run name the beginning of the whole run.
    again = saved_by(hook, runner)['random_state']['ranks'][0]['start']
    assert torch.equal(again['torch'], checkpoint['random_state']['ranks'][0]['start']['torch'])


@pytest.mark.skipif(
    not hasattr(loops._InfiniteDataloaderIterator, 'skip_iter'), reason='mmengine 0.10.7 seeds the workers earlier'
)
def test_workers_that_torch_seeds():
    """Without ``worker_init_fn`` the seed of the workers is drawn when they start: a replay draws it again."""
    hook = RandomStateHook()
    loop = IterLoop(InfiniteSampler, loops._InfiniteDataloaderIterator, num_workers=1, own_seeds=False)
    runner = fake_runner(loop)
    hook.before_train_epoch(runner)
    loop.train()
    checkpoint, expected = saved_by(hook, runner), loop.train()

    seed(99)
    hook = RandomStateHook(replay=True)
    loop = IterLoop(InfiniteSampler, loops._InfiniteDataloaderIterator, num_workers=1, own_seeds=False, done=1)
    runner = fake_runner(loop, iter=1)
    hook.after_load_checkpoint(runner, checkpoint)
    hook.before_train(runner)
    loop.skip()
    assert loop.train() == expected


@pytest.mark.parametrize('deterministic', [True, False])
def test_auto_replays_workers_of_a_deterministic_run(caplog, deterministic):
    caplog.set_level(logging.INFO)
    hook, loop = RandomStateHook(), IterLoop(InfiniteSampler, loops._InfiniteDataloaderIterator, 1)
    runner = fake_runner(loop)
    hook.before_train_epoch(runner)
    for _ in range(2):
        loop.train()
    checkpoint, expected = saved_by(hook, runner), loop.train()

    hook, loop = RandomStateHook(), IterLoop(InfiniteSampler, loops._InfiniteDataloaderIterator, 1, done=2)
    runner = fake_runner(loop, iter=2, deterministic=deterministic)
    hook.after_load_checkpoint(runner, checkpoint)
    hook.before_train(runner)
    loop.skip()
    batch = loop.train()
    replayed = deterministic or not hasattr(loop.dataloader_iterator, 'skip_iter')  # mmengine 0.10.7 always does
    assert ('Batches run again: 2/2' in caplog.text) == replayed
    assert ('the augmentations differ' in caplog.text) != replayed
    assert (batch == expected) == replayed
    step = 1 + len(draw())
    assert batch[: 4 * step : step] == expected[: 4 * step : step]  # the same samples in any case


class TestSaving:
    @staticmethod
    def train(hook, runner, num_iters):
        """Iterations with CheckpointHook's question; returns after which the states were collected."""
        collected = []
        for runner.iter in range(num_iters):
            hook.before_train_iter(runner, runner.iter)
            hook.after_train_iter(runner, runner.iter)
            if hook._states is not None:
                collected.append(runner.iter + 1)
        return collected

    def test_collected_only_when_a_checkpoint_is_due(self):
        checkpoint_hook = CheckpointHook(interval=4, by_epoch=False, save_begin=2)
        assert self.train(RandomStateHook(), fake_runner(hooks=[checkpoint_hook]), 10) == [2, 6, 10]
        checkpoint_hook = CheckpointHook(interval=4, by_epoch=False, save_last=False)
        assert self.train(RandomStateHook(), fake_runner(hooks=[checkpoint_hook]), 10) == [4, 8]
        assert self.train(RandomStateHook(), fake_runner(hooks=[CheckpointHook(interval=1)]), 10) == []

    def test_collected_by_epoch(self):
        hook, runner = RandomStateHook(), fake_runner(hooks=[CheckpointHook(interval=2)])
        collected = []
        for runner.epoch in range(3):
            hook.before_train_iter(runner, 0)
            hook.after_train_epoch(runner)
            if hook._states is not None:
                collected.append(runner.epoch + 1)
        assert collected == [2, 3]

    def test_all_ranks(self, monkeypatch):
        others = capture_random_state()
        monkeypatch.setattr(random_state_hook, 'all_gather_object', lambda own: [own, dict(start=None, current=others)])
        monkeypatch.setattr(random_state_hook, 'get_world_size', lambda: 2)
        hook, runner = RandomStateHook(), fake_runner(hooks=[CheckpointHook(interval=1, by_epoch=False)])
        draw()
        hook.after_train_iter(runner, 0)
        checkpoint = saved_by(hook, runner)
        numbers = draw()
        seed(0)
        numbers_of_others = draw()

        for rank, expected in ((0, numbers), (1, numbers_of_others)):
            monkeypatch.setattr(random_state_hook, 'get_rank', lambda rank=rank: rank)
            hook, runner = RandomStateHook(), fake_runner(SimpleNamespace(dataloader=[0]), iter=1, epoch=1)
            runner.train_dataloader = DataLoader([0])
            hook.after_load_checkpoint(runner, checkpoint)
            hook.before_train(runner)
            assert draw() == expected

    def test_a_save_at_any_other_moment(self, monkeypatch, caplog):
        assert saved_by(RandomStateHook(), fake_runner())['random_state']['world_size'] == 1
        monkeypatch.setattr(random_state_hook, 'get_world_size', lambda: 2)
        assert 'random_state' not in saved_by(RandomStateHook(), fake_runner())
        assert len(warnings_of(caplog)) == 1

    def test_states_of_the_past_are_not_saved(self):
        hook, runner = RandomStateHook(), fake_runner(hooks=[CheckpointHook(interval=1, by_epoch=False)])
        hook.after_train_iter(runner, 0)
        hook.before_train_iter(runner, 1)
        draw()
        state = saved_by(hook, runner)['random_state']['ranks'][0]['current']
        numbers = draw()
        restore_random_state(state)
        assert draw() == numbers


class TestValidation:
    def test_leaves_no_trace(self):
        hook, runner = RandomStateHook(), fake_runner()
        hook.before_val(runner)
        numbers = draw()
        hook.after_val(runner)
        assert draw() == numbers

    def test_a_best_checkpoint_holds_the_states_of_training(self):
        hook, runner = RandomStateHook(), fake_runner(SimpleNamespace())
        hook.before_train(runner)
        hook.before_val(runner)
        numbers = draw()
        restore_random_state(saved_by(hook, runner)['random_state']['ranks'][0]['current'])
        assert draw() == numbers

    def test_alone_it_needs_no_other_rank(self, monkeypatch):
        monkeypatch.setattr(random_state_hook, 'all_gather_object', lambda _: pytest.fail('collective call'))
        hook, runner = RandomStateHook(), fake_runner()
        hook.before_val(runner)
        hook.after_val(runner)


class TestOtherCheckpoints:
    @staticmethod
    def resume(checkpoint, **kwargs):
        """Resume; returns whether the states have been restored."""
        hook, runner = RandomStateHook(), fake_runner(SimpleNamespace(), **dict(dict(iter=1, epoch=1), **kwargs))
        runner.train_dataloader = DataLoader([0])
        seed(99)
        numbers = draw()
        seed(99)
        hook.after_load_checkpoint(runner, checkpoint)
        hook.before_train(runner)
        return draw() != numbers

    def test_own(self, caplog):
        assert self.resume(saved_by(RandomStateHook(), fake_runner()))
        assert warnings_of(caplog) == []

    def test_without_states(self, caplog):
        assert not self.resume(dict(meta=dict(seed=5), state_dict={}))
        assert len(warnings_of(caplog)) == 1
        assert 'holds no random states' in caplog.text

    def test_of_another_number_of_processes(self, monkeypatch, caplog):
        checkpoint = saved_by(RandomStateHook(), fake_runner())
        monkeypatch.setattr(random_state_hook, 'get_world_size', lambda: 4)
        assert not self.resume(checkpoint)
        assert len(warnings_of(caplog)) == 1
        assert 'saved by 1 processes and is resumed by 4' in caplog.text

    def test_of_another_seed(self, monkeypatch, caplog):
        assert self.resume(saved_by(RandomStateHook(), fake_runner()), seed=6)
        assert len(warnings_of(caplog)) == 1
        assert 'Set randomness=dict(seed=5)' in caplog.text

        caplog.clear()
        monkeypatch.setattr(random_state_hook, 'is_main_process', lambda: False)
        assert self.resume(saved_by(RandomStateHook(), fake_runner()), seed=6)  # diff_rank_seed
        assert warnings_of(caplog) == []

    def test_training_on_without_a_checkpoint(self, caplog):
        hook = RandomStateHook()
        hook.before_train(fake_runner(SimpleNamespace(), iter=3))
        assert warnings_of(caplog) == []

    def test_within_an_epoch(self, caplog):
        assert self.resume(saved_by(RandomStateHook(), fake_runner()), iter=2)
        assert len(warnings_of(caplog)) == 1
        assert 'within an epoch' in caplog.text

    def test_loading_weights_is_not_resuming(self, caplog):
        assert not self.resume(saved_by(RandomStateHook(), fake_runner()), iter=0, epoch=0)
        assert not self.resume(dict(state_dict={}), iter=0, epoch=0)
        assert warnings_of(caplog) == []


def kill_and_resume(tmp_path, kill, last, *args):
    """Train undisturbed and, at the same time, be killed; resume; returns what differs at the end."""
    undisturbed, disturbed = tmp_path / 'undisturbed', tmp_path / 'disturbed'
    waits = start(undisturbed, *args), start(disturbed, *args, '--kill', kill)
    assert [wait() for wait in waits] == [[0], [-signal.SIGKILL]], output_of(disturbed)
    assert not os.path.exists(disturbed / last)
    assert start(disturbed, *args, '--resume')() == [0], output_of(disturbed)
    return differences(undisturbed / last, disturbed / last)


# The resumed checkpoint is that of iteration 4 or epoch 2, after which there was a validation that the killed
# run did and the resumed one does not.
@pytest.mark.slow
@pytest.mark.parametrize('workers', ['0', '2'])
def test_killed_and_resumed_by_iteration(tmp_path, workers):
    assert kill_and_resume(tmp_path, 'iter:6', 'iter_10.pth', '--workers', workers) == []


@pytest.mark.slow
@pytest.mark.parametrize('workers', ['0', '2'])
def test_killed_and_resumed_by_epoch(tmp_path, workers):
    """The workers are persistent ones."""
    assert kill_and_resume(tmp_path, 'iter:8', 'epoch_4.pth', '--by-epoch', '--workers', workers) == []


@pytest.mark.slow
def test_resumed_on_two_ranks(tmp_path):
    """Each rank has a seed, and so random states, of its own."""
    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    assert start(whole, '--max-keep-ckpts', '-1', ranks=2)() == [0, 0], output_of(whole)
    resumed.mkdir()
    shutil.copy(whole / 'iter_4.pth', resumed)
    assert start(resumed, '--resume', ranks=2)() == [0, 0], output_of(resumed)
    assert differences(whole / 'iter_10.pth', resumed / 'iter_10.pth') == []
    states = torch.load(resumed / 'iter_10.pth', weights_only=False)['random_state']['ranks']
    assert not torch.equal(states[0]['current']['torch'], states[1]['current']['torch'])
