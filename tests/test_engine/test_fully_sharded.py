"""Training with sharded weights (FSDP) by configs/_base_/fsdp.py: two CPU processes, variant A, tools/train.py."""

import json
import math
import os

import pytest
import torch
from mmengine._strategy import FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from mmunireplknet import CheckpointError, UniRepLKNet
from mmunireplknet.engine import every_block
from mmunireplknet.engine.launch import ConfigError, load_config, prepare_training
from mmunireplknet.models import UniRepLKNetBlock
from mmunireplknet.models.checkpoint import check_state_dict

from ..imagenet_stand_in import CONFIGS, generate, shrunk
from ..test_models.tiny import TINY, tiny
from ..test_tools.test_command_line import free_port, run_tool


def run(rank, runs):
    """Each of ``runs`` is a port and the arguments of tools/train.py."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1')
    for port, *args in runs:
        os.environ['MASTER_PORT'] = str(port)
        flags = ['--launcher', 'pytorch', '--seed', 0, '--deterministic', '--auto-scale-lr']
        stopped = run_tool('train.py', *args, *flags)
        assert stopped is None, stopped


def losses(work_dir):
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [record['loss'] for record in records if 'loss' in record]


@pytest.fixture(scope='module')
def configs(tmp_path_factory):
    """Variant A that recomputes its blocks, as the large variants do, for two epochs; plain and sharded."""
    pytest.importorskip('mmpretrain.models')
    folder = tmp_path_factory.mktemp('sharded')
    plain = shrunk(
        folder / 'plain.py', generate(folder / 'imagenet'),
        model=dict(backbone=dict(with_cp=True), head=dict(num_classes=3)),
        optim_wrapper=dict(accumulative_counts=1), param_scheduler=[], train_cfg=dict(max_epochs=2, val_interval=2),
        default_hooks=dict(logger=dict(interval=1), checkpoint=dict(save_best=None)),
        auto_scale_lr=dict(base_batch_size=8),
    )  # fmt: skip
    sharded = folder / 'sharded.py'
    sharded.write_text(f'_base_ = [{str(plain)!r}, {str(CONFIGS / "_base_/fsdp.py")!r}]')
    return plain, sharded


@pytest.fixture(scope='module')
def work_dirs(configs, tmp_path_factory):
    """Two epochs with whole weights, two with sharded ones, and one that a resumed run made two."""
    plain, sharded = configs
    names = ('plain', 'sharded', 'resumed')
    dirs = {name: tmp_path_factory.mktemp(name) for name in names}

    def arguments(name, config, *more):
        options = ['--cfg-options', f'visualizer.name={name}{len(more)}', *more]
        return [free_port(), config, '--work-dir', dirs[name], *options]

    runs = [
        arguments('plain', plain),
        arguments('sharded', sharded),
        arguments('resumed', sharded, 'train_cfg.max_epochs=1', 'train_cfg.val_interval=1'),
        [*arguments('resumed', sharded), '--resume'],
    ]
    torch.multiprocessing.spawn(run, (runs,), nprocs=2)
    return dirs


@pytest.mark.slow
def test_sharding_changes_no_number(work_dirs):
    whole, sharded = losses(work_dirs['plain']), losses(work_dirs['sharded'])
    assert len(whole) == 6
    assert all(math.isfinite(loss) for loss in whole)
    assert sharded == pytest.approx(whole, rel=1e-4)


@pytest.mark.slow
def test_resuming_is_exact(work_dirs):
    """Weights, optimizer and schedule of the resumed run are those of the other, and whole."""
    assert losses(work_dirs['resumed']) == losses(work_dirs['sharded'])
    one, other = (torch.load(work_dirs[n] / 'epoch_2.pth', weights_only=False) for n in ('sharded', 'resumed'))
    plain = torch.load(work_dirs['plain'] / 'epoch_2.pth', weights_only=False)
    assert {k: v.shape for k, v in one['state_dict'].items()} == {k: v.shape for k, v in plain['state_dict'].items()}
    assert all(torch.equal(value, other['state_dict'][name]) for name, value in one['state_dict'].items())
    assert {group['lr'] for group in one['optimizer']['param_groups']} == {4e-3 * 4 / 8}
    states = one['optimizer']['state']
    assert len(states) == len(plain['optimizer']['state'])
    for name, state in states.items():
        assert float(state['step']) == 6
        assert not torch.equal(state['exp_avg'], state['exp_avg_sq']), name
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other['optimizer']['state'][name][key])), name


@pytest.mark.slow
def test_the_checkpoint_is_tested_in_one_piece(work_dirs, configs, tmp_path):
    for config in configs:
        metrics = tmp_path / f'{config.stem}.json'
        args = [config, work_dirs['sharded'] / 'epoch_2.pth', '--work-dir', tmp_path, '--deploy', '--metrics', metrics]
        assert run_tool('test.py', *args, '--cfg-options', f'visualizer.name=fsdp{config.stem}') is None
        assert 0 <= json.loads(metrics.read_text())['accuracy/top1'] <= 100


def test_a_run_without_sharding_is_not_resumed_with_it():
    with pytest.raises(CheckpointError, match=r'is of a run without FSDP.*load_from=FILE\.$'):
        FSDPStrategy.load_optim_state_dict(None, dict(state={0: dict(step=1)}, param_groups=[]))


def test_every_block_is_a_unit():
    model = UniRepLKNet(TINY)
    units = [m for m in model.modules() if every_block(module=m, recurse=False, nonwrapped_numel=0)]
    assert len(units) == 6
    assert {type(m) for m in units} == {UniRepLKNetBlock}
    assert every_block(module=model.stages, recurse=True, nonwrapped_numel=0)


def test_the_guard_of_checkpoints_knows_the_names_in_units(process_group):
    model = tiny()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    FSDP(model, use_orig_params=True, auto_wrap_policy=every_block, device_id=torch.device('cpu'))
    check_state_dict(model, state)
    with pytest.raises(CheckpointError, match=r'has 0 misshapen and 1 unknown backbone entries, first stages\.0\.7\.x'):
        check_state_dict(model, {**state, 'stages.0.7.x': torch.zeros(1)})
    stem = 'downsample_layers.0.1.weight'  # outside of every unit, where shapes are known
    with pytest.raises(CheckpointError, match='has 1 misshapen'):
        check_state_dict(model, {**state, stem: torch.zeros(3)})
    state.pop('stages.1.1.gamma')
    with pytest.raises(CheckpointError, match=r'lacks 1 of \d+ backbone entries, first stages\.1\.1\.gamma'):
        check_state_dict(model, state)


@pytest.mark.parametrize('recipe', ['upernet_unireplknet_xl-in22k_ade20k-640', 'unireplknet_xl-in22k_in1k-384'])
def test_every_recipe_takes_the_file(recipe, tmp_path):
    file = tmp_path / 'config.py'
    file.write_text(f'_base_ = [{str(CONFIGS / recipe)!r} + ".py", {str(CONFIGS / "_base_/fsdp.py")!r}]')
    with pytest.raises(ConfigError, match=r'start it by tools/dist_train\.sh or tools/slurm_train\.sh\.$'):
        prepare_training(load_config(str(file)))
    cfg = load_config(str(file), launcher='pytorch')
    if any(hook['type'] == 'EMAHook' for hook in cfg.custom_hooks):
        with pytest.raises(ConfigError, match=r'without the average by --cfg-options custom_hooks=\[\]'):
            prepare_training(cfg)
        cfg = load_config(str(file), dict(custom_hooks=[]), launcher='pytorch')
    with pytest.raises(ConfigError, match=r'without it by --cfg-options optim_wrapper\.clip_grad=None'):
        prepare_training(load_config(str(file), {'optim_wrapper.clip_grad.max_norm': 1.0}, launcher='pytorch'))
    prepare_training(cfg, amp='bf16')
    assert cfg.runner_type == 'FlexibleRunner'
    assert cfg.strategy.state_dict_cfg == 'full'
