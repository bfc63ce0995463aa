import dataclasses
import itertools
import sys

import cv2
import numpy as np
import pytest

pytest.importorskip('sklearn')
pytest.importorskip('skimage')

from mmunireplknet.datasets import digit_painting as painting
from mmunireplknet.datasets.digit_painting import DIFFICULTIES, Difficulty, paint


def touching(scene):
    """Whether two digits of the scene are next to each other."""
    grown = [cv2.dilate(i.mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0 for i in scene.instances]
    return any((grown[j] & other.mask).any() for j in range(len(grown)) for other in scene.instances[j + 1 :])


def test_seed_split_and_index_all_matter():
    scenes = [paint(*key, (64, 64), DIFFICULTIES['easy']).image for key in
              ((0, 'train', 0), (1, 'train', 0), (0, 'val', 0), (0, 'train', 1))]  # fmt: skip
    assert len({scene.tobytes() for scene in scenes}) == 4


# ---------------------------------------------------------------------------------------------------- sources


def test_the_splits_share_nothing():
    train, val = (set(painting.DIGIT_SPLIT[split]) for split in painting.SPLITS)
    assert not train & val
    assert train | val == set(range(len(painting._digits()[1])))
    photographs = [{(p.package, p.file) for p in painting.PHOTOGRAPHS[split]} for split in painting.SPLITS]
    assert not photographs[0] & photographs[1]
    pair = {('skimage', 'data/motorcycle_left.png'), ('skimage', 'data/motorcycle_right.png')}
    assert any(pair <= names for names in photographs), 'one stereo pair, one scene'


@pytest.mark.parametrize('split', painting.SPLITS)
def test_the_painter_keeps_to_the_split(split, monkeypatch):
    numbers, photographs = set(), set()
    outline, photograph = painting._outline, painting._photograph
    monkeypatch.setattr(painting, '_outline', lambda number: (numbers.add(number), outline(number))[1])
    monkeypatch.setattr(painting, '_photograph', lambda photo: (photographs.add(photo), photograph(photo))[1])
    for index in range(12):
        paint(0, split, index, (64, 64), DIFFICULTIES['hard'])
    assert len(numbers) > 20
    assert numbers <= set(painting.DIGIT_SPLIT[split])
    assert len(photographs) > 2
    assert photographs <= set(painting.PHOTOGRAPHS[split])


@pytest.mark.parametrize('split', painting.SPLITS)
def test_every_digit_has_readable_samples(split):
    targets = painting._digits()[1]
    for digit in range(10):
        numbers = (number for number in painting.DIGIT_SPLIT[split] if targets[number] == digit)
        readable = (number for number in numbers if painting._outline(number) is not None)
        assert len(list(itertools.islice(readable, 10))) == 10, digit


@pytest.mark.parametrize('digit', range(10))
def test_a_glyph_has_the_holes_of_its_digit(digit):
    rng = np.random.default_rng(digit)
    for _ in range(6):
        glyph = painting._glyph(painting._sample(rng, 'train', digit), 60.0, 0.0)
        assert glyph.shape[0] == pytest.approx(60, abs=2)
        assert glyph.min() == 0
        assert glyph.max() == 1
        stroke = np.pad(glyph >= 0.5, 1).astype(np.uint8)
        assert cv2.connectedComponents(stroke)[0] - 1 == 1
        assert cv2.connectedComponents(1 - stroke, connectivity=4)[0] - 2 in painting.HOLES[digit]


def test_a_turned_glyph_is_whole():
    field = painting._sample(np.random.default_rng(0), 'train', 1)
    areas = [painting._glyph(field, 60.0, angle).sum() for angle in (0.0, -45.0, 30.0, 45.0)]
    assert areas == pytest.approx([areas[0]] * 4, rel=0.01)


def test_a_colour_stands_out():
    rng = np.random.default_rng(0)
    for _ in range(20):
        background = np.float32(rng.uniform(0, 1, 3))[None].repeat(50, 0)
        colour = painting._colour(rng, background, 45.0)
        lab = cv2.cvtColor(np.float32([[colour, background[0]]]), cv2.COLOR_RGB2LAB)[0]
        assert np.linalg.norm(lab[0] - lab[1]) >= 45


# ------------------------------------------------------------------------------------------------------ truth


@pytest.mark.parametrize('size', [(64, 64), (64, 200), (211, 97), (128, 128)])
@pytest.mark.parametrize('difficulty', DIFFICULTIES)
def test_any_size(size, difficulty):
    for index in range(4):
        scene = paint(5, 'train', index, size, DIFFICULTIES[difficulty])
        assert scene.image.shape == (*size, 3)
        assert scene.image.dtype == scene.semantic.dtype == np.uint8
        assert scene.semantic.shape == size
        preset = DIFFICULTIES[difficulty]
        assert preset.digits[0] <= len(scene.instances) <= preset.digits[1]
        painted = np.zeros(size, np.uint8)
        for instance in scene.instances:
            assert instance.mask.any()
            assert 0 <= instance.digit < preset.num_classes
            assert not painted[instance.mask].any(), 'visible parts do not meet'
            painted[instance.mask] = instance.digit + 1
        np.testing.assert_array_equal(painted, scene.semantic)


def test_presets_are_what_they_say():
    assert DIFFICULTIES['medium'] == Difficulty()
    for difficulty in DIFFICULTIES.values():
        assert (difficulty.num_classes, difficulty.digits) == (10, (3, 6))


@pytest.mark.parametrize('difficulty', DIFFICULTIES)
def test_overlap_and_visibility(difficulty, monkeypatch):
    layers = []
    truth = painting._truth
    monkeypatch.setattr(painting, '_truth', lambda canvas, found: (layers.append(found), truth(canvas, found))[1])
    preset = DIFFICULTIES[difficulty]
    scenes = [paint(2, 'train', index, (128, 128), preset) for index in range(12)]
    visible = np.array([
        instance.mask.sum() / (alpha >= 0.5).sum()
        for scene, found in zip(scenes, layers, strict=True)
        for instance, (_, alpha) in zip(scene.instances, found, strict=True)
    ])  # fmt: skip
    assert visible.min() >= preset.min_visible
    if preset.overlap == 0:
        assert (visible == 1).all()
        assert not any(touching(scene) for scene in scenes)
    else:
        assert 0.1 < (visible < 1).mean() < 0.7
        assert any(touching(scene) for scene in scenes)


def test_overlap_can_be_had_always():
    always = dataclasses.replace(DIFFICULTIES['hard'], overlap=1.0)
    assert all(touching(paint(0, 'val', index, (96, 96), always)) for index in range(6))


def test_digits_are_where_the_masks_say():
    """Against the bare photograph, the image differs inside the masks and nowhere far from them."""
    scene = paint(0, 'train', 2, (128, 128), DIFFICULTIES['easy'])
    plain = painting._background(np.random.default_rng([0, 0, 2]), 'train', (128, 128))
    changed = np.abs(scene.image / 255.0 - plain).max(axis=2) > 0.15
    assert changed[scene.semantic > 0].mean() > 0.95
    far = cv2.dilate((scene.semantic > 0).astype(np.uint8), np.ones((25, 25), np.uint8)) == 0
    assert far.any()
    assert changed[far].mean() < 0.02


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    'change',
    [{'num_classes': 11}, {'digits': (3, 2)}, {'scale': (0.0, 0.5)}, {'rotation': 180.0}, {'overlap': 1.5},
     {'min_visible': 0.0}, {'contrast': -1.0}, {'relief': 2.0}],
)  # fmt: skip
def test_wrong_difficulty(change):
    with pytest.raises(ValueError, match=f'Difficulty.{next(iter(change))} is .*; expected'):
        Difficulty(**change)


def test_a_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    painting._digits.cache_clear()
    with pytest.raises(ImportError, match='pip install scikit-learn'):
        paint(0, 'train', 0, (64, 64), Difficulty())


def test_a_missing_scikit_image_is_named(monkeypatch):
    painting._photograph.cache_clear()
    monkeypatch.setattr(painting, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match='pip install scikit-image'):
        painting._photograph(painting.Photograph('skimage', 'data/coffee.png'))


def test_a_missing_photograph_is_named():
    with pytest.raises(FileNotFoundError, match=r'nowhere\.png is not there, though skimage is installed'):
        painting._photograph(painting.Photograph('skimage', 'data/nowhere.png'))
