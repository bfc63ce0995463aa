"""A detector exported by tools/export.py and tested by tools/test.py finds what the checkpoint finds."""

import json
import pickle

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from mmunireplknet.engine.launch import load_config

from .. import coco_stand_in, imagenet_stand_in
from ..procedural import randomise
from ..test_tools.test_command_line import run_tool

pytestmark = pytest.mark.slow
pytest.importorskip('mmdet.models')


def found(name, tmp_path, config, *options):
    """Predictions of tools/test.py, by image."""
    file = tmp_path / f'{name}.pkl'
    arguments = ['--out', file, '--work-dir', tmp_path / name, '--cfg-options', f'visualizer.name=end-to-end-{name}']
    assert run_tool('test.py', config, *options, *arguments) is None
    return {sample['img_id']: sample['pred_instances'] for sample in pickle.loads(file.read_bytes())}


def test_detector(tmp_path):
    root = coco_stand_in.generate(tmp_path / 'coco')
    config = coco_stand_in.config(tmp_path / 'config.py', root)
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(96, 96), keep_ratio=True),
        dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
    ]
    config.write_text(f"{config.read_text()}\ntest_dataloader['dataset']['pipeline'] = {pipeline!r}\n")
    cfg = load_config(str(config))
    init_default_scope(cfg.default_scope)
    model = randomise(MODELS.build(cfg.model))
    checkpoint = tmp_path / 'model.pth'
    meta = dict(dataset_meta=dict(classes=coco_stand_in.NAMES))
    torch.save(dict(meta=meta, state_dict=model.state_dict()), checkpoint)
    assert run_tool('export.py', config, checkpoint, tmp_path / 'out', '--seconds', 0) is None
    # 72 rows, which mmdet pads, and the graph too: it takes the size of what it is given for that of the image.
    assert 72 % cfg.model.data_preprocessor.pad_size_divisor
    assert json.loads((tmp_path / 'out' / 'meta.json').read_text())['preprocess']['size_divisor'] == 1
    expected = found('torch', tmp_path, config, checkpoint)
    exported = found('onnx', tmp_path, config, tmp_path / 'out')
    assert expected.keys() == exported.keys()
    for image, there in expected.items():
        assert len(there['labels']) > 0
        here = exported[image]
        assert torch.equal(here['labels'], there['labels'])
        assert torch.allclose(here['scores'], there['scores'], atol=1e-4)
        assert torch.allclose(here['bboxes'], there['bboxes'], atol=1e-2)
        assert (here['masks'] != there['masks']).float().mean() < 1e-3


def test_classifier(tmp_path):
    """UniRepLKNet-A by its ImageNet config."""
    pytest.importorskip('mmpretrain.models')
    data = imagenet_stand_in.generate(tmp_path / 'imagenet', train=1)
    config = imagenet_stand_in.shrunk(tmp_path / 'config.py', data, model=dict(head=dict(num_classes=3)))
    cfg = load_config(str(config))
    init_default_scope(cfg.default_scope)
    model = randomise(MODELS.build({**cfg.model, 'data_preprocessor': cfg.data_preprocessor}))
    assert model.backbone.arch.depths == (2, 2, 6, 2)
    checkpoint = tmp_path / 'model.pth'
    torch.save(
        dict(meta=dict(dataset_meta=dict(classes=['one', 'two', 'three'])), state_dict=model.state_dict()), checkpoint
    )
    assert (
        run_tool('export.py', config, checkpoint, tmp_path / 'out', '--exporter', 'torchscript', '--seconds', 0) is None
    )
    scores, top1 = {}, {}
    for name, tested in (('torch', checkpoint), ('onnx', tmp_path / 'out' / 'model.onnx')):
        out, metrics = tmp_path / f'{name}.pkl', tmp_path / f'{name}.json'
        arguments = ['--out', out, '--metrics', metrics, '--work-dir', tmp_path / name]
        assert run_tool('test.py', config, tested, *arguments, '--cfg-options', f'visualizer.name=top1-{name}') is None
        top1[name] = json.loads(metrics.read_text())['accuracy/top1']
        scores[name] = torch.stack([sample['pred_score'] for sample in pickle.loads(out.read_bytes())])
    assert top1['onnx'] == top1['torch']
    assert torch.equal(scores['onnx'].argmax(1), scores['torch'].argmax(1))
    assert float(scores['torch'].std(0).max()) > 1e-3, 'the images are all alike to it'
    assert torch.allclose(scores['onnx'], scores['torch'], atol=1e-5)
