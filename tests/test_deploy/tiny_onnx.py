"""Exported folders made by hand, of every task, with small networks of fixed weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mmunireplknet.deploy import run

NAMES = ('sky', 'tree', 'road')
PALETTE = [[0, 0, 255], [0, 255, 0], [128, 64, 128]]
# In pixels of the input. The second box leaves the image to the right, the third has a low score.
DETS = np.float32([[10, 8, 34, 40, 0.9], [40, 20, 100, 60, 0.5], [0, 0, 8, 8, 0.1]])
LABELS = np.int64([1, 2, 0])
MASKS = np.tile(np.float32(np.arange(28) < 14), (3, 28, 1))  # the left half
KINDS = dict(labels=TensorProto.INT64)
RULES = dict(mean=[120.0, 110.0, 100.0], std=[60.0, 58.0, 56.0], size_divisor=1, pad_value=0, center_crop=None)


def facts(task, outputs, resize=None, shape=(None, 3, None, None), **rules):
    """meta.json."""
    return dict(
        format=1,
        task=task,
        config='tiny.py',
        file='model.onnx',
        input=dict(name='input', dtype='float32', layout='NCHW', shape=list(shape), channels='RGB'),
        preprocess={**RULES, 'resize': resize or dict(mode='none'), **rules},
        outputs=[dict(name=name, shape=[], meaning='') for name in outputs],
        classes=list(NAMES),
        palette=PALETTE,
        thresholds=dict(score=0.05, mask=0.5),
        opset=18,
    )


def folder(path, meta, nodes, constants, ranks):
    """Write the folder of an export: model.onnx, meta.json and run.py; returns it."""
    path = Path(path)
    path.mkdir(parents=True)
    graph = helper.make_graph(
        nodes,
        'tiny',
        [helper.make_tensor_value_info('input', TensorProto.FLOAT, [n or 'any' for n in meta['input']['shape']])],
        [
            helper.make_tensor_value_info(name, KINDS.get(name, TensorProto.FLOAT), [None] * n)
            for name, n in ranks.items()
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path / 'model.onnx')
    (path / 'meta.json').write_text(json.dumps(meta))
    shutil.copy(run.__file__, path)
    return path


def segmentor(path, weight=None, **more):
    """The class of a pixel is the largest of its red, green and blue, at half the resolution."""
    weight = np.eye(3, dtype=np.float32)[..., None, None] if weight is None else weight
    nodes = [
        helper.make_node('Conv', ['input', 'weight'], ['half'], strides=[2, 2], kernel_shape=[1, 1]),
        helper.make_node('Shape', ['half'], ['front'], end=2),
        helper.make_node('Shape', ['input'], ['back'], start=2),
        helper.make_node('Concat', ['front', 'back'], ['sizes'], axis=0),
        helper.make_node('Resize', ['half', '', '', 'sizes'], ['logits'], mode='linear'),
    ]
    meta = facts('segmentation', ['logits'], **more)
    return folder(path, meta, nodes, dict(weight=weight), dict(logits=4))


def classifier(path, weight=None, **more):
    """The logits are the means of red, green and blue."""
    weight = np.eye(3, dtype=np.float32)[..., None, None] if weight is None else weight
    nodes = [
        helper.make_node('Conv', ['input', 'weight'], ['same']),
        helper.make_node('GlobalAveragePool', ['same'], ['pooled']),
        helper.make_node('Flatten', ['pooled'], ['logits']),
    ]
    meta = facts('classification', ['logits'], **more)
    return folder(path, meta, nodes, dict(weight=weight), dict(logits=2))


def detector(path, masks=True, dets=DETS, labels=LABELS, probabilities=MASKS, **more):
    """The same boxes on every image."""
    values = dict(dets=dets[None], labels=labels[None])
    if masks:
        values['masks'] = probabilities[None]
    nodes = [helper.make_node('Identity', [f'all_{name}'], [name]) for name in values]
    meta = facts('instance-segmentation' if masks else 'detection', values, **more)
    constants = {f'all_{name}': value for name, value in values.items()}
    return folder(path, meta, nodes, constants, {name: value.ndim for name, value in values.items()})
