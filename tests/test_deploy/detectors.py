"""The smallest detectors of every kind that can be exported, and what mmdet finds with them."""

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from skimage import data

from mmunireplknet.deploy.exportable import make_exportable

from ..procedural import randomise
from ..test_models.tiny import CLASSES, TINY

SIZES = [(96, 128), (150, 90), (97, 131)]
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
NMS = dict(type='nms', iou_threshold=0.5)
STRIDES = [4, 8, 16, 32]
BOXES = dict(type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2])
ROIS = dict(type='SingleRoIExtractor', out_channels=8, featmap_strides=STRIDES[:3], finest_scale=28)
EXTRACTOR = dict(**ROIS, roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0))
MASK_EXTRACTOR = dict(**ROIS, roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=2))
SHARED_2FC = dict(
    type='Shared2FCBBoxHead', in_channels=8, fc_out_channels=16, roi_feat_size=7, num_classes=CLASSES, bbox_coder=BOXES
)
CONVS_1FC = dict(
    SHARED_2FC, type='Shared4Conv1FCBBoxHead', conv_out_channels=8, reg_class_agnostic=True, norm_cfg=dict(type='BN')
)
MASK = dict(type='FCNMaskHead', num_convs=1, in_channels=8, conv_out_channels=8, num_classes=CLASSES)
ANCHORS = dict(type='AnchorGenerator', scales=[4], ratios=[0.5, 1.0], strides=STRIDES)


def _detector(kind, test_cfg, **parts):
    return dict(
        type=kind,
        data_preprocessor=dict(type='DetDataPreprocessor', mean=MEAN, std=STD, pad_size_divisor=32),
        backbone=dict(type='UniRepLKNet', arch=TINY),
        neck=dict(type='FPN', in_channels=list(TINY['dims']), out_channels=8, num_outs=4),
        test_cfg=test_cfg,
        **parts,
    )


def _two_stage(kind, roi_head, **rcnn):
    test_cfg = dict(
        rpn=dict(nms_pre=100, max_per_img=60, nms=dict(NMS, iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(score_thr=0.15, nms=NMS, max_per_img=30, mask_thr_binary=0.5, **rcnn),
    )
    rpn = dict(
        type='RPNHead', in_channels=8, feat_channels=8, anchor_generator=ANCHORS, bbox_coder=dict(type=BOXES['type'])
    )
    return _detector(
        kind, test_cfg, train_cfg=None, rpn_head=rpn, roi_head=dict(bbox_roi_extractor=EXTRACTOR, **roi_head)
    )


def _single_stage(kind, **head):
    test_cfg = dict(nms_pre=100, min_bbox_size=0, score_thr=0.05, nms=NMS, max_per_img=30)
    common = dict(num_classes=CLASSES, in_channels=8, feat_channels=8, stacked_convs=1)
    return _detector(kind, test_cfg, bbox_head=dict(type=f'{kind}Head', **common, **head))


SQUARES = dict(ANCHORS, ratios=[1.0], scales=None, octave_base_scale=4, scales_per_octave=1)
POINTS = dict(type='MlvlPointGenerator', offset=0, strides=STRIDES)
DETECTORS = {
    'faster-rcnn': _two_stage('FasterRCNN', dict(type='StandardRoIHead', bbox_head=CONVS_1FC)),
    'mask-rcnn': _two_stage(
        'MaskRCNN',
        dict(type='StandardRoIHead', bbox_head=SHARED_2FC, mask_roi_extractor=MASK_EXTRACTOR, mask_head=MASK),
    ),
    'cascade-mask-rcnn': _two_stage(
        'CascadeRCNN',
        dict(
            type='CascadeRoIHead',
            num_stages=3,
            stage_loss_weights=[1, 1, 1],
            bbox_head=[SHARED_2FC, CONVS_1FC, SHARED_2FC],
            mask_roi_extractor=MASK_EXTRACTOR,
            mask_head=dict(MASK, class_agnostic=True),
        ),
    ),
    'retinanet': {
        **_single_stage('Retina', anchor_generator=SQUARES, bbox_coder=dict(type=BOXES['type'])),
        'type': 'RetinaNet',
    },
    'fcos': _single_stage(
        'FCOS', strides=STRIDES, regress_ranges=((-1, 32), (32, 64), (64, 128), (128, 1e8)), norm_cfg=dict(type='BN')
    ),
    'atss': _single_stage(
        'ATSS', anchor_generator=SQUARES, bbox_coder=BOXES, norm_cfg=dict(type='BN'), reg_decoded_bbox=True
    ),
    'gfl': _single_stage('GFL', anchor_generator=SQUARES, norm_cfg=dict(type='BN'), reg_max=4),
    'rtmdet': _single_stage(
        'RTMDet', anchor_generator=POINTS, bbox_coder=dict(type='DistancePointBBoxCoder'), norm_cfg=dict(type='BN')
    ),
}  # fmt: skip


def build(config):
    """The randomised model of one of ``DETECTORS``."""
    register_all_modules(init_default_scope=True)
    model = randomise(MODELS.build(Config(dict(model=config)).model)).eval()
    if config['type'] == 'GFL':  # no weight: the distances that its distributions are over
        model.bbox_head.integral.project.copy_(torch.arange(5.0))
    return model


def exportable(config):
    """A detector as a function of tensors, and the detector."""
    model = build(config)
    return make_exportable(model, Config(dict(model=config))), model


def photograph(size):
    """A photograph (3, H, W) in uint8."""
    image = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None].float()
    return torch.nn.functional.interpolate(image, size, mode='bilinear', antialias=True)[0].round().to(torch.uint8)


def normalized(photo):
    """What an exported model takes: (1, 3, H, W), not padded."""
    return ((photo.float() - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])[None]


@torch.no_grad()
def found_by_mmdet(model, photo):
    """mmdet's result for a photograph: dets (k, 5), labels (k,), and masks (k, H, W) of instance segmentors."""
    size = tuple(photo.shape[1:])
    sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)))
    batch = model.data_preprocessor(dict(inputs=[photo], data_samples=[sample]), False)
    found = model.predict(batch['inputs'], batch['data_samples'], rescale=False)[0].pred_instances
    dets = torch.cat([found.bboxes, found.scores[:, None]], 1)
    return (dets, found.labels, found.masks) if 'masks' in found else (dets, found.labels)
