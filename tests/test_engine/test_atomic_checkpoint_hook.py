"""Killed at any moment, a run keeps a checkpoint to resume from, and nothing half-written is taken for one."""

import io
import logging
import os
import signal
import uuid

import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.runner.checkpoint import save_checkpoint

from mmunireplknet.engine import atomic_checkpoint_hook
from mmunireplknet.engine.atomic_checkpoint_hook import AtomicCheckpointHook, AtomicLocalBackend, latest_checkpoint

from .tiny_run import differences, output_of, start


class Disk:
    """Stands in for the runner; remembers which files there were when a checkpoint was about to be written."""

    def __init__(self, work_dir, hub=None):
        self.work_dir = str(work_dir)
        self.iter = self.epoch = 0
        self.message_hub = MessageHub.get_instance(uuid.uuid4().hex)
        if hub is not None:
            self.message_hub.load_state_dict(hub)
        self.logger = logging.getLogger('disk')
        self.before_saving = []
        self.saved_hub = None
        self.fail = False

    def save_checkpoint(self, out_dir, filename, file_client_args=None, meta=None, backend_args=None, **_):
        self.before_saving.append(self.files())
        self.saved_hub = self.message_hub.state_dict()
        if self.fail:
            raise OSError('No space left on device')
        save_checkpoint(dict(meta=meta), os.path.join(out_dir, filename), file_client_args, backend_args)

    def files(self):
        return {name for name in os.listdir(self.work_dir) if '.pth' in name}

    def info(self, key):
        return self.message_hub.get_info(key)


def make(work_dir, hub=None, **kwargs):
    runner = Disk(work_dir, hub)
    hook = AtomicCheckpointHook(**dict(dict(interval=1, by_epoch=False), **kwargs))
    hook.before_train(runner)
    return hook, runner


def train_to(hook, runner, step):
    runner.iter = step - 1
    hook.after_train_iter(runner, step - 1)
    runner.iter = step


def zip_bytes():
    buffer = io.BytesIO()
    torch.save(dict(meta=dict(iter=1)), buffer)
    return buffer.getvalue()


class TestAtomicLocalBackend:
    def test_put(self, tmp_path):
        file = tmp_path / 'new' / 'a.pth'
        AtomicLocalBackend().put(b'one', file)
        AtomicLocalBackend().put(b'two', str(file))
        assert file.read_bytes() == b'two'
        assert os.listdir(file.parent) == ['a.pth']

    def test_put_text(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        AtomicLocalBackend().put_text('Größe', 'last_checkpoint', encoding='latin-1')
        assert (tmp_path / 'last_checkpoint').read_bytes() == 'Größe'.encode('latin-1')

    @pytest.mark.parametrize('function', ['fsync', 'replace'])
    def test_a_failure_leaves_the_old_file_alone(self, tmp_path, monkeypatch, function):
        AtomicLocalBackend().put(b'old', tmp_path / 'a.pth')

        def fail(*_):
            raise OSError('No space left on device')

        monkeypatch.setattr(os, function, fail)
        with pytest.raises(OSError, match='No space'):
            AtomicLocalBackend().put(b'new', tmp_path / 'a.pth')
        assert os.listdir(tmp_path) == ['a.pth']
        assert (tmp_path / 'a.pth').read_bytes() == b'old'

    def test_content_is_on_the_disk_before_it_gets_its_name(self, tmp_path, monkeypatch):
        order = []
        fsync, replace = os.fsync, os.replace
        monkeypatch.setattr(os, 'fsync', lambda fd: (order.append(os.path.isdir(f'/proc/self/fd/{fd}')), fsync(fd)))
        monkeypatch.setattr(os, 'replace', lambda a, b: (order.append('replace'), replace(a, b)))
        AtomicLocalBackend().put(b'new', tmp_path / 'a.pth')
        assert order == [False, 'replace', True]


class TestBackendChoice:
    def test_local_path(self, tmp_path):
        hook, _ = make(tmp_path)
        assert type(hook.file_backend) is AtomicLocalBackend

    def test_own_backend_args_win(self, tmp_path):
        hook, _ = make(tmp_path, backend_args=dict(backend='local'))
        assert type(hook.file_backend) is not AtomicLocalBackend
        assert hook.backend_args == dict(backend='local')

    def test_out_dir_may_be_a_path(self, tmp_path):
        (tmp_path / 'work').mkdir()
        hook, runner = make(tmp_path / 'work', out_dir=tmp_path / 'out')
        train_to(hook, runner, 1)
        assert latest_checkpoint(runner.work_dir) == str(tmp_path / 'out' / 'work' / 'iter_1.pth')


class TestRemoval:
    def test_the_old_checkpoint_goes_after_the_new_one_stands(self, tmp_path):
        hook, runner = make(tmp_path, max_keep_ckpts=1)
        for step in (1, 2, 3):
            train_to(hook, runner, step)
        assert runner.before_saving == [set(), {'iter_1.pth'}, {'iter_2.pth'}]
        assert runner.files() == {'iter_3.pth'}
        assert runner.info('keep_ckpt_ids') == [3]

    def test_nothing_goes_when_saving_fails(self, tmp_path):
        hook, runner = make(tmp_path, max_keep_ckpts=1)
        train_to(hook, runner, 1)
        runner.fail = True
        with pytest.raises(OSError, match='No space'):
            train_to(hook, runner, 2)
        assert runner.files() == {'iter_1.pth'}
        assert latest_checkpoint(tmp_path) == str(tmp_path / 'iter_1.pth')

    def test_last_checkpoint_never_names_what_is_gone(self, tmp_path, monkeypatch):
        hook, runner = make(tmp_path, max_keep_ckpts=1)
        train_to(hook, runner, 1)

        def fail(*_):
            raise OSError('killed here')

        monkeypatch.setattr(AtomicLocalBackend, 'put_text', fail)
        with pytest.raises(OSError, match='killed'):
            train_to(hook, runner, 2)
        assert runner.files() == {'iter_1.pth', 'iter_2.pth'}
        assert latest_checkpoint(tmp_path) == str(tmp_path / 'iter_1.pth')

    def test_last_checkpoint_is_written_atomically(self, tmp_path, monkeypatch):
        renamed = []
        replace = os.replace
        monkeypatch.setattr(os, 'replace', lambda a, b: (renamed.append(os.path.basename(b)), replace(a, b)))
        hook, runner = make(tmp_path)
        train_to(hook, runner, 1)
        assert renamed == ['iter_1.pth', 'last_checkpoint']

    def test_the_list_of_kept_checkpoints_goes_on_after_resuming(self, tmp_path):
        hook, runner = make(tmp_path, max_keep_ckpts=2)
        for step in (1, 2, 3):
            train_to(hook, runner, step)
        assert runner.saved_hub['runtime_info']['keep_ckpt_ids'] == [2, 3]
        hook, runner = make(tmp_path, hub=runner.saved_hub, max_keep_ckpts=2)
        train_to(hook, runner, 4)
        assert runner.files() == {'iter_3.pth', 'iter_4.pth'}
        assert runner.info('keep_ckpt_ids') == [3, 4]

    def test_a_resumed_run_finishes_the_removal(self, tmp_path, monkeypatch):
        hook, runner = make(tmp_path, max_keep_ckpts=1)
        train_to(hook, runner, 1)
        monkeypatch.setattr(AtomicCheckpointHook, '_remove', lambda *_: [])  # killed here
        train_to(hook, runner, 2)
        monkeypatch.undo()
        assert runner.files() == {'iter_1.pth', 'iter_2.pth'}
        _, runner = make(tmp_path, hub=runner.saved_hub, max_keep_ckpts=1)
        assert runner.files() == {'iter_2.pth'}

    def test_checkpoints_of_another_run_stay(self, tmp_path):
        (tmp_path / 'iter_77.pth').write_bytes(zip_bytes())
        hook, runner = make(tmp_path, max_keep_ckpts=1)
        train_to(hook, runner, 1)
        train_to(hook, runner, 2)
        assert runner.files() == {'iter_77.pth', 'iter_2.pth'}


class TestBest:
    @staticmethod
    def validate(hook, runner, **metrics):
        hook.after_val_epoch(runner, metrics=metrics)

    def test_the_previous_best_goes_after_the_new_one_stands(self, tmp_path):
        hook, runner = make(tmp_path, save_best='mIoU', max_keep_ckpts=1)
        train_to(hook, runner, 1)
        self.validate(hook, runner, mIoU=0.5)
        train_to(hook, runner, 2)
        del runner.before_saving[:]
        self.validate(hook, runner, mIoU=0.6)
        # Two writes: the best one, then the last one again, which names the best. Until then the old best is there.
        assert runner.before_saving == [
            {'best_mIoU_iter_1.pth', 'iter_2.pth'},
            {'best_mIoU_iter_1.pth', 'best_mIoU_iter_2.pth', 'iter_2.pth'},
        ]
        assert runner.files() == {'best_mIoU_iter_2.pth', 'iter_2.pth'}
        assert runner.saved_hub['runtime_info']['best_ckpt'].endswith('best_mIoU_iter_2.pth')

    def test_a_worse_one_changes_nothing(self, tmp_path):
        hook, runner = make(tmp_path, save_best='mIoU')
        train_to(hook, runner, 1)
        self.validate(hook, runner, mIoU=0.5)
        self.validate(hook, runner, mIoU=0.4)
        assert runner.files() == {'best_mIoU_iter_1.pth', 'iter_1.pth'}

    def test_a_best_file_written_again_under_its_name_stays(self, tmp_path):
        hook, runner = make(tmp_path, save_best='mIoU')
        train_to(hook, runner, 1)
        self.validate(hook, runner, mIoU=0.5)
        self.validate(hook, runner, mIoU=0.6)
        assert runner.files() == {'best_mIoU_iter_1.pth', 'iter_1.pth'}

    def test_several_metrics(self, tmp_path):
        hook, runner = make(tmp_path, save_best=['mIoU', 'aAcc'], max_keep_ckpts=1)
        train_to(hook, runner, 1)
        self.validate(hook, runner, mIoU=0.5, aAcc=0.5)
        train_to(hook, runner, 2)
        self.validate(hook, runner, mIoU=0.4, aAcc=0.6)
        assert runner.files() == {'best_mIoU_iter_1.pth', 'best_aAcc_iter_2.pth', 'iter_2.pth'}

    def test_a_resumed_run_removes_the_previous_best(self, tmp_path, monkeypatch):
        hook, runner = make(tmp_path, save_best='mIoU', max_keep_ckpts=1)
        train_to(hook, runner, 1)
        self.validate(hook, runner, mIoU=0.5)
        monkeypatch.setattr(AtomicCheckpointHook, '_remove', lambda *_: [])  # killed here
        train_to(hook, runner, 2)
        self.validate(hook, runner, mIoU=0.6)
        monkeypatch.undo()
        _, runner = make(tmp_path, hub=runner.saved_hub, save_best='mIoU', max_keep_ckpts=1)
        assert 'best_mIoU_iter_1.pth' not in runner.files()
        assert {'best_mIoU_iter_2.pth', 'iter_2.pth'} <= runner.files()


def test_temporary_files_of_a_killed_run_are_removed(tmp_path):
    stale = {'iter_8.pth.123.tmp', 'best_mIoU_iter_4.pth.9.tmp', 'last_checkpoint.123.tmp'}
    other = {'iter_4.pth', 'notes.12.tmp', 'iter_8.pth.tmp', 'iter_8.pth.x.tmp', 'last_checkpoint'}
    for name in stale | other:
        (tmp_path / name).write_bytes(b'')
    make(tmp_path)
    assert set(os.listdir(tmp_path)) == other


class TestLatestCheckpoint:
    @pytest.fixture
    def work_dir(self, tmp_path):
        for name in ('iter_9.pth', 'iter_10.pth'):
            (tmp_path / name).write_bytes(zip_bytes())
        (tmp_path / 'iter_12.pth').write_bytes(zip_bytes()[:-30])
        (tmp_path / 'best_mIoU_iter_99.pth').write_bytes(zip_bytes())
        (tmp_path / 'iter_11.pth.5.tmp').write_bytes(zip_bytes())
        return tmp_path

    def test_as_named(self, work_dir):
        (work_dir / 'last_checkpoint').write_text(f'{work_dir}/iter_9.pth\n')
        assert latest_checkpoint(str(work_dir)) == f'{work_dir}/iter_9.pth'

    def test_missing(self, work_dir):
        assert latest_checkpoint(work_dir) == f'{work_dir}/iter_10.pth'

    @pytest.mark.parametrize('content', [b'', b'\n', b'/nowhere/iter_7.pth', b'\xff\xfe', b'{}/iter_12.pth'])
    def test_useless(self, work_dir, content):
        (work_dir / 'last_checkpoint').write_bytes(content.replace(b'{}', str(work_dir).encode()))
        assert latest_checkpoint(work_dir) == f'{work_dir}/iter_10.pth'

    def test_moved(self, work_dir):
        (work_dir / 'last_checkpoint').write_text('/old/place/iter_9.pth')
        assert latest_checkpoint(work_dir) == f'{work_dir}/iter_9.pth'

    def test_remote(self, work_dir):
        (work_dir / 'last_checkpoint').write_text('s3://bucket/iter_9.pth')
        assert latest_checkpoint(work_dir) == 's3://bucket/iter_9.pth'

    def test_directory_of_deepspeed(self, work_dir):
        (work_dir / 'iter_20').mkdir()
        (work_dir / 'last_checkpoint').write_text(f'{work_dir}/iter_20')
        assert latest_checkpoint(work_dir) == f'{work_dir}/iter_10.pth'  # empty
        (work_dir / 'iter_20' / 'rank_0.pt').write_bytes(b'x')
        assert latest_checkpoint(work_dir) == f'{work_dir}/iter_20'

    @pytest.mark.parametrize(('newer', 'older'), [('epoch_2.pth', 'iter_10.pth'), ('iter_10.pth', 'epoch_2.pth')])
    def test_both_kinds(self, work_dir, newer, older):
        (work_dir / 'epoch_2.pth').write_bytes(zip_bytes())
        os.utime(work_dir / older, (1e9, 1e9))
        os.utime(work_dir / newer, (2e9, 2e9))
        assert latest_checkpoint(work_dir) == f'{work_dir}/{newer}'

    def test_none(self, tmp_path):
        assert latest_checkpoint(tmp_path) is None
        assert latest_checkpoint(tmp_path / 'nowhere') is None
        (tmp_path / 'last_checkpoint').write_text('gone.pth')
        assert latest_checkpoint(tmp_path) is None

    def test_every_cut_is_noticed(self, tmp_path):
        whole = zip_bytes()
        for length in range(0, len(whole), 7):
            (tmp_path / 'iter_1.pth').write_bytes(whole[:length])
            assert latest_checkpoint(tmp_path) is None, length


def test_the_names_are_those_that_configs_use():
    assert atomic_checkpoint_hook.HOOKS.get('AtomicCheckpointHook') is AtomicCheckpointHook


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('undisturbed')
    assert start(work_dir)() == [0]
    return work_dir


@pytest.mark.slow
@pytest.mark.parametrize(('moment', 'killed_by'), [('write:8', signal.SIGXFSZ), ('rename:8', signal.SIGKILL)])
def test_killed_while_saving(undisturbed, tmp_path, moment, killed_by):
    assert start(tmp_path, '--kill', moment)() == [-killed_by]
    names = os.listdir(tmp_path)
    assert 'iter_8.pth' not in names
    assert [name for name in names if name.startswith('iter_8.pth.') and name.endswith('.tmp')]
    assert latest_checkpoint(tmp_path) == str(tmp_path / 'iter_4.pth')
    assert torch.load(tmp_path / 'iter_4.pth', weights_only=False)['meta']['iter'] == 4

    assert start(tmp_path, '--resume')() == [0], output_of(tmp_path)
    assert [name for name in os.listdir(tmp_path) if '.pth' in name] == ['iter_10.pth']
    assert differences(undisturbed / 'iter_10.pth', tmp_path / 'iter_10.pth') == []
