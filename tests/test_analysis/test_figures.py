"""Pictures: what is painted where, and which metrics are read."""

import json

import numpy as np
import pytest
from PIL import Image

from mmunireplknet.analysis.figures import (
    Comparison,
    draw_results,
    paint_instances,
    paint_labels,
    percentages,
    read_scalars,
)

PALETTE = [[200, 0, 0], [0, 100, 0]]


def test_labels_have_the_colours_of_the_palette_and_others_are_white():
    picture = paint_labels(np.array([[0, 1], [2, 255]], np.uint8), PALETTE)
    assert picture.tolist() == [[[200, 0, 0], [0, 100, 0]], [[255] * 3, [255] * 3]]


def test_instances():
    image = np.full((6, 8, 3), 10, np.uint8)
    mask = np.zeros((1, 6, 8), bool)
    mask[0, 2:4, 2:5] = True
    out = paint_instances(image, np.array([1]), np.array([[1.2, 1.5, 5.6, 4.9]]), mask, PALETTE)
    assert (image == 10).all()
    frame = (out == PALETTE[1]).all(-1)
    expected = np.zeros((6, 8), bool)
    expected[1:5, 1:6] = True
    expected[2:4, 2:5] = False
    assert (frame == expected).all()
    assert out[2, 2].tolist() == [4, 64, 4]
    assert (out[0] == 10).all()
    assert (out[:, 7] == 10).all()


@pytest.mark.parametrize('box', [[-5, -5, 20, 20], [7.5, 0, 30, 3], [9, 9, 12, 12]])
def test_boxes_beyond_the_image(box):
    out = paint_instances(
        np.zeros((6, 8, 3), np.uint8), np.array([0]), np.array([box]), np.zeros((1, 6, 8), bool), PALETTE
    )
    assert out.any() == (box[0] < 8)


def test_percentages():
    assert percentages('mmseg', {'aAcc': 90.0, 'mIoU': 61.5}) == {'mIoU': 61.5}
    metrics = {'coco/bbox_mAP': 0.25, 'coco/bbox_mAP_s': 0.1, 'coco/segm_mAP_50': 0.5}
    assert percentages('mmdet', metrics) == {'box AP': 25.0, 'mask AP50': 50.0}


@pytest.mark.parametrize('scope', ['mmseg', 'mmdet'])
def test_picture(tmp_path, scope):
    pictures = [np.full((60, 90, 3), value, np.uint8) for value in (50, 100)]
    comparison = Comparison(dict(image=pictures, truth=pictures), list(zip('ab', PALETTE, strict=True)))
    scalars = {'loss': [(1, 2.0), (2, 1.0)], 'mIoU': [(2, 30.0)], 'coco/bbox_mAP': [(2, 0.3)]}
    draw_results(comparison, scope, scalars, tmp_path / 'with' / 'curves.png', 'title')
    draw_results(comparison, scope, {}, tmp_path / 'without.png')
    with Image.open(tmp_path / 'with' / 'curves.png') as curves, Image.open(tmp_path / 'without.png') as plain:
        assert curves.size[0] == plain.size[0]
        assert curves.size[1] - plain.size[1] == pytest.approx(2.7 * 110, abs=1)
        colours = {colour for _, colour in plain.convert('RGB').getcolors(1 << 20)}
    assert {(50, 50, 50), (100, 100, 100), (200, 0, 0), (0, 100, 0)} <= colours


def test_scalars_of_a_resumed_run_count_once(tmp_path):
    for run, lines in (('1', [(1, 5.0), (2, 4.0)]), ('2', [(2, 3.0)])):
        (tmp_path / run / 'vis_data').mkdir(parents=True)
        text = '\n'.join(json.dumps(dict(loss=value, step=step)) for step, value in lines)
        (tmp_path / run / 'vis_data' / 'scalars.json').write_text(text)
    assert read_scalars(tmp_path) == {'loss': [(1, 5.0), (2, 3.0)]}
    with pytest.raises(FileNotFoundError, match='nothing was logged there'):
        read_scalars(tmp_path / 'none')
