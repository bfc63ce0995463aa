"""The program in the exported folder, by its functions: sizes, interpolation, boxes, masks."""

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from torch.nn import functional as F

from mmunireplknet.deploy import run

from .tiny_onnx import DETS, LABELS, MASKS, facts

SIZES = [((37, 53), (20, 31)), ((37, 53), (74, 106)), ((100, 90), (50, 45)), ((48, 64), (80, 107)), ((9, 7), (9, 30))]


def photo(*size, seed=0):
    """Noise on a ramp."""
    noise = np.random.RandomState(seed).randint(0, 120, (*size, 3))
    return (noise + np.linspace(0, 135, size[1])[:, None]).astype(np.uint8)


def test_it_is_short_and_alone():
    with open(run.__file__) as file:
        lines = file.read().splitlines()
    assert len(lines) < 120
    imports = [line.split()[1] for line in lines if line.lstrip().startswith(('import ', 'from '))]
    assert set(imports) == {'argparse', 'json', 'pathlib', 'numpy', 'PIL', 'onnxruntime'}


@pytest.mark.parametrize(('before', 'after'), SIZES)
def test_images_are_resized_as_cv2_does(before, after):
    image = photo(*before)
    ours = np.rint(run.resize(image, after)).astype(int)
    difference = np.abs(ours - cv2.resize(image, after[::-1], interpolation=cv2.INTER_LINEAR))
    assert difference.max() <= 1
    assert difference.mean() < 0.2


@pytest.mark.parametrize(('before', 'after'), SIZES)
def test_logits_are_resized_as_torch_does(before, after):
    logits = np.random.RandomState(0).standard_normal((4, *before)).astype(np.float32)
    expected = F.interpolate(torch.from_numpy(logits)[None], after, mode='bilinear', align_corners=False)[0]
    ours = run.resize(logits, after, (1, 2))
    assert ours.dtype == np.float32
    assert np.abs(ours - expected.numpy()).max() < 1e-4


def pasted(mask, box, size):
    """By torch's grid_sample: what mmdet's paste of a mask computes."""
    ys, xs = (torch.arange(n) + 0.5 for n in size)
    ys, xs = ((ys - box[1]) / (box[3] - box[1]) * 2 - 1, (xs - box[0]) / (box[2] - box[0]) * 2 - 1)
    grid = torch.stack([xs[None, :].expand(*size), ys[:, None].expand(*size)], -1)
    return F.grid_sample(torch.from_numpy(mask)[None, None], grid[None], align_corners=False)[0, 0].numpy()


def test_masks_are_pasted_as_mmdet_does():
    size, rng = (48, 64), np.random.RandomState(0)
    dets = np.float32([[10.3, 8.1, 34.7, 40.2, 1], [-3, 20, 30, 47.5, 1], [5, 5, 6.2, 44, 1], [63.2, 47, 64, 48, 1]])
    masks = rng.uniform(0, 1, (4, 28, 28)).astype(np.float32)
    outputs = dict(dets=dets[None], labels=np.zeros((1, 4), np.int64), masks=masks[None])
    found = run.postprocess(outputs, facts('instance-segmentation', outputs), size, size)
    for mask, box, ours in zip(masks, found['boxes'], found['masks'], strict=True):
        expected = pasted(mask, box, size)
        assert np.array_equal(ours[abs(expected - 0.5) > 1e-4], (expected >= 0.5)[abs(expected - 0.5) > 1e-4])
    assert [bool(mask.any()) for mask in found['masks']][:2] == [True, True]


def test_a_box_without_area_has_a_small_mask():
    outputs = dict(dets=np.float32([[[5, 5, 5, 9, 1]]]), labels=np.zeros((1, 1), np.int64), masks=MASKS[None, :1])
    with np.errstate(all='raise'):
        found = run.postprocess(outputs, facts('instance-segmentation', outputs), (16, 16), (16, 16))
    assert found['masks'][0].sum() <= 4


def test_the_better_instance_hides_the_others(tmp_path):
    masks = np.zeros((3, 6, 8), bool)
    masks[0, :4], masks[1, 2:], masks[2] = True, True, True
    found = dict(
        boxes=np.zeros((3, 4)), scores=np.float32([0.9, 0.8, 0.1]), labels=np.int64([2, 0, 1]), masks=list(masks)
    )
    image = np.zeros((6, 8, 3), np.uint8)
    run.write(image, found, facts('instance-segmentation', []), tmp_path / 'a.b', 0.5)
    labels = np.asarray(Image.open(tmp_path / 'a.b_labels.png'))
    assert labels[:, 0].tolist() == [1, 1, 1, 1, 2, 2]
    entries = json.loads((tmp_path / 'a.b.json').read_text())['found']
    assert [(entry['class'], entry['pixels']) for entry in entries] == [('road', 32), ('sky', 16)]


def test_boxes_are_cut_at_the_image_and_scaled_back():
    outputs = dict(dets=DETS[None], labels=LABELS[None])
    found = run.postprocess(outputs, facts('detection', outputs), size=(24, 40), used=(48, 80))
    assert found['boxes'].tolist() == [[5, 4, 17, 20], [20, 10, 40, 24], [0, 0, 4, 4]]
    assert found['scores'].tolist() == DETS[:, 4].tolist()
    assert found['labels'].tolist() == LABELS.tolist()


def test_padding_counts_for_nothing():
    logits = np.zeros((1, 2, 8, 10), np.float32)
    logits[:, 1, :, 5:] = 1
    found = run.postprocess(dict(logits=logits), facts('segmentation', ['logits']), size=(16, 10), used=(8, 5))
    assert found['map'].shape == (16, 10)
    assert not found['map'].any()
    labels = logits.argmax(1)
    found = run.postprocess(dict(labels=labels), facts('segmentation', ['labels']), size=(16, 20), used=(8, 10))
    assert np.array_equal(found['map'], labels[0].repeat(2, 0).repeat(2, 1))


def test_scores_are_the_softmax():
    logits = np.float32([[1000.0, 998.0, 0.0]])
    found = run.postprocess(dict(logits=logits), facts('classification', ['logits']), (8, 8), (8, 8))
    assert found['scores'] == pytest.approx(torch.from_numpy(logits[0]).softmax(0).tolist())


@pytest.mark.parametrize(
    ('resize', 'size'),
    [
        (dict(mode='none'), (45, 70)),
        (dict(mode='exact', scale=[64, 32]), (32, 64)),
        (dict(mode='exact', factor=2.0), (90, 140)),
        (dict(mode='keep_ratio', scale=[133, 80]), (80, 124)),
        (dict(mode='keep_ratio', scale=64), (41, 64)),
        (dict(mode='short_edge', scale=32), (32, 49)),
        (dict(mode='keep_ratio', scale=[133, 80], multiple=32), (96, 128)),
    ],
)
def test_sizes(resize, size):
    inputs, used = run.preprocess(photo(45, 70), facts('segmentation', ['logits'], resize))
    assert (inputs.shape, used) == ((1, 3, *size), size)


def test_a_network_of_one_size():
    meta = facts('segmentation', ['logits'], shape=(1, 3, 32, 32))
    inputs, used = run.preprocess(photo(45, 90), meta)
    assert (inputs.shape, used) == ((1, 3, 32, 32), (16, 32))
    inputs, used = run.preprocess(photo(20, 10), meta)
    assert (inputs.shape, used) == ((1, 3, 32, 32), (20, 10))
    assert not inputs[:, :, 20:].any()


def test_channels_and_dtype():
    meta = facts('segmentation', ['logits'])
    inputs, _ = run.preprocess(photo(8, 8), meta)
    meta['input'].update(channels='BGR', dtype='float16')
    swapped, _ = run.preprocess(photo(8, 8)[..., ::-1], meta)
    assert swapped.dtype == np.float16
    assert np.array_equal(inputs.astype(np.float16), swapped)


@pytest.mark.parametrize('change', [dict(mode='long_edge'), dict(interpolation='bicubic', mode='exact', scale=[9, 9])])
def test_unknown_rules_are_refused(change):
    with pytest.raises(KeyError):
        run.preprocess(photo(8, 8), facts('segmentation', ['logits'], change))


PIPELINES = {
    'mmseg': [dict(type='Resize', scale=(160, 48), keep_ratio=True), dict(type='ResizeToMultiple', size_divisor=32)],
    'mmdet': [dict(type='Resize', scale=(133, 80), keep_ratio=True)],
    'mmpretrain': [
        dict(type='ResizeEdge', scale=40, edge='short', backend='pillow', interpolation='bicubic'),
        dict(type='CenterCrop', crop_size=33),
    ],
}
PREPROCESSORS = {
    'mmseg': dict(type='SegDataPreProcessor', bgr_to_rgb=True),
    'mmdet': dict(type='DetDataPreprocessor', bgr_to_rgb=True, pad_size_divisor=32),
    'mmpretrain': dict(type='ClsDataPreprocessor', to_rgb=True),
}
PACK = dict(mmseg='PackSegInputs', mmdet='PackDetInputs', mmpretrain='PackInputs')


@pytest.mark.slow
@pytest.mark.parametrize('scope', PIPELINES)
@pytest.mark.parametrize('size', [(61, 97), (97, 61)])
def test_the_input_is_that_of_the_test_pipeline(scope, size, tmp_path):
    """From the config through meta.json: what mm* makes of an image file, run.py makes of it, too."""
    pytest.importorskip(f'{scope}.models')
    from mmcv.transforms import Compose
    from mmengine.registry import MODELS, init_default_scope

    from mmunireplknet.deploy.preprocessing import read_preprocessing

    init_default_scope(scope)
    image = photo(*size)
    cv2.imwrite(str(tmp_path / 'image.png'), image[..., ::-1])
    steps = [dict(type='LoadImageFromFile'), *PIPELINES[scope], dict(type=PACK[scope])]
    prepare = MODELS.build(dict(**PREPROCESSORS[scope], mean=[123.7, 116.3, 103.5], std=[58.4, 57.1, 57.4]))
    packed = Compose(steps)(dict(img_path=str(tmp_path / 'image.png'), img_id=0))
    batch = dict(inputs=[packed['inputs']], data_samples=[packed['data_samples']])
    expected = prepare(batch, False)['inputs'].numpy()

    cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=steps))))
    rules, channels = read_preprocessing(cfg, SimpleNamespace(data_preprocessor=prepare))
    meta = facts('segmentation', ['logits'])
    meta.update(preprocess=rules)
    meta['input']['channels'] = channels
    ours, used = run.preprocess(image, meta)
    assert ours.shape == expected.shape
    assert used == tuple(packed['data_samples'].img_shape[:2])
    resizings = dict(mmseg=2, mmdet=1, mmpretrain=0)[scope]  # each within 1 of 255; mmpretrain's is Pillow's in both
    assert np.abs(ours - expected).max() <= 1e-6 + 1.01 * resizings / 57.1
    assert np.abs(ours - expected).mean() <= 1e-6 + 0.2 * resizings / 57.1
