"""What is wrong in annotation files, one thing at a time."""

import json

import pytest

from mmunireplknet.datasets.annotations import check_annotations

from ..coco_stand_in import FILE, NAMES, edit, generate


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    return generate(tmp_path_factory.mktemp('coco'))


@pytest.fixture
def root(whole, tmp_path):
    """A copy whose annotation file may be changed; the images are shared."""
    (tmp_path / 'annotations').mkdir()
    for split in ('train2017', 'val2017'):
        (tmp_path / FILE.format(split)).write_text((whole / FILE.format(split)).read_text())
        (tmp_path / split).symlink_to(whole / split)
    return tmp_path


def look(root, **options):
    found = check_annotations(root / FILE.format('train2017'), root / 'train2017', **options)
    for sentence in [*found.faults, *found.notes]:
        assert '\n' not in sentence
        assert '; ' in sentence, 'what to do stands behind the semicolon'
        assert str(root) in sentence
    return found


def test_nothing_is_wrong(root):
    found = look(root, classes=NAMES)
    assert (found.faults, found.notes) == ([], [])
    assert (found.images, found.annotations, found.usable, found.categories) == (4, 8, 4, list(NAMES))
    assert found.of_boxes


def change(kind, number, **values):
    def apply(content):
        for key, value in values.items():
            if value is None:
                del content[kind][number][key]
            else:
                content[kind][number][key] = value

    return apply


WRONG = {
    'missing image': (change('images', 1, file_name='no.jpg'), ['train2017/no.jpg, image 2 of', 'does not exist']),
    'folder': (change('images', 1, file_name='no/1.jpg'), ['train2017/no/1.jpg, image 2 of', 'does not exist']),
    'no size': (change('images', 2, height=0), ['image 3 (000000000002.jpg) is 0 high and 64 wide']),
    'size is text': (change('images', 2, width='64'), ['image 3 (000000000002.jpg) is 48 high and 64 wide']),
    'no height': (change('images', 2, height=None), ['image 3 (000000000002.jpg) has no height']),
    'image id': (change('images', 2, id=1), ['image 1 (000000000002.jpg) has the id of 000000000000.jpg']),
    'class id': (
        change('annotations', 4, category_id=3),
        ['annotation 5 of 000000000002.jpg has the category id 3', 'the 2 categories of the file have 1 to 2'],
    ),
    'annotation id': (change('annotations', 4, id=4), ['annotation 4 of 000000000002.jpg has the id of another']),
    'image of nothing': (change('annotations', 4, image_id=77), ['annotation 5 belongs to image 77']),
    'no area': (change('annotations', 4, area=None), ['annotation 5 of 000000000002.jpg has no area']),
    'three numbers': (change('annotations', 4, bbox=[1, 2, 3]), ['has the box [1, 2, 3]; expected four finite']),
    'nan': (change('annotations', 4, bbox=[1, 2, 3, float('nan')]), ['has the box [1, 2, 3, nan]; expected four']),
    'negative': (change('annotations', 4, bbox=[30, 30, -9, 5]), ['of negative size; expected', 'not two corners']),
    'mask of another size': (
        change('annotations', 5, segmentation=dict(size=[64, 48], counts=[0, 3072])),
        ['annotation 6 of 000000000002.jpg has a mask of 64 by 48 pixels, but its image is 48 by 64'],
    ),
    'mask of other counts': (
        change('annotations', 5, segmentation=dict(size=[48, 64], counts=[0, 30])),
        ['a mask whose counts make 30 pixels instead of 3,072'],
    ),
    'no mask': (change('annotations', 5, segmentation=[]), ['annotation 6 of 000000000002.jpg has no mask']),
    'no RLE': (change('annotations', 5, segmentation=dict(counts='x')), ['neither polygons nor an RLE']),
    'no list': (lambda content: content.pop('categories'), ['has no list of categories']),
    'no name': (change('categories', 1, name=None), ['has no id and name']),
}


@pytest.mark.parametrize('name', WRONG)
def test_one_thing_is_wrong(root, name):
    damage, parts = WRONG[name]
    edit(root, damage)
    text = ' | '.join(look(root).faults)
    for part in parts:
        assert part in text


@pytest.mark.parametrize('name', ['mask of another size', 'mask of other counts', 'no mask', 'no RLE'])
def test_masks_do_not_matter_where_none_is_trained(root, name):
    edit(root, WRONG[name][0])
    assert look(root, masks=False).faults == []


def test_an_image_without_content(whole, tmp_path):
    root = generate(tmp_path)
    (root / 'train2017/000000000001.jpg').write_bytes(b'')
    (fault,) = look(root).faults
    assert 'train2017/000000000001.jpg, image 2 of' in fault
    assert 'has no content' in fault


def test_what_mmdet_leaves_out_is_a_note(root):
    """COCO's own train2017 has boxes without height, so that they must not stop a training."""

    def damage(content):
        content['annotations'][0]['bbox'][3] = 0
        content['annotations'][1]['bbox'][2] = 0.5
        content['annotations'][2]['area'] = 0
        content['annotations'][3]['bbox'][0] = 64

    edit(root, damage)
    found = look(root)
    assert found.faults == []
    small, area, outside, empty = found.notes
    assert 'annotation 1 of 000000000000.jpg has a box of 20 by 0 pixels' in small
    assert small.endswith('(and 1 more like it)')
    assert 'annotation 3 of 000000000001.jpg has the area 0' in area
    assert 'annotation 4 of 000000000001.jpg has a box outside of its image' in outside
    assert '2 of 4 images have no box, the first is image 1 (000000000000.jpg)' in empty
    assert 'filter_empty_gt=True' in empty
    assert found.usable == 2


def test_classes_of_the_config(root):
    (fault,) = look(root, classes=('square', 'person')).faults
    assert 'has no category person, which is among the 2 classes of the config' in fault
    assert 'its categories are square, bar' in fault
    found = look(root, classes=('bar', 'square'))
    assert found.faults == []
    assert 'in another order' in found.notes[0]
    only = look(root, classes=('bar',))
    assert only.faults == []
    assert only.usable == 4


def test_no_json(root):
    file = root / FILE.format('train2017')
    file.write_text(file.read_text()[:100])
    assert 'is no whole JSON file' in look(root).faults[0]
    file.write_bytes(b'\xff\xfe\x00')
    assert 'is no whole JSON file' in look(root).faults[0]
    file.write_text(json.dumps([1, 2]))
    assert 'has no list of images and annotations and categories' in look(root).faults[0]
    file.unlink()
    assert 'cannot be read (No such file or directory)' in look(root).faults[0]


def test_many_of_a_kind_are_one_sentence(root):
    edit(root, lambda content: [entry.update(category_id=9) for entry in content['annotations']])
    found = look(root)
    assert len(found.faults) == 1
    assert found.faults[0].endswith('(and 7 more like it)')
    assert 'annotation 1 of' in found.faults[0]
