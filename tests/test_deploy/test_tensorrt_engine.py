"""TensorRT engines: the calls, the comparison and the command. The engine itself is a fake: there is no GPU here."""

import importlib.util
import json

import numpy as np
import pytest

from mmunireplknet.deploy import tensorrt_engine as module
from mmunireplknet.deploy.exportable import ExportError
from mmunireplknet.deploy.tensorrt_engine import build_engine, profile_of, trtexec

from ..test_tools.test_command_line import run_tool
from . import fake_tensorrt
from .tiny_onnx import detector, segmentor

CASES = [(1, 96, 128), (2, 96, 64), (1, 63, 107)]


def exported(make, path, sizes=CASES, **options):
    """The folder of an export, with a report of these sizes."""
    folder = make(path, **options)
    cases = [dict(shape=[n, 3, height, width], differences={}) for n, height, width in sizes]
    (folder / 'report.json').write_text(json.dumps(dict(config='tiny.py', cases=cases)))
    return folder


def names(calls):
    return [name for name, *_ in calls]


def test_build_and_compare(tmp_path, monkeypatch):
    folder = exported(segmentor, tmp_path / 'out')
    before = sorted(folder.iterdir())
    calls = fake_tensorrt.install(monkeypatch, module)
    report = build_engine(folder)
    assert names(calls[:7]) == [
        'create_network', 'parse_from_file', 'clear_flag', 'set_shape', 'add_optimization_profile',
        'build_serialized_network', 'deserialize_cuda_engine',
    ]  # fmt: skip
    assert calls[0][1] == 1 << fake_tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert calls[1][1] == str(folder / 'model.onnx')
    assert calls[2][1] is fake_tensorrt.BuilderFlag.TF32
    assert calls[3][1:] == ('input', (1, 3, 63, 64), (1, 3, 96, 128), (2, 3, 96, 128))
    runs = [args for name, *args in calls if name == 'set_input_shape']
    assert runs == [['input', (n, 3, height, width)] for n, height, width in CASES]
    assert names(calls[7:]) == ['set_input_shape', 'execute_async_v3', 'synchronize'] * 3
    assert report['passed']
    assert [case['shape'] for case in report['cases']] == [[n, 3, height, width] for n, height, width in CASES]
    assert [case['differences']['engine - onnxruntime']['logits']['relative'] for case in report['cases']] == [0, 0, 0]
    assert set(folder.iterdir()) - set(before) == {folder / 'tensorrt'}
    made = folder / 'tensorrt'
    assert sorted(path.name for path in made.iterdir()) == ['meta.json', 'model.engine', 'report.json', 'report.md']
    assert json.loads((made / 'report.json').read_text())['shapes'] == [[1, 63, 64], [1, 96, 128], [2, 96, 128]]
    assert json.loads((made / 'meta.json').read_text())['file'] == 'model.engine'
    assert '| 2 x 3 x 96 x 64 | engine - onnxruntime | logits |' in (made / 'report.md').read_text()
    assert 'deploy form' not in (made / 'report.md').read_text()
    with pytest.raises(ExportError, match='--overwrite'):
        build_engine(folder)
    assert build_engine(folder, overwrite=True)['passed']


def test_detections_may_change_places(tmp_path, monkeypatch):
    folder = exported(detector, tmp_path / 'out', sizes=[(1, 64, 96)])
    order = [1, 0, 2]
    fake_tensorrt.install(monkeypatch, module, spoil=lambda name, value: value[:, order])
    report = build_engine(folder)
    assert list(report['cases'][0]['differences']['engine - onnxruntime']) == ['dets', 'labels', 'masks']
    assert report['passed']


def test_a_fixed_size_has_no_profile(tmp_path, monkeypatch):
    folder = exported(segmentor, tmp_path / 'out', sizes=[(1, 64, 96)], shape=(1, 3, 64, 96))
    calls = fake_tensorrt.install(monkeypatch, module)
    assert build_engine(folder, tf32=True, out_dir=tmp_path / 'engine')['tolerance'] == 1e-2
    assert not {'set_shape', 'add_optimization_profile', 'clear_flag'} & set(names(calls))
    assert (tmp_path / 'engine' / 'model.engine').is_file()


def test_what_differs_is_not_left(tmp_path, monkeypatch):
    folder = exported(segmentor, tmp_path / 'out')
    fake_tensorrt.install(monkeypatch, module, spoil=lambda name, value: value * np.float32(1.001))
    with pytest.raises(ExportError, match=r'differs by 1\.0e-03 from onnxruntime, more than 0\.0001'):
        build_engine(folder)
    assert not (folder / 'tensorrt').exists()
    assert build_engine(folder, tolerance=1e-2)['passed']


def test_what_tensorrt_does_not_read(tmp_path, monkeypatch):
    folder = exported(segmentor, tmp_path / 'out')
    fake_tensorrt.install(monkeypatch, module, error='no importer for Resize')
    with pytest.raises(ExportError, match=r'cannot read .*model\.onnx: no importer for Resize'):
        build_engine(folder)
    assert not (folder / 'tensorrt').exists()


def test_given_shapes(tmp_path, monkeypatch):
    folder = exported(segmentor, tmp_path / 'out')
    calls = fake_tensorrt.install(monkeypatch, module)
    report = build_engine(folder, shapes=((1, 64, 64), (2, 128, 128), (4, 256, 256)))
    assert ('set_shape', 'input', (1, 3, 64, 64), (2, 3, 128, 128), (4, 3, 256, 256)) in calls
    assert [case['shape'] for case in report['cases']] == [[1, 3, 96, 128], [2, 3, 96, 64]], 'without the third'
    report = build_engine(folder, shapes=((4, 256, 256), (4, 256, 256), (4, 256, 256)), overwrite=True)
    assert [case['shape'] for case in report['cases']] == [[4, 3, 256, 256]]
    with pytest.raises(ExportError, match='are not in order'):
        build_engine(folder, shapes=((4, 64, 64), None, None), overwrite=True)
    fixed = exported(segmentor, tmp_path / 'fixed', sizes=[(1, 64, 96)], shape=(1, 3, 64, 96))
    with pytest.raises(ExportError, match=r'takes \[1, 64, 96\]'):
        build_engine(fixed, shapes=((1, 32, 32), None, None))


def test_the_command():
    meta = dict(file='model.onnx', input=dict(name='input', shape=[None, 3, None, None]))
    report = dict(cases=[dict(shape=[1, 3, 96, 128]), dict(shape=[2, 3, 64, 64])])
    assert trtexec(meta, profile_of(meta, report)) == (
        'trtexec --onnx=model.onnx --saveEngine=model.engine --stronglyTyped --noTF32 --minShapes=input:1x3x64x64 '
        '--optShapes=input:1x3x96x128 --maxShapes=input:2x3x96x128'
    )
    meta['input']['shape'] = [1, 3, 96, 128]
    assert trtexec(meta, profile_of(meta, dict(cases=report['cases'][:1])), tf32=True) == (
        'trtexec --onnx=model.onnx --saveEngine=model.engine --stronglyTyped'
    )


def test_one_sentence_without_tensorrt(tmp_path):
    folder = exported(segmentor, tmp_path / 'out')
    message = run_tool('build_engine.py', folder, '--shape-max', 4, 512, 512)
    assert message.startswith('ExportError: ')
    assert 'Where both are' in message
    assert 'trtexec --onnx=model.onnx' in message
    assert '--maxShapes=input:4x3x512x512' in message
    assert 'is no folder of an export' in run_tool('build_engine.py', tmp_path)
    meta = json.loads((folder / 'meta.json').read_text())
    (folder / 'meta.json').write_text(json.dumps({**meta, 'file': 'model.xml'}))
    assert 'needs --format onnx' in run_tool('build_engine.py', folder)
    assert not (folder / 'tensorrt').exists()


@pytest.mark.skipif(not importlib.util.find_spec('tensorrt'), reason='TensorRT is not installed')
def test_the_fake_is_like_the_real_package():
    tensorrt = pytest.importorskip('tensorrt')
    for owner, members in fake_tensorrt.REAL_NAMES.items():
        assert hasattr(tensorrt, owner)
        assert all(hasattr(getattr(tensorrt, owner), name) for name in members), owner
