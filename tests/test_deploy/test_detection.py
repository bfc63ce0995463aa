"""Detectors as functions of tensors give what mmdet's ``predict`` gives."""

import copy

import numpy as np
import pytest
import torch

pytest.importorskip('mmdet.models')
pytest.importorskip('torchvision')

from mmunireplknet.deploy.exportable import ExportError
from mmunireplknet.deploy.run import postprocess

from .detectors import DETECTORS, EXTRACTOR, MASK, SIZES, build, exportable, found_by_mmdet, normalized, photograph


def changed(name, **entries):
    """The config of a detector, with 'a.b.c' replaced."""
    config = copy.deepcopy(DETECTORS[name])
    for path, value in entries.items():
        node = config
        *parents, last = path.split('__')
        for key in parents:
            node = node[key]
        node[last] = value
    return config


def check_equal(outs, expected, photo):
    """In set and order; masks but for pixels at the threshold."""
    dets, labels, *masks = outs
    assert len(expected[0]) > 3, 'there is nothing to compare'
    assert dets.shape[1:] == expected[0].shape
    assert torch.equal(labels[0], expected[1])
    torch.testing.assert_close(dets[0, :, :4], expected[0][:, :4], atol=1e-3, rtol=0)
    torch.testing.assert_close(dets[0, :, 4], expected[0][:, 4], atol=1e-4, rtol=0)
    if masks:
        outputs = dict(dets=dets.numpy(), labels=labels.numpy(), masks=masks[0].numpy())
        meta, size = dict(task='instance-segmentation', thresholds=dict(mask=0.5)), tuple(photo.shape[1:])
        pasted = torch.from_numpy(np.stack(postprocess(outputs, meta, size, size)['masks']))
        pixels = expected[2].sum()
        assert pixels > 500
        assert (pasted != expected[2]).sum() < 1e-3 * pixels


@pytest.mark.slow
@pytest.mark.parametrize('name', DETECTORS)
def test_it_finds_what_mmdet_finds(name):
    """At every size, one that is no multiple of 32 among them: boxes end at the image, not at its padding."""
    traceable, model = exportable(DETECTORS[name])
    for size in SIZES:
        photo = photograph(size)
        outs = traceable(normalized(photo))
        check_equal(outs, found_by_mmdet(model, photo), photo)
        assert len(outs) == len(traceable.output_names)
        assert outs[0][0, :, 2].max() <= size[1]
        assert outs[0][0, :, 3].max() <= size[0]


def test_mask_rcnn_finds_what_mmdet_finds():
    traceable, model = exportable(DETECTORS['mask-rcnn'])
    photo = photograph((70, 90))
    check_equal(traceable(normalized(photo)), found_by_mmdet(model, photo), photo)
    assert traceable.task == 'instance-segmentation'
    assert traceable.dynamic_axes['masks'] == {1: 'K'}
    assert set(traceable.state_dict()) == {f'model.{key}' for key in model.state_dict()}  # nothing is there twice


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mask-rcnn', 'retinanet'])
def test_class_agnostic_nms(name):
    """One box hides another of any class."""
    place = 'test_cfg__rcnn__' if name == 'mask-rcnn' else 'test_cfg__'
    entries = {f'{place}nms': dict(type='nms', iou_threshold=0.3, class_agnostic=True), f'{place}max_per_img': 500}
    traceable, model = exportable(changed(name, **entries))
    photo = photograph(SIZES[0])
    outs = traceable(normalized(photo))
    check_equal(outs, found_by_mmdet(model, photo), photo)
    entries[f'{place}nms']['class_agnostic'] = False
    assert exportable(changed(name, **entries))[0](normalized(photo))[0].shape[1] > outs[0].shape[1]


@pytest.mark.slow
@pytest.mark.parametrize('name', ['cascade-mask-rcnn', 'gfl'])
def test_nothing_found(name):
    place = 'test_cfg__score_thr' if name == 'gfl' else 'test_cfg__rcnn__score_thr'
    traceable, _ = exportable(changed(name, **{place: 0.999}))
    outs = traceable(normalized(photograph(SIZES[0])))
    assert [tuple(out.shape) for out in outs] == [(1, 0, 5), (1, 0), (1, 0, 14, 14)][: len(outs)]


@pytest.mark.slow
def test_half_precision_weights():
    """Boxes and NMS stay in float32, in which a pixel of a large image is still a pixel."""
    traceable, _ = exportable(DETECTORS['mask-rcnn'])
    image = normalized(photograph(SIZES[0]))
    expected = traceable(image)
    traceable.model.half()
    outs = traceable(image)
    assert [out.dtype for out in outs] == [torch.float32, torch.int64, torch.float32]
    close = (outs[0][0, :, None] - expected[0][0]).abs().amax(2).amin(0)  # of each expected box the nearest
    assert close.median() < 1


def test_only_one_image_at_a_time():
    traceable, _ = exportable(DETECTORS['fcos'])
    with pytest.raises(ValueError, match=r'2 images were given; a detector takes one at a time'):
        traceable(torch.zeros(2, 3, 64, 64))


def test_align_finds_boxes_that_changed_places():
    traceable, _ = exportable(DETECTORS['retinanet'])
    dets, labels = torch.rand(1, 6, 5) * 50, torch.tensor([[0, 1, 1, 0, 2, 1]])
    order = torch.tensor([1, 0, 2, 5, 4, 3])
    aligned = traceable.align((dets, labels), (dets[:, order] + 1e-3, labels[:, order]))
    torch.testing.assert_close(aligned[0], dets + 1e-3)
    assert torch.equal(aligned[1], labels)
    other = labels.clone()
    other[0, 4] = 0  # a box of another class is no match: something must stay different
    assert not torch.equal(traceable.align((dets, labels), (dets, other))[1], labels)


@pytest.mark.parametrize(
    ('name', 'entries', 'message'),
    [
        ('mask-rcnn', {'test_cfg__rcnn__nms': dict(type='soft_nms', iou_threshold=0.5)}, r'rcnn is .*soft_nms.* nms='),
        ('mask-rcnn', {'test_cfg__rcnn__nms': dict(type='nms', iou_threshold=0.5, max_num=9)}, r'unknown: nms.max_num'),
        ('retinanet', {'test_cfg__multi_label': True}, r'model.test_cfg is .*unknown: multi_label'),
        ('mask-rcnn', {'test_cfg__rpn__nms': None}, r'model.test_cfg.rpn is .*. Exported can be .*max_per_img'),
        (
            'mask-rcnn',
            {
                'roi_head__bbox_roi_extractor': dict(
                    type='GenericRoIExtractor', roi_layer=EXTRACTOR['roi_layer'], out_channels=8, featmap_strides=[4, 8]
                )
            },
            r'come from GenericRoIExtractor .* Exported can be SingleRoIExtractor',
        ),
        (
            'mask-rcnn',
            {
                'roi_head__bbox_roi_extractor': dict(
                    EXTRACTOR, roi_layer=dict(type='RoIAlign', output_size=7, pool_mode='max')
                )
            },
            r"with RoIAlign\(.* pool_mode='avg'",
        ),
        (
            'mask-rcnn',
            {'roi_head__type': 'DoubleHeadRoIHead', 'roi_head__reg_roi_scale_factor': 1.3},
            r'roi_head is DoubleHeadRoIHead. .* StandardRoIHead',
        ),
        (
            'mask-rcnn',
            {'roi_head__mask_head': dict(MASK, type='HTCMaskHead')},
            r'mask_head is HTCMaskHead. Exported can be FCNMaskHead',
        ),
        ('retinanet', {'bbox_head__bbox_coder': dict(type='TBLRBBoxCoder')}, r'boxes with TBLRBBoxCoder. .* DeltaXYWH'),
        (
            'retinanet',
            {'bbox_head__type': 'PAAHead', 'bbox_head__norm_cfg': None},
            r'PAAHead makes its boxes in a way of its own. .*RetinaNet',
        ),
    ],
)
def test_what_cannot_be_exported_is_named(name, entries, message):
    with pytest.raises(ExportError, match=message):
        exportable(changed(name, **entries))


def test_torchvision_is_missing(monkeypatch):
    from mmunireplknet import compat

    monkeypatch.setattr(compat, 'ensure_torchvision', lambda: 'absent')
    with pytest.raises(ModuleNotFoundError, match=r'needs torchvision: pip install torchvision'):
        compat.ensure_detection_operators()


def test_a_copy_holds_together():
    """What folds BN in a copy, as the report does, changes what the copy computes with."""
    traceable, _ = exportable(DETECTORS['mask-rcnn'])
    other = copy.deepcopy(traceable)
    with torch.no_grad():
        other.model.roi_head.bbox_head.fc_cls.bias[0] += 9
    image = normalized(photograph(SIZES[0]))
    assert (other(image)[1] == 0).all()
    assert not (traceable(image)[1] == 0).all()


def test_a_detector_of_another_kind():
    from mmdet.models.detectors import YOLACT

    model = build(DETECTORS['retinanet'])
    model.__class__ = YOLACT
    from mmunireplknet.deploy.detection import make_detector

    with pytest.raises(ExportError, match=r'YOLACT predicts in a way of its own. Exported can be two-stage'):
        make_detector(model, None)
