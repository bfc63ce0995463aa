"""Full-model files as mmdet 2.28 and mmseg 0.27 wrote them, by every way into the models of today."""

import copy
import functools
import re
from pathlib import Path

import mmengine
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from mmunireplknet import CheckpointError, UniRepLKNet, load_checkpoint, switch_to_deploy
from mmunireplknet.engine.launch import prepare_training
from mmunireplknet.models import CHECKPOINTS
from mmunireplknet.models.checkpoint import check_full
from mmunireplknet.models.layouts import drop_ema_copies

from . import published_files
from .published_files import VARIANTS, cascade_mask_rcnn, file_of, payload, upernet

CONFIGS = Path(__file__).parents[2] / 'configs'
SMALL = dict(cascade=dict(width=16, fc=32, classes=3), upernet=dict(width=16, auxiliary=8, classes=4))
SHAPES = dict(cascade=cascade_mask_rcnn('a', **SMALL['cascade']), upernet=upernet('a', **SMALL['upernet']))


@functools.cache
def read(file):
    return Config.fromfile(file)


def detector_config(arch='a', width=256, fc=1024, classes=80):
    """Cascade Mask R-CNN with the published heads, on mmdet's own config."""
    mmdet = pytest.importorskip('mmdet.models')
    folder = Path(mmdet.__file__).parents[1] / '.mim' / 'configs' / 'cascade_rcnn'
    cfg = copy.deepcopy(read(folder / 'cascade-mask-rcnn_r50_fpn_1x_coco.py'))
    norm = dict(type='SyncBN')
    cfg.model.backbone = dict(type='UniRepLKNet', arch=arch, norm_cfg=norm)
    cfg.model.neck.update(in_channels=[VARIANTS[arch][1] * 2**i for i in range(4)], out_channels=width)
    cfg.model.rpn_head.update(in_channels=width, feat_channels=width)
    roi = cfg.model.roi_head
    roi.bbox_roi_extractor.out_channels = roi.mask_roi_extractor.out_channels = width
    roi.mask_head.update(in_channels=width, conv_out_channels=width, num_classes=classes)
    for head in roi.bbox_head:
        head.update(
            type='ConvFCBBoxHead', num_shared_convs=4, num_shared_fcs=1, in_channels=width, conv_out_channels=width,
            fc_out_channels=fc, num_classes=classes, norm_cfg=norm, reg_class_agnostic=False, reg_decoded_bbox=True,
        )  # fmt: skip
    cfg.custom_imports = dict(imports=['mmunireplknet'], allow_failed_imports=False)
    return cfg


def segmentor_config(arch='a', width=512, auxiliary=256, classes=150):
    pytest.importorskip('mmseg.models')
    cfg = copy.deepcopy(read(CONFIGS / f'upernet_unireplknet_{arch}_ade20k.py'))
    cfg.model.backbone.init_cfg = None
    cfg.model.decode_head.update(channels=width, num_classes=classes)
    cfg.model.auxiliary_head.update(channels=auxiliary, num_classes=classes)
    return cfg


def config(kind):
    return (detector_config if kind == 'cascade' else segmentor_config)(**SMALL[kind])


def build(cfg):
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


def assert_weights(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys()
    assert [name for name in own if not torch.equal(own[name], state[name])] == []


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Both kinds of file, with EMA copies as in the published T, L and XL of COCO, and the weights they must give."""
    folder = tmp_path_factory.mktemp('published')
    made = {kind: (folder / f'{kind}.pth', file_of(folder / f'{kind}.pth', SHAPES[kind], ema=True)) for kind in SMALL}
    assert b'numpy.core.multiarray' in made['cascade'][0].read_bytes()
    return made


# ------------------------------------------------------------------------------------------ the hand-kept names


@pytest.mark.parametrize(
    ('shapes', 'ema', 'size'),
    [
        # Exact sizes of the files at huggingface.co/DingXiaoH/UniRepLKNet.
        (cascade_mask_rcnn('s'), False, 1_367_279_898),
        (cascade_mask_rcnn('b'), False, 1_877_455_322),
        (cascade_mask_rcnn('l'), True, 4_436_070_529),
        (upernet('s'), False, 1_059_007_590),
        (upernet('b'), False, 1_593_070_822),
        (upernet('l'), False, 3_089_851_942),
        (upernet('xl'), False, 5_158_177_518),
    ],
    ids=['coco-s', 'coco-b', 'coco-l', 'ade-s', 'ade-b', 'ade-l', 'ade-xl'],
)
def test_names_account_for_the_size_of_the_published_file(shapes, ema, size):
    """What is left of the file is its zip and pickle records, some hundred bytes a tensor: no entry is forgotten."""
    trained = sum(not published_files.is_buffer(name) for name in shapes)
    tensors = len(shapes) * (2 if ema else 1) + 2 * trained
    assert 300 < (size - payload(shapes, ema)) / tensors < 420


@pytest.mark.parametrize(
    ('cfg', 'shapes'),
    [(detector_config, cascade_mask_rcnn), (segmentor_config, upernet)],
    ids=['cascade', 'upernet'],
)
def test_full_size(cfg, shapes):
    """Variant T with its real channels and classes: the names and shapes are those of our model, none more or less."""
    with torch.device('meta'):
        model = build(cfg('t'))
        state = {name: torch.empty(shape) for name, shape in shapes('t').items()}
    check_full(model, state)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == shapes('t')


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name, entry in CHECKPOINTS.items() if entry.task != 'classification'])
def test_published_configs_fit_the_published_names(name):
    """The config of every published detector and segmentor, in full size."""
    entry = CHECKPOINTS[name]
    pytest.importorskip('mmdet.models' if entry.task == 'detection' else 'mmseg.models')
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    cfg.model.backbone.init_cfg = None
    shapes = (cascade_mask_rcnn if entry.task == 'detection' else upernet)(entry.arch)
    with torch.device('meta'):
        model = build(cfg)
        check_full(model, {name: torch.empty(shape) for name, shape in shapes.items()})


# ------------------------------------------------------------------------------------------ ways in


@pytest.mark.parametrize('kind', SMALL)
def test_load_checkpoint(files, kind):
    file, state = files[kind]
    model = build(config(kind))
    report = load_checkpoint(model, file)
    assert_weights(model, state)
    assert report['missing'] == []
    assert len(report['unexpected']) == len(state), 'the EMA copies, and nothing else'


@pytest.mark.slow
@pytest.mark.parametrize('kind', SMALL)
@pytest.mark.parametrize('ema_hook', [False, True])
def test_load_from(files, kind, ema_hook, tmp_path, caplog):
    """As tools/train.py does it: nothing missing, nothing unexpected, and one line about the EMA copies."""
    file, state = files[kind]
    cfg = config(kind)
    cfg.update(work_dir=str(tmp_path), load_from=str(file), log_level='INFO', experiment_name=f'{kind}{ema_hook}')
    cfg.visualizer.name = f'{kind}{ema_hook}'
    if ema_hook:
        cfg.custom_hooks = [dict(type='EMAHook', momentum=1e-4, update_buffers=True)]
    prepare_training(cfg)
    runner = Runner.from_cfg(cfg)
    runner.logger.addHandler(caplog.handler)
    runner.call_hook('before_run')
    runner.load_or_resume()
    assert_weights(runner.model, state)
    lines = [record.getMessage() for record in caplog.records]
    assert not [line for line in lines if 'do not match exactly' in line]
    assert f'{file}: left out {len(state)} ema_* copies; the plain entries are the averages' in lines
    if ema_hook:
        average = next(hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook').ema_model.module
        assert_weights(average, state)


@pytest.mark.parametrize('kind', SMALL)
def test_init_cfg(files, kind):
    """Of the whole model, by mmengine, and of the backbone, by us."""
    file, state = files[kind]
    cfg = config(kind)
    cfg.model.init_cfg = dict(type='Pretrained', checkpoint=str(file))
    model = build(cfg)
    model.init_weights()
    assert_weights(model, state)
    cfg = config(kind)
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(file))
    model = build(cfg)
    model.init_weights()
    assert_weights(model.backbone, {k[9:]: v for k, v in state.items() if k.startswith('backbone.')})


def test_inference_functions(files):
    """mmdet's and mmseg's own, which read the classes of mmcv 1's meta; both load non-strictly."""
    mmdet, mmseg = pytest.importorskip('mmdet.apis'), pytest.importorskip('mmseg.apis')
    for kind, init in (('cascade', mmdet.init_detector), ('upernet', mmseg.init_model)):
        file, state = files[kind]
        model = init(config(kind), str(file), device='cpu')
        assert_weights(model, state)
        assert tuple(model.dataset_meta['classes']) == ('cat', 'dog')


def test_deploy_form(files, tmp_path):
    """A published file into a model in deploy form: refused by every way, and right after conversion."""
    file, _ = files['upernet']
    cfg = config('upernet')
    model = build(cfg)
    load_checkpoint(model, file)
    switch_to_deploy(model.eval())
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'deploy.pth')
    cfg.model.backbone.deploy = True
    for load in (load_checkpoint, lambda m, f: mmengine.runner.load_checkpoint(m, str(f))):
        with pytest.raises(
            CheckpointError, match='UniRepLKNet-A in training form, but the model is UniRepLKNet-A in d'
        ):
            load(build(cfg), file)
    deployed = build(cfg)
    load_checkpoint(deployed, tmp_path / 'deploy.pth')
    assert_weights(deployed, model.state_dict())


# ------------------------------------------------------------------------------------------ wrong files


def classification_file(path):
    return file_of(path, published_files.classifier('a', 10))


def through_load_from(cfg, file, tmp_path):
    cfg.update(work_dir=str(tmp_path), load_from=str(file), log_level='ERROR', experiment_name=tmp_path.name)
    cfg.visualizer.name = tmp_path.name
    prepare_training(cfg)
    Runner.from_cfg(cfg).load_or_resume()


def through_load_checkpoint(cfg, file, tmp_path):
    load_checkpoint(build(cfg), file)


@pytest.mark.slow
@pytest.mark.parametrize('through', [through_load_from, through_load_checkpoint])
@pytest.mark.parametrize(
    ('model', 'given'), [('cascade', 'upernet'), ('upernet', 'cascade'), ('upernet', 'classifier')]
)
def test_another_task(files, model, given, through, tmp_path):
    file = tmp_path / 'classifier.pth'
    if given == 'classifier':
        classification_file(file)
    else:
        file = files[given][0]
    tasks = dict(cascade='detection', upernet='segmentation', classifier='classification')
    with pytest.raises(CheckpointError) as caught:
        through(config(model), file, tmp_path)
    message = str(caught.value).removeprefix(f'{file}: ')
    assert message.startswith(f'the checkpoint is of another task: it holds {tasks[given]} weights (backbone, ')
    assert f'but the model is for {tasks[model]} (backbone' in message
    assert 'model.backbone.init_cfg' in message
    assert '\n' not in message
    assert len(message) < 400


@pytest.mark.parametrize('through', [through_load_from, through_load_checkpoint])
def test_another_variant(tmp_path, through):
    with torch.device('meta'):
        names = upernet('t', **SMALL['upernet'])
    zero = torch.zeros(())
    torch.save(dict(state_dict={k: zero.expand(shape) for k, shape in names.items()}), tmp_path / 't.pth')
    with pytest.raises(
        CheckpointError, match='holds UniRepLKNet-T in training form, but the model is UniRepLKNet-A in'
    ):
        through(config('upernet'), tmp_path / 't.pth', tmp_path)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda s: s.pop('roi_head.bbox_head.2.fc_reg.bias'),
            'missing roi_head.bbox_head.2.fc_reg.bias; unexpected none',
        ),
        (lambda s: s.update({'roi_head.semantic_head.x': torch.ones(1)}), 'unexpected roi_head.semantic_head.x'),
        (lambda s: s.update({'ema_step': torch.ones(1)}), 'missing none; unexpected ema_step'),
        (lambda s: s.update({'rpn_head.rpn_cls.bias': torch.ones(9)}), 'of another shape rpn_head.rpn_cls.bias'),
    ],
    ids=['missing', 'unexpected', 'nobodys copy', 'shape'],
)
def test_file_that_does_not_fit(files, change, message):
    _, state = files['cascade']
    state = dict(state)
    change(state)
    with torch.device('meta'):
        model = build(config('cascade'))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        check_full(model, state)


def test_file_of_mmcv_1_cannot_be_resumed(files, tmp_path):
    """Its optimizer state belongs to other parameter groups, and it lacks the state of the run."""
    cfg = config('upernet')
    cfg.update(work_dir=str(tmp_path), log_level='ERROR', experiment_name='resume')
    cfg.visualizer.name = 'resume'
    prepare_training(cfg, resume=str(files['upernet'][0]))
    runner = Runner.from_cfg(cfg)
    with pytest.raises(
        CheckpointError, match=r'holds meta, state_dict, optimizer, but .* --cfg-options load_from=FILE'
    ):
        runner.load_or_resume()


def test_classifier_by_load_from(tmp_path):
    """A published classification file into an ImageClassifier; mmengine alone does not find its names."""
    pytest.importorskip('mmpretrain.models')
    state = classification_file(tmp_path / 'cls.pth')
    torch.save(state, tmp_path / 'raw.pth')
    model = dict(
        type='ImageClassifier',
        backbone=dict(type='UniRepLKNet', arch='a', out_indices=(3,), gap_before_final_norm=True),
        head=dict(type='LinearClsHead', num_classes=10, in_channels=320),
    )
    visualizer = dict(type='Visualizer', name=tmp_path.name)
    cfg = Config(dict(model=model, default_scope='mmpretrain', train_cfg=None, visualizer=visualizer))
    cfg.update(work_dir=str(tmp_path), load_from=str(tmp_path / 'raw.pth'), log_level='ERROR')
    prepare_training(cfg)
    runner = Runner.from_cfg(cfg)
    runner.load_or_resume()
    expected = {k.replace('head.', 'head.fc.') if 'head.' in k else f'backbone.{k}': v for k, v in state.items()}
    assert_weights(runner.model, expected)


# ------------------------------------------------------------------------------------------ EMA copies


def test_only_copies_are_dropped():
    state = {'a.b_c.weight': 1, 'ema_a_b_c_weight': 2, 'ema_other': 3, 'ema_model.a.weight': 4}
    assert drop_ema_copies(state) == ['ema_a_b_c_weight']
    assert state == {'a.b_c.weight': 1, 'ema_other': 3, 'ema_model.a.weight': 4}


def test_ema_copies_are_not_the_weights(files):
    """The stand-in is a test of this at all: raw and averaged weights differ everywhere."""
    file, state = files['cascade']
    stored = torch.load(file, weights_only=False)
    assert isinstance(stored['meta']['hook_msgs']['best_score'], np.float64)
    assert next(iter(stored['state_dict'])).startswith('ema_')
    for name, value in state.items():
        assert torch.equal(stored['state_dict'][f'ema_{name.replace(".", "_")}'], value + 1)
    assert isinstance(build(config('cascade')).backbone, UniRepLKNet)
