"""Who reads which map, in configs as they are shipped, and what is refused."""

import copy
import logging

import pytest
from mmengine.config import Config
from mmengine.logging import MMLogger

from mmunireplknet.engine import swap_backbone

from ..test_configs.any_config import shipped

DIMS = [40, 80, 160, 320]  # of variant a
PSP = 'pspnet/pspnet_r50-d8_4xb4-160k_ade20k-512x512.py'


def swapped(library, config, **options):
    return swap_backbone(shipped(library, config), **{'arch': 'a', **options})


@pytest.fixture
def warnings(caplog):
    MMLogger.get_current_instance().addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    MMLogger.get_current_instance().removeHandler(caplog.handler)


def test_a_pyramid_in_reversed_order():
    model = swapped('mmdet', 'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py').model
    assert model.backbone.out_indices == (1, 2, 3)
    assert model.neck.in_channels == [320, 160, 80]


def test_maps_that_the_neck_leaves_out():
    model = swapped('mmdet', 'retinanet/retinanet_r18_fpn_1x_coco.py').model
    assert model.backbone.out_indices == (1, 2, 3)
    assert (model.neck.in_channels, model.neck.start_level) == (DIMS[1:], 0)


def test_maps_that_the_heads_leave_out():
    model = swapped('mmseg', 'deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py').model
    assert model.backbone.out_indices == (0, 2, 3)
    head, auxiliary = model.decode_head, model.auxiliary_head
    assert (head.in_channels, head.in_index, head.c1_in_channels) == (320, 2, 40)
    assert (auxiliary.in_channels, auxiliary.in_index) == (160, 1)
    assert model.pretrained is None
    assert model.backbone.norm_cfg.type == 'SyncBN'


def test_maps_that_the_neck_hands_on():
    model = swapped('mmseg', 'fastfcn/fastfcn_r50-d32_jpu_psp_4xb4-160k_ade20k-512x512.py').model
    assert model.neck.in_channels == (80, 160, 320)
    assert (model.decode_head.in_channels, model.decode_head.in_index) == (2048, 2)  # the neck's own map
    assert (model.auxiliary_head.in_channels, model.auxiliary_head.in_index) == (160, 1)


def test_a_vector_is_the_pooled_feature():
    model = swapped('mmpretrain', 'convnext/convnext-tiny_32xb128_in1k.py').model
    assert model.backbone.gap_before_final_norm
    assert model.head.in_channels == 320


def test_a_detector_within_a_model():
    cfg = swapped('mmdet', 'soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py')
    assert cfg.model.detector.backbone.type == 'UniRepLKNet'
    assert cfg.model.detector.neck.in_channels == DIMS


def test_what_is_set_and_what_stays(warnings):
    cfg = shipped('mmseg', PSP)
    cfg.load_from = 'pspnet_r50.pth'
    cfg.custom_imports = dict(imports=['json'], allow_failed_imports=False)
    before = copy.deepcopy(cfg.to_dict())
    new = swap_backbone(cfg, 't', 'unireplknet_t_in1k', drop_path_rate=0.2, layer_decay=0.8)
    assert cfg.to_dict() == before
    assert new.load_from is None
    assert new.custom_imports['imports'] == ['json', 'mmunireplknet']
    assert new.model.backbone.drop_path_rate == 0.2
    assert new.model.backbone.init_cfg == dict(type='Pretrained', checkpoint='unireplknet_t_in1k')
    assert new.optim_wrapper.optimizer == cfg.optim_wrapper.optimizer
    assert new.optim_wrapper.constructor == 'LayerDecayOptimWrapperConstructor'
    assert new.optim_wrapper.paramwise_cfg == dict(decay_rate=0.8, num_layers=12)
    assert new.train_pipeline == cfg.train_pipeline
    assert not warnings()


def test_what_layer_decay_drops_is_said(warnings):
    swapped('mmdet', 'yolox/yolox_tiny_8xb8-300e_coco.py', layer_decay=0.8)
    assert len(warnings()) == 1
    assert 'norm_decay_mult' in warnings()[0]


def test_normalisation_that_the_weights_do_not_expect_is_said(warnings):
    swapped('mmdet', 'yolox/yolox_tiny_8xb8-300e_coco.py', checkpoint='unireplknet_a_in1k')
    assert len(warnings()) == 1
    assert 'expect RGB' in warnings()[0]


REFUSED = {
    'R-CNN without a neck': ('mmdet', 'faster_rcnn/faster-rcnn_r50-caffe-c4_ms-1x_coco.py', 'Take a config with FPN'),
    'logits': ('mmpretrain', 'vgg/vgg16_8xb16_voc.py', 'VGG cannot be run by itself'),
    'stride 1': ('mmdet', 'detectors/detectors_cascade-rcnn_r50_1x_coco.py', r'strides \[1, 4, 8, 16, 32\]'),
    'a cascade at one stride': ('mmseg', 'ocrnet/ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024.py', 'one in_index'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_be_known_is_refused(case):
    library, config, words = REFUSED[case]
    with pytest.raises(ValueError, match=words) as error:
        swapped(library, config)
    assert '\n' not in str(error.value)


def refused_change(change):
    cfg = shipped('mmseg', PSP)
    change(cfg)
    with pytest.raises(ValueError) as error:  # noqa: PT011, the callers look at the message
        swap_backbone(cfg, 'a')
    return str(error.value)


def test_channels_that_nobody_gives():
    message = refused_change(lambda cfg: cfg.model.decode_head.update(in_channels=512))
    assert 'decode_head, PSPHead, is 512 with in_index=3, but ResNetV1c gives [256, 512, 1024, 2048]' in message
    assert 'in_index=4' in refused_change(lambda cfg: cfg.model.decode_head.update(in_index=4))


def test_an_unknown_neck():
    message = refused_change(lambda cfg: cfg.model.update(neck=dict(type='MyNeck', in_channels=[256, 512, 1024, 2048])))
    assert 'The neck MyNeck cannot be run by itself' in message
    assert 'Set in_channels in the config by hand' in message


def test_no_reader():
    assert 'but no in_channels of' in refused_change(
        lambda cfg: [cfg.model.pop('auxiliary_head'), cfg.model.decode_head.pop('in_channels')]
    )


def test_no_model_no_backbone_several():
    with pytest.raises(ValueError, match='has no model'):
        swap_backbone(Config(dict(default_scope='mmdet')))
    assert 'found: none' in refused_change(lambda cfg: cfg.model.pop('backbone'))
    two = dict(type='Distiller', student=dict(backbone=dict(type='A')), teacher=dict(backbone=dict(type='B')))
    assert 'found: model.student, model.teacher' in refused_change(lambda cfg: setattr(cfg, 'model', two))


def test_layer_decay_without_an_optimizer():
    cfg = shipped('mmseg', PSP)
    cfg.pop('optim_wrapper')
    with pytest.raises(ValueError, match='needs an optim_wrapper'):
        swap_backbone(cfg, 'a', layer_decay=0.8)
