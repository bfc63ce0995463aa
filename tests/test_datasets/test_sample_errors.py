"""Errors of data pipelines name the sample, in this process and from a worker."""

import mmcv
import numpy as np
import pytest
from mmengine.dataset import BaseDataset, Compose, pseudo_collate
from torch.utils.data import DataLoader

from mmunireplknet.datasets.label_ranges import LabelRange
from mmunireplknet.datasets.sample_errors import NamingCompose, SampleError, name_samples

pytestmark = pytest.mark.slow


class Load:
    """What mmcv's LoadImageFromFile and the LoadAnnotations of mmseg do."""

    def __call__(self, data):
        data['img'] = mmcv.imread(data['img_path'])
        if data['img'] is None:
            raise AssertionError(f'failed to load image:\n {data["img_path"]}')
        data['ori_shape'] = data['img'].shape[:2]
        return data


class LoadMask:
    def __call__(self, data):
        data['gt_seg_map'] = mmcv.imread(data['seg_map_path'], 'unchanged')
        return data


class Crop:
    """Changes sizes after they have been compared."""

    def __call__(self, data):
        data['img'] = data['img'][:4]
        return data


class Skip:
    def __call__(self, data):
        return None if '0.png' in data['img_path'] else data


class Images(BaseDataset):
    def __init__(self, files, steps, **info):
        self.files, self.info = files, info
        super().__init__(pipeline=steps)

    def load_data_list(self):
        return [dict(img_path=str(file), **self.info) for file in self.files]


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f'{index}.png' for index in range(3)]
    for path in paths:
        mmcv.imwrite(np.zeros((8, 6, 3), np.uint8), str(path))
    return paths


class Pack:
    def __call__(self, data):
        return dict(packed=data['gt_seg_map'])


def named(*args, ranges=(), **info):
    dataset = Images(*args, **info)
    name_samples(dataset, ranges)
    assert isinstance(dataset.pipeline, NamingCompose)
    return dataset


def test_whole_samples_go_through(files):
    mmcv.imwrite(np.zeros((8, 6), np.uint8), str(files[1]))
    dataset = named(files, [Load(), LoadMask(), Crop()], seg_map_path=str(files[1]), height=8, width=6, instances=[])
    assert dataset[0]['img'].shape == (4, 6, 3)


@pytest.mark.parametrize('workers', [0, 1])
def test_an_image_that_cannot_be_decoded(files, workers):
    files[1].write_bytes(b'nothing')
    loader = DataLoader(named(files, [Load()], img_id=7), num_workers=workers, collate_fn=pseudo_collate)
    with pytest.raises(SampleError) as caught:
        list(loader)
    assert ('worker process' in str(caught.value)) == bool(workers)
    assert caught.value.sentence == (
        f'{files[1]} (image id 7) cannot be loaded, Load says: failed to load image: {files[1]}; repair it, or '
        'remove it from the data set'
    )


def test_a_mask_of_another_size(files):
    mmcv.imwrite(np.zeros((6, 8), np.uint8), str(files[2]))
    dataset = named(files, [Load(), LoadMask(), Crop()], seg_map_path=str(files[2]))
    with pytest.raises(SampleError, match=f'^{files[0]} with {files[2]} has a mask of 6 by 8 pixels, but is 8 by 6;'):
        dataset[0]


def test_the_truth_may_be_read_behind_the_resizing(files):
    """As test pipelines of mmseg do: it keeps its size."""
    pipeline = NamingCompose(Compose([Load(), Crop(), LoadMask()]))
    assert pipeline(dict(img_path=str(files[0]), seg_map_path=str(files[1])))['img'].shape == (4, 6, 3)
    mmcv.imwrite(np.zeros((4, 6), np.uint8), str(files[2]))  # of the size of the resized image
    with pytest.raises(SampleError, match='has a mask of 4 by 6 pixels, but is 8 by 6'):
        pipeline(dict(img_path=str(files[0]), seg_map_path=str(files[2])))


def test_annotations_for_another_size(files):
    dataset = named(files, [Load()], height=6, width=8, instances=[])
    with pytest.raises(SampleError, match=r'is 8 by 6 pixels .*, but its annotations are for 6 by 8; .*EXIF'):
        dataset[0]
    assert named(files, [Load()], height=6, width=8)[0]['img'].shape == (8, 6, 3), 'no annotations, no fault'


@pytest.mark.parametrize('steps', [[Load(), LoadMask()], [Load(), LoadMask(), Pack()]])
def test_labels_are_looked_at_as_they_are_packed(files, steps):
    def double(data):
        data['gt_seg_map'] *= 2
        return data

    mmcv.imwrite(np.full((8, 6), 3, np.uint8), str(files[2]))
    given = dict(ranges=(LabelRange('decode_head', 4, 255),), seg_map_path=str(files[2]))
    assert named(files, steps, **given)[0].keys() & {'img', 'packed'}
    with pytest.raises(SampleError, match=f'^{files[0]} with {files[2]} has the label 6 in 48 pixels, but the 4 clas'):
        named(files, [*steps[:2], double, *steps[2:]], **given)[0]
    named(files, [*steps[:2], double], seg_map_path=str(files[2]))[0]


def test_a_transform_may_still_ask_for_another_sample(files):
    assert '0.png' not in named(files, [Skip()])[0]['img_path']


def test_wrapped_data_sets(files):
    class Wrapper:
        def __init__(self, **inner):
            vars(self).update(inner)

    one, two = Images(files, [Load()]), Images(files, [Load()])
    wrapper = Wrapper(datasets=[one, Wrapper(dataset=two)], pipeline=[Load()])
    name_samples(wrapper)
    name_samples(wrapper)
    assert type(one.pipeline) is type(two.pipeline) is NamingCompose
    assert isinstance(one.pipeline, Compose)
    assert isinstance(wrapper.pipeline, list), 'what is no pipeline of mmengine is left alone'
