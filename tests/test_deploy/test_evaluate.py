"""Evaluating exported models: the numbers of torch, and without the torch model."""

import json
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from onnx import numpy_helper

from mmunireplknet import UniRepLKNet
from mmunireplknet.deploy import evaluate as module
from mmunireplknet.deploy.evaluate import evaluate_exported, is_exported
from mmunireplknet.deploy.exportable import ExportError
from mmunireplknet.engine.launch import evaluate

from .. import coco_stand_in
from ..procedural import randomise
from ..test_tools.test_command_line import run_tool
from .tiny_onnx import MASKS, NAMES, PALETTE, classifier, detector, facts, segmentor

SIZE = (40, 56)  # height, width
MEAN_STD = dict(mean=[120.0, 110.0, 100.0], std=[60.0, 58.0, 56.0])
ARCH = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), kernel_sizes=((3,), (7,), (7,), (3,)))


INIT = UniRepLKNet.__init__


@pytest.fixture(autouse=True)
def no_torch_model(monkeypatch):
    """No backbone is built but by the tests that ask for it."""

    def refuse(*_, **__):
        raise AssertionError('the torch model was built')

    monkeypatch.setattr(UniRepLKNet, '__init__', refuse)


def loader(dataset):
    return dict(batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dataset)


# ------------------------------------------------------------------------------------- segmentation


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    """Images of one strong colour a pixel; half of the truth is another class."""
    root, rng = tmp_path_factory.mktemp('scenes'), np.random.RandomState(0)
    for number in range(3):
        colours = rng.randint(0, 3, (5, 7)).repeat(8, 0).repeat(8, 1)
        image = rng.randint(0, 90, (*SIZE, 3)) + 160 * np.eye(3, dtype=int)[colours]
        truth = np.where(rng.rand(*SIZE) < 0.3, rng.randint(0, 3, SIZE), colours)
        for folder, array in (('images', image[..., ::-1]), ('labels', truth)):
            (root / folder).mkdir(exist_ok=True)
            cv2.imwrite(str(root / folder / f'{number}.png'), array.astype(np.uint8))
    return root


def seg_config(scenes, **more):
    dataset = dict(
        type='BaseSegDataset',
        data_root=str(scenes),
        metainfo=dict(classes=list(NAMES), palette=PALETTE),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        img_suffix='.png',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(200, 72), keep_ratio=True),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
    )
    head = dict(
        type='FCNHead', in_channels=16, channels=8, in_index=3, num_classes=3, num_convs=1, concat_input=False,
        norm_cfg=dict(type='BN'), align_corners=False,
    )  # fmt: skip
    values = dict(
        custom_imports=dict(imports=['mmunireplknet']),
        launcher='none',
        default_scope='mmseg',
        model=dict(
            type='EncoderDecoder',
            data_preprocessor=dict(type='SegDataPreProcessor', bgr_to_rgb=True, **MEAN_STD),
            backbone=dict(type='UniRepLKNet', arch=ARCH),
            decode_head=head,
            test_cfg=dict(mode='whole'),
        ),
        test_dataloader=loader(dataset),
        test_evaluator=dict(type='IoUMetric', iou_metrics=['mIoU']),
        test_cfg=dict(type='TestLoop'),
    )
    return Config({**values, **more})


@pytest.mark.slow
def test_a_segmentor_scores_as_in_torch(scenes, tmp_path, monkeypatch):
    pytest.importorskip('mmseg.models')
    from mmunireplknet.deploy.exportable import make_exportable
    from mmunireplknet.deploy.formats import Options, write

    cfg = seg_config(scenes, work_dir=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(UniRepLKNet, '__init__', INIT)
        init_default_scope('mmseg')
        torch.manual_seed(0)
        model = randomise(MODELS.build(cfg.model))
        torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'train.pth')
        expected = evaluate(cfg.copy(), str(tmp_path / 'train.pth'))
        meta = facts('segmentation', ['logits'])
        (tmp_path / 'meta.json').write_text(json.dumps(meta))
        write('onnx', make_exportable(model, cfg), torch.randn(2, 3, 64, 96), tmp_path, Options(exporter='torchscript'))
    with pytest.raises(AssertionError, match='the torch model was built'):
        MODELS.build(cfg.model)
    assert 5 < expected['mIoU'] < 95
    for runtime in ('onnxruntime', 'openvino'):
        assert evaluate_exported(cfg.copy(), tmp_path, runtime, 1) == pytest.approx(expected, abs=0.02)

    exported = onnx.load(tmp_path / 'model.onnx')
    weight = next(w for w in exported.graph.initializer if w.dims[:1] == [3] and len(w.dims) == 4)  # the last layer
    values = numpy_helper.to_array(weight).copy()
    values[0] *= -30
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(exported, tmp_path / 'model.onnx')
    assert abs(evaluate_exported(cfg.copy(), tmp_path)['mIoU'] - expected['mIoU']) > 1


@pytest.mark.slow
def test_a_single_logit_has_its_threshold(scenes, tmp_path, monkeypatch):
    pytest.importorskip('mmseg.models')
    from mmunireplknet.deploy.exportable import make_exportable
    from mmunireplknet.deploy.formats import Options, write

    cfg = seg_config(scenes, work_dir=str(tmp_path))
    cfg.visualizer = dict(type='SegLocalVisualizer', name='single-logit')
    cfg.model.decode_head.update(
        num_classes=2, out_channels=1, threshold=0.6, loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True)
    )
    cfg.test_dataloader.dataset.metainfo = dict(classes=['sky', 'tree'], palette=PALETTE[:2])
    with monkeypatch.context() as patch:
        patch.setattr(UniRepLKNet, '__init__', INIT)
        init_default_scope('mmseg')
        model = randomise(MODELS.build(cfg.model))
        torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'train.pth')
        expected = evaluate(cfg.copy(), str(tmp_path / 'train.pth'))
        for argmax, name in ((False, 'logits'), (True, 'labels')):
            folder = tmp_path / name
            folder.mkdir()
            meta = {**facts('segmentation', [name]), 'classes': ['sky', 'tree']}
            (folder / 'meta.json').write_text(json.dumps(meta))
            exportable = make_exportable(model, cfg, argmax=argmax)
            write('onnx', exportable, torch.randn(2, 3, 64, 96), folder, Options(exporter='torchscript'))
    assert 5 < expected['mIoU'] < 95
    assert evaluate_exported(cfg.copy(), tmp_path / 'logits', threads=1) == pytest.approx(expected, abs=0.05)
    # Labels are enlarged as they are, not as logits: the edges differ a little.
    assert evaluate_exported(cfg.copy(), tmp_path / 'labels', threads=1)['aAcc'] == pytest.approx(
        expected['aAcc'], abs=2
    )


@pytest.mark.slow
def test_every_format_is_evaluated(scenes, tmp_path):
    """The same network in each: the metrics of the ONNX file."""
    pytest.importorskip('mmseg.models')
    openvino = pytest.importorskip('openvino')

    class Colours(torch.nn.Module):
        def forward(self, image):
            return (torch.nn.functional.interpolate(image[:, :, ::2, ::2], image.shape[2:], mode='bilinear'),)

    folder, image = segmentor(tmp_path / 'model'), torch.randn(1, 3, 64, 96)
    torch.jit.save(torch.jit.trace(Colours(), image), folder / 'model.torchscript.pt')
    sizes = ({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(Colours(), (image,), dynamic_shapes=sizes), folder / 'model.pt2')
    openvino.save_model(openvino.convert_model(folder / 'model.onnx'), folder / 'model.xml')
    expected = evaluate_exported(seg_config(scenes), folder)
    assert 60 < expected['aAcc'] < 99
    for name in ('model.xml', 'model.torchscript.pt', 'model.pt2'):
        assert evaluate_exported(seg_config(scenes), folder / name, threads=1) == pytest.approx(expected, abs=0.1), name
        if name != 'model.xml':
            with pytest.raises(ExportError, match=f'openvino cannot run {name}'):
                evaluate_exported(seg_config(scenes), folder / name, 'openvino')
            (folder / name).write_bytes(b'nothing')
            with pytest.raises(ExportError, match=f'torch cannot open .*{name}'):
                evaluate_exported(seg_config(scenes), folder / name)


@pytest.mark.slow
def test_the_tool_writes_the_metrics(scenes, tmp_path, capsys):
    pytest.importorskip('mmseg.models')
    config = tmp_path / 'config.py'
    seg_config(scenes).dump(config)
    folder = segmentor(tmp_path / 'model')
    assert run_tool('test.py', config, folder / 'model.onnx', '--metrics', tmp_path / 'metrics.json') is None
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert 60 < metrics['aAcc'] < 99  # about 80 percent of the truth is what one sees
    assert json.loads(capsys.readouterr().out.partition('{')[2].join('{ ')) == metrics
    assert 'are for checkpoints' in run_tool('test.py', config, folder, '--tta')
    (tmp_path / 'iter_1.pth').touch()
    assert '--threads are for exported' in run_tool('test.py', config, tmp_path / 'iter_1.pth', '--threads', 1)
    assert 'one of mmdet' in run_tool('test.py', config, folder, '--cfg-options', 'default_scope=mmdet')


@pytest.mark.slow
def test_wrong_models_are_refused(scenes, tmp_path, monkeypatch):
    pytest.importorskip('mmseg.models')
    folder = segmentor(tmp_path / 'model')

    def message(cfg=None, name=folder, runtime=None):
        with pytest.raises(ExportError) as error:
            evaluate_exported(cfg or seg_config(scenes), name, runtime)
        return str(error.value)

    assert 'does classification, the config' in message(name=classifier(tmp_path / 'classifier'))
    other = seg_config(scenes)
    other.test_dataloader.dataset.metainfo = dict(classes=['sky', 'bush', 'road'], palette=PALETTE)
    assert "the first difference is at 1: 'tree' and 'bush'" in message(other)
    other.test_dataloader.dataset.metainfo = dict(classes=['sky', 'tree'], palette=PALETTE[:2])
    assert "3 classes and the test data 2; the first difference is at 2: 'road' and nothing" in message(other)
    assert 'takes 32x32 alone' in message(name=segmentor(tmp_path / 'fixed', shape=(1, 3, 32, 32)))
    assert 'takes 2 images at once' in message(name=segmentor(tmp_path / 'two', shape=(2, 3, None, None)))
    assert 'there is no' in message(name=folder / 'model.xml')
    (folder / 'model.xml').write_text('')
    assert 'onnxruntime cannot run model.xml' in message(name=folder / 'model.xml', runtime='onnxruntime')
    with monkeypatch.context() as patch:
        patch.setattr(module, 'find_spec', lambda name: None)
        assert 'needs onnxruntime, which is not installed' in message()
        assert 'needs openvino, which is not installed' in message(runtime='openvino')
    (folder / 'model.onnx').write_text('no model')
    assert 'onnxruntime cannot open' in message()
    (folder / 'model.onnx').unlink()
    assert 'there is no' in message()
    (folder / 'meta.json').write_text('{"format": 1}')
    assert 'lacks file, input, outputs, preprocess, task, thresholds' in message()
    (folder / 'meta.json').write_text('[]')
    assert 'meta.json cannot be used' in message()


def test_what_counts_as_exported(tmp_path):
    assert not is_exported(str(tmp_path))
    (tmp_path / 'meta.json').write_text('{}')
    assert is_exported(str(tmp_path))
    assert all(map(is_exported, ['model.onnx', 'a/model.xml', 'model.torchscript.pt', 'model.pt2']))
    assert not any(map(is_exported, ['iter_1.pth', 'unireplknet_a_in1k', 'a.pt', 'model.safetensors']))


# ------------------------------------------------------------------------------------- detection


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    return coco_stand_in.generate(tmp_path_factory.mktemp('coco'), val=1)


def det_config(coco, metric=('bbox', 'segm'), **more):
    annotations = f'{coco}/{coco_stand_in.FILE.format("val2017")}'
    dataset = dict(
        type='CocoDataset',
        data_root=f'{coco}/',
        ann_file=annotations,
        data_prefix=dict(img='val2017/'),
        test_mode=True,
        metainfo=dict(classes=list(coco_stand_in.NAMES)),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(96, 96), keep_ratio=True),  # by 1.5
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
        ],
    )
    values = dict(
        custom_imports=dict(imports=['mmunireplknet']),
        default_scope='mmdet',
        model=dict(
            data_preprocessor=dict(type='DetDataPreprocessor', bgr_to_rgb=True, pad_size_divisor=32, **MEAN_STD)
        ),
        test_dataloader=loader(dataset),
        test_evaluator=dict(type='CocoMetric', ann_file=annotations, metric=list(metric)),
    )
    return Config({**values, **more})


def truth(shift=0.0):
    """The truth as a detector's output, in pixels of the input."""
    boxes = np.float32([[4 + n + shift, 6, 24 + n + shift, 30] for n in range(2)]) * 1.5
    dets = np.concatenate([boxes, np.float32([[0.9], [0.8]])], 1)
    return dict(dets=dets, labels=np.int64([0, 1]), probabilities=np.ones((2, 28, 28), np.float32))


def coco_folder(path, **options):
    folder = detector(path, **options)
    meta = json.loads((folder / 'meta.json').read_text())
    (folder / 'meta.json').write_text(json.dumps({**meta, 'classes': list(coco_stand_in.NAMES)}))
    return folder


@pytest.mark.slow
def test_boxes_and_masks(coco, tmp_path):
    pytest.importorskip('mmdet.models')
    right = evaluate_exported(det_config(coco), coco_folder(tmp_path / 'right', **truth()))
    assert (right['coco/bbox_mAP'], right['coco/segm_mAP']) == (1, 1)
    moved = evaluate_exported(det_config(coco), coco_folder(tmp_path / 'moved', **truth(shift=2)))
    assert 0 < moved['coco/bbox_mAP'] < 1
    assert 0 < moved['coco/segm_mAP'] < 1
    half = {**truth(), 'probabilities': MASKS[:2]}
    half = evaluate_exported(det_config(coco), coco_folder(tmp_path / 'half', **half))
    assert half['coco/bbox_mAP'] == 1
    assert half['coco/segm_mAP'] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(('divisor', 'shape'), [(1, (1, 3, 72, 96)), (32, (1, 3, 96, 96))])
def test_padding_is_as_meta_says(coco, tmp_path, monkeypatch, divisor, shape):
    """Exported detectors pad by themselves, so that they know where the image ends."""
    pytest.importorskip('mmdet.models')
    seen, outputs = [], [np.concatenate([truth()['dets']])[None], truth()['labels'][None], MASKS[None, :2]]
    monkeypatch.setattr(module, 'open_exported', lambda *_, **__: lambda image: seen.append(image) or outputs)
    evaluate_exported(det_config(coco), coco_folder(tmp_path / 'model', size_divisor=divisor, pad_value=7))
    assert [image.shape for image in seen] == [shape]
    assert (seen[0][:, :, 72:] == 7).all()
    assert not (seen[0][:, :, :72] == 7).any()


@pytest.mark.slow
def test_torch_formats_of_detectors_get_their_operators(coco, tmp_path, monkeypatch):
    """Their graphs call torchvision's NMS and RoIAlign, which torch knows only when they have been declared."""
    pytest.importorskip('mmdet.models')
    outputs = [torch.from_numpy(value)[None] for value in truth().values()]
    folder, called = coco_folder(tmp_path / 'model', **truth()), []

    class Same(torch.nn.Module):
        def forward(self, image):
            return tuple(out + (0 * image.sum()).to(out.dtype) for out in outputs)

    torch.jit.save(torch.jit.trace(Same(), torch.zeros(1, 3, 64, 64)), folder / 'model.torchscript.pt')
    monkeypatch.setattr(module, 'ensure_detection_operators', lambda: called.append(True))
    assert evaluate_exported(det_config(coco), folder / 'model.torchscript.pt')['coco/bbox_mAP'] == 1
    assert called


@pytest.mark.slow
def test_boxes_alone_and_nothing(coco, tmp_path):
    pytest.importorskip('mmdet.models')
    folder = coco_folder(tmp_path / 'boxes', masks=False, **{k: v for k, v in truth().items() if k != 'probabilities'})
    with pytest.raises(ExportError, match='gives boxes alone'):
        evaluate_exported(det_config(coco), folder)
    assert evaluate_exported(det_config(coco, ['bbox']), folder)['coco/bbox_mAP'] == 1
    nothing = {name: value[:0] for name, value in truth().items()}
    assert not evaluate_exported(det_config(coco), coco_folder(tmp_path / 'nothing', **nothing))


# ------------------------------------------------------------------------------------- classification


@pytest.mark.slow
def test_a_classifier(scenes, tmp_path):
    pytest.importorskip('mmpretrain.models')
    for number, image in enumerate(([255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 0, 0])):
        cv2.imwrite(str(tmp_path / f'{number}.png'), np.full((8, 8, 3), image[::-1], np.uint8))
    Path(tmp_path, 'list.txt').write_text('0.png 0\n1.png 1\n2.png 2\n3.png 1\n')
    dataset = dict(
        type='CustomDataset',
        data_root='',
        data_prefix=str(tmp_path),
        ann_file=str(tmp_path / 'list.txt'),
        metainfo=dict(classes=list(NAMES)),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
    )
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            model=dict(),
            data_preprocessor=dict(num_classes=3, to_rgb=True, **MEAN_STD),
            test_dataloader=dict(**loader(dataset), collate_fn=dict(type='default_collate')),
            test_evaluator=dict(type='Accuracy', topk=(1, 2)),
        )
    )
    metrics = evaluate_exported(cfg.copy(), classifier(tmp_path / 'model'))
    assert metrics['accuracy/top1'] == 75  # the last is red and called green
    cfg.data_preprocessor.to_rgb = False
    assert evaluate_exported(cfg, tmp_path / 'model')['accuracy/top1'] == 25
