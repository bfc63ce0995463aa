"""Masks on boxes, pasted into the image by the program beside an exported model, are mmdet's."""

import numpy as np
import pytest
import torch

from mmunireplknet.deploy.run import postprocess

HEIGHT, WIDTH = 61, 83


def boxes_and_masks(cells):
    rng = np.random.RandomState(0)
    low = rng.uniform(-9, 50, (40, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.3, 60, (40, 2))], 1).clip(0, [WIDTH, HEIGHT] * 2)
    boxes[0] = [0, 0, WIDTH, HEIGHT]
    return boxes.astype(np.float32), rng.uniform(0, 1, (40, cells, cells)).astype(np.float32)


def paste(masks, boxes, threshold):
    dets = np.concatenate([boxes, np.ones((len(boxes), 1), np.float32)], 1)
    outputs = dict(dets=dets[None], labels=np.zeros((1, len(boxes)), np.int64), masks=masks[None])
    meta = dict(task='instance-segmentation', thresholds=dict(mask=threshold))
    return postprocess(outputs, meta, (HEIGHT, WIDTH), (HEIGHT, WIDTH))['masks']


@pytest.mark.parametrize('threshold', [0.5, 0.3])
@pytest.mark.parametrize('cells', [14, 28])
def test_paste_is_that_of_mmdet(cells, threshold):
    fcn_mask_head = pytest.importorskip('mmdet.models.roi_heads.mask_heads.fcn_mask_head')
    boxes, masks = boxes_and_masks(cells)
    ours = np.stack(paste(masks, boxes, threshold))
    assert ours.shape == (40, HEIGHT, WIDTH)
    assert ours.dtype == bool
    for box, mask, pasted in zip(boxes, masks, ours, strict=True):
        tensors = torch.from_numpy(mask)[None, None], torch.from_numpy(box)[None]
        probabilities, (rows, columns) = fcn_mask_head._do_paste_mask(*tensors, HEIGHT, WIDTH)
        expected = np.zeros((HEIGHT, WIDTH), np.float32)
        expected[rows, columns] = probabilities[0].numpy()
        sure = abs(expected - threshold) > 1e-5
        assert (pasted == (expected >= threshold))[sure].all()
    assert 0.01 < ours.mean() < 0.9


def test_paste_without_boxes():
    assert paste(np.zeros((0, 28, 28), np.float32), np.zeros((0, 4), np.float32), 0.5) == []
