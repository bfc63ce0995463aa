"""int8: which images, which layers, that these are computed in integers, and what an export says about it."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmunireplknet.deploy import export as module
from mmunireplknet.deploy import quantize
from mmunireplknet.deploy.evaluate import evaluate_exported
from mmunireplknet.deploy.export import ParityError, export
from mmunireplknet.deploy.exportable import ExportError, make_exportable
from mmunireplknet.deploy.norm_precision import module_of
from mmunireplknet.deploy.onnx_file import write_onnx
from mmunireplknet.deploy.quantize import FLOAT_MODULES, Calibration, check_int8, layers_to_quantize
from mmunireplknet.deploy.run import preprocess

from ..procedural import image
from ..test_models.tiny import tiny
from .cases import FAST, NAMES, PALETTE, checkpoint, classifier_config, segmentor_config
from .tiny_onnx import facts

pytest.importorskip('mmseg')
pytest.importorskip('onnxruntime')
onnx = pytest.importorskip('onnx')
SIZES = [(64, 96), (64, 64), (80, 64)]


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """A folder with three coloured images and a file that is none."""
    folder = tmp_path_factory.mktemp('photos')
    for i, (height, width) in enumerate(SIZES):
        pixels = (image((1, 3, height, width), i)[0] * 50 + 128).clip(0, 255).byte()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f'{i}.png')
    (folder / 'list.txt').write_text('no image')
    return folder


# ------------------------------------------------------------------------------------------ which images


def test_images_are_taken_evenly_and_prepared_as_the_program_does(photos, tmp_path):
    for i in range(10):
        (tmp_path / f'{i}.png').touch()
    assert [path.name for path in Calibration(tmp_path, 4).files] == ['0.png', '2.png', '5.png', '7.png']
    calibration = Calibration(photos, 32)
    assert [path.name for path in calibration.files] == ['0.png', '1.png', '2.png']
    meta = facts('segmentation', ['logits'], dict(mode='exact', scale=[48, 32]), shape=(2, 3, 32, 64))
    pixels = np.asarray(Image.open(photos / '0.png'))
    found = calibration.load(photos / '0.png', meta)
    assert found.shape == (2, 3, 32, 64)
    assert np.array_equal(found[1:], preprocess(pixels, meta)[0])


def test_an_image_that_cannot_be_used_is_named(photos, tmp_path):
    (tmp_path / 'broken.png').write_text('no image')
    meta = facts('segmentation', ['logits'])
    with pytest.raises(ExportError, match=r'broken\.png cannot be read as an image: remove it'):
        Calibration(tmp_path, 1).load(tmp_path / 'broken.png', meta)
    meta = facts('segmentation', ['logits'], dict(mode='exact', scale=[48, 32], interpolation='lanczos'))
    with pytest.raises(ExportError, match=r"0\.png cannot be prepared, since there is no rule for 'lanczos'"):
        Calibration(photos, 1).load(photos / '0.png', meta)


def test_refused_before_anything_is_built(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'build_model', None)
    (tmp_path / 'empty').mkdir()
    for options, message in [
        (dict(format='pt2', int8=photos), 'onnx and openvino, not for pt2'),
        (dict(half=True, int8=photos), 'int8 and half exclude each other'),
        (dict(int8=tmp_path / 'none'), "none' is no folder"),
        (dict(int8=photos / '0.png'), 'is no folder'),
        (dict(int8=tmp_path / 'empty'), 'empty: no such file, no image'),
        (dict(int8=photos, calibration_images=0), 'calibration_images=0: expected 1 or more'),
    ]:
        with pytest.raises(ExportError, match=message):
            export(segmentor_config(), 'x.pth', tmp_path / 'out', **options)
    monkeypatch.setattr(quantize, 'find_spec', lambda name: None)
    for format, package in (('onnx', 'onnxruntime'), ('openvino', 'nncf')):
        with pytest.raises(ExportError, match=f'needs {package}, not installed here'):
            check_int8(format, False, photos, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['empty']


def test_images_without_detections_are_left_out(photos, tmp_path):
    """What follows the boxes, as a mask head, computes nothing there, which NNCF takes for an endless range."""

    def run(pixels):
        count = {(64, 96): 1, (64, 64): 0, (80, 64): 2}[pixels.shape[2:]]
        return [np.zeros((1, count, 5)), np.zeros((1, count))]

    calibration = Calibration(photos, 3)
    calibration.keep_detections(run, facts('detection', ['dets', 'labels']))
    assert [path.name for path in calibration.files] == ['0.png', '2.png']
    with pytest.raises(ExportError, match='nothing is found in any of the 2 images'):
        calibration.keep_detections(lambda _: [np.zeros((1, 0, 5))], facts('detection', ['dets']))


# ------------------------------------------------------------------------------------------ which layers


def node(kind, inputs, output, module):
    made = onnx.helper.make_node(kind, inputs, [output], name=output)
    made.metadata_props.add(key='module', value=module)
    return made


def test_layers_are_chosen_by_their_module():
    """Products of one activation with another, as of the pooling matrices, have nothing constant to quantize."""
    nodes = [
        node('Conv', ['x', 'w'], 'depthwise', 'backbone.stages.0.0.dwconv'),
        node('Conv', ['depthwise', 'w'], 'gate', 'backbone.stages.0.0.se.down'),
        node('MatMul', ['x', 'w'], 'linear', 'backbone.stages.0.0.pwconv1.1'),
        node('MatMul', ['x', 'linear'], 'pooled', 'backbone.stages.0.0'),
        node('Conv', ['x', 'w'], 'other', 'backbone.stages.0.0.second'),  # begins as se does
        node('Add', ['x', 'w'], 'sum', 'backbone.stages.0.0'),
        node('Conv', ['x', 'w'], 'nobodys', ''),
    ]
    weight = onnx.numpy_helper.from_array(np.zeros((1, 1, 1, 1), np.float32), 'w')
    graph = onnx.helper.make_model(onnx.helper.make_graph(nodes, 'g', [], [], [weight]))
    exportable = make_exportable(tiny(), None)
    exportable.model = torch.nn.ModuleDict(dict(backbone=exportable.model))
    chosen = [n.name for n in layers_to_quantize(graph, exportable)]
    assert chosen == ['depthwise', 'linear', 'other', 'nobodys']


@pytest.fixture(scope='module')
def backbone(photos, tmp_path_factory):
    """A backbone, its float graph and its int8 file by onnxruntime."""
    file = tmp_path_factory.mktemp('backbone') / 'model.onnx'
    exportable = make_exportable(tiny(), None)
    write_onnx(exportable, image((1, 3, 64, 64)), file, exporter='torchscript')
    graph = onnx.load(file)
    meta = facts('features', exportable.output_names)
    quantize.quantize('onnx', file, exportable, Calibration(photos, 3), meta)
    return exportable, graph, file


def stays_float(graph, exportable):
    """Nodes of the graph in modules that stay in float, by the module's kind."""
    kinds = {n.removeprefix('model.'): type(m) for n, m in exportable.named_modules() if isinstance(m, FLOAT_MODULES)}
    found = {}
    for made in graph.graph.node:
        for name, kind in kinds.items():
            if f'{module_of(made)}.'.startswith(f'{name}.'):
                found.setdefault(kind.__name__, []).append(made)
    return found


@pytest.mark.slow
def test_gates_and_norms_are_float_in_the_graph(backbone):
    """None of their nodes has a quantized weight, nor reads a rounded value where a convolution has not made it."""
    exportable, _, file = backbone
    graph = onnx.load(file)
    producers = {out: made for made in graph.graph.node for out in made.output}
    found = stays_float(graph, exportable)
    assert {kind: len(nodes) > 0 for kind, nodes in found.items()} == dict(SEBlock=True, GRN=True, LayerNorm2d=True)
    weights = {tensor.name: tensor for tensor in graph.graph.initializer}
    for made in (made for nodes in found.values() for made in nodes):
        for name in made.input:
            if name in weights:
                assert weights[name].data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64), made.name
            elif producers[name].op_type == 'DequantizeLinear':  # of what comes in: a value, no weight
                source = producers.get(producers[name].input[0])
                assert source is not None, f'{made.name} has a quantized weight'
                assert producers[source.input[0]].op_type == 'Conv', f'{made.name} reads a rounded value'
    kinds = [made.op_type for made in found['SEBlock']]
    assert kinds.count('Conv') == 2 * 6
    assert {made.op_type for made in found['GRN']} >= {'ReduceL2', 'ReduceMean', 'Div', 'Mul'}


@pytest.mark.slow
def test_onnxruntime_computes_the_others_in_integers(backbone, tmp_path):
    import onnxruntime

    exportable, before, file = backbone
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / 'optimized.onnx')
    session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
    kinds = [made.op_type for made in onnx.load(tmp_path / 'optimized.onnx').graph.node]
    chosen = [made.op_type for made in layers_to_quantize(before, exportable)]
    assert chosen == ['Conv'] * (6 * 3 + 5)  # one depthwise and two linear a block, two of the stem, three downsampling
    assert kinds.count('QLinearConv') == len(chosen)
    assert kinds.count('Conv') == 2 * 6  # of SE
    assert not {kind for kind in kinds if kind.startswith('QLinear')} - {'QLinearConv'}
    assert {entry.domain for entry in onnx.load(file).opset_import} == {''}
    outputs = session.run(None, {'input': image((2, 3, 96, 64)).numpy()})
    assert [out.shape for out in outputs] == [(2, 8, 24, 16), (2, 12, 12, 8), (2, 16, 6, 4), (2, 20, 3, 2)]


@pytest.mark.slow
def test_openvino_has_the_same_layers(photos, tmp_path):
    openvino = pytest.importorskip('openvino')
    pytest.importorskip('nncf')
    file = tmp_path / 'model.onnx'
    exportable = make_exportable(tiny(), None)
    write_onnx(exportable, image((1, 3, 64, 64)), file, exporter='torchscript')
    openvino.save_model(openvino.convert_model(file), tmp_path / 'model.xml', compress_to_fp16=False)
    size = (tmp_path / 'model.bin').stat().st_size
    meta = facts('features', exportable.output_names)
    layers = quantize.quantize('openvino', tmp_path / 'model.xml', exportable, Calibration(photos, 3), meta)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['model.bin', 'model.onnx', 'model.xml']
    assert (tmp_path / 'model.bin').stat().st_size < size / 2
    expected = {made.name for made in layers_to_quantize(onnx.load(file), exportable)}
    model = openvino.Core().read_model(tmp_path / 'model.xml')
    weighted = ('Convolution', 'GroupConvolution', 'MatMul')
    found, floats = set(), set()
    for made in model.get_ordered_ops():
        if made.get_type_name() in weighted:
            quantized = made.input_value(0).get_node().get_type_name() == 'FakeQuantize'
            (found if quantized else floats).add(made.get_friendly_name().removesuffix('/WithoutBiases'))
    assert found == expected
    assert layers == len(expected)
    assert {'/se/' in name for name in floats} == {True}
    behind = {
        consumer.get_node().get_type_name()
        for made in model.get_ordered_ops()
        if made.get_type_name() == 'FakeQuantize'
        for consumer in made.output(0).get_target_inputs()
    }
    assert behind <= {*weighted, 'Transpose', 'Reshape'}


# ------------------------------------------------------------------------------------------ end to end


def data_of(photos, tmp_path):
    """A config with test data: the photos, whose labels are quarters."""
    cfg = segmentor_config()
    (tmp_path / 'labels').mkdir()
    for file in photos.glob('*.png'):
        width, height = Image.open(file).size
        y, x = np.mgrid[:height, :width]
        labels = 2 * (y > height / 2) + (x > width / 2)
        Image.fromarray(labels.astype(np.uint8)).save(tmp_path / 'labels' / file.name)
    dataset = cfg.test_dataloader.dataset
    dataset.update(
        data_prefix=dict(img_path=str(photos), seg_map_path=str(tmp_path / 'labels')),
        img_suffix='.png', seg_map_suffix='.png', metainfo=dict(classes=NAMES, palette=PALETTE),
    )  # fmt: skip
    cfg.test_dataloader.update(batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False))
    cfg.test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize('format', ['onnx', 'openvino'])
def test_export_of_a_segmentor(photos, tmp_path, format):
    if format == 'openvino':
        pytest.importorskip('nncf')
    cfg = data_of(photos, tmp_path)
    weights = checkpoint(cfg, tmp_path / 'train.pth')
    before = cfg.pretty_text
    options = dict(FAST, seconds=0.01, int8=photos, calibration_images=2)
    report = export(cfg, weights, tmp_path / 'out', format, **options)
    assert cfg.pretty_text == before
    found = report['int8']
    assert report == json.loads((tmp_path / 'out' / 'report.json').read_text())
    assert found['images'] == 2
    names = {path.name: path.stat().st_size for path in (tmp_path / 'out').iterdir()}
    if format == 'onnx':  # of so small a model OpenVINO's file holds little but names
        assert found['bytes']['int8'] < found['bytes']['float']
    sizes = names['model.onnx'] if format == 'onnx' else names['model.xml'] + names['model.bin']
    assert found['bytes']['int8'] == sizes
    assert not {'int8.onnx', 'int8.xml', 'int8.bin'} & names.keys()
    assert all(1e-4 < case['differences']['logits']['relative'] < 0.2 for case in found['cases'])
    assert set(found['cases'][0]['latency_ms']) == {'float', 'int8'}
    assert evaluate_exported(copy.deepcopy(cfg), tmp_path / 'out') == found['metrics']['int8']
    assert found['metrics']['float'].keys() == found['metrics']['int8'].keys()
    assert json.loads((tmp_path / 'out' / 'meta.json').read_text())['int8'] == dict(calibration_images=2)
    readme = (tmp_path / 'out' / 'README.md').read_text()
    assert 'in ranges from 2 calibration' in readme
    assert 'TensorRT' not in readme
    text = (tmp_path / 'out' / 'report.md').read_text()
    assert f'| mIoU | {found["metrics"]["float"]["mIoU"]:.4g} | {found["metrics"]["int8"]["mIoU"]:.4g} |' in text


@pytest.mark.slow
def test_a_wrong_quantization_leaves_nothing(tmp_path):
    """Ranges of images that are all black: what other images hold is cut off."""
    Image.new('RGB', (64, 64)).save(tmp_path / 'black.png')
    weights = checkpoint(classifier_config(), tmp_path / 'train.pth')
    with pytest.raises(ParityError, match=r'int8 model differs .* more than 0\.25, .*Are the 1 images of'):
        export(classifier_config(), weights, tmp_path / 'out', int8=tmp_path, metric=False, **FAST)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['black.png', 'train.pth']
