"""Labels that a mask may have: what the heads of a model say, and what is said of others."""

import numpy as np
import pytest
from mmengine.model import MMDistributedDataParallel
from torch import nn

from mmunireplknet.datasets.label_ranges import LabelRange, label_fault, label_ranges


def head(classes=11, ignored=255, channels=None):
    module = nn.Linear(1, 1)
    module.num_classes, module.ignore_index, module.out_channels = classes, ignored, channels or classes
    return module


def model(**heads):
    whole = nn.Module()
    for name, value in heads.items():
        setattr(whole, name, value)
    return whole


def test_heads(process_group):
    one = model(decode_head=head(), auxiliary_head=head())
    assert label_ranges(one) == (LabelRange('decode_head', 11, 255),), 'equal ones are looked at once'
    assert label_ranges(MMDistributedDataParallel(one, device_ids=None)) == label_ranges(one)
    several = model(decode_head=nn.ModuleList([head(), head(12)]), auxiliary_head=head(11, 0))
    assert set(label_ranges(several)) == {
        LabelRange('decode_head', 11, 255),
        LabelRange('decode_head', 12, 255),
        LabelRange('auxiliary_head', 11, 0),
    }
    assert label_ranges(model(head=head(), decode_head=None)) == (), "another library's"


def test_heads_that_are_left_out():
    assert label_ranges(model(decode_head=head(2, channels=1))) == (), 'mmseg asserts'
    stdc = pytest.importorskip('mmseg.models').STDCHead(0.1, num_classes=2, in_channels=8, channels=8, num_convs=1)
    assert label_ranges(model(auxiliary_head=stdc)) == (), 'its loss is of the boundaries between labels'
    assert (stdc.num_classes, stdc.ignore_index) == (2, 255)


@pytest.mark.parametrize('dtype', [np.uint8, np.int64])
def test_a_label_without_a_class(dtype):
    labels = np.tile(np.array([10, 11, 3, 255], dtype), (4, 1))
    assert label_fault(labels, (LabelRange('head', 12, 255), LabelRange('decode_head', 11, 255))) == (
        'has the label 11 in 4 pixels, but the 11 classes of decode_head have 0 to 10 and its ignore_index is 255; if '
        '11 is no class, set ignore_index of each head and of the evaluators and seg_pad_val of the data preprocessor '
        'to 11; if the first class has 1, set reduce_zero_label=True of the data set; if classes are missing, set its '
        'metainfo=dict(classes=...) and num_classes of each head'
    )
    assert label_fault(labels, (LabelRange('head', 12, 255),)) is None
    assert label_fault(labels, (LabelRange('head', 300, 11),)) is None
    assert 'has the label 255 in 4 pixels' in label_fault(labels, (LabelRange('head', 11, 11),))
    assert 'has the label 255 in 4 pixels' in label_fault(labels, (LabelRange('head', 12, -100),))


def test_negative_labels():
    labels = np.array([[0, -1, 300]])
    assert 'has the label -1 in 1 pixels' in label_fault(labels, (LabelRange('head', 301, 255),))
    assert label_fault(labels, (LabelRange('head', 301, -1),)) is None
