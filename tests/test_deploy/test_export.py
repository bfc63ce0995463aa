"""From config and checkpoint to folder; the formats, and the ways in which it must not go wrong."""

import json
import sys

import numpy as np
import pytest
import torch

from mmunireplknet import CheckpointError
from mmunireplknet.deploy import export as module
from mmunireplknet.deploy import formats, onnx_file
from mmunireplknet.deploy.export import ParityError, build_model, export
from mmunireplknet.deploy.exportable import ExportError, make_exportable
from mmunireplknet.deploy.norm_precision import float32_norms
from mmunireplknet.engine.launch import load_config
from mmunireplknet.engine.reparameterize import deploy_mark, reparameterize_checkpoint
from mmunireplknet.models.checkpoint import load_checkpoint

from ..procedural import image
from ..test_models.tiny import tiny
from ..test_tools.test_command_line import CONFIG, run_tool
from .cases import FAST, NAMES, PALETTE, build, checkpoint, classifier_config, segmentor_config

pytest.importorskip('mmseg')
pytest.importorskip('mmpretrain')
pytest.importorskip('safetensors')
LAYER = 'backbone.stages.2.0.dwconv.lk_origin'


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    return checkpoint(segmentor_config(), tmp_path_factory.mktemp('weights') / 'train.pth', iter=7)


@pytest.fixture
def out(tmp_path):
    return tmp_path / 'out' / 'model'


def left(out):
    """What an export left beside and in its folder."""
    return sorted(path.name for path in out.parent.rglob('*')) if out.parent.exists() else []


def test_weights_without_code(weights, out):
    cfg = segmentor_config()
    before = cfg.pretty_text
    report = export(cfg, weights, out, 'safetensors', seconds=0)
    assert cfg.pretty_text == before
    assert left(out) == sorted(
        ['README.md', 'deploy.pth', 'meta.json', 'model', 'model.safetensors', 'report.json', 'report.md']
    )
    assert report == json.loads((out / 'report.json').read_text())
    assert report['passed']
    assert len(report['cases']) == 3
    meta = json.loads((out / 'meta.json').read_text())
    assert meta['classes'] == NAMES
    assert meta['palette'] == PALETTE
    assert meta['task'] == 'segmentation'
    assert meta['config'] == 'upernet_tiny.py'
    assert meta['input'] == dict(
        name='input', dtype='float32', layout='NCHW', shape=[None, 3, None, None], channels='RGB'
    )
    assert [o['shape'] for o in meta['outputs']] == [[None, 5, None, None]]
    cfg.model.backbone.deploy = True
    for file in ('model.safetensors', 'deploy.pth'):
        model = build(cfg)
        load_checkpoint(model, out / file)
        x = image((1, 3, 64, 64))
        with torch.no_grad():
            expected = build_model(segmentor_config(), weights)[0].predict(x)[0].seg_logits.data
            assert torch.allclose(model.predict(x)[0].seg_logits.data, expected, atol=1e-4)
    assert torch.load(out / 'deploy.pth')['meta']['iter'] == 7
    assert deploy_mark(out / 'deploy.pth')['source'] == weights.name


def test_deploy_form_and_half_checkpoints(weights, out, tmp_path):
    reparameterize_checkpoint(segmentor_config(), weights, tmp_path / 'deploy.pth')
    report = export(segmentor_config(), tmp_path / 'deploy.pth', out, 'safetensors', seconds=0)
    assert list(report['cases'][0]['differences']) == ['exported - deploy form']
    data = torch.load(weights)
    data['state_dict'] = {k: v.half() if v.is_floating_point() else v for k, v in data['state_dict'].items()}
    torch.save(data, tmp_path / 'half.pth')
    assert export(segmentor_config(), tmp_path / 'half.pth', out.with_name('b'), 'safetensors', seconds=0)['passed']


def test_averaged_weights_are_exported(weights, out, tmp_path):
    """EMAHook saves the averages as state_dict and the others beside it."""
    data = torch.load(weights)
    data['ema_state_dict'] = {f'module.{k}': torch.zeros_like(v) for k, v in data['state_dict'].items()}
    torch.save(data, tmp_path / 'ema.pth')
    export(segmentor_config(), tmp_path / 'ema.pth', out, 'safetensors', seconds=0)
    assert torch.load(out / 'deploy.pth')['state_dict']['decode_head.conv_seg.weight'].abs().sum() > 0


def test_refused_before_anything_is_built(weights, out, monkeypatch):
    monkeypatch.setattr(module, 'build_model', None)
    for options, message in [
        (dict(format='caffe'), "'caffe' is not known: expected one of onnx"),
        (dict(shape=(1, 0, 5)), 'batch, height and width'),
        (dict(format='pt2', exporter='dynamo'), 'for the formats onnx and openvino'),
        (dict(exporter='jit'), 'expected dynamo or torchscript'),
    ]:
        with pytest.raises(ExportError, match=message):
            export(segmentor_config(), weights, out, **options)
    monkeypatch.setattr(formats, 'find_spec', lambda name: None if name == 'openvino' else name)
    with pytest.raises(ExportError, match='needs openvino, not installed here: pip install'):
        export(segmentor_config(), weights, out, 'openvino')
    out.mkdir(parents=True)
    (out / 'x').touch()
    with pytest.raises(ExportError, match='not empty'):
        export(segmentor_config(), weights, out, 'safetensors')
    with pytest.raises(ExportError, match=r'no meta\.json'):
        export(segmentor_config(), weights, out, 'safetensors', overwrite=True)
    assert left(out) == ['model', 'x']


def test_wrong_checkpoints_leave_nothing(weights, out, tmp_path):
    other = segmentor_config()
    other.model.decode_head.num_classes = 4
    cases = [(other, weights), (classifier_config(), weights), (segmentor_config(), tmp_path / 'bad.pth')]
    torch.save(dict(state_dict={'a': torch.zeros(1)}), tmp_path / 'bad.pth')
    for cfg, file in cases:
        with pytest.raises(CheckpointError, match=str(file.name)):
            export(cfg, file, out, 'safetensors', seconds=0)
    plain = segmentor_config()
    del plain.model['backbone']
    with pytest.raises(ExportError, match=r'model\.backbone'):
        export(plain, weights, out, 'safetensors', seconds=0)
    unknown = segmentor_config()
    unknown.test_dataloader.dataset.pipeline.insert(1, dict(type='Pad', size_divisor=32))
    with pytest.raises(ExportError, match='no rule for Pad'):
        export(unknown, weights, out, 'safetensors', seconds=0)
    assert left(out) == []


def test_a_wrong_file_is_not_left(weights, out, monkeypatch):
    """A weight that went wrong in writing is found, named, and nothing is written."""
    write = formats.write

    def corrupt(format, *args):
        from safetensors.torch import load_file, save_file

        file = write(format, *args)
        state = load_file(file)
        state[f'{LAYER}.weight'][0, 0, 6, 6] += 1
        save_file(state, file, metadata=dict(format='pt'))
        return file

    monkeypatch.setattr(module, 'write', corrupt)
    with pytest.raises(ParityError, match=rf'the first layer that differs is {LAYER}, its weight'):
        export(segmentor_config(), weights, out, 'safetensors', seconds=0)
    assert left(out) == []


def test_a_wrong_merge_is_not_left(weights, out, monkeypatch):
    def wrongly(model, *args, deploy=True, **options):
        exportable = make(model, *args, deploy=deploy, **options)
        if deploy:
            with torch.no_grad():
                model.backbone.stages[1][0].dwconv.lk_origin.weight.mul_(1.1)
        return exportable

    make = module.make_exportable
    monkeypatch.setattr(module, 'make_exportable', wrongly)
    with pytest.raises(ParityError, match=r'deploy form differs .* is backbone\.stages\.1\.0,'):
        export(segmentor_config(), weights, out, 'safetensors', seconds=0)
    assert left(out) == []


@pytest.mark.parametrize('format', formats.FORMATS)
def test_what_is_not_ready_is_not_written(tmp_path, format):
    backbone = tiny()
    for ready, what in ((False, 'training form'), (True, 'training mode')):
        exportable = make_exportable(backbone, None, deploy=ready).train(ready)
        with pytest.raises(ExportError, match=f'in {what}'):
            formats.write(format, exportable, image((1, 3, 32, 32)), tmp_path, formats.Options())
    assert not list(tmp_path.iterdir())


def test_random_numbers_are_left_alone(weights):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    build_model(segmentor_config(), weights)
    assert torch.equal(torch.rand(1), expected)


def test_names_of_formats(tmp_path):
    assert {formats.format_of(tmp_path / f.file) for f in formats.FORMATS.values()} == set(formats.FORMATS)
    with pytest.raises(ExportError, match='no exported model'):
        formats.format_of(tmp_path / 'deploy.pth')
    with pytest.raises(ExportError, match='holds weights alone'):
        formats.open_exported(tmp_path / 'model.safetensors')


@pytest.mark.slow
def test_the_package_needs_no_exporter():
    """Importing what tools import brings in none of the optional packages."""
    import subprocess

    names = ['onnx', 'onnxruntime', 'onnxscript', 'openvino', 'onnxslim']
    code = f'import sys, mmunireplknet.deploy.export; sys.exit(str([n for n in {names} if n in sys.modules]))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1] == '[]', done.stderr


# ------------------------------------------------------------------------------------------ formats


@pytest.mark.slow
@pytest.mark.parametrize('half', [False, True])
def test_onnx(weights, out, half):
    """Dynamic batch, height and width, standard operators, and readable names; onnxruntime agrees at three sizes."""
    onnx = pytest.importorskip('onnx')
    ort = pytest.importorskip('onnxruntime')
    report = export(segmentor_config(), weights, out, half=half, **FAST)
    assert len({tuple(case['shape']) for case in report['cases']}) == 3
    graph = onnx.load(out / 'model.onnx')
    assert {(o.domain, o.version) for o in graph.opset_import} == {('', 18)}
    assert [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.graph.input] == [
        ['N', 3, 'H', 'W']
    ]
    assert 'BatchNormalization' not in {node.op_type for node in graph.graph.node}
    assert str(out.parent) not in str(graph), 'a path of this machine is in the file'
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(graph).graph.value_info}
    norms = [node for node in graph.graph.node if node.op_type == 'ReduceL2']
    assert len(norms) == 6
    assert {types[name] for node in norms for name in node.output} == {onnx.TensorProto.FLOAT}
    layer_norms = [node for node in graph.graph.node if node.op_type == 'LayerNormalization']
    assert len(layer_norms) == 9
    assert {types[node.input[0]] for node in layer_norms} == {onnx.TensorProto.FLOAT}
    assert len(float32_norms(graph)) == 6 * 2 + 9
    assert '    trtexec --onnx=model.onnx' in (out / 'README.md').read_text()
    kernels = {node.input[1] for node in graph.graph.node if node.op_type == 'Conv'}
    assert {t.data_type for t in graph.graph.initializer if t.name in kernels} == {
        onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    }
    x = np.zeros((3, 3, 33, 47), np.float32)
    session = ort.InferenceSession(str(out / 'model.onnx'))
    assert session.run(None, {'input': x})[0].shape == (3, 5, 33, 47)


@pytest.mark.slow
@pytest.mark.parametrize('format', ['onnx', 'openvino', 'torchscript'])
def test_a_corrupted_weight_is_named(weights, out, monkeypatch, format):
    write = formats.write

    def corrupt(format, *args):
        file = write(format, *args)
        corrupt_file(format, file)
        return file

    monkeypatch.setattr(module, 'write', corrupt)
    options = FAST if format != 'torchscript' else dict(seconds=0)
    with pytest.raises(ParityError, match=rf'the first layer that differs is {LAYER}'):
        export(segmentor_config(), weights, out, format, **options)
    assert left(out) == []


def corrupt_file(format, file):
    """Change one tap of the first 13x13 kernel, in stage 3."""
    if format == 'torchscript':
        traced = torch.jit.load(str(file))
        with torch.no_grad():
            traced.state_dict()[f'model.{LAYER}.weight'][0, 0, 6, 6] += 1
        torch.jit.save(traced, str(file))
        return
    onnx = pytest.importorskip('onnx')
    graph = onnx.load(file.with_name('model.onnx'))
    tensor = next(t for t in graph.graph.initializer if list(t.dims[1:]) == [1, 13, 13])
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[0, 0, 6, 6] += 1
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(graph, file.with_name('model.onnx'))
    if format == 'openvino':
        openvino = pytest.importorskip('openvino')
        openvino.save_model(openvino.convert_model(file.with_name('model.onnx')), file, compress_to_fp16=False)


@pytest.mark.slow
@pytest.mark.parametrize('format', ['openvino', 'torchscript'])
@pytest.mark.parametrize('make', [segmentor_config, classifier_config])
def test_other_formats(out, tmp_path, format, make):
    if format == 'openvino':
        pytest.importorskip('openvino')
    file = checkpoint(make(), tmp_path / 'train.pth')
    options = FAST if format == 'openvino' else dict(seconds=0)
    report = export(make(), file, out, format, **options)
    assert len(report['cases']) == 3
    assert 'model.onnx' not in left(out)


@pytest.mark.slow
def test_pt2_of_any_size(out, tmp_path):
    file = checkpoint(classifier_config(), tmp_path / 'train.pth')
    assert len(export(classifier_config(), file, out, 'pt2', seconds=0)['cases']) == 3


@pytest.mark.slow
def test_onnx_options(weights, out):
    onnx = pytest.importorskip('onnx')

    def shapes(name):
        values = (*(graph := onnx.load(out / name / 'model.onnx').graph).input, *graph.output)
        return [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values]

    report = export(segmentor_config(), weights, out / 'fixed', shape=(2, 64, 96), argmax=True, **FAST)
    assert shapes('fixed') == [[2, 3, 64, 96], [2, 64, 96]]
    assert [case['shape'] for case in report['cases']] == [[2, 3, 64, 96]]
    assert json.loads((out / 'fixed' / 'meta.json').read_text())['outputs'][0]['shape'] == [2, 64, 96]
    export(segmentor_config(), weights, out / 'maps', backbone_only=True, opset=17, **FAST)
    assert shapes('maps')[-1][1] == 20
    assert {o.version for o in onnx.load(out / 'maps' / 'model.onnx').opset_import} == {17}


@pytest.mark.slow
def test_weights_beside_a_large_model(out, tmp_path, monkeypatch):
    """protobuf ends at 2 GiB; here that is lowered to next to nothing."""
    onnx = pytest.importorskip('onnx')
    ort = pytest.importorskip('onnxruntime')
    monkeypatch.setattr(onnx_file, 'LARGEST', 1000)
    file = checkpoint(classifier_config(), tmp_path / 'train.pth')
    export(classifier_config(), file, out, **FAST)
    assert {'model.onnx', 'model.onnx.data', 'meta.json'} <= set(left(out))
    assert not [name for name in left(out) if 'traced' in name or 'probe' in name]
    weights = sum(p.numel() * 4 for p in build_model(classifier_config(), out / 'deploy.pth')[0].parameters())
    assert (out / 'model.onnx.data').stat().st_size > 0.9 * weights
    inside = onnx.load(out / 'model.onnx', load_external_data=False).graph.initializer
    assert max(len(tensor.raw_data) for tensor in inside) <= 1024, 'only small ones stay'
    assert json.loads((out / 'meta.json').read_text())['data'] == 'model.onnx.data'
    assert 'model.onnx.data' in (out / 'README.md').read_text()
    session = ort.InferenceSession(str(out / 'model.onnx'))
    assert session.run(None, {'input': np.zeros((3, 3, 33, 47), np.float32)})[0].shape == (3, 5)
    export(classifier_config(), file, out, 'openvino', overwrite=True, **FAST)
    assert not [name for name in left(out) if 'onnx' in name]
    monkeypatch.setattr(module, 'write', lambda *args: corrupt_in_place(write(*args)))
    write = formats.write
    with pytest.raises(ParityError, match='the first layer that differs is backbone'):
        export(classifier_config(), file, out, overwrite=True, **FAST)


def corrupt_in_place(file):
    """Set the first quarter of the weights to zero."""
    weights = file.with_name('model.onnx.data')
    data = bytearray(weights.read_bytes())
    data[: len(data) // 4] = bytes(len(data) // 4)
    weights.write_bytes(data)
    return file


@pytest.mark.slow
def test_onnx_by_the_newer_exporter(out, tmp_path):
    """The default, which takes long; the whole-model matrix is exported by the older one."""
    onnx = pytest.importorskip('onnx')
    file = checkpoint(classifier_config(), tmp_path / 'train.pth')
    assert len(export(classifier_config(), file, out, seconds=0)['cases']) == 3
    graph = onnx.load(out / 'model.onnx')
    modules = {p.value for node in graph.graph.node for p in node.metadata_props}
    assert LAYER in modules
    assert {p.key for node in graph.graph.node for p in node.metadata_props} == {'module'}
    assert 'BatchNormalization' not in {node.op_type for node in graph.graph.node}


@pytest.mark.slow
def test_command_line(weights, tmp_path, capsys):
    config = tmp_path / 'tiny.py'
    segmentor_config().dump(str(config))
    args = ['export.py', config, weights, tmp_path / 'out', '--format', 'safetensors']
    assert run_tool(*args, '--seconds', 0.01, '--threads', 1) is None
    assert '| deploy form | exported |' in capsys.readouterr().out
    message = run_tool(*args)
    assert message.startswith('ExportError: ')
    assert '--overwrite' in message
    assert run_tool(*args, '--overwrite', '--seconds', 0) is None
    message = run_tool('export.py', CONFIG, weights, tmp_path / 'other')
    assert message.startswith('CheckpointError: ')
    assert 'There is no checkpoint' in run_tool('export.py', CONFIG, tmp_path / 'none.pth', tmp_path / 'other')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out', 'tiny.py']


def test_config_of_the_demo_has_size_rules():
    from mmunireplknet.deploy.preprocessing import read_preprocessing

    cfg = load_config(str(CONFIG))
    assert read_preprocessing(cfg, build(segmentor_config()))[0]['resize'] == dict(mode='none')
