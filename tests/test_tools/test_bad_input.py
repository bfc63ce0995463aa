"""Bad input to tools/train.py and tools/test.py: one clear sentence, and checkpoints stay as they were."""

import json
import os
import shutil

import mmcv
import pytest
import torch

from mmunireplknet.datasets.digit_scenes import generate as generate_scenes
from mmunireplknet.engine.launch import check_work_dir, load_config

from ..coco_stand_in import config, edit, generate
from .test_command_line import CONFIG, RUNS, options, run_tool

pytestmark = pytest.mark.slow

pytest.importorskip('mmdet.models')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    return generate(tmp_path_factory.mktemp('coco') / 'coco')


@pytest.fixture
def root(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / 'coco')


def train(root, *arguments, **changes):
    """What the tool says, and the work dir."""
    work_dir = root.parent / 'run'
    name = f'bad{next(RUNS)}'  # mmengine keeps visualizers and loggers by name for the life of a process
    values = {'visualizer.name': name, 'experiment_name': name, **changes}
    flags = ['--cfg-options', *(f'{key}={value}' for key, value in values.items())]
    file = config(root.parent / 'config.py', root)
    return run_tool('train.py', file, '--work-dir', work_dir, *arguments, *flags), work_dir


def one_sentence(message, *parts):
    assert isinstance(message, str)
    assert '\n' not in message
    assert 'Traceback' not in message
    for part in parts:
        assert str(part) in message
    return True


# --------------------------------------------------------------------------------- known before the training starts


def image(**values):
    return lambda content: content['images'][2].update(values)


def annotation(**values):
    return lambda content: content['annotations'][5].update(values)


BEFORE = {
    'missing image': (image(file_name='lost.jpg'), ['train2017/lost.jpg, image 3', 'does not exist; put it there']),
    'image of no size': (image(width=0), ['image 3 (000000000002.jpg) is 48 high and 0 wide; write the size']),
    'class id': (annotation(category_id=81), ['annotation 6 of 000000000002.jpg', 'category id 81', 'correct the id']),
    'mask': (
        annotation(segmentation=dict(size=[64, 48], counts=[0, 3072])),
        ['annotation 6 of 000000000002.jpg', 'a mask of 64 by 48 pixels', 'write its mask for the image'],
    ),
    'box': (annotation(bbox=[30, 30, -9, 5]), ['annotation 6 of 000000000002.jpg', 'negative size; expected [x, y']),
}


@pytest.mark.parametrize('name', BEFORE)
def test_annotation_files_are_read_before_the_training(root, name):
    damage, parts = BEFORE[name]
    file = edit(root, damage, 'train2017')
    work_dir = root.parent / 'run'
    work_dir.mkdir()
    (work_dir / 'iter_7.pth').write_bytes(b'from before')
    message, _ = train(root)
    one_sentence(message, file, *parts)
    assert [path.name for path in work_dir.iterdir()] == ['iter_7.pth'], 'nothing was started'
    assert (work_dir / 'iter_7.pth').read_bytes() == b'from before'


@pytest.mark.parametrize('tool', ['train.py', 'test.py'])
def test_the_data_of_evaluations_is_read_before_the_model_is_built(root, tool):
    file = edit(root, lambda content: content['annotations'][3].update(category_id=81), 'val2017')
    file_of_config, work_dir = config(root.parent / 'config.py', root), root.parent / 'run'
    if tool == 'train.py':
        with file_of_config.open('a') as lines:
            lines.write(
                "\nval_dataloader, val_evaluator, val_cfg = test_dataloader, test_evaluator, dict(type='ValLoop')"
            )
    (checkpoint := root.parent / 'some.pth').touch()
    flags = ['--work-dir', work_dir, '--cfg-options', 'model.backbone.zzz=1']  # an error where a model is built
    message = run_tool(tool, file_of_config, *([checkpoint] if tool == 'test.py' else []), *flags)
    one_sentence(message, file, 'annotation 4 of 000000000001.jpg', 'category id 81', 'correct the id')
    assert not work_dir.exists()


def test_the_annotations_that_a_validation_compares_with_are_looked_for(root):
    file = config(root.parent / 'config.py', root)
    with file.open('a') as lines:
        lines.write("\nval_dataloader, val_cfg = test_dataloader, dict(type='ValLoop')")
        lines.write("\nval_evaluator = dict(test_evaluator, ann_file='lost.json')\n")
    message = run_tool('train.py', file, '--work-dir', root.parent / 'run')
    one_sentence(message, 'lost.json, which CocoMetric of val_evaluator compares with', 'val_evaluator.ann_file=')
    assert not (root.parent / 'run').exists()


def test_an_image_file_without_content(root):
    path = root / 'train2017/000000000001.jpg'
    path.write_bytes(b'')
    message, work_dir = train(root)
    one_sentence(message, f'{path}, image 2 of', 'has no content; put it there, or remove it')
    assert not work_dir.exists()


def test_a_work_dir_that_cannot_be_written(root, tmp_path):
    (tmp_path / 'run').write_text('a file')
    message, work_dir = train(root)
    one_sentence(message, f'ConfigError: nothing can be written to {work_dir} (', '--work-dir')
    cfg = load_config(str(config(tmp_path / 'config.py', root)), {'default_hooks.checkpoint.out_dir': '/proc/nowhere'})
    cfg.work_dir = str(tmp_path / 'other')
    with pytest.raises(ValueError, match=r'nothing can be written to /proc/nowhere .*make it writable'):
        check_work_dir(cfg)
    assert os.listdir(tmp_path / 'other') == [], 'the trial leaves nothing behind'


@pytest.mark.parametrize(
    ('argument', 'parts'),
    [
        ('drop_path', ["takes no argument 'drop_path', did you mean drop_path_rate?"]),
        ('zzz', ["takes no argument 'zzz'; it takes arch, in_channels, "]),
    ],
)
def test_a_misspelt_backbone_argument(root, argument, parts):
    message, work_dir = train(root, **{f'model.backbone.{argument}': 0.1})
    one_sentence(message, 'ConfigError: UniRepLKNet in the config', *parts)
    assert not list(work_dir.glob('*.pth'))


def test_a_checkpoint_of_another_task(root, tmp_path):
    file = tmp_path / 'segmentor.pth'
    names = ('backbone.downsample_layers.0.0.weight', 'decode_head.conv_seg.weight')
    torch.save(dict(state_dict={name: torch.zeros(1) for name in names}, meta={}), file)
    message, work_dir = train(root, load_from=file)
    one_sentence(message, 'CheckpointError: the checkpoint is of another task', 'decode_head', 'Take the config of its')
    assert not list(work_dir.glob('*.pth'))


# ---------------------------------------------------------------------------- what mmdet leaves out: told, and trained


def test_a_box_of_no_size_and_an_image_without_boxes(root):
    def damage(content):
        content['annotations'][0]['bbox'][3] = 0
        del content['annotations'][6:]

    edit(root, damage)
    message, work_dir = train(root)
    assert message is None
    text = next(work_dir.glob('*/*.log')).read_text()
    assert 'annotation 1 of 000000000000.jpg has a box of 20 by 0 pixels, so mmdet leaves it out; correct it' in text
    assert '1 of 4 images have no box, the first is image 4 (000000000003.jpg)' in text
    assert (work_dir / 'iter_2.pth').exists()


# ------------------------------------------------------------------------- only known when an image is opened, or later


def checked(work_dir):
    """The checkpoint of the first iteration is whole, and the one to resume from."""
    assert [path.name for path in work_dir.glob('*.pth')] == ['iter_1.pth']
    checkpoint = torch.load(work_dir / 'iter_1.pth', weights_only=False)
    assert checkpoint['meta']['iter'] == 1
    assert all(torch.isfinite(value).all() for value in checkpoint['state_dict'].values())
    assert (work_dir / 'last_checkpoint').read_text() == str(work_dir / 'iter_1.pth')
    return True


@pytest.mark.parametrize('workers', [0, 1])
def test_a_corrupt_jpeg(root, workers):
    path = root / 'train2017/000000000003.jpg'
    path.write_bytes(path.read_bytes()[:2000])
    message, work_dir = train(root, **{'train_dataloader.num_workers': workers})
    one_sentence(message, f'SampleError: {path} (image id 4) cannot be loaded', 'LoadImageFromFile', 'repair it, or')
    assert checked(work_dir)


def test_a_corrupt_jpeg_after_a_switch_of_pipelines(root):
    """The second epoch cannot decode what the first could."""
    switch = dict(
        type='PipelineSwitchHook',
        switch_epoch=1,
        switch_pipeline=[dict(type='LoadImageFromFile', imdecode_backend='none'), dict(type='PackDetInputs')],
    )
    epochs = {'train_cfg': dict(type='EpochBasedTrainLoop', max_epochs=2), 'custom_hooks': [switch]}
    file = config(root.parent / 'config.py', root, **epochs)
    message = run_tool('train.py', file, '--work-dir', root.parent / 'run')
    one_sentence(message, f'SampleError: {root}/train2017/000000000000.jpg (image id 1) cannot be loaded', 'repair it')


def test_an_image_of_another_size_than_its_annotations(root):
    path = shutil.copy(root / 'val2017/000000000000.jpg', root / 'train2017/000000000003.jpg')

    def turned(content):
        content['images'][3].update(height=64, width=48)
        del content['annotations'][7]  # the mask with a size of its own

    edit(root, turned)
    message, work_dir = train(root)
    one_sentence(message, f'{path} (image id 4) is 48 by 64 pixels', 'annotations are for 64 by 48; write them for')
    assert checked(work_dir)


def test_a_loss_that_is_not_finite(root):
    message, work_dir = train(root, **{'optim_wrapper.optimizer.lr': 1e30, 'train_cfg.max_iters': 4})
    one_sentence(
        message, 'NonFiniteLossError: the loss of iteration 2 is not finite (loss nan', 'train2017/000000000002.jpg',
        work_dir / 'iter_1.pth', 'is kept, go on from it by --resume with a smaller learning rate',
    )  # fmt: skip
    assert checked(work_dir)


def test_the_hook_is_in_every_run(root):
    message, work_dir = train(root)
    assert message is None
    dumped = (work_dir / 'config.py').read_text()
    assert dumped.count("type='NonFiniteLossHook'") == 1
    records = next(work_dir.glob('*/vis_data/scalars.json')).read_text().splitlines()
    assert len([json.loads(line) for line in records]) == 2


@pytest.mark.parametrize('workers', [0, 1])
def test_a_mask_with_a_label_without_a_class(tmp_path, workers):
    """Of an mmseg data set: the first iteration trains, the second has it."""
    pytest.importorskip('mmseg.models')
    scenes, work_dir = tmp_path / 'digit_scenes', tmp_path / 'run'
    generate_scenes(scenes, dict(train=4, val=1), size=(64, 64))
    mask = sorted((scenes / 'annotations/training').glob('*.png'))[2]
    labels = mmcv.imread(str(mask), 'unchanged')
    labels[:2, :3] = 11
    mmcv.imwrite(labels, str(mask))
    changes = {'train_dataloader.sampler.shuffle': False, 'train_cfg.val_interval': 9, 'model.decode_head.channels': 8}
    changes |= {'model.decode_head.loss_decode.class_weight': None, 'train_dataloader.num_workers': workers}
    arguments = [CONFIG, '--work-dir', work_dir, *options(scenes, **changes)]
    message = run_tool('train.py', *arguments)
    one_sentence(
        message, f'SampleError: {scenes}/images/training/{mask.stem}.jpg with {mask} has the label 11 in 6 pixels',
        'but the 11 classes of decode_head have 0 to 10 and its ignore_index is 255; if 11 is no class, set ignore',
        'reduce_zero_label=True', 'metainfo=dict(classes=...)',
    )  # fmt: skip
    assert checked(work_dir)
    assert run_tool('train.py', *arguments, 'model.decode_head.ignore_index=11') is None
