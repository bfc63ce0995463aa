"""Adaptive pooling by averaging matrices."""

import pytest
import torch
from torch import nn

from mmunireplknet.deploy.pooling import MatrixPool2d, replace_pooling

from ..procedural import image, relative_error


@pytest.mark.parametrize('size', [(1, 1), (2, 2), (3, 3), (6, 6), (4, 7)], ids=str)
def test_every_size_of_map(size):
    """Multiples of the grid, others, smaller than the grid, and single rows."""
    pool, ours = nn.AdaptiveAvgPool2d(size), MatrixPool2d(size)
    for height in (1, 2, 3, 5, 6, 7, 12, 19, 64):
        for width in (1, 4, 6, 13, 31):
            x = image((2, 3, height, width), height * width) + 1
            assert ours(x).shape == pool(x).shape
            assert relative_error(ours(x), pool(x)) < 1e-6, (height, width)


def test_half_precision_sums_in_float32():
    x = (image((1, 2, 128, 128)) + 300).half()  # 16384 values of 300 are beyond float16
    y = MatrixPool2d((2, 2))(x)
    assert y.dtype == torch.float16
    assert relative_error(y, nn.AdaptiveAvgPool2d(2)(x.double())) < 1e-3


def test_replaced_wherever_it_has_more_than_one_cell():
    model = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((None, 3)), nn.ModuleList([nn.AdaptiveAvgPool2d(6)])
    )
    replace_pooling(model)
    assert [type(m).__name__ for m in (model[0], model[1], model[2][0])] == [
        'AdaptiveAvgPool2d', 'AdaptiveAvgPool2d', 'MatrixPool2d',
    ]  # fmt: skip
    assert model[2][0].output_size == (6, 6)


def test_a_trace_takes_other_sizes():
    traced = torch.jit.trace(MatrixPool2d((3, 6)), image((1, 2, 8, 9)))
    x = image((2, 2, 11, 5))
    assert relative_error(traced(x), nn.AdaptiveAvgPool2d((3, 6))(x)) < 1e-6
