"""The ImageNet configs against the published table, and what can be tried of them without ImageNet."""

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, PARAM_SCHEDULERS, DefaultScope

from mmunireplknet.models import CHECKPOINTS, UniRepLKNetBlock

from . import published_imagenet as published
from .comparing import NAMES, build, differences, header, load, plain
from .published_imagenet import RECIPES

pytest.importorskip('mmpretrain')


def test_every_config_is_known():
    assert {name for name in NAMES if name.startswith('unireplknet_')} == set(RECIPES)


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_is_the_published_one(name):
    recipe, cfg = RECIPES[name], load(name)
    mixup = recipe.mixup and dict(
        augments=[dict(type='Mixup', alpha=recipe.mixup[0]), dict(type='CutMix', alpha=recipe.mixup[1])]
    )
    pretrained = dict(type='Pretrained', checkpoint=f'unireplknet_{recipe.arch}_in22k')
    adamw = dict(type='AdamW', lr=recipe.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=recipe.weight_decay)
    expected = published.COMMON | {
        'model.backbone.arch': recipe.arch,
        'model.backbone.drop_path_rate': recipe.drop_path,
        'model.backbone.init_cfg': pretrained if recipe.kind == '384' else None,
        'model.head.in_channels': recipe.dim,
        'model.head.num_classes': published.CLASSES[recipe.kind],
        'model.head.loss.label_smooth_val': recipe.smoothing,
        'model.head.init_cfg': dict(
            type='TruncNormal', layer='Linear', std=pytest.approx(0.02 * recipe.head_init_scale), bias=0.0
        ),
        'model.train_cfg': mixup or {},
        'data_preprocessor.num_classes': published.CLASSES[recipe.kind],
        'optim_wrapper.optimizer': adamw,
        'optim_wrapper.paramwise_cfg': dict(decay_rate=recipe.layer_decay, num_layers=12),
        'optim_wrapper.accumulative_counts': recipe.accumulate,
        'train_dataloader.batch_size': recipe.batch_size,
        'train_cfg': dict(by_epoch=True, max_epochs=recipe.epochs, val_interval=1),
        'auto_scale_lr.base_batch_size': published.GLOBAL_BATCH[recipe.kind],
    }
    assert differences(cfg, expected) == {}
    assert recipe.gpus * recipe.batch_size * recipe.accumulate == published.GLOBAL_BATCH[recipe.kind]
    if recipe.kind == '384':
        checkpoint = CHECKPOINTS[cfg.model.backbone.init_cfg.checkpoint]
        assert checkpoint.file == f'unireplknet_{recipe.arch}_in22k_pretrain.pth'


@pytest.mark.parametrize('name', RECIPES)
def test_averaged_weights(name):
    recipe, cfg = RECIPES[name], load(name)
    hooks = {hook.type: hook for hook in cfg.custom_hooks}
    assert hooks.keys() == {'RandomStateHook', 'CheckpointFitHook'} | ({'EMAHook'} if recipe.ema else set())
    if recipe.ema:  # ModelEma of timm, decay 0.9999 each optimizer step, buffers too
        expected = dict(type='EMAHook', momentum=1e-4, update_buffers=True, interval=recipe.accumulate, priority=49)
        assert hooks['EMAHook'] == expected


@pytest.mark.parametrize('name', RECIPES)
def test_data(name):
    recipe, cfg = RECIPES[name], load(name)
    large = recipe.kind == 'in22k'
    train, test = cfg.train_dataloader.dataset, cfg.test_dataloader.dataset
    assert plain(train.pipeline) == plain(published.train_pipeline(recipe.size))
    assert plain(test.pipeline) == plain(published.test_pipeline(recipe.size))
    assert {train.type, test.type} == {'ImageNet21k' if large else 'ImageNet'}
    assert {train.data_root, test.data_root} == {'data/imagenet21k' if large else 'data/imagenet'}
    assert train.split == 'train'
    if large:  # --disable_eval true
        assert (cfg.val_dataloader, cfg.val_cfg, cfg.val_evaluator) == (None, None, None)
        assert cfg.default_hooks.checkpoint.save_best is None
        assert (test.split, test.data_prefix) == ('', 'val')
    else:
        assert cfg.val_dataloader == cfg.test_dataloader
        assert test.split == 'val'
        assert cfg.default_hooks.checkpoint.save_best == 'auto'
    assert plain(cfg.test_evaluator) == dict(type='Accuracy', topk=[1, 5])


@pytest.mark.parametrize('name', RECIPES)
def test_header_states_the_published_result(name):
    recipe = RECIPES[name]
    assert (f'Published top-1: {recipe.top1}.' if recipe.top1 else 'No accuracy is published') in header(name)
    assert f'{recipe.gpus} GPUs x {recipe.batch_size} x {recipe.accumulate} accumulated' in header(name)


@pytest.mark.parametrize('name', RECIPES)
def test_schedule_is_the_published_curve(name):
    """By optimizer step, of few a published epoch; mmengine's schedulers count the accumulated iterations."""
    recipe, cfg, steps = RECIPES[name], load(name), 4
    epoch = steps * recipe.accumulate
    scales = (1.0, recipe.layer_decay**13)
    optimizer = torch.optim.SGD([dict(params=[torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr * s) for s in scales])
    schedulers = [_scheduler(s, optimizer, epoch) for s in cfg.param_scheduler]
    optimizer.step()
    slack = recipe.lr / (max(recipe.warmup, 1) * steps)  # iterations inside of one optimizer step
    for iteration in range(recipe.epochs * epoch):
        expected = published.learning_rate(recipe, iteration // recipe.accumulate, steps)
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            assert group['lr'] == pytest.approx(expected * scale, abs=1.1 * slack * scale), iteration
        for scheduler in schedulers:
            scheduler.step()
    final = [group['lr'] for group in optimizer.param_groups]
    assert final == pytest.approx([published.MIN_LR * s for s in scales], rel=0.05)


def _scheduler(cfg, optimizer, epoch_length):
    cfg = dict(cfg, optimizer=optimizer)
    assert cfg.pop('convert_to_iter_based')
    assert cfg.get('by_epoch', True)
    return PARAM_SCHEDULERS.get(cfg.pop('type')).build_iter_from_epoch(**cfg, epoch_length=epoch_length)


@pytest.mark.parametrize('name', RECIPES)
def test_builds(name):
    """With the exact number of parameters."""
    recipe, model = RECIPES[name], build(name)
    assert sum(isinstance(m, UniRepLKNetBlock) for m in model.backbone.modules()) == recipe.num_blocks
    more_classes = (published.CLASSES[recipe.kind] - 1000) * (recipe.dim + 1)
    counts = [sum(p.numel() for p in m.parameters()) - more_classes for m in (model, build(name, deploy=True))]
    assert tuple(counts) == published.PARAMS[recipe.arch]
    assert type(model.data_preprocessor.batch_augments).__name__ == (
        'RandomBatchAugment' if recipe.mixup else 'NoneType'
    )


@pytest.mark.parametrize('name', ['unireplknet_a_in1k', 'unireplknet_s-in22k_in1k-384'])
def test_parameter_groups(name):
    recipe, cfg = RECIPES[name], load(name)
    model = build(name)
    wrapper_cfg = cfg.optim_wrapper
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.get(wrapper_cfg.pop('constructor'))
    paramwise = wrapper_cfg.pop('paramwise_cfg')
    groups = constructor(wrapper_cfg, paramwise)(model).optimizer.param_groups
    found = {id(p): group for group in groups for p in group['params']}
    for key, p in model.named_parameters():
        exempt = p.ndim == 1 or key.endswith('.bias')
        assert found[id(p)]['weight_decay'] == (0.0 if exempt else recipe.weight_decay), key
        if '.act.1.' in key:
            assert not exempt, 'GRN is decayed as published'
    scale = {key: found[id(p)]['lr'] / recipe.lr for key, p in model.named_parameters()}
    assert scale['head.fc.weight'] == scale['backbone.norm.weight'] == 1
    assert scale['backbone.downsample_layers.0.0.weight'] == pytest.approx(recipe.layer_decay**13)


def test_head_starts_at_its_scale():
    cfg = load('unireplknet_s-in22k_in1k-384')
    pytest.importorskip('mmpretrain.models')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        head = MODELS.build(cfg.model.head)
    head.init_weights()
    assert float(head.fc.weight.detach().std()) == pytest.approx(2e-5, rel=0.05)
    assert not head.fc.bias.any()


@pytest.mark.parametrize('name', ['unireplknet_a_in1k', 'unireplknet_l_in22k', 'unireplknet_s-in22k_in1k-384'])
def test_pipelines_run(name, tmp_path):
    pytest.importorskip('mmpretrain.datasets')
    import mmcv
    from mmengine.dataset import Compose

    recipe, cfg = RECIPES[name], load(name)
    file = str(tmp_path / 'image.png')
    mmcv.imwrite(np.random.RandomState(0).randint(0, 256, (90, 150, 3), np.uint8), file)
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            packed = Compose(loader.dataset.pipeline)(dict(img_path=file, gt_label=1))
        assert packed['inputs'].shape == (3, recipe.size, recipe.size)
        assert packed['data_samples'].gt_label.tolist() == [1]
