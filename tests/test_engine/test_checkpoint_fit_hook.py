"""Published classification files through mmengine's Runner: tools/test.py, load_from, and the goldens behind them."""

import argparse

import numpy as np
import pytest
import torch
from mmengine.runner import Runner

from mmunireplknet import CheckpointError, UniRepLKNet
from mmunireplknet.engine.launch import build_runner, evaluate, load_config, prepare_training

from ..imagenet_stand_in import ARCH, CONFIGS, generate, shrunk
from ..procedural import DATA, GOLDENS, fill, image, randomise, relative_error

pytest.importorskip('mmpretrain.models')

WRAPPERS = {
    'raw': lambda state: state,
    'model': lambda state: dict(model=state, epoch=299, args=argparse.Namespace(lr=4e-3), optimizer={}),
    'state_dict': lambda state: dict(state_dict=state, meta={}),
    'module.': lambda state: {f'module.{key}': value for key, value in state.items()},
}


def published(arch, classes):
    """State dict of a published file, filled by its own keys."""
    trunk = randomise(UniRepLKNet(arch, out_indices=(3,), gap_before_final_norm=True))
    dim = trunk.arch.dims[-1]
    head = {'head.weight': (classes, dim), 'head.bias': (classes,)}
    return trunk.state_dict() | {key: torch.from_numpy(fill(key, shape)) for key, shape in head.items()}


def load(config, work_dir, **options):
    """A config whose visualizer writes into ``work_dir``: mmengine keeps visualizers by name."""
    return load_config(config, {**options, 'visualizer.name': str(work_dir)}, str(work_dir))


def assert_loaded(model, state):
    own = model.state_dict()
    names = {key: key.replace('backbone.', '').replace('head.fc.', 'head.') for key in own}
    assert set(names.values()) == set(state)
    for key, name in names.items():
        assert torch.equal(own[key], state[name]), key


@pytest.fixture
def tested(monkeypatch):
    """The runners that ``evaluate`` would have let test."""
    runners = []
    monkeypatch.setattr(Runner, 'test', lambda runner: runners.append(runner) or {})
    return runners


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp('imagenet')
    return shrunk(root / 'config.py', generate(root / 'imagenet'))


@pytest.mark.parametrize('deploy', [False, True])
def test_logits_are_the_golden_ones(deploy, config, tmp_path, tested):
    """The config and the file, as ``tools/test.py CONFIG FILE [--deploy]`` brings them together."""
    file = tmp_path / 'unireplknet_a.pth'
    torch.save(published('a', 1000), file)
    data = {'test_dataloader.dataset': load(config, tmp_path).test_dataloader.dataset, 'test_dataloader.num_workers': 0}
    data['test_dataloader.persistent_workers'] = False
    cfg = load(CONFIGS / 'unireplknet_a_in1k.py', tmp_path, **data)
    evaluate(cfg, str(file), deploy=deploy)
    model = tested[0].model.eval()
    assert model.backbone.deploy == deploy
    shape = tuple(map(int, GOLDENS['a'].removesuffix('.npz').split('_')[1].split('x')))
    with torch.no_grad():
        logits = model(image(shape), mode='tensor')
    golden = np.load(DATA / GOLDENS['a'], allow_pickle=False)
    assert relative_error(logits, torch.from_numpy(golden['logits'])) < 1e-5


@pytest.mark.parametrize(('wrapper', 'tta'), [*((wrapper, False) for wrapper in WRAPPERS), ('raw', True)])
def test_every_kind_of_file_is_tested_strictly(config, wrapper, tta, tmp_path, tested):
    state = published(ARCH, 3)
    torch.save(WRAPPERS[wrapper](state), tmp_path / 'file.pth')
    evaluate(load(config, tmp_path), str(tmp_path / 'file.pth'), tta=tta)
    model = tested[0].model
    assert_loaded(model.module if tta else model, state)


def test_another_number_of_classes_is_refused(config, tmp_path, tested):
    torch.save(published(ARCH, 7), tmp_path / 'file.pth')
    with pytest.raises(CheckpointError, match=r'shape head\.fc\.weight \[7, 64\] for \[3, 64\].*\(num_classes'):
        evaluate(load(config, tmp_path), str(tmp_path / 'file.pth'))


@pytest.mark.parametrize('wrapper', ['raw', 'model'])
def test_load_from(config, wrapper, tmp_path):
    """Training starts from it, and so do the averaged weights."""
    state = published(ARCH, 3)
    torch.save(WRAPPERS[wrapper](state), tmp_path / 'file.pth')
    average = dict(type='EMAHook', momentum=1e-4, update_buffers=True, priority=49)
    cfg = load(config, tmp_path, load_from=str(tmp_path / 'file.pth'), custom_hooks=[average])
    prepare_training(cfg)
    runner = build_runner(cfg)
    runner.call_hook('before_run')
    runner.load_or_resume()
    assert_loaded(runner.model, state)
    averaged = next(hook.ema_model for hook in runner.hooks if hasattr(hook, 'ema_model'))
    assert_loaded(averaged.module, state)


def test_fine_tuning_takes_the_trunk_and_a_new_head(config, tmp_path):
    """As the published recipes start from files with 21,841 classes."""
    state = published(ARCH, 21841)
    torch.save(state, tmp_path / 'file.pth')
    pretrained = {'model.backbone.init_cfg': dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth'))}
    runner = build_runner(load(config, tmp_path, **pretrained))
    runner.model.init_weights()
    for key, value in runner.model.backbone.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert runner.model.head.fc.weight.shape == (3, 64)


def test_other_files_stay_as_they_are(config, tmp_path):
    """A file of ours is loaded by its own names, whatever hook is there."""
    cfg = load(config, tmp_path)
    prepare_training(cfg)
    runner = build_runner(cfg)
    state = {key: value.clone() for key, value in randomise(runner.model).state_dict().items()}
    data = dict(state_dict=state, meta=dict(epoch=1))
    runner.call_hook('after_load_checkpoint', checkpoint=data)
    assert data['state_dict'] is state
