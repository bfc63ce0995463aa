"""The inferencers of mmpretrain, mmseg and mmdet, and tools/infer.py's Predictor, by config path and checkpoint."""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmunireplknet.engine.inference import Predictor
from mmunireplknet.engine.reparameterize import reparameterize_checkpoint

from ..imagenet_stand_in import ARCH, CONFIGS, shrunk
from ..procedural import randomise, relative_error

DIMS = list(ARCH['dims'])


def classification(folder):
    pytest.importorskip('mmpretrain.models')
    return shrunk(folder / 'cls.py', folder / 'imagenet')


def segmentation(folder):
    pytest.importorskip('mmseg.models')
    backbone = dict(type='UniRepLKNet', arch=ARCH, _delete_=True)
    model = dict(backbone=backbone, decode_head=dict(in_channels=DIMS, channels=8))
    lines = [f'_base_ = {str(CONFIGS / "demo_upernet_unireplknet_a_digit-scenes.py")!r}', f'model = {model!r}']
    (folder / 'seg.py').write_text('\n'.join(lines))
    return folder / 'seg.py'


def detection(folder):
    """mmdet's own Mask R-CNN config with the backbone replaced, every box kept and a small test image."""
    pytest.importorskip('mmdet.models')
    model = dict(
        backbone=dict(type='UniRepLKNet', arch=ARCH, _delete_=True),
        neck=dict(in_channels=DIMS, out_channels=16),
        rpn_head=dict(in_channels=16, feat_channels=16),
        roi_head=dict(
            bbox_roi_extractor=dict(out_channels=16),
            bbox_head=dict(in_channels=16, fc_out_channels=16),
            mask_roi_extractor=dict(out_channels=16),
            mask_head=dict(in_channels=16, conv_out_channels=16),
        ),
        test_cfg=dict(rpn=dict(max_per_img=50), rcnn=dict(score_thr=0.0, max_per_img=10)),
    )
    meta = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(128, 96), keep_ratio=True),
        dict(type='PackDetInputs', meta_keys=meta),
    ]
    lines = [
        "_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'",
        "custom_imports = dict(imports=['mmunireplknet'], allow_failed_imports=False)",
        f'model = {model!r}',
        f'test_dataloader = dict(dataset=dict(pipeline={pipeline!r}))',
    ]
    (folder / 'det.py').write_text('\n'.join(lines))
    return folder / 'det.py'


def infer_classification(config, checkpoint, picture, out):
    from mmpretrain import ImageClassificationInferencer

    inferencer = ImageClassificationInferencer(str(config), pretrained=str(checkpoint), device='cpu')
    result = inferencer(str(picture), show_dir=str(out))[0]
    assert result['pred_class'] in ('one', 'two', 'three')
    return result['pred_scores']


def infer_segmentation(config, checkpoint, picture, out):
    from mmseg.apis import MMSegInferencer

    inferencer = MMSegInferencer(str(config), str(checkpoint), device='cpu')
    sample = inferencer(str(picture), out_dir=str(out), return_datasamples=True)
    assert sample.pred_sem_seg.shape == (48, 64)
    return sample.seg_logits.data


def infer_detection(config, checkpoint, picture, out):
    from mmdet.apis import DetInferencer

    inferencer = DetInferencer(str(config), str(checkpoint), device='cpu', show_progress=False)
    sample = inferencer(str(picture), out_dir=str(out), return_datasamples=True, no_save_pred=True)['predictions'][0]
    return boxes(sample)


def boxes(sample):
    found = sample.pred_instances
    assert len(found) == 10
    assert found.masks.shape == (10, 48, 64)
    return torch.cat([found.bboxes, found.scores[:, None]], 1)


CLASSES = ['background', 'zero', 'one', 'two', 'three', 'four']
META = {
    'classification': dict(classes=['one', 'two', 'three']),
    'segmentation': dict(classes=CLASSES, palette=[[i, i, i] for i in range(6)]),
    'detection': dict(classes=[f'thing {i}' for i in range(80)], palette='random'),
}
TASKS = {
    'classification': (classification, infer_classification, lambda sample: sample.pred_score),
    'segmentation': (segmentation, infer_segmentation, lambda sample: sample.seg_logits.data),
    'detection': (detection, infer_detection, boxes),
}


@pytest.mark.slow
@pytest.mark.parametrize('task', TASKS)
def test_both_forms_by_path(task, tmp_path):
    import mmcv

    make, infer, outcome = TASKS[task]
    config = make(tmp_path)
    cfg = Config.fromfile(config)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        state = randomise(MODELS.build(cfg.model)).state_dict()
    torch.save(dict(meta=dict(dataset_meta=META[task]), state_dict=state), tmp_path / 'training.pth')
    reparameterize_checkpoint(Config.fromfile(config), str(tmp_path / 'training.pth'), tmp_path / 'deploy.pth')
    deployed = config.with_name(f'deploy_{config.name}')
    deployed.write_text(f'_base_ = {str(config)!r}\nmodel = dict(backbone=dict(deploy=True))')
    picture = tmp_path / 'picture.png'
    mmcv.imwrite(np.random.RandomState(0).randint(0, 256, (48, 64, 3), np.uint8), str(picture))

    predictor = Predictor(Config.fromfile(config), str(tmp_path / 'training.pth'), 'cpu')
    sample = predictor(picture)
    predictor.draw(picture, sample, tmp_path / 'drawn.png')
    assert mmcv.imread(str(tmp_path / 'drawn.png')).shape == (48, 64, 3)
    expected = torch.as_tensor(outcome(sample))
    for form, file in (('training', config), ('deploy', deployed)):
        out = tmp_path / form
        actual = torch.as_tensor(infer(file, tmp_path / f'{form}.pth', picture, out))
        assert actual.shape == expected.shape
        assert relative_error(actual, expected) < 1e-4, form
        assert list(out.rglob('*.*')), 'a picture is written'
    assert float(expected.double().std()) > 1e-3, 'there is something to compare'
