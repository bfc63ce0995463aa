"""Size rules from test pipelines, and images."""

import numpy as np
import pytest
from mmengine.config import Config, ConfigDict
from torch import nn

from mmunireplknet.deploy.exportable import ExportError
from mmunireplknet.deploy.preprocessing import read_preprocessing, real_images, to_input


def rules(*steps):
    cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=[ConfigDict(step) for step in steps]))))
    return read_preprocessing(cfg, nn.Identity())[0]


def test_segmentation_as_published():
    found = rules(
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(2048, 512), keep_ratio=True),
        dict(type='ResizeToMultiple', size_divisor=32),
        dict(type='LoadAnnotations', reduce_zero_label=True),
        dict(type='mmseg.PackSegInputs'),
    )
    expected = dict(mode='keep_ratio', scale=[2048, 512], interpolation='bilinear', backend='cv2', multiple=32)
    assert found['resize'] == expected
    assert found['center_crop'] is None


def test_classification_as_published():
    found = rules(
        dict(type='ResizeEdge', scale=256, edge='short', backend='pillow', interpolation='bicubic'),
        dict(type='CenterCrop', crop_size=224),
    )
    assert found['resize'] == dict(mode='short_edge', scale=256, interpolation='bicubic', backend='pillow')
    assert found['center_crop'] == [224, 224]
    assert rules(dict(type='CenterCrop', crop_size=(30, 20)))['center_crop'] == [20, 30], 'height first'


def test_other_resizing():
    assert rules(dict(type='Resize', scale=384))['resize']['scale'] == [384, 384]
    assert rules(dict(type='Resize', scale=(1333, 800), keep_ratio=False))['resize']['mode'] == 'exact'
    assert rules(dict(type='Resize', scale_factor=0.5, keep_ratio=True))['resize']['factor'] == 0.5
    assert rules(dict(type='LoadImageFromFile'))['resize'] == dict(mode='none')


@pytest.mark.parametrize(
    'step',
    [
        dict(type='Pad', size_divisor=32),
        dict(type='ResizeEdge', scale=256, edge='long'),
        dict(type='Resize', scale_factor=(0.5, 1.0)),
        dict(type='TestTimeAug', transforms=[]),
    ],
    ids=str,
)
def test_unknown_rules_are_refused(step):
    with pytest.raises(ExportError, match=step['type']):
        rules(step)


def test_order_matters():
    with pytest.raises(ExportError, match='Resize'):
        rules(dict(type='CenterCrop', crop_size=10), dict(type='Resize', scale=10))
    with pytest.raises(ExportError, match='no test pipeline'):
        read_preprocessing(Config(dict()), nn.Identity())


def test_numbers_of_the_three_preprocessors():
    numbers = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
    cfg = Config(dict(test_pipeline=[dict(type='LoadImageFromFile')]))
    model = nn.Identity()

    mmseg = pytest.importorskip('mmseg.models')
    model.data_preprocessor = mmseg.SegDataPreProcessor(**numbers, bgr_to_rgb=True, size_divisor=32, pad_val=7)
    found, channels = read_preprocessing(cfg, model)
    assert (found['mean'], found['std'], channels) == (*numbers.values(), 'RGB')
    assert (found['size_divisor'], found['pad_value']) == (1, 7), 'size_divisor is for training'
    model.data_preprocessor = mmseg.SegDataPreProcessor(size=(64, 64), test_cfg=dict(size_divisor=16))
    found, channels = read_preprocessing(cfg, model)
    assert (found['mean'], found['std'], channels, found['size_divisor']) == ([0.0] * 3, [1.0] * 3, 'BGR', 16)
    model.data_preprocessor = mmseg.SegDataPreProcessor(test_cfg=dict(size=(64, 64)))
    with pytest.raises(ExportError, match='test_cfg'):
        read_preprocessing(cfg, model)

    mmdet = pytest.importorskip('mmdet.models')
    model.data_preprocessor = mmdet.DetDataPreprocessor(**numbers, bgr_to_rgb=True, pad_size_divisor=32)
    found, channels = read_preprocessing(cfg, model)
    assert (found['std'], channels, found['size_divisor']) == (numbers['std'], 'RGB', 32)

    mmpretrain = pytest.importorskip('mmpretrain.models')
    model.data_preprocessor = mmpretrain.ClsDataPreprocessor(**numbers, to_rgb=True)
    assert read_preprocessing(cfg, model)[1] == 'RGB'
    model.data_preprocessor = mmpretrain.ClsDataPreprocessor(**numbers)
    assert read_preprocessing(cfg, model)[1] == 'BGR'


def test_images_of_the_test_data_come_first(tmp_path):
    import mmcv

    folder = tmp_path / 'images' / 'validation'
    cfg = Config(dict(test_dataloader=dict(dataset=dict(data_root=str(tmp_path), data_prefix=dict(img_path='images')))))
    assert 'scikit-image' in real_images(cfg)[1]
    folder.mkdir(parents=True)
    assert 'scikit-image' in real_images(cfg)[1], 'an empty folder has none'
    picture = np.full((20, 30, 3), (10, 20, 30), np.uint8)
    mmcv.imwrite(picture, str(folder / 'a.png'))
    images, source = real_images(cfg)
    assert 'test images' in source
    assert np.array_equal(images[0], picture)


@pytest.mark.parametrize('channels', ['RGB', 'BGR'])
def test_input(channels):
    meta = dict(preprocess=dict(mean=[1.0, 2.0, 3.0], std=[2.0, 4.0, 8.0]), input=dict(channels=channels))
    x = to_input([np.full((4, 4, 3), (10, 20, 30), np.uint8)], (2, 8, 6), meta)
    assert x.shape == (2, 3, 8, 6)
    colours = (30, 20, 10) if channels == 'RGB' else (10, 20, 30)
    expected = [(c - m) / s for c, m, s in zip(colours, (1, 2, 3), (2, 4, 8), strict=True)]
    assert x[1, :, 3, 2].tolist() == pytest.approx(expected)
