"""Training with fully sharded weights (FSDP), for the large variants: two CPU processes, by mmengine's own strategy."""

import json
import math
import os

import pytest
import torch
import torch.distributed as dist
from mmengine.registry import MODELS, init_default_scope

from mmunireplknet import load_checkpoint
from mmunireplknet.engine.launch import build_runner, leave_process_group, load_config, prepare_training
from mmunireplknet.models.arch_zoo import ARCHS

from ..imagenet_stand_in import generate, shrunk

pytest.importorskip('mmpretrain.models')


# What a config adds for FSDP. Every block is a unit of its own that is gathered when it is needed.
STRATEGY = dict(
    type='FSDPStrategy',
    # 'full' on GPUs, which moves the gathered weights to the CPU: of weights that are there it makes no copy, frees
    # what it returns, and crashes (torch 2.13).
    state_dict_cfg=dict(
        state_dict_type='FULL_STATE_DICT',
        state_dict_config=dict(type='FullStateDictConfig', rank0_only=True, offload_to_cpu=False),
        optim_state_dict_config=dict(type='FullOptimStateDictConfig', rank0_only=True, offload_to_cpu=False),
    ),
    model_wrapper=dict(
        type='MMFullyShardedDataParallel',
        use_orig_params=True,  # LayerDecayOptimWrapperConstructor asks for it
        auto_wrap_policy=dict(type='torch.distributed.fsdp.wrap.size_based_auto_wrap_policy', min_num_params=100_000),
    ),
)


def train(rank, store, config, work_dir):
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    torch.set_num_threads(1)
    cfg = load_config(config, work_dir=work_dir, launcher='pytorch')
    prepare_training(cfg, seed=0)
    build_runner(cfg).train()
    leave_process_group()


@pytest.mark.slow
def test_two_processes_train_variant_a(tmp_path):
    config = shrunk(
        tmp_path / 'config.py', generate(tmp_path / 'imagenet'),
        model=dict(backbone=dict(), head=dict(num_classes=3)), optim_wrapper=dict(accumulative_counts=1),
        param_scheduler=[], train_cfg=dict(max_epochs=1, val_interval=100),
        default_hooks=dict(checkpoint=dict(save_best=None)),
        runner_type='FlexibleRunner', strategy=STRATEGY,
    )  # fmt: skip
    run = tmp_path / 'run'
    torch.multiprocessing.spawn(train, (str(tmp_path / 'store'), str(config), str(run)), nprocs=2)
    records = [json.loads(line) for line in next(run.glob('*/vis_data/scalars.json')).read_text().splitlines()]
    losses = [record['loss'] for record in records if 'loss' in record]
    assert losses, 'nothing was trained'
    assert all(math.isfinite(loss) for loss in losses)

    cfg = load_config(str(config))
    init_default_scope('mmpretrain')
    model = MODELS.build({**cfg.model, 'data_preprocessor': cfg.data_preprocessor})
    assert model.backbone.arch == ARCHS['a']
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_checkpoint(model, run / 'epoch_1.pth')  # strictly: names and shapes are those of the model in one piece
    for name, value in model.state_dict().items():
        assert torch.isfinite(value).all(), name
        assert not value.dtype.is_floating_point or not torch.equal(value, before[name]), f'{name} did not change'
