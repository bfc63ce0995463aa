import dataclasses
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('sklearn')
pytest.importorskip('skimage')

from mmunireplknet.datasets.digit_painting import DIFFICULTIES, Difficulty, paint
from mmunireplknet.datasets.digit_scenes import FOLDERS, generate, metainfo, run_lengths

COUNTS = {'train': 4, 'val': 2}
TOOL = Path(__file__).parents[2] / 'tools/dataset_preparation/digit_scenes.py'


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp('data') / 'hard'
    return generate(root, COUNTS, size=(96, 144), seed=3, difficulty='hard')


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob('*') if path.is_file()}


def decode(segmentation):
    mask_utils = pytest.importorskip('pycocotools.mask')
    return mask_utils.decode(mask_utils.frPyObjects(segmentation, *segmentation['size'])).astype(bool)


# ------------------------------------------------------------------------------------------------ determinism


def test_same_seed_same_bytes(made, tmp_path):
    again = generate(tmp_path / 'again', COUNTS, size=(96, 144), seed=3, difficulty='hard')
    assert contents(again.root) == contents(made.root)


def test_a_larger_data_set_begins_with_the_smaller(made, tmp_path):
    few = contents(generate(tmp_path / 'few', {'val': 1, 'train': 2}, (96, 144), 3, 'hard').root)
    many = contents(made.root)
    pictures = [name for name in few if not name.endswith('.json')]
    assert len(pictures) == 6
    assert all(few[name] == many[name] for name in pictures)
    few_coco, many_coco = (json.loads(c['annotations/instances_train.json']) for c in (few, many))
    assert few_coco['annotations'] == many_coco['annotations'][: len(few_coco['annotations'])]


# -------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize('split', COUNTS)
def test_coco_agrees_with_the_masks(made, split):
    coco = json.loads((made.root / 'annotations' / f'instances_{split}.json').read_text())
    assert len(coco['images']) == COUNTS[split]
    assert [category['id'] for category in coco['categories']] == list(range(1, 11))
    assert [annotation['id'] for annotation in coco['annotations']] == list(range(1, len(coco['annotations']) + 1))
    for image in coco['images']:
        with Image.open(made.root / 'images' / FOLDERS[split] / image['file_name']) as file:
            assert (file.mode, file.size) == ('RGB', (image['width'], image['height'])) == ('RGB', (144, 96))
        name = image['file_name'].replace('.jpg', '.png')
        semantic = np.asarray(Image.open(made.root / 'annotations' / FOLDERS[split] / name))
        assert semantic.dtype == np.uint8
        painted = np.zeros_like(semantic)
        for annotation in coco['annotations']:
            if annotation['image_id'] != image['id']:
                continue
            mask = decode(annotation['segmentation'])
            assert annotation['iscrowd'] == 0
            assert annotation['area'] == mask.sum() > 0
            x, y, w, h = annotation['bbox']
            box = mask[y : y + h, x : x + w]
            assert box.sum() == mask.sum(), 'nothing outside'
            assert all(edge.any() for edge in (box[0], box[-1], box[:, 0], box[:, -1])), 'tight'
            assert not painted[mask].any()
            painted[mask] = annotation['category_id']
        np.testing.assert_array_equal(painted, semantic)


@pytest.mark.parametrize('first', [False, True])
def test_run_lengths(first):
    mask = np.random.default_rng(0).random((7, 5)) < 0.5
    mask[0, 0] = first
    np.testing.assert_array_equal(decode(run_lengths(mask)), mask)
    assert run_lengths(np.zeros((2, 3), bool)) == {'size': [2, 3], 'counts': [6]}
    assert run_lengths(np.ones((2, 3), bool)) == {'size': [2, 3], 'counts': [0, 6]}


def test_the_jpeg_shows_the_scene(made):
    scene = paint(3, 'val', 1, (96, 144), DIFFICULTIES['hard'])
    image = np.asarray(Image.open(made.root / 'images/validation/val_000001.jpg'))
    assert np.abs(image.astype(int) - scene.image).mean() < 3


def test_meta_and_summary(made):
    assert made.meta == json.loads((made.root / 'meta.json').read_text())
    assert made.meta['metainfo'] == metainfo(10)
    assert 'skimage/data/chelsea.png' in made.meta['sources']['val']['photographs']
    assert '4 train images' in str(made)
    assert 'height 96, width 144' in str(made)


def test_mmseg_reads_it(made):
    pytest.importorskip('mmseg')
    from mmseg.datasets import BaseSegDataset
    from mmseg.utils import register_all_modules

    register_all_modules()
    dataset = BaseSegDataset(
        data_root=str(made.root),
        data_prefix={'img_path': 'images/training', 'seg_map_path': 'annotations/training'},
        metainfo=metainfo(10),
        reduce_zero_label=False,
        pipeline=[
            {'type': 'LoadImageFromFile'},
            {'type': 'LoadAnnotations'},
            {'type': 'RandomFlip', 'prob': 0.0},
            {'type': 'PackSegInputs'},
        ],
    )
    assert len(dataset) == COUNTS['train']
    assert dataset.metainfo['classes'][:2] == ['background', 'zero']
    for index in range(len(dataset)):
        item = dataset[index]
        scene = paint(3, 'train', index, (96, 144), DIFFICULTIES['hard'])
        assert tuple(item['inputs'].shape) == (3, 96, 144)
        np.testing.assert_array_equal(item['data_samples'].gt_sem_seg.data[0].numpy(), scene.semantic)


def test_mmdet_reads_it(made):
    pytest.importorskip('mmdet')
    from mmdet.datasets import CocoDataset
    from mmdet.utils import register_all_modules

    register_all_modules()
    dataset = CocoDataset(
        data_root=str(made.root),
        ann_file='annotations/instances_val.json',
        data_prefix={'img': 'images/validation/'},
        metainfo=metainfo(10, background=False),
        filter_cfg={'filter_empty_gt': True, 'min_size': 32},
        pipeline=[
            {'type': 'LoadImageFromFile'},
            {'type': 'LoadAnnotations', 'with_bbox': True, 'with_mask': True},
            {'type': 'PackDetInputs'},
        ],
    )
    assert len(dataset) == COUNTS['val']
    for index in range(len(dataset)):
        found = dataset[index]['data_samples'].gt_instances
        scene = paint(3, 'val', index, (96, 144), DIFFICULTIES['hard'])
        assert found.labels.tolist() == [instance.digit for instance in scene.instances]
        masks = np.stack([instance.mask for instance in scene.instances])
        np.testing.assert_array_equal(found.masks.masks.astype(bool), masks)
        np.testing.assert_array_equal(found.bboxes.numpy(), found.masks.get_bboxes('hbox').numpy())


@pytest.mark.parametrize('num_classes', [1, 5, 10])
def test_metainfo(num_classes):
    seg, det = metainfo(num_classes), metainfo(num_classes, background=False)
    assert len(seg['classes']) == len(seg['palette']) == num_classes + 1
    assert seg['classes'][1:] == det['classes']
    assert seg['palette'][1:] == det['palette']
    assert len({tuple(colour) for colour in seg['palette']}) == num_classes + 1


# ------------------------------------------------------------------------------------- reuse, refusal, killing


def test_the_same_data_set_is_reused(made):
    before = {path: path.stat().st_mtime_ns for path in made.root.rglob('*')}
    calls = []
    again = generate(made.root, COUNTS, (96, 144), 3, 'hard', progress=lambda *a: calls.append(a))
    assert again.reused
    assert not made.reused
    assert again.meta == made.meta
    assert not calls
    assert {path: path.stat().st_mtime_ns for path in made.root.rglob('*')} == before


def test_another_data_set_is_refused_or_replaced(tmp_path):
    root = tmp_path / 'ds'
    first = generate(root, {'train': 2}, (64, 64))
    kept = contents(root)
    with pytest.raises(FileExistsError, match=r'seed 0 instead of 1; digits \[3, 6\] instead of \[2, 3\].*overwrite'):
        generate(
            root, {'train': 2}, (64, 64), seed=1, difficulty=dataclasses.replace(DIFFICULTIES['easy'], digits=(2, 3))
        )
    assert contents(root) == kept
    second = generate(root, {'train': 2}, (64, 64), seed=1, overwrite=True)
    assert second.meta != first.meta
    assert contents(root) != kept
    assert [path.name for path in tmp_path.iterdir()] == ['ds']


def test_an_incomplete_data_set_is_refused_or_made_anew(tmp_path):
    root = tmp_path / 'ds'
    generate(root, {'train': 2}, (64, 64))
    whole = contents(root)
    (root / 'images/training/train_000001.jpg').unlink()
    with pytest.raises(FileExistsError, match=r'lacks 1 of its files, .*train_000001\.jpg'):
        generate(root, {'train': 2}, (64, 64))
    generate(root, {'train': 2}, (64, 64), overwrite=True)
    assert contents(root) == whole


@pytest.mark.parametrize('meta', [None, '{}', 'not json', '{"kind": "other", "parameters": {}}', '[]'])
def test_foreign_files_are_never_replaced(tmp_path, meta):
    (tmp_path / 'thesis.tex').write_text('years of work')
    if meta is not None:
        (tmp_path / 'meta.json').write_text(meta)
    with pytest.raises(FileExistsError, match='no Digit Scenes'):
        generate(tmp_path, {'train': 1}, (64, 64), overwrite=True)
    assert (tmp_path / 'thesis.tex').read_text() == 'years of work'


def test_an_empty_folder_is_filled(tmp_path):
    root = tmp_path / 'ds'
    root.mkdir()
    assert not generate(root, {'val': 1}, (64, 64)).reused
    assert (root / 'meta.json').is_file()
    assert [path.name for path in tmp_path.iterdir()] == ['ds']


def test_another_process_may_win(tmp_path):
    root = tmp_path / 'ds'

    def progress(done, total):
        if done == total:
            generate(root, {'train': 1}, (64, 64))

    assert generate(root, {'train': 1}, (64, 64), progress=progress).reused
    assert [path.name for path in tmp_path.iterdir()] == ['ds']


@pytest.mark.parametrize('there', [False, True])
def test_an_interrupted_run_leaves_no_trace(tmp_path, there):
    root = tmp_path / 'ds'
    if there:
        generate(root, {'train': 1}, (64, 64))
    before = contents(tmp_path)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(root, {'train': 2}, (64, 64), progress=interrupt, overwrite=True)
    assert contents(tmp_path) == before


def _kill_at_two(root):
    def kill(done, total):
        if done == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    generate(root, {'train': 3}, (64, 64), progress=kill)


@pytest.mark.skipif(sys.platform == 'win32', reason='SIGKILL')
def test_a_killed_run_leaves_nothing_that_looks_whole(tmp_path):
    root = tmp_path / 'ds'
    process = multiprocessing.get_context('fork').Process(target=_kill_at_two, args=(root,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not root.exists()
    assert [path.suffix for path in tmp_path.iterdir()] == ['.partial']
    assert not generate(root, {'train': 3}, (64, 64)).reused
    assert len(list((root / 'images/training').iterdir())) == 3


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'split_counts': {'test': 3}}, "the splits \\['test'\\]; expected some of"),
        ({'split_counts': {}}, 'expected some of'),
        ({'split_counts': {'train': 0}}, 'at least 1 image'),
        ({'size': (63, 128)}, 'each at least 64 pixels'),
        ({'size': (128,)}, r'\(height, width\)'),
        ({'seed': -1}, 'expected 0 or more'),
        ({'difficulty': 'brutal'}, "'brutal'; expected one of \\['easy', 'hard', 'medium'\\]"),
        ({'difficulty': Difficulty(digits=(40, 40), scale=(0.9, 0.9), overlap=0.0)}, 'no place for .*fewer'),
    ],
)
def test_wrong_arguments(tmp_path, change, message):
    arguments = {'split_counts': {'train': 1}, 'size': (64, 64), **change}
    with pytest.raises(ValueError, match=message):
        generate(tmp_path / 'ds', **arguments)
    assert not list(tmp_path.iterdir())


def test_metainfo_refuses():
    with pytest.raises(ValueError, match='num_classes is 11'):
        metainfo(11)


# ------------------------------------------------------------------------------------------------------- tool


def test_tool(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location('digit_scenes_tool', TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    arguments = ['--out', str(tmp_path / 'ds'), '--train', '2', '--val', '0', '--size', '64', '80']
    tool.main([*arguments, '--num-classes', '7', '--digits', '1', '2'])
    assert '2 train images' in capsys.readouterr().out
    meta = json.loads((tmp_path / 'ds/meta.json').read_text())
    assert meta['parameters']['size'] == [64, 80]
    assert meta['parameters']['difficulty']['num_classes'] == 7
    assert meta['parameters']['difficulty']['digits'] == [1, 2]
    with pytest.raises(SystemExit, match='num_classes 7 instead of 10'):
        tool.main(arguments)
    tool.main([*arguments, '--overwrite'])
    assert 'was made' in capsys.readouterr().out
