"""Deploy checkpoints beside the training ones, of the right weights; a training that goes on as if nobody looked."""

import copy
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from torch import nn

from mmunireplknet import load_checkpoint, switch_to_deploy
from mmunireplknet.engine import reparameterize
from mmunireplknet.engine.deploy_files import SIGNATURE
from mmunireplknet.engine.reparameterize_hook import ReparameterizeError, ReparameterizeHook

from ..procedural import randomise, relative_error
from .reparameterize_run import Segmentor, break_folding, make_runner
from .tiny_run import differences, start

BEST = 'best_tiny_accuracy_'
SCORES = [0.5, 0.4, 0.6]
OPTIONS = dict(scores=SCORES, checkpoint=dict(save_best='tiny/accuracy'))


@pytest.fixture(scope='module', autouse=True)
def quick():
    """What mmengine collects of the environment takes longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmengine.runner.runner.collect_env', dict)
        yield


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A finished run with the hook at every checkpoint, and its log."""
    work_dir = tmp_path_factory.mktemp('run')
    make_runner(work_dir, dict(interval=2), **OPTIONS).train()
    return work_dir


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """The same run without the hook."""
    work_dir = tmp_path_factory.mktemp('undisturbed')
    make_runner(work_dir, None, **OPTIONS).train()
    return work_dir


def load(file):
    return torch.load(file, weights_only=False)


def checkpoints(folder):
    return {name for name in os.listdir(folder) if '.pth' in name}


def log_of(folder):
    return ''.join(file.read_text() for file in Path(folder).rglob('*.log'))


def deployed(file, **backbone):
    """The state dict that ``file`` should have in deploy form."""
    model = Segmentor(**backbone)
    model.load_state_dict(load(file)['state_dict'])
    return switch_to_deploy(model.eval()).state_dict()


def raw_weights(checkpoint):
    return {k.removeprefix('module.'): v for k, v in checkpoint['ema_state_dict'].items() if k != 'steps'}


class StopAtFour(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 4:
            raise KeyboardInterrupt


@pytest.mark.slow
class TestRun:
    def test_files(self, finished):
        assert checkpoints(finished) == {
            'iter_6.pth', 'iter_6_deploy.pth', f'{BEST}iter_6.pth', f'{BEST}iter_6_deploy.pth'
        }  # fmt: skip
        log = log_of(finished)
        for name in ('iter_2', 'iter_4', 'iter_6', f'{BEST}iter_2', f'{BEST}iter_6'):
            assert f'{name}_deploy.pth is written' in log, name
        for name in ('iter_2', 'iter_4', f'{BEST}iter_2'):
            assert f'{name}_deploy.pth is removed' in log, name
        assert log.count('images of the last training batch, 40x48, float32: backbone[0]') == 1
        assert 'backbone[3]' in log

    @pytest.mark.parametrize('name', ['iter_6', f'{BEST}iter_6'])
    def test_the_averaged_weights_are_merged(self, finished, name):
        training, written = load(finished / f'{name}.pth'), load(finished / f'{name}_deploy.pth')
        expected = deployed(finished / f'{name}.pth')
        assert written['state_dict'].keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(written['state_dict'][key], value), key
        assert set(written) == {'meta', 'state_dict'}
        raw = raw_weights(training) if name == 'iter_6' else raw_weights(load(finished / 'iter_6.pth'))
        key = 'backbone.stages.2.1.pwconv1.1.weight'
        assert relative_error(raw[key], written['state_dict'][key]) > 1e-3, 'the average is too near to tell'

    def test_meta_is_kept_and_marked(self, finished):
        training, written = (load(finished / name)['meta'] for name in ('iter_6.pth', 'iter_6_deploy.pth'))
        assert written['dataset_meta'] == dict(classes=('a', 'b'), palette=[[0, 0, 0], [9, 9, 9]])
        assert 'experiment' in written['cfg']
        mark = written.pop('mmunireplknet')
        assert {key for key in training if training[key] != written[key]} <= {'time'}
        assert (mark['form'], mark['source'], mark['dtype']) == ('deploy', 'iter_6.pth', 'float32')
        assert 0 < max(mark['relative_difference'].values()) < 1e-6
        torch.load(finished / 'iter_6_deploy.pth', weights_only=True)

    def test_it_loads_as_it_is(self, finished):
        model = Segmentor(deploy=True)
        load_checkpoint(model, finished / 'iter_6_deploy.pth')
        other = Segmentor()
        load_checkpoint(other, finished / 'iter_6.pth')
        x = torch.randn(1, 3, 40, 48, generator=torch.Generator().manual_seed(1))
        outs = [torch.stack(m.eval()(x)).detach() for m in (model, other)]
        assert 0 < relative_error(*outs) < 1e-5

    @pytest.mark.parametrize('name', ['iter_6.pth', f'{BEST}iter_6.pth'])
    def test_the_training_is_as_without(self, finished, undisturbed, name):
        a, b = load(finished / name), load(undisturbed / name)
        for state in {'state_dict', 'ema_state_dict'} & a.keys():
            assert a[state].keys() == b[state].keys()
            assert [key for key in a[state] if not torch.equal(a[state][key], b[state][key])] == []
        if name == 'iter_6.pth':
            assert a['random_state'], 'nothing to compare'
            assert differences(finished / name, undisturbed / name) == []

    def test_a_resumed_run_goes_on(self, undisturbed, tmp_path):
        """Stopped at 4, with a deploy checkpoint of which the training one says nothing yet."""
        with pytest.raises(KeyboardInterrupt):
            make_runner(tmp_path, dict(interval=2), hooks=[StopAtFour()], **OPTIONS).train()
        assert checkpoints(tmp_path) == {
            'iter_4.pth', 'iter_4_deploy.pth', f'{BEST}iter_2.pth', f'{BEST}iter_2_deploy.pth'
        }  # fmt: skip
        known = load(tmp_path / 'iter_4.pth')['message_hub']['runtime_info']['deploy_checkpoints']
        assert 'iter_4.pth' not in known
        options = dict(OPTIONS, scores=[0.6])
        make_runner(tmp_path, dict(interval=2), resume=True, **options).train()
        assert checkpoints(tmp_path) == {
            'iter_6.pth', 'iter_6_deploy.pth', f'{BEST}iter_6.pth', f'{BEST}iter_6_deploy.pth'
        }  # fmt: skip
        assert differences(undisturbed / 'iter_6.pth', tmp_path / 'iter_6.pth') == []

    def test_by_epoch_and_only_at_the_end(self, tmp_path):
        runner = make_runner(tmp_path, {}, iters=3, by_epoch=True, checkpoint=dict(interval=1, max_keep_ckpts=-1))
        runner.train()
        assert checkpoints(tmp_path) == {'epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth', 'epoch_3_deploy.pth'}

    def test_an_interval_of_epochs(self, tmp_path):
        checkpoint = dict(type='CheckpointHook', interval=1, max_keep_ckpts=-1)
        make_runner(tmp_path, dict(interval=2), iters=3, by_epoch=True, checkpoint=checkpoint, ema=False).train()
        names = {'epoch_2_deploy.pth', 'epoch_3_deploy.pth'}
        assert {name for name in checkpoints(tmp_path) if 'deploy' in name} == names

    @pytest.mark.parametrize(
        'options',
        [
            dict(dtype=torch.bfloat16),
            dict(dtype=torch.float16, optim=dict(optimizer=dict(type='SGD', lr=0.0))),
            dict(optim=dict(type='BF16OptimWrapper')),
            dict(backbone=dict(frozen_stages=2, norm_cfg=dict(type='SyncBN'), with_cp=True)),
        ],
        ids=['bfloat16', 'float16', 'amp', 'frozen'],
    )
    def test_kinds_of_training(self, tmp_path, options):
        make_runner(tmp_path, {}, iters=2, val=False, **options).train()
        written = load(tmp_path / 'iter_2_deploy.pth')
        dtype = options.get('dtype', torch.float32)
        assert written['meta']['mmunireplknet']['dtype'] == str(dtype).split('.')[1]
        weights = {k: v for k, v in written['state_dict'].items() if v.is_floating_point()}
        assert {v.dtype for v in weights.values()} == {dtype}
        assert 'the last training batch' in written['meta']['mmunireplknet']['images']
        backbone = {k: v for k, v in options.get('backbone', {}).items() if k != 'with_cp'}
        model = Segmentor(**backbone).to(dtype)
        model.load_state_dict(load(tmp_path / 'iter_2.pth')['state_dict'])
        for key, value in switch_to_deploy(model.eval()).state_dict().items():
            assert torch.equal(value, written['state_dict'][key]), key


@pytest.mark.slow
class TestFailure:
    def test_a_wrong_fold_is_raised_at_the_end(self, tmp_path, monkeypatch):
        break_folding(monkeypatch.setattr)
        runner = make_runner(tmp_path, dict(interval=2), **OPTIONS)
        with pytest.raises(
            ReparameterizeError, match=r'failed 5 times.*iter_2_deploy\.pth: ParityError.*backbone\[1\]'
        ):
            runner.train()
        assert runner.iter == 6, 'the training did not end'
        assert checkpoints(tmp_path) == {'iter_6.pth', f'{BEST}iter_6.pth'}
        assert log_of(tmp_path).count('ERROR') >= 5

    def test_files_of_others_stay(self, tmp_path):
        for name in ('iter_2_deploy.pth', 'iter_6_deploy.pth', 'iter_1_deploy.pth'):
            (tmp_path / name).write_bytes(b'mine')
        with pytest.raises(ReparameterizeError, match=r'failed 2 times.*not written by ReparameterizeHook'):
            make_runner(tmp_path, dict(interval=2), ema=False).train()
        for name in ('iter_2_deploy.pth', 'iter_6_deploy.pth', 'iter_1_deploy.pth'):
            assert (tmp_path / name).read_bytes() == b'mine'
        assert 'iter_6.pth' in checkpoints(tmp_path)
        assert 'iter_4_deploy.pth' not in checkpoints(tmp_path), 'that was its own'


class TestBeforeTraining:
    @pytest.mark.parametrize(
        ('hook', 'options', 'message'),
        [
            (dict(interval=3), {}, r'interval=3\) is no multiple of CheckpointHook\(interval=2'),
            ({}, dict(checkpoint=False), 'converts what CheckpointHook writes'),
            ({}, dict(backbone=dict(norm_cfg=dict(type='LN'))), 'cannot be folded'),
            ({}, dict(backbone=dict(deploy=True)), 'deploy form'),
            (dict(export=dict(format='onnx', widht=1)), {}, 'widht'),
        ],
        ids=['interval', 'checkpoints', 'norm', 'form', 'option'],
    )
    def test_what_cannot_work(self, tmp_path, monkeypatch, hook, options, message):
        install_export(monkeypatch, lambda cfg, checkpoint, out_dir, format, height=1: None)
        runner = make_runner(tmp_path, hook, ema=False, val=False, **options)
        with pytest.raises(ReparameterizeError, match=message):
            runner.train()
        assert runner.iter == 0
        assert not checkpoints(tmp_path)

    def test_a_missing_package(self, tmp_path, monkeypatch):
        def check_packages(format):
            raise ValueError(f'format {format} needs nowhere_to_be_found: pip install it')

        install_export(monkeypatch, lambda *_, **__: None, check_packages)
        runner = make_runner(tmp_path, dict(export=dict(format='onnx')), ema=False, val=False)
        with pytest.raises(ReparameterizeError, match='needs nowhere_to_be_found: pip install'):
            runner.train()
        assert runner.iter == 0

    @pytest.mark.parametrize(
        'arguments', [dict(interval=0), dict(tolerance=0), dict(export=dict(opset=18)), dict(export={})]
    )
    def test_arguments(self, arguments):
        with pytest.raises(ValueError, match=f'{next(iter(arguments))}='):
            ReparameterizeHook(**arguments)

    def test_sharded_weights(self):
        class FullyShardedDataParallel(nn.Module):
            pass

        class Sharded(FullyShardedDataParallel):
            pass

        with pytest.raises(reparameterize.CheckpointError, match='shards its weights'):
            reparameterize.Reparameterizer(nn.Sequential(Sharded(), Segmentor()))


def install_export(monkeypatch, function, check_packages=lambda format: None):
    """Put ``function`` in the place of the exporter."""
    contents = {'': {}, '.export': dict(export=function), '.formats': dict(check_packages=check_packages)}
    for name, values in contents.items():
        module = types.ModuleType(f'mmunireplknet.deploy{name}')
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.slow
class TestExport:
    def test_beside_every_deploy_checkpoint(self, undisturbed, tmp_path, monkeypatch):
        calls = []

        def export(cfg, checkpoint, out_dir, format, height):
            torch.rand(3)
            calls.append((os.path.basename(checkpoint), os.path.basename(out_dir), format, height, cfg.experiment))
            cfg.experiment = 'changed'
            os.mkdir(out_dir)

        install_export(monkeypatch, export)
        hook = dict(interval=2, best=False, export=dict(format='onnx', height=64))
        runner = make_runner(tmp_path, hook, **OPTIONS)
        runner.train()
        assert calls == [(f'iter_{i}.pth', f'iter_{i}_onnx', 'onnx', 64, 'tiny') for i in (2, 4, 6)]
        assert {p.name for p in tmp_path.glob('*_onnx')} == {'iter_6_onnx'}
        assert (tmp_path / 'iter_6_onnx' / SIGNATURE).read_text() == 'iter_6.pth'
        assert f'{BEST}iter_6_deploy.pth' not in checkpoints(tmp_path)
        assert runner.cfg.experiment == 'tiny'
        assert differences(undisturbed / 'iter_6.pth', tmp_path / 'iter_6.pth') == []

    def test_a_failure_and_a_folder_of_somebody_else(self, tmp_path, monkeypatch):
        def export(cfg, checkpoint, out_dir, format):
            raise OSError('no space')

        install_export(monkeypatch, export)
        (tmp_path / 'iter_2_onnx').mkdir(parents=True)
        hook = dict(interval=2, export=dict(format='onnx'))
        with pytest.raises(ReparameterizeError, match=r'failed 2 times.*iter_2_onnx: FileExistsError'):
            make_runner(tmp_path, hook, iters=4, ema=False, val=False).train()
        assert 'iter_4_onnx: OSError: no space' in log_of(tmp_path)
        assert (tmp_path / 'iter_2_onnx').is_dir()
        assert checkpoints(tmp_path) == {'iter_4.pth', 'iter_4_deploy.pth'}


class EvaluateTwice(Hook):
    """What mmpretrain's EMAHook does with evaluate_on_origin: after the test, with the weights swapped back, again."""

    priority = 60

    def after_test_epoch(self, runner, metrics=None):
        runner.model.eval()
        for i, batch in enumerate(runner.test_loop.dataloader):
            runner.test_loop.run_iter(i, batch)
        runner.test_loop.evaluator.evaluate(len(runner.test_loop.dataloader.dataset))


@pytest.mark.slow
class TestTest:
    @staticmethod
    def predictions(work_dir, file, hook, ema, hooks=()):
        runner = make_runner(work_dir, hook, ema=ema, hooks=hooks)
        runner._load_from = str(file)
        before = runner.model
        runner.test()
        assert runner.model is before
        assert not runner.model.backbone.deploy
        state = load(file)['state_dict']
        return runner, state, runner.test_loop.evaluator.metrics[0].predictions

    @pytest.mark.parametrize('ema', [True, False])
    def test_the_deploy_form_of_the_tested_weights_is_evaluated(self, finished, tmp_path, ema):
        file = finished / 'iter_6.pth'
        runner, state, (found,) = self.predictions(tmp_path, file, {}, ema)
        _, _, (expected,) = self.predictions(tmp_path, file, None, ema)
        assert 0 < relative_error(found, expected) < 1e-5
        assert 'The deploy form is evaluated' in log_of(tmp_path)
        for key, value in runner.model.state_dict().items():
            assert torch.equal(value, state[key]), key

    def test_not_where_it_is_switched_off(self, finished, tmp_path):
        _, _, (found,) = self.predictions(tmp_path, finished / 'iter_6.pth', dict(at_test=False), True)
        _, _, (expected,) = self.predictions(tmp_path, finished / 'iter_6.pth', None, True)
        assert torch.equal(found, expected)

    def test_a_second_evaluation_has_its_own_weights(self, finished, tmp_path):
        """Of a resumed runner, whose model has the raw weights and whose EMAHook the average."""
        results = {}
        for form, hook in (('deploy', {}), ('training', None)):
            runner = make_runner(tmp_path, hook, hooks=[EvaluateTwice()])
            runner._load_from, runner._resume = str(finished / 'iter_6.pth'), False
            runner.call_hook('before_run')
            model = randomise(copy.deepcopy(runner.model))
            runner.load_or_resume()
            runner.model.load_state_dict(model.state_dict())
            runner.test_loop.run()
            results[form] = runner.test_loop.evaluator.metrics[0].predictions
        for found, expected in zip(results['deploy'], results['training'], strict=True):
            assert 0 < relative_error(found, expected) < 1e-5
        assert relative_error(*results['training']) > 0.01, 'both evaluations had the same weights'


@pytest.mark.slow
def test_two_processes(tmp_path):
    """The first one writes; both end with the error of the one conversion that went wrong."""
    codes = start(tmp_path, ranks=2, script='tests.test_engine.reparameterize_run')()
    outputs = [(tmp_path / f'output_{rank}.txt').read_text() for rank in range(2)]
    assert codes == [1, 1], outputs
    assert checkpoints(tmp_path) == {
        'iter_6.pth', 'iter_6_deploy.pth', f'{BEST}iter_6.pth', f'{BEST}iter_6_deploy.pth'
    }  # fmt: skip
    for text in outputs:
        assert 'ReparameterizeError: the training has ended' in text
        assert 'failed 1 times' in text
        assert 'iter_4_deploy.pth: ParityError' in text
    expected = deployed(tmp_path / 'iter_6.pth')
    for key, value in load(tmp_path / 'iter_6_deploy.pth')['state_dict'].items():
        assert torch.equal(value, expected[key]), key
