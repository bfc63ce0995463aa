"""The tools as a user calls them: train, resume, test in both forms, infer, reparameterize, and their errors."""

import itertools
import json
import pickle
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmunireplknet.datasets.digit_scenes import generate

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / 'tools'
RUNS = itertools.count()
CONFIG = ROOT / 'configs' / 'demo_upernet_unireplknet_a_digit-scenes.py'
DETECTOR = ROOT / 'configs' / 'demo_mask-rcnn_unireplknet_a_digit-scenes.py'
ANNOTATIONS = '/annotations/instances_val.json'


def run_tool(script, *args):
    """Run a tool in this process; returns what it would tell the shell: None or a message, and never a traceback."""
    argv = sys.argv
    sys.argv = [script, *map(str, args)]
    try:
        runpy.run_path(str(TOOLS / script), run_name='__main__')
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = argv


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def options(data, iterations=2, **more):
    values = {
        'train_cfg.max_iters': iterations,
        'train_cfg.val_interval': 2,
        'train_dataloader.batch_size': 2,
        'model.data_preprocessor.size': '(64,64)',  # mmseg 1.2.2's class weights fail on padded labels
        'default_hooks.checkpoint.interval': 1,
        'default_hooks.logger.interval': 1,
        'visualizer.name': f'visualizer{next(RUNS)}',  # mmengine keeps them by name for the life of a process
        **{f'{split}_dataloader.dataset.data_root': data for split in ('train', 'val', 'test')},
        **more,
    }
    return ['--cfg-options', *(f'{key}={value}' for key, value in values.items())]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('scenes') / 'digit_scenes'
    generate(root, dict(train=6, val=4), size=(64, 64))
    return root


@pytest.fixture(scope='module')
def work_dir(data, tmp_path_factory):
    """A finished short training run."""
    path = tmp_path_factory.mktemp('run')
    assert run_tool('train.py', CONFIG, '--work-dir', path, *options(data)) is None
    return path


@pytest.mark.slow
def test_train_writes_checkpoint_and_log(work_dir):
    checkpoint = torch.load(work_dir / 'iter_2.pth', weights_only=False)
    assert checkpoint['meta']['iter'] == 2
    assert 'random_state' in checkpoint
    records = [json.loads(line) for line in next(work_dir.glob('*/vis_data/scalars.json')).read_text().splitlines()]
    assert any('mIoU' in record for record in records)


@pytest.mark.slow
def test_resume_goes_on_where_it_stopped(work_dir, data, tmp_path, caplog):
    weights = torch.load(work_dir / 'iter_2.pth', weights_only=False)
    assert run_tool('train.py', CONFIG, '--work-dir', work_dir, '--resume', *options(data, 3)) is None
    resumed = torch.load(work_dir / 'iter_3.pth', weights_only=False)
    assert resumed['meta']['iter'] == 3
    counter = 'backbone.stages.0.0.norm.num_batches_tracked'
    assert int(resumed['state_dict'][counter]) == int(weights['state_dict'][counter]) + 1


@pytest.mark.slow
def test_both_forms_score_the_same(work_dir, data, tmp_path):
    scores, predictions = {}, {}
    for form, flags in (('training', []), ('deploy', ['--deploy'])):
        metrics, out = tmp_path / f'{form}.json', tmp_path / f'{form}.pkl'
        args = [CONFIG, work_dir / 'iter_2.pth', '--work-dir', tmp_path, '--metrics', metrics, '--out', out]
        assert run_tool('test.py', *args, *flags, *options(data)) is None
        scores[form] = json.loads(metrics.read_text())
        predictions[form] = pickle.loads(out.read_bytes())
    assert scores['training']['mIoU'] == pytest.approx(scores['deploy']['mIoU'], abs=0.1)
    a, b = (torch.cat([p['seg_logits']['data'].flatten() for p in predictions[f]]) for f in scores)
    assert float((a - b).norm() / a.norm()) < 1e-4
    assert not torch.equal(a, b), 'the deploy form was not used'


@pytest.mark.slow
def test_reparameterized_file(work_dir, data, tmp_path, capsys):
    deploy = tmp_path / 'deploy.pth'
    assert run_tool('reparameterize.py', CONFIG, work_dir / 'iter_2.pth', deploy) is None
    assert float(capsys.readouterr().out.split()[-1]) < 1e-5
    assert torch.load(deploy)['meta']['dataset_meta']['classes'][1] == 'zero'
    args = [CONFIG, deploy, '--work-dir', tmp_path]
    message = run_tool('test.py', *args, *options(data))
    assert 'in deploy form' in message
    assert 'in training form' in message
    assert 'model.backbone.deploy=True' in message
    assert run_tool('test.py', *args, *options(data, **{'model.backbone.deploy': True})) is None
    message = run_tool(
        'test.py',
        CONFIG,
        work_dir / 'iter_2.pth',
        '--work-dir',
        tmp_path,
        *options(data, **{'model.backbone.deploy': True}),
    )
    assert 'tools/reparameterize.py' in message
    assert 'nothing to convert' in run_tool(
        'reparameterize.py', CONFIG, deploy, tmp_path / 'x.pth', '--cfg-options', 'model.backbone.deploy=True'
    )
    assert not (tmp_path / 'x.pth').exists()


@pytest.mark.slow
@pytest.mark.parametrize('resume', [True, False])
def test_training_never_starts_from_the_wrong_form(work_dir, data, tmp_path, resume):
    deployed = {'model.backbone.deploy': True}
    if resume:
        arguments = ['--resume', work_dir / 'iter_2.pth', *options(data, 3, **deployed)]
    else:
        arguments = options(data, **deployed, load_from=work_dir / 'iter_2.pth')
    message = run_tool('train.py', CONFIG, '--work-dir', tmp_path, *arguments)
    assert 'in training form' in message
    assert not list(tmp_path.glob('*.pth'))


@pytest.mark.slow
def test_infer_draws(work_dir, data, tmp_path):
    folder = data / 'images' / 'validation'
    one = sorted(folder.iterdir())[0]
    args = [CONFIG, work_dir / 'iter_2.pth', '--out-dir', tmp_path / 'out', '--deploy']
    assert run_tool('infer.py', *args, folder, one, f'{folder}/*0.jpg') is None
    assert len(list((tmp_path / 'out').iterdir())) == 4, 'each image once'
    assert 'no such file' in run_tool('infer.py', *args, tmp_path / 'nothing*.jpg')


@pytest.mark.slow
def test_show_dir(work_dir, data, tmp_path):
    args = [CONFIG, work_dir / 'iter_2.pth', '--work-dir', tmp_path, '--show-dir', tmp_path / 'shown']
    assert run_tool('test.py', *args, *options(data)) is None
    assert len(list((tmp_path / 'shown').rglob('*.png'))) == 4


@pytest.mark.slow
def test_tta(work_dir, data, tmp_path):
    metrics = tmp_path / 'metrics.json'
    args = [CONFIG, work_dir / 'iter_2.pth', '--work-dir', tmp_path, '--metrics', metrics, '--tta', '--deploy']
    assert run_tool('test.py', *args, *options(data)) is None
    assert 0 <= json.loads(metrics.read_text())['mIoU'] <= 100
    dumped = next(tmp_path.glob('*.py')).read_text()
    assert 'SegTTAModel' in dumped


@pytest.mark.slow
@pytest.mark.parametrize('config', [CONFIG, DETECTOR], ids=['segmentation', 'detection'])
def test_demo(config, tmp_path):
    values = dict(train_cfg=dict(max_iters=2, val_interval=2), default_hooks=dict(logger=dict(interval=1)))
    if config is DETECTOR:  # something to score and to draw after two iterations
        values['model'] = dict(test_cfg=dict(rcnn=dict(score_thr=0.0, max_per_img=20)))
    lines = [f'{key} = {value!r}' for key, value in values.items()]
    data = tmp_path / 'digit_scenes'
    lines += [f'data_root = {str(data)!r}']
    lines += [f'{s}_dataloader = dict(dataset=dict(data_root=data_root))' for s in ('train', 'val', 'test')]
    if config is DETECTOR:
        lines += [f'{s}_evaluator = dict(ann_file={str(data)!r} + {ANNOTATIONS!r})' for s in ('val', 'test')]
    tiny = tmp_path / 'tiny.py'
    tiny.write_text('\n'.join([f'_base_ = {str(config)!r}', *lines]))
    arguments = ['--config', tiny, '--work-dir', tmp_path / 'run', '--train', 8, '--val', 8]
    assert run_tool('demo.py', *arguments) is None
    assert (tmp_path / 'run' / 'demo.png').stat().st_size > 50_000
    files = sorted((tmp_path / 'run').glob('metrics*.json'))
    scores = [json.loads(file.read_text())['mIoU' if config is CONFIG else 'coco/bbox_mAP_50'] for file in files]
    assert len(scores) == 2
    assert scores[0] == pytest.approx(scores[1], abs=0.1 if config is CONFIG else 0.001)


@pytest.mark.slow
def test_amp_seed_and_auto_scale(data, tmp_path, caplog):
    flags = ['--amp', '--seed', 3, '--deterministic', '--auto-scale-lr']
    assert run_tool('train.py', CONFIG, '--work-dir', tmp_path, *flags, *options(data, 1)) is None
    dumped = (tmp_path / CONFIG.name).read_text()
    assert 'BF16OptimWrapper' in dumped
    checkpoint = torch.load(tmp_path / 'iter_1.pth', weights_only=False)
    assert checkpoint['meta']['seed'] == 3
    # batch 2 where the config's learning rate is for 8
    assert checkpoint['optimizer']['param_groups'][0]['initial_lr'] == pytest.approx(2e-3 * 2 / 8)
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_two_processes_on_the_cpu(data, tmp_path):
    env = {'PYTHON': sys.executable, 'PORT': str(free_port()), 'OMP_NUM_THREADS': '1', 'PATH': '/usr/bin:/bin'}
    command = ['bash', str(TOOLS / 'dist_train.sh'), str(CONFIG), '2', '--work-dir', str(tmp_path)]
    sync = {'model.backbone.norm_cfg.type': 'SyncBN', 'model.decode_head.norm_cfg.type': 'SyncBN'}
    done = subprocess.run(
        [*command, *options(data, **sync)], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / 'iter_2.pth').exists()


def test_missing_data_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = run_tool('train.py', ROOT / 'configs' / 'upernet_unireplknet_s_ade20k.py')
    assert isinstance(message, str)
    assert '\n' not in message
    assert 'data/ade/ADEChallengeData2016' in message
    assert 'tools/dataset_preparation/ade20k.py' in message
    assert not list(tmp_path.iterdir()), 'nothing is written before the data is there'


def test_options_that_the_config_cannot_serve_are_one_sentence(data, tmp_path):
    wrong = options(data, **{'optim_wrapper.type': 'ApexOptimWrapper'})
    for order in ([CONFIG, '--amp'], ['--amp', CONFIG], ['--amp', 'bf16', CONFIG]):
        message = run_tool('train.py', *order, *wrong)
        assert message == '--amp replaces OptimWrapper, but the config has ApexOptimWrapper.', order
    assert 'There is no checkpoint' in run_tool('test.py', CONFIG, tmp_path / 'nothing.pth', *options(data))


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize('tool', ['test', 'infer', 'reparameterize', 'train', 'resume'])
def test_no_tool_executes_a_checkpoint(tool, data, tmp_path):
    evil, marker = tmp_path / 'evil.pth', tmp_path / 'executed'
    torch.save(dict(state_dict={}, meta=Evil(marker)), evil)
    calls = dict(
        test=['test.py', CONFIG, evil, '--work-dir', tmp_path, *options(data)],
        infer=['infer.py', CONFIG, evil, data / 'images', '--out-dir', tmp_path / 'out'],
        reparameterize=['reparameterize.py', CONFIG, evil, tmp_path / 'out.pth'],
        train=['train.py', CONFIG, '--work-dir', tmp_path, *options(data, load_from=evil)],
        resume=['train.py', CONFIG, '--work-dir', tmp_path, '--resume', evil, *options(data)],
    )
    assert 'nothing in it was executed' in run_tool(*calls[tool])
    assert not marker.exists()
    torch.load(evil, weights_only=False)
    assert marker.exists(), 'the file is harmless, so this test shows nothing'


def test_missing_config_names_its_neighbours():
    message = run_tool('train.py', ROOT / 'configs' / 'upernet_unireplknet_z_ade20k.py')
    assert 'upernet_unireplknet_s_ade20k.py' in message


@pytest.mark.parametrize('script', sorted(str(p.relative_to(TOOLS)) for p in TOOLS.rglob('*.py')))
def test_help_has_an_example(script, capsys):
    assert run_tool(script, '--help') == 0
    text = capsys.readouterr().out
    assert re.search(r'Examples?:\n\s+python3? tools/', text), text


@pytest.mark.parametrize('script', sorted(p.name for p in TOOLS.glob('*.sh')))
def test_shell_scripts_parse_and_ask_for_arguments(script):
    subprocess.run(['bash', '-n', str(TOOLS / script)], check=True)
    done = subprocess.run(['bash', str(TOOLS / script)], capture_output=True, text=True)
    assert done.returncode != 0
    assert re.search(r'config|partition', done.stderr)
