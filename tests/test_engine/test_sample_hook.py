"""Samples keep their names, and labels are looked at, when a pipeline is replaced during the run."""

from types import SimpleNamespace

import mmcv.transforms
import numpy as np
import pytest
from mmengine.dataset import BaseDataset
from torch import nn

from mmunireplknet.datasets.sample_errors import SampleError, name_samples
from mmunireplknet.engine import SampleHook


class Images(BaseDataset):
    def load_data_list(self):
        return [dict(img_path='0.jpg')]


def unreadable(data):
    raise OSError('unreadable')


def mask(data):
    return dict(data, gt_seg_map=np.full((2, 2), 11, np.uint8))


@pytest.mark.parametrize(
    ('step', 'error', 'text'),
    [
        (unreadable, OSError, '0.jpg cannot be loaded, function says: unreadable; '),
        (mask, None, '0.jpg has the label 11 in 4 pixels, but the 11 classes of decode_head '),
    ],
)
def test_a_pipeline_that_comes_during_the_run(step, error, text):
    dataset = Images(pipeline=[lambda data: data])
    name_samples(dataset)
    dataset[0]
    dataset.pipeline = mmcv.transforms.Compose([step])  # the type that the hooks of mmdet and mmpretrain put in
    if error:
        with pytest.raises(error):
            dataset[0]
    else:
        dataset[0]
    model = nn.Module()
    model.decode_head = nn.Identity()
    model.decode_head.num_classes, model.decode_head.ignore_index = 11, 255
    runner = SimpleNamespace(model=model, train_dataloader=SimpleNamespace(dataset=dataset))
    SampleHook().before_train_epoch(runner)
    with pytest.raises(SampleError) as caught:
        dataset[0]
    assert str(caught.value).startswith(text)
