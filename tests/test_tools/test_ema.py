"""Averaged weights (EMA) through the tools: trained, validated, resumed, tested in both forms, reparameterized.

The config is the published detection recipe with few channels, pixels and boxes, and an average that is clearly behind
the weights.
"""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch

from ..test_configs.comparing import load
from .test_command_line import RUNS, run_tool

pytestmark = pytest.mark.slow

TINY = dict(depths=(1, 1, 1, 1), dims=(8, 16, 16, 16), kernel_sizes=7)


@pytest.fixture(scope='module', autouse=True)
def unformatted():
    """mmengine formats the whole config as Python text for every checkpoint, which takes most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        for place in ('yapf.yapflib.yapf_api', 'mmengine.config.config'):  # imported late by one family, early by one
            patch.setattr(f'{place}.FormatCode', lambda text, **_: (text, True), raising=False)
        yield


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Four training and two validation images in COCO's layout, with bright rectangles of two classes."""
    import mmcv

    root = tmp_path_factory.mktemp('coco')
    (root / 'annotations').mkdir()
    rng = np.random.RandomState(0)
    for split, number in (('train', 4), ('val', 2)):
        images, annotations = [], []
        for i in range(number):
            image = rng.randint(0, 100, (64, 96, 3), np.uint8)
            for category in (1, 2):
                x, y, w, h = (int(v) for v in rng.randint((0, 0, 20, 20), (50, 30, 45, 33)))
                image[y : y + h, x : x + w] = 255 if category == 1 else (0, 0, 255)
                polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
                annotations.append(
                    dict(
                        id=len(annotations) + 1, image_id=i, category_id=category, bbox=[x, y, w, h], area=w * h,
                        segmentation=[polygon], iscrowd=0,
                    )
                )  # fmt: skip
            mmcv.imwrite(image, str(root / f'{split}2017' / f'{i}.png'))
            images.append(dict(id=i, file_name=f'{i}.png', height=64, width=96))
        categories = [dict(id=1, name='person'), dict(id=2, name='bicycle')]
        text = json.dumps(dict(images=images, annotations=annotations, categories=categories))
        (root / 'annotations' / f'instances_{split}2017.json').write_text(text)
    return root


def shrink(cfg, data, predictions):
    """The published recipe in small; validation writes what it predicts to ``predictions``."""
    model = cfg.model
    model.backbone.update(arch=TINY, init_cfg=None, layer_scale_init_value=0.5, drop_path_rate=0.0)
    model.neck.update(in_channels=list(TINY['dims']), out_channels=8)
    model.rpn_head.update(in_channels=8, feat_channels=8)
    for kind in ('bbox', 'mask'):
        model.roi_head[f'{kind}_roi_extractor'].out_channels = 8
    for head in model.roi_head.bbox_head:
        head.update(in_channels=8, conv_out_channels=8, fc_out_channels=16, num_classes=2)
    model.roi_head.mask_head.update(in_channels=8, conv_out_channels=8, num_classes=2)
    model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=10)
    model.test_cfg.rpn.update(max_per_img=20)
    cfg.train_pipeline = cfg.train_dataloader.dataset.pipeline
    cfg.train_pipeline[3:4] = [dict(type='Resize', scale=(96, 64), keep_ratio=True)]
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.update(data_root=f'{data}/', metainfo=dict(classes=('person', 'bicycle')))
        if split != 'train':
            loader.dataset.pipeline[1].scale = (96, 64)
            cfg[f'{split}_evaluator'].ann_file = f'{data}/annotations/instances_val2017.json'
    cfg.val_evaluator = [cfg.val_evaluator, dict(type='DumpResults', out_file_path=str(predictions))]
    cfg.optim_wrapper.optimizer.lr = 0.01
    cfg.param_scheduler = []
    cfg.train_cfg.max_epochs = 2
    ema = next(hook for hook in cfg.custom_hooks if hook.type == 'EMAHook')
    ema.gamma = 3
    cfg.custom_hooks.append(dict(type='ReparameterizeHook', at_test=False))
    cfg.default_hooks.logger.interval = 1
    return cfg


@pytest.fixture(scope='module')
def config(data, tmp_path_factory):
    pytest.importorskip('mmdet.models')
    path = tmp_path_factory.mktemp('config')
    cfg = shrink(load('cascade-mask-rcnn_unireplknet_s-in22k_coco'), data, path / 'validation.pkl')
    cfg.dump(path / 'tiny.py')
    return path / 'tiny.py'


@pytest.fixture(scope='module')
def work_dir(config, tmp_path_factory):
    """Two epochs, with validation and a checkpoint after each."""
    path = tmp_path_factory.mktemp('run')
    assert run_tool('train.py', config, '--work-dir', path, '--seed', 0, *names()) is None
    return path


def names(*options):
    return ['--cfg-options', f'visualizer.name=visualizer{next(RUNS)}', *options]  # mmengine keeps them by name


def predict(config, checkpoint, folder, *flags, options=()):
    """What tools/test.py predicts: boxes and scores of each image."""
    out = folder / 'predictions.pkl'
    args = [config, checkpoint, '--work-dir', folder, '--out', out, *flags]
    assert run_tool('test.py', *args, *names(*options)) is None
    return instances(out)


def instances(file):
    found = [p['pred_instances'] for p in pickle.loads(file.read_bytes())]
    assert [len(one['scores']) for one in found] == [10, 10], 'nothing to compare'
    return torch.stack([torch.cat([one['bboxes'], one['scores'][:, None]], 1) for one in found])


def raw_weights(checkpoint):
    """The weights that were trained, which mmengine keeps beside the averaged ones."""
    return {k.removeprefix('module.'): v for k, v in checkpoint['ema_state_dict'].items() if k != 'steps'}


def test_checkpoint_holds_both(work_dir):
    for name in ('epoch_1.pth', 'epoch_2.pth'):
        checkpoint = torch.load(work_dir / name, weights_only=False)
        averaged, raw = checkpoint['state_dict'], raw_weights(checkpoint)
        assert averaged.keys() == raw.keys()
        for key in ('backbone.stages.2.0.dwconv.lk_origin.weight', 'backbone.stages.2.0.dwconv.origin_bn.running_mean'):
            assert not torch.allclose(averaged[key], raw[key], rtol=1e-2, atol=0), key
    assert list(work_dir.glob('best_coco_bbox_mAP_epoch_*.pth'))


def test_deploy_evaluates_the_average(work_dir, config, tmp_path):
    """Validation while training swaps the average in; testing in either form predicts the same."""
    validated = instances(config.parent / 'validation.pkl')
    trained_form = predict(config, work_dir / 'epoch_2.pth', tmp_path)
    torch.testing.assert_close(trained_form, validated)
    for name in ('EMAHook', 'mmengine.EMAHook'):
        options = [f'custom_hooks.0.type={name}']
        deployed = predict(config, work_dir / 'epoch_2.pth', tmp_path, '--deploy', options=options)
        torch.testing.assert_close(deployed, validated, rtol=1e-4, atol=1e-3)
        assert not torch.equal(deployed, validated), 'the deploy form was not used'

    checkpoint = torch.load(work_dir / 'epoch_2.pth', weights_only=False)
    torch.save(dict(state_dict=raw_weights(checkpoint), meta=checkpoint['meta']), tmp_path / 'raw.pth')
    raw = predict(config, tmp_path / 'raw.pth', tmp_path, '--deploy')
    assert not torch.allclose(raw, validated, rtol=1e-2, atol=0.1), 'the average is too near to tell'


def test_resume_goes_on_with_both(work_dir, config, tmp_path):
    """A run that is resumed, after tests in either form, ends like one that was never stopped."""
    shutil.copytree(work_dir, tmp_path / 'resumed')
    (tmp_path / 'resumed' / 'epoch_2.pth').unlink()
    args = [config, '--work-dir', tmp_path / 'resumed', '--seed', 0, '--resume', tmp_path / 'resumed' / 'epoch_1.pth']
    assert run_tool('train.py', *args, *names()) is None
    expected, resumed = (torch.load(d / 'epoch_2.pth', weights_only=False) for d in (work_dir, tmp_path / 'resumed'))
    assert resumed['ema_state_dict']['steps'] == expected['ema_state_dict']['steps'] == 4
    for state in ('state_dict', 'ema_state_dict'):
        for key, value in expected[state].items():
            torch.testing.assert_close(resumed[state][key], value, msg=lambda text, key=key: f'{key}: {text}')


def test_reparameterized_file_is_the_average(work_dir, config, tmp_path):
    deploy = tmp_path / 'deploy.pth'
    assert run_tool('reparameterize.py', config, work_dir / 'epoch_2.pth', deploy) is None
    written = torch.load(deploy)
    assert set(written) == {'meta', 'state_dict'}
    assert written['meta']['mmunireplknet']['images'] == '1 image of the test data, 64x96'
    # The hook has written the same at the end of the training, and of the best checkpoint.
    (best,) = work_dir.glob('best_coco_bbox_mAP_epoch_?_deploy.pth')
    assert best.with_name(best.name.replace('_deploy', '')).exists()
    by_hook = torch.load(work_dir / 'epoch_2_deploy.pth')
    assert 'of the validation data, 64x96' in by_hook['meta']['mmunireplknet']['images']
    assert by_hook['state_dict'].keys() == written['state_dict'].keys()
    assert [k for k, v in written['state_dict'].items() if not torch.equal(v, by_hook['state_dict'][k])] == []
    args = [config, deploy, '--work-dir', tmp_path, '--out', tmp_path / 'out.pkl']
    assert run_tool('test.py', *args, *names('model.backbone.deploy=True')) is None
    validated = instances(config.parent / 'validation.pkl')
    torch.testing.assert_close(instances(tmp_path / 'out.pkl'), validated, rtol=1e-4, atol=1e-3)
