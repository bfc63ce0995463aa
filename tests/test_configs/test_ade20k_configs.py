"""The ADE20K configs against the published table, and what can be tried of them without ADE20K."""

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from mmunireplknet.models import CHECKPOINTS, UniRepLKNetBlock

from . import published
from .comparing import NAMES, build, differences, header, load, plain
from .published import RECIPES

OWN = {f'upernet_unireplknet_{arch}_ade20k': arch for arch in 'afpn'}
ALL = (*RECIPES, *OWN)


def test_every_config_is_known():
    assert {name for name in NAMES if 'ade20k' in name} == set(ALL)


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_is_the_published_one(name):
    recipe, cfg = RECIPES[name], load(name)
    expected = {f'model.{path}': value for path, value in published.MODEL.items()} | published.COMMON
    expected |= {
        'model.data_preprocessor.size': (recipe.crop, recipe.crop),
        'model.backbone.arch': recipe.arch,
        'model.backbone.drop_path_rate': recipe.drop_path,
        'model.backbone.with_cp': recipe.with_cp,
        'model.backbone.init_cfg.type': 'Pretrained',
        'model.decode_head.in_channels': recipe.dims,
        'model.auxiliary_head.in_channels': recipe.dims[2],
        'optim_wrapper.paramwise_cfg': dict(decay_rate=recipe.decay_rate, num_layers=recipe.num_layers),
    }
    assert differences(cfg, expected) == {}
    checkpoint = CHECKPOINTS[cfg.model.backbone.init_cfg.checkpoint]
    assert (checkpoint.file, checkpoint.arch, checkpoint.task) == (recipe.checkpoint, recipe.arch, 'classification')


@pytest.mark.parametrize('name', RECIPES)
def test_header_states_the_published_result(name):
    single, multi = RECIPES[name].miou.split(' / ')
    assert f'Published mIoU: {single} single-scale, {multi} multi-scale' in header(name)
    assert ('missing upstream' in header(name)) == (RECIPES[name].arch == 'xl')


@pytest.mark.parametrize(('name', 'arch'), OWN.items())
def test_own_recipe_says_that_it_is_not_published(name, arch):
    cfg = load(name)
    assert 'Not published' in header(name)
    assert 'not tuned' in header(name)
    expected = {f'model.{path}': value for path, value in published.MODEL.items()} | published.COMMON
    expected |= {
        'model.data_preprocessor.size': (512, 512),
        'model.backbone.arch': arch,
        'model.backbone.drop_path_rate': dict(a=0.0, f=0.0, p=0.1, n=0.1)[arch],
        'model.backbone.with_cp': False,
        'model.backbone.init_cfg': dict(type='Pretrained', checkpoint=f'unireplknet_{arch}_in1k'),
        'optim_wrapper.paramwise_cfg': dict(decay_rate=1.0, num_layers=9),
    }
    assert differences(cfg, expected) == {}


@pytest.mark.parametrize('name', ALL)
def test_pipelines(name):
    cfg = load(name)
    crop = RECIPES[name].crop if name in RECIPES else 512
    assert plain(cfg.train_dataloader.dataset.pipeline) == plain(published.train_pipeline(crop))
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert plain(loader.dataset.pipeline) == plain(published.test_pipeline(crop))
        assert loader.batch_size == 1
        assert 'validation' in loader.dataset.data_prefix.img_path
    assert 'training' in cfg.train_dataloader.dataset.data_prefix.img_path
    assert cfg.train_dataloader.sampler == dict(type='InfiniteSampler', shuffle=True)
    load_image, augment = cfg.tta_pipeline
    resize, multiple, flip, annotations, pack = augment.transforms
    assert load_image.type == 'LoadImageFromFile'
    assert cfg.tta_model.type == 'SegTTAModel'
    assert [t.scale for t in resize] == [(int(4 * crop * r), int(crop * r)) for r in published.TTA_RATIOS]
    assert all(t.type == 'Resize' and t.keep_ratio for t in resize)
    assert multiple == [dict(type='ResizeToMultiple', size_divisor=32)]
    assert flip == [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
    assert annotations == [dict(type='LoadAnnotations', reduce_zero_label=True)]
    assert pack == [dict(type='PackSegInputs')]


@pytest.mark.parametrize('name', ['upernet_unireplknet_t_ade20k', 'upernet_unireplknet_s-in22k_ade20k-640'])
def test_pipelines_run(name, tmp_path):
    """What the pipelines do to an image of 90x150, of which a test at crop 512 makes 512x853 and then 512x864."""
    pytest.importorskip('mmseg.datasets')
    import mmcv
    from mmengine.dataset import Compose

    cfg = load(name)
    crop = cfg.crop_size[0]
    mmcv.imwrite(np.random.RandomState(0).randint(0, 256, (90, 150, 3), np.uint8), str(tmp_path / 'image.png'))
    mmcv.imwrite(np.tile(np.array([0, 1, 150], np.uint8), (90, 50)), str(tmp_path / 'label.png'))

    def run(pipeline):
        files = dict(img_path=str(tmp_path / 'image.png'), seg_map_path=str(tmp_path / 'label.png'))
        with DefaultScope.overwrite_default_scope('mmseg'):
            return Compose(pipeline)(dict(files, reduce_zero_label=True, seg_fields=[]))

    trained = run(cfg.train_dataloader.dataset.pipeline)
    assert max(trained['inputs'].shape) <= crop
    assert trained['data_samples'].gt_sem_seg.shape == trained['inputs'].shape[1:]
    tested = run(cfg.test_dataloader.dataset.pipeline)
    width = {512: 864, 640: 1088}[crop]
    assert tested['inputs'].shape == (3, crop, width)
    truth = tested['data_samples'].gt_sem_seg.data[0]
    assert truth.shape == (90, 150)
    assert truth[0, :3].tolist() == [255, 0, 149]
    augmented = run(cfg.tta_pipeline)
    assert len(augmented['inputs']) == 12
    assert {image.shape[1] % 32 + image.shape[2] % 32 for image in augmented['inputs']} == {0}
    assert augmented['inputs'][4].shape == (3, crop, width)
    assert [sample.flip for sample in augmented['data_samples']] == [False, True] * 6


@pytest.mark.parametrize('arch', published.PARAMS_IN_README)
def test_parameters(arch):
    """Deploy form, without the auxiliary head, which only training has: what the README counts."""
    for name in (name for name, recipe in RECIPES.items() if recipe.arch == arch):
        model = build(name, deploy=True)
        count = sum(p.numel() for key, p in model.named_parameters() if not key.startswith('auxiliary_head')) / 1e6
        assert count == pytest.approx(RECIPES[name].params, abs=0.005)
        assert f'{count:.0f}M' == published.PARAMS_IN_README[arch]


@pytest.mark.parametrize('name', ALL)
def test_builds(name):
    model = build(name)
    if name in RECIPES:
        assert sum(isinstance(m, UniRepLKNetBlock) for m in model.backbone.modules()) == RECIPES[name].num_blocks
    assert model.decode_head.num_classes == 150
    assert all(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))


def published_learning_rate(iteration):
    """PolyLrUpdaterHook of mmcv 1.5.0 with its linear warm-up, for a base learning rate of 1."""
    s = published.SCHEDULE
    regular = (1 - iteration / s['max_iters']) ** s['power'] * (1 - s['min_lr']) + s['min_lr']
    if iteration >= s['warmup_iters']:
        return regular
    return regular * (1 - (1 - iteration / s['warmup_iters']) * (1 - s['warmup_ratio']))


@pytest.mark.parametrize('name', ['upernet_unireplknet_t_ade20k', 'upernet_unireplknet_l-in22k_ade20k-640'])
def test_schedule_is_the_published_curve(name):
    """Within 0.1 %: mmengine reaches the end of a schedule one iteration before mmcv 1 does."""
    from mmengine.registry import PARAM_SCHEDULERS

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedulers = [PARAM_SCHEDULERS.build(dict(s, optimizer=optimizer)) for s in load(name).param_scheduler]
    optimizer.step()
    for iteration in range(4000):
        assert optimizer.param_groups[0]['lr'] == pytest.approx(published_learning_rate(iteration), rel=1e-3, abs=1e-12)
        for scheduler in schedulers:
            scheduler.step()
    assert all(s.end <= 160000 and not s.by_epoch for s in schedulers)
    assert schedulers[1].eta_min == 0.0


def shrink(cfg, root, work_dir):
    """The config with few channels, pixels and iterations, on the four images at ``root``."""
    cfg.model.data_preprocessor.size = cfg.train_dataloader.dataset.pipeline[3].crop_size = (64, 64)
    augmentations = cfg.tta_pipeline[1].transforms
    augmentations[0] = augmentations[0][:1]
    for resize in (
        cfg.train_dataloader.dataset.pipeline[2],
        cfg.val_dataloader.dataset.pipeline[1],
        cfg.test_dataloader.dataset.pipeline[1],
        augmentations[0][0],
    ):
        resize.scale = (256, 64)
    cfg.model.backbone.update(arch=dict(depths=(1, 1, 2, 1), dims=(8, 16, 32, 64), kernel_sizes=7), init_cfg=None)
    cfg.model.decode_head.update(in_channels=[8, 16, 32, 64], channels=8)
    cfg.model.auxiliary_head.update(in_channels=32, channels=8)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(root)
    cfg.train_cfg.update(max_iters=2, val_interval=2)
    cfg.default_hooks.checkpoint.interval = 2
    cfg.default_hooks.logger.interval = 1
    cfg.env_cfg.dist_cfg.backend = 'gloo'
    cfg.work_dir = str(work_dir)
    return cfg


@pytest.fixture
def ade20k(tmp_path):
    """Two training and two validation images in ADE20K's layout."""
    import mmcv

    rng = np.random.RandomState(0)
    for split in ('training', 'validation'):
        for i in range(2):
            mmcv.imwrite(rng.randint(0, 256, (48, 64, 3), np.uint8), str(tmp_path / f'images/{split}/{i}.jpg'))
            label = rng.randint(0, 151, (6, 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            mmcv.imwrite(label, str(tmp_path / f'annotations/{split}/{i}.png'))
    return tmp_path


@pytest.mark.slow
def test_trains_validates_and_tests_with_augmentation(ade20k, tmp_path):
    """S with activation checkpointing and layer decay, through mmengine's Runner."""
    pytest.importorskip('mmseg.models')
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    cfg = shrink(load('upernet_unireplknet_s_ade20k'), ade20k, tmp_path / 'work')
    runner = Runner.from_cfg(cfg)
    before = {name: p.detach().clone() for name, p in runner.model.named_parameters()}
    runner.train()
    scales = {group['lr_scale'] for group in runner.optim_wrapper.optimizer.param_groups}
    assert sorted(scales) == pytest.approx([0.9**n for n in (13, 12, 11, 10, 1, 0)])
    assert any(not torch.equal(p, before[name]) for name, p in runner.model.named_parameters())
    assert (tmp_path / 'work' / 'iter_2.pth').is_file()
    assert list((tmp_path / 'work').glob('best_mIoU_iter_2.pth'))

    cfg = shrink(load('upernet_unireplknet_s_ade20k'), ade20k, tmp_path / 'tta')
    cfg.load_from = str(tmp_path / 'work' / 'iter_2.pth')
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.tta_model.module = cfg.model
    cfg.model = cfg.tta_model
    metrics = Runner.from_cfg(cfg).test()
    assert 0 <= metrics['mIoU'] <= 100
