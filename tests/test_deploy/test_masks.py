"""Masks on boxes, pasted into the image by numpy, are mmdet's."""

import numpy as np
import pytest
import torch

from mmunireplknet.deploy.masks import paste

HEIGHT, WIDTH = 61, 83


def boxes_and_masks(cells):
    rng = np.random.RandomState(0)
    low = rng.uniform(-9, 50, (40, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.3, 60, (40, 2))], 1).clip(0, [WIDTH, HEIGHT] * 2)
    boxes[0] = [3.5, 4.25, 3.5, 20]  # without width
    boxes[1] = [0, 0, WIDTH, HEIGHT]
    return boxes.astype(np.float32), rng.uniform(0, 1, (40, cells, cells)).astype(np.float32)


@pytest.mark.parametrize('threshold', [0.5, 0.3])
@pytest.mark.parametrize('cells', [14, 28])
def test_paste_is_that_of_mmdet(cells, threshold):
    fcn_mask_head = pytest.importorskip('mmdet.models.roi_heads.mask_heads.fcn_mask_head')
    boxes, masks = boxes_and_masks(cells)
    ours = paste(masks, boxes, HEIGHT, WIDTH, threshold)
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
    assert paste(np.zeros((0, 28, 28), np.float32), np.zeros((0, 5), np.float32), 4, 6).shape == (0, 4, 6)
