"""Whole models as functions of tensors."""

import pytest
import torch
from torch import nn

from mmunireplknet.deploy.exportable import (
    ExportableBackbone,
    ExportableClassifier,
    ExportableSegmentor,
    ExportError,
    make_exportable,
)  # fmt: skip
from mmunireplknet.deploy.pooling import MatrixPool2d

from ..procedural import image, relative_error
from ..test_models.tiny import tiny
from .cases import build, classifier_config, segmentor_config


def test_segmentor_computes_what_mmseg_predicts():
    pytest.importorskip('mmseg')
    cfg = segmentor_config()
    model, x = build(cfg), image((2, 3, 61, 90))
    with torch.no_grad():
        expected = [sample.seg_logits.data for sample in model.predict(x)]
        labels = [sample.pred_sem_seg.data for sample in model.predict(x)]
    exportable = make_exportable(model.train(), cfg)
    assert isinstance(exportable, ExportableSegmentor)
    assert not any(m.training for m in exportable.modules())
    assert model.backbone.deploy
    assert sum(isinstance(m, MatrixPool2d) for m in exportable.modules()) == 3
    (logits,) = exportable(x)
    assert relative_error(logits, torch.stack(expected)) < 1e-5
    (found,) = make_exportable(model, cfg, argmax=True)(x)
    assert found.dtype == torch.int64
    assert float((found != torch.cat(labels)).double().mean()) < 1e-3


def test_labels_of_a_single_logit():
    """A foreground of one sigmoid has the threshold of its head."""
    pytest.importorskip('mmseg')
    cfg = segmentor_config()
    cfg.model.decode_head.update(num_classes=2, out_channels=1)
    cfg.model.decode_head.loss_decode = dict(type='CrossEntropyLoss', use_sigmoid=True)
    model, x = build(cfg), image((1, 3, 64, 64))
    with torch.no_grad():
        model.decode_head.threshold = float(model.encode_decode(x, [dict(img_shape=x.shape[2:])]).sigmoid().median())
        expected = model.predict(x)[0].pred_sem_seg.data
    (labels,) = make_exportable(model, cfg, argmax=True)(x)
    assert labels.shape == (1, 64, 64)
    assert 0 < float(labels.double().mean()) < 1
    assert float((labels != expected).double().mean()) < 1e-3
    (logits,) = make_exportable(model, cfg)(x)
    assert logits.shape == (1, 2, 64, 64), 'as many as classes'
    assert torch.equal(logits.argmax(1), labels)
    (half,) = make_exportable(model, cfg, half=True)(x)
    assert float((half.argmax(1) != expected).double().mean()) < 1e-2


def test_classifier_computes_what_mmpretrain_predicts():
    pytest.importorskip('mmpretrain')
    cfg = classifier_config()
    cfg.model.data_preprocessor = cfg.data_preprocessor
    model, x = build(cfg), image((2, 3, 50, 70))
    with torch.no_grad():
        expected = torch.stack([sample.pred_score for sample in model.predict(x)])
    exportable = make_exportable(model, cfg)
    assert isinstance(exportable, ExportableClassifier)
    assert relative_error(exportable(x)[0].softmax(1), expected) < 1e-5


def test_backbone_alone():
    pytest.importorskip('mmseg')
    cfg, x = segmentor_config(), image((1, 3, 64, 64))
    exportable = make_exportable(build(cfg), cfg, backbone_only=True)
    assert exportable.output_names == ('feat0', 'feat1', 'feat2', 'feat3')
    assert [tuple(out.shape[1:]) for out in exportable(x)] == [(8, 16, 16), (12, 8, 8), (16, 4, 4), (20, 2, 2)]
    assert set(exportable.dynamic_axes) == {'input', *exportable.output_names}
    alone = make_exportable(tiny(out_indices=(1, 3)), cfg)
    assert isinstance(alone, ExportableBackbone)
    assert alone.output_names == ('feat1', 'feat3')
    trunk = make_exportable(tiny(out_indices=(3,), gap_before_final_norm=True), cfg)
    assert trunk.output_names == ('feat',)
    assert trunk(x)[0].shape == (1, 20)


def test_half_precision_inside_single_outside():
    backbone, x = tiny().eval(), image((1, 3, 64, 64))
    with torch.no_grad():
        expected = backbone(x)
    exportable = make_exportable(backbone, None, half=True)
    assert {p.dtype for p in exportable.parameters()} == {torch.float16}
    for out, reference in zip(exportable(x), expected, strict=True):
        assert out.dtype == torch.float32
        assert 0 < relative_error(out, reference) < 1e-2
    half = make_exportable(tiny().half(), None)
    assert half(x)[0].dtype == torch.float32, 'a half model is exported as one'


def test_what_cannot_be_exported():
    with pytest.raises(ExportError, match='argmax is for whole segmentors'):
        make_exportable(tiny(), None, argmax=True)
    with pytest.raises(ExportError, match='--backbone-only'):
        make_exportable(nn.Sequential(tiny()), None)
    with pytest.raises(ValueError, match='holds no UniRepLKNet'):
        make_exportable(nn.Conv2d(3, 3, 1), None)
