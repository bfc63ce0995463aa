"""No loader brings a state dict of another form into a model, and none is kept from bringing the right one."""

import copy
from pathlib import Path

import mmengine
import numpy as np
import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import ExponentialMovingAverage
from mmengine.runner.checkpoint import load_state_dict as mmengine_load_state_dict
from torch import nn

from mmunireplknet import CheckpointError, UniRepLKNet, load_checkpoint, switch_to_deploy
from mmunireplknet.models.checkpoint import identify
from mmunireplknet.models.checkpoint_file import read_checkpoint
from mmunireplknet.models.unireplknet import UniRepLKNetBlock

from ..procedural import randomise
from .checkpoint_files import (
    FILE_PATHS,
    Net,
    assert_loaded,
    blank,
    deployed,
    prefixed,
    runner,
    saved,
    through_auto_resume,
    through_load_from,
    through_resume,
    training_file,
)  # fmt: skip
from .tiny import TINY, tiny


@pytest.mark.parametrize('through', FILE_PATHS)
def test_paths_work(tmp_path, through):
    """Each of the ways below does load a file that is right: what they refuse is not refused by mistake."""
    through(training_file(tmp_path / 'x.pth'), tmp_path / 'work', False)
    if through not in (through_load_from, through_resume, through_auto_resume):  # which train
        through(training_file(tmp_path / 'y.pth', deploy=True), tmp_path / 'work', True)


@pytest.mark.parametrize('through', FILE_PATHS)
@pytest.mark.parametrize('into_deploy', [True, False])
def test_wrong_form_by_every_path(tmp_path, through, into_deploy):
    file = training_file(tmp_path / 'x.pth', deploy=not into_deploy)
    names = ('training', 'deploy') if into_deploy else ('deploy', 'training')
    with pytest.raises(CheckpointError, match=rf'in {names[0]} form, but the model is .* in {names[1]} form'):
        through(file, tmp_path / 'work', into_deploy)


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('prefix', ['', 'backbone.', 'module.backbone.'])
@pytest.mark.parametrize('into_deploy', [True, False])
def test_wrong_form_by_load_state_dict(strict, prefix, into_deploy):
    state = prefixed(tiny().state_dict() if into_deploy else deployed().state_dict(), prefix)
    model = UniRepLKNet(TINY, deploy=into_deploy)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tree = model
    for name in reversed(prefix.split('.')[:-1]):
        tree = nn.ModuleDict({name: tree})
    for load in (tree.load_state_dict, lambda s, strict: mmengine_load_state_dict(tree, s, strict)):
        with pytest.raises(CheckpointError, match='form, but the model is'):
            load(state, strict=strict)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('deploy', [True, False])
@pytest.mark.parametrize('part', [0, 3])
def test_partly_reparameterized(deploy, part):
    model = tiny().eval()
    model.stages[part][0].switch_to_deploy()
    assert identify(model.state_dict()).form == 'mixed'
    with pytest.raises(CheckpointError, match=r'in mixed form.*Part of it is reparameterized.*tools/reparameterize.py'):
        UniRepLKNet(TINY, deploy=deploy).load_state_dict(model.state_dict(), strict=False)
    # The same, of the convolution only.
    model = tiny().eval()
    model.stages[3][0].dwconv.switch_to_deploy()
    with pytest.raises(CheckpointError):
        UniRepLKNet(TINY, deploy=deploy).load_state_dict(model.state_dict(), strict=False)


@pytest.mark.parametrize('state', [{}, {'head.weight': torch.ones(2, 20)}], ids=['empty', 'head only'])
def test_no_backbone_at_all(state):
    with pytest.raises(CheckpointError, match=r'no weights under "backbone\.downsample_layers" and "backbone\.stages"'):
        Net().load_state_dict(state, strict=False)


@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(deploy=True),
        dict(norm_cfg=dict(type='GN', num_groups=2)),
        dict(in_channels=4),
        dict(in_channels=4, deploy=True),
        dict(out_indices=(1,)),
        dict(layer_scale_init_value=0),
        dict(norm_cfg=dict(type='SyncBN')),
    ],
    ids=str,
)
def test_own_state_dict(options):
    state = tiny(**options).state_dict()
    model = blank(**options)
    model.load_state_dict(state)
    assert_loaded(model, state)
    model = blank(**options)
    model.load_state_dict({k: nn.Parameter(v, requires_grad=False) for k, v in state.items()}, assign=True)
    assert_loaded(model, state)


def test_reparameterized_in_place():
    """A model that was switched takes deploy weights, its own and those of another."""
    model = deployed()
    model.load_state_dict(model.state_dict())
    model.load_state_dict(UniRepLKNet(TINY, deploy=True).state_dict())
    with pytest.raises(CheckpointError):
        model.load_state_dict(tiny().state_dict(), strict=False)


def test_ddp(tmp_path, process_group):
    from mmengine.model import MMDistributedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    state = randomise(Net()).state_dict()
    file = saved(tmp_path / 'x.pth', dict(state_dict=prefixed(state, 'module.')))
    for wrap in (DistributedDataParallel, MMDistributedDataParallel):
        for load in (
            lambda m: m.load_state_dict(prefixed(state, 'module.')),
            lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())) and m.module.load_state_dict(state),
            lambda m: load_checkpoint(m, file),
            lambda m: mmengine.runner.load_checkpoint(m, str(file), strict=True),
        ):
            model = wrap(Net())
            load(model)
            assert_loaded(model.module, state)
        with pytest.raises(CheckpointError, match='deploy form'):
            wrap(Net()).load_state_dict(prefixed(switch_to_deploy(Net().eval()).state_dict(), 'module.'), strict=False)
    backbone = DistributedDataParallel(blank())
    load_checkpoint(backbone, file)
    assert_loaded(backbone.module, state, prefix='backbone.')


def test_activation_checkpointing_and_sharding(process_group):
    """Wrappers of blocks, which change the names of parameters, take a plain state dict and refuse a wrong one."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    fsdp = pytest.importorskip('torch.distributed.fsdp')
    state = tiny().state_dict()
    model = blank()
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, UniRepLKNetBlock))
    assert any('_checkpoint_wrapped_module' in name for name, _ in model.named_parameters())
    model.load_state_dict(state)
    assert_loaded(model, state)
    with pytest.raises(CheckpointError, match='deploy form'):
        model.load_state_dict(deployed().state_dict(), strict=False)
    if not hasattr(fsdp, 'fully_shard'):
        pytest.skip('fully_shard is public since torch 2.6')
    model = blank()
    mesh = torch.distributed.init_device_mesh('cpu', (1,))
    for block in [m for m in model.modules() if isinstance(m, UniRepLKNetBlock)]:
        fsdp.fully_shard(block, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, dict(state), options=options)
    loaded = get_model_state_dict(model, options=options)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())
    with pytest.raises(CheckpointError, match='mixed form'):  # torch adds the model's own to what is missing
        set_model_state_dict(model, deployed().state_dict(), options=options)


def test_moving_average():
    model = tiny()
    average = ExponentialMovingAverage(model, momentum=0.5, update_buffers=True)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    average.update_parameters(model)  # the first update copies
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    average.update_parameters(model)
    expected = (model.stages[0][0].gamma - 0.5).detach()
    assert torch.allclose(average.module.stages[0][0].gamma, expected, atol=1e-6)
    other = ExponentialMovingAverage(tiny(), momentum=0.5, update_buffers=True)
    other.load_state_dict(average.state_dict())
    assert_loaded(other.module, average.module.state_dict())
    with pytest.raises(CheckpointError, match='deploy form'):
        other.load_state_dict(prefixed(deployed().state_dict(), 'module.'), strict=False)


@pytest.mark.parametrize('ema', [False, True])
def test_train_save_resume(tmp_path, ema):
    """mmengine's own checkpoint, with its message hub of HistoryBuffers and with an EMA hook, resumes."""
    hooks = [dict(type='EMAHook', momentum=0.1)] if ema else []
    torch.manual_seed(0)
    first = runner(tmp_path / 'a', custom_hooks=hooks)
    first.train()
    file = tmp_path / 'a' / 'iter_2.pth'
    data = read_checkpoint(file)
    assert any(isinstance(v, HistoryBuffer) for v in data['message_hub']['log_scalars'].values())
    assert ('ema_state_dict' in data) == ema
    second = runner(tmp_path / 'b', max_iters=3, custom_hooks=hooks, load_from=str(file), resume=True)
    seen = []
    second.register_hook(Spy(seen), priority='LOWEST')
    second.train()
    assert seen == [2]
    assert second.iter == 3
    assert len(second.message_hub.log_scalars['train/loss'].data[0]) == 3
    loss = first.message_hub.log_scalars['train/loss']
    assert list(second.message_hub.log_scalars['train/loss'].data[0][:2]) == list(loss.data[0])
    assert np.allclose(loss.statistics('mean', 2), loss.data[0].mean())
    if ema:
        hook = next(h for h in second.hooks if isinstance(h, EMAHook))
        assert int(hook.ema_model.steps) == 3
        # Into a backbone: the averages, which stand under the plain names.
        model = blank()
        load_checkpoint(model, file)
        assert_loaded(model, data['state_dict'], prefix='backbone.')
        source = {k.removeprefix('module.backbone.'): v for k, v in data['ema_state_dict'].items() if 'backbone' in k}
        assert not torch.equal(source['norm3.weight'], model.norm3.weight)
        load_checkpoint(model, file, key='ema_state_dict')
        assert_loaded(model, source)


class Spy(Hook):
    """Notes the iteration at which the training starts and that a resumed model is the saved one."""

    def __init__(self, seen):
        self.seen = seen

    def before_train_epoch(self, runner):
        self.seen.append(runner.iter)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 2:
            saved = read_checkpoint(Path(runner._load_from))
            own = runner.model.state_dict()
            key = 'ema_state_dict' if 'ema_state_dict' in saved else 'state_dict'
            prefix = 'module.' if key == 'ema_state_dict' else ''
            for name, value in own.items():
                if name in dict(runner.model.named_parameters()):
                    assert torch.equal(value, saved[key][prefix + name]), name
