"""The tools on a classification config: train, resume, test in both forms and with a flip, infer."""

import itertools
import json
import pickle

import pytest
import torch

from mmunireplknet.engine.launch import check_tta, load_config, prepare_training

from ..imagenet_stand_in import ARCH, CLASSES, CONFIGS, TRUNK, generate, shrunk
from ..test_engine.test_checkpoint_fit_hook import published
from .test_command_line import ROOT, run_tool

pytest.importorskip('mmpretrain.models')
RUNS = itertools.count()


def unique(**more):
    """Options; mmengine keeps visualizers by name for the life of a process."""
    return ['--cfg-options', *(f'{k}={v}' for k, v in {'visualizer.name': f'cls{next(RUNS)}', **more}.items())]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return generate(tmp_path_factory.mktemp('classification') / 'imagenet')


@pytest.fixture(scope='module')
def config(data):
    # Opened blocks: behind the published layer scale of 1e-6 both forms are alike whatever is in them.
    trunk = {'model.backbone.layer_scale_init_value': 0.5}
    return shrunk(data.parent / 'config.py', data), trunk


@pytest.fixture(scope='module')
def work_dir(config, tmp_path_factory):
    """A finished short training run: two epochs of six iterations, one step every eight."""
    path = tmp_path_factory.mktemp('run')
    file, trunk = config
    assert run_tool('train.py', file, '--work-dir', path, '--seed', 0, '--auto-scale-lr', *unique(**trunk)) is None
    return path


@pytest.mark.slow
def test_training(work_dir):
    checkpoint = torch.load(work_dir / 'epoch_2.pth', weights_only=False)
    assert checkpoint['meta']['epoch'] == 2
    assert checkpoint['meta']['dataset_meta']['classes'] == ['one', 'two', 'three']
    assert list(work_dir.glob('best_accuracy_top1_epoch_*.pth'))
    # 2 images, 8 iterations: 16 where the learning rate is for 4096.
    assert checkpoint['optimizer']['param_groups'][0]['initial_lr'] == pytest.approx(4e-3 * 16 / 4096)


@pytest.mark.slow
def test_resume_with_amp(work_dir, config, tmp_path):
    file, trunk = config
    args = ['--work-dir', tmp_path, '--resume', work_dir / 'epoch_2.pth', '--amp', '--seed', 0]
    assert run_tool('train.py', file, *args, *unique(**trunk, **{'train_cfg.max_epochs': 3})) is None
    assert 'BF16OptimWrapper' in (tmp_path / file.name).read_text()
    assert torch.load(tmp_path / 'epoch_3.pth', weights_only=False)['meta']['iter'] == 18


@pytest.mark.slow
def test_both_forms_and_a_flip(work_dir, config, tmp_path):
    file, trunk = config
    scores = {}
    for flags in ('', '--deploy', '--deploy --tta'):
        metrics, out = tmp_path / 'metrics.json', tmp_path / 'out.pkl'
        args = [file, work_dir / 'epoch_2.pth', '--work-dir', tmp_path, '--metrics', metrics, '--out', out]
        assert run_tool('test.py', *args, *flags.split(), *unique(**trunk)) is None
        assert 0 <= json.loads(metrics.read_text())['accuracy/top1'] <= 100
        scores[flags] = torch.stack([sample['pred_score'] for sample in pickle.loads(out.read_bytes())])
    one, deploy, flip = scores.values()
    assert one.shape == (6, 3)
    assert float((one - deploy).norm() / one.norm()) < 1e-5
    assert not torch.equal(one, deploy), 'the deploy form was not used'
    assert float((flip - deploy).norm() / deploy.norm()) > 1e-5, 'nothing was flipped'
    assert flip.sum(1).tolist() == pytest.approx([1.0] * 6)


@pytest.mark.slow
def test_reparameterized_file(work_dir, config, tmp_path, capsys):
    file, trunk = config
    deploy = tmp_path / 'deploy.pth'
    options = [f'{key}={value}' for key, value in trunk.items()]
    assert run_tool('reparameterize.py', file, work_dir / 'epoch_2.pth', deploy, '--cfg-options', *options) is None
    assert float(capsys.readouterr().out.split()[-1]) < 1e-5
    args = [file, deploy, '--work-dir', tmp_path]
    assert 'model.backbone.deploy=True' in run_tool('test.py', *args, *unique(**trunk))
    assert run_tool('test.py', *args, *unique(**trunk, **{'model.backbone.deploy': True})) is None


@pytest.mark.slow
def test_infer_and_show_dir_draw(work_dir, config, data, tmp_path):
    file, trunk = config
    checkpoint, out = work_dir / 'epoch_2.pth', tmp_path / 'out'
    args = [file, checkpoint, data / 'val', '--out-dir', out, '--deploy']
    assert run_tool('infer.py', *args, *unique(**trunk)) is None
    assert {path.stem for path in out.iterdir()} == {f'{name}_{i}' for name in CLASSES for i in range(2)}
    args = [file, checkpoint, '--work-dir', tmp_path, '--show-dir', tmp_path / 'shown']
    assert run_tool('test.py', *args, *unique(**trunk)) is None
    assert len(list((tmp_path / 'shown').rglob('*.png'))) == 6


@pytest.mark.slow
def test_meta_list_instead_of_folders(config, data, tmp_path, work_dir):
    """The other layout of mmpretrain: all images of val in one folder, their classes in meta/val.txt."""
    file, trunk = config
    lines = [f'{path.relative_to(data / "val")} {i // 2}' for i, path in enumerate(sorted((data / 'val').glob('*/*')))]
    flat = tmp_path / 'imagenet'
    (flat / 'meta').mkdir(parents=True)
    (flat / 'val').mkdir()
    for line in lines:
        name = line.split()[0]
        (flat / 'val' / name.rpartition('/')[2]).write_bytes((data / 'val' / name).read_bytes())
    (flat / 'meta/val.txt').write_text('\n'.join(line.rpartition('/')[2] for line in lines))
    scores = []
    for root in (data, flat):
        args = [file, work_dir / 'epoch_2.pth', '--work-dir', tmp_path, '--metrics', tmp_path / 'metrics.json']
        assert run_tool('test.py', *args, *unique(**trunk, **{'test_dataloader.dataset.data_root': root})) is None
        scores.append(json.loads((tmp_path / 'metrics.json').read_text()))
    assert scores[0] == scores[1]


def test_missing_data_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, folder in (('a_in1k', 'data/imagenet/train'), ('s_in22k', 'data/imagenet21k/train')):
        message = run_tool('train.py', ROOT / 'configs' / f'unireplknet_{name}.py')
        assert '\n' not in message
        assert f'{folder} does not exist' in message
        assert 'tools/dataset_preparation/imagenet.py' in message
    assert not list(tmp_path.iterdir()), 'nothing is written before the data is there'


def test_auto_scale_counts_accumulated_iterations():
    cfg = load_config(CONFIGS / 'unireplknet_t_in1k.py')
    prepare_training(cfg, auto_scale_lr=True)
    assert cfg.auto_scale_lr == dict(enable=True, base_batch_size=512)  # 4 GPUs x 128: a factor of 1


def test_flip_is_the_default_of_classifiers_only():
    cfg = load_config(CONFIGS / 'unireplknet_t_in1k.py')
    check_tta(cfg)
    *steps, last = cfg.test_dataloader.dataset.pipeline
    assert cfg.tta_pipeline[:-1] == steps
    assert cfg.tta_pipeline[-1].transforms[1] == [last]
    cfg = load_config(CONFIGS / 'upernet_unireplknet_t_ade20k.py')
    cfg.pop('tta_pipeline')
    with pytest.raises(ValueError, match='tta_model and tta_pipeline'):
        check_tta(cfg)


def test_infer_with_a_published_22k_file(data, tmp_path):
    """Its 21,841 classes have no names in mmpretrain; the picture then shows the number."""
    file = tmp_path / 'unireplknet.pth'
    torch.save(published(ARCH, 21841), file)
    loader = dict(dataset=dict(data_root=str(data)))
    model = dict(backbone=TRUNK, head=dict(in_channels=64))
    lines = [f'_base_ = {str(CONFIGS / "unireplknet_s_in22k.py")!r}', f'{model = }', f'test_dataloader = {loader!r}']
    (tmp_path / 'config.py').write_text('\n'.join(lines))
    args = [tmp_path / 'config.py', file, data / 'val' / CLASSES[0], '--out-dir', tmp_path / 'out']
    assert run_tool('infer.py', *args) is None
    assert len(list((tmp_path / 'out').iterdir())) == 2


@pytest.mark.slow
def test_fine_tuning_with_averaged_weights(data, tmp_path):
    """The recipe of L: from a file with 21,841 classes, with EMA; its checkpoint is tested in deploy form."""
    torch.save(published(ARCH, 21841), tmp_path / 'in22k.pth')
    file = shrunk(tmp_path / 'config.py', data, base='unireplknet_l-in22k_in1k-384')
    trunk = dict(TRUNK, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'in22k.pth')))
    text = file.read_text()
    assert text.count(repr(TRUNK)) == 1
    file.write_text(text.replace(repr(TRUNK), repr(trunk)))
    options = unique(**{'custom_hooks.2.momentum': 0.5, 'optim_wrapper.optimizer.lr': 1e-2})
    assert run_tool('train.py', file, '--work-dir', tmp_path, '--seed', 0, *options) is None
    checkpoint = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)
    averaged, last = checkpoint['state_dict'], checkpoint['ema_state_dict']
    differences = [
        float((last[f'module.{k}'] - v).abs().max()) for k, v in averaged.items() if v.is_floating_point() and 'fc' in k
    ]
    assert min(differences) > 0, 'the state dict holds the averages, the other entry the last step'
    scales = sorted({group['lr_scale'] for group in checkpoint['optimizer']['param_groups']})
    assert scales[0] == pytest.approx(0.8**13)
    args = [file, tmp_path / 'epoch_2.pth', '--work-dir', tmp_path, '--deploy', '--metrics', tmp_path / 'metrics.json']
    assert run_tool('test.py', *args, *unique()) is None
    records = [json.loads(line) for line in next(tmp_path.glob('*/vis_data/scalars.json')).read_text().splitlines()]
    validated = [record['accuracy/top1'] for record in records if 'accuracy/top1' in record][-1]
    assert json.loads((tmp_path / 'metrics.json').read_text())['accuracy/top1'] == pytest.approx(validated)
