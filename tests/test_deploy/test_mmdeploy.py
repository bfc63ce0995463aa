"""mmdeploy's deploy configs, and the work-arounds for it, without mmdeploy."""

import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import mmengine.model
import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmunireplknet import compat

from ..test_models.tiny import tiny

OPSET9 = import_module('torch.onnx.symbolic_opset9')  # where mmdeploy looks; an attribute of torch.onnx may be another
CONFIGS = sorted((Path(__file__).parents[2] / 'configs' / 'deploy').glob('*.py'))


class Rewriters:
    """What mmdeploy.core.FUNCTION_REWRITER does: the rewritten function is in place inside of a context."""

    def __init__(self):
        self.found, self.context = {}, None

    def register_rewriter(self, name):
        return lambda function: self.found.setdefault(name, function)

    def get_context(self):
        return self.context

    @contextmanager
    def active(self, monkeypatch):
        with monkeypatch.context() as patch:
            self.context = SimpleNamespace(origin_func=torch.onnx.export)
            patch.setattr(torch.onnx, 'export', self.found['torch.onnx.export'])
            yield


class BaseTask:
    def __init__(self, model):
        self.model = model

    def build_pytorch_model(self, checkpoint=None):
        """The steps of mmdeploy 1.3.1, in its order."""
        from mmengine.model import revert_sync_batchnorm

        model = revert_sync_batchnorm(self.model.train())
        model.backbone.switch_to_deploy()
        return model.eval()


@pytest.fixture
def mmdeploy(monkeypatch):
    """Stand-ins for the modules of mmdeploy; afterwards everything is as it was."""
    task = type('BaseTask', (BaseTask,), dict(build_pytorch_model=BaseTask.build_pytorch_model))
    modules = {
        'mmdeploy': {},
        'mmdeploy.core': dict(FUNCTION_REWRITER=Rewriters()),
        'mmdeploy.codebase': {},
        'mmdeploy.codebase.base': {},
        'mmdeploy.codebase.base.task': dict(BaseTask=task),
    }
    for name, entries in modules.items():
        module = ModuleType(name)
        vars(module).update(entries)
        monkeypatch.setitem(sys.modules, name, module)
    if hasattr(OPSET9, '_cast_Long'):
        monkeypatch.delattr(OPSET9, '_cast_Long')
    yield SimpleNamespace(rewriters=modules['mmdeploy.core']['FUNCTION_REWRITER'], task=task)
    vars(OPSET9).pop('_cast_Long', None)


def test_without_mmdeploy_nothing_happens(monkeypatch):
    monkeypatch.delitem(sys.modules, 'mmdeploy', raising=False)
    before = dict(vars(OPSET9))
    compat.let_mmdeploy_export()
    assert vars(OPSET9) == before


def test_models_are_folded_in_evaluation(mmdeploy):
    with pytest.raises(RuntimeError, match='in training mode'):
        mmdeploy.task(nn.ModuleDict(dict(backbone=tiny()))).build_pytorch_model()
    revert = mmengine.model.revert_sync_batchnorm
    compat.let_mmdeploy_export()
    model = nn.Module()
    model.backbone = tiny()
    assert mmdeploy.task(model).build_pytorch_model().backbone.deploy
    assert mmengine.model.revert_sync_batchnorm is revert
    once = mmdeploy.task.build_pytorch_model
    compat.let_mmdeploy_export()
    assert mmdeploy.task.build_pytorch_model is once, 'twice'


def test_export_by_tracing(mmdeploy, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.onnx, 'export', lambda *args, **kwargs: calls.append((args, kwargs)))
    compat.let_mmdeploy_export()
    torch.onnx.export('before')
    with mmdeploy.rewriters.active(monkeypatch):
        torch.onnx.export('model', 'input', opset_version=16)
        torch.onnx.export('model', dynamo=True)
    torch.onnx.export('after')
    assert calls == [
        (('before',), {}),
        (('model', 'input'), dict(dynamo=False, opset_version=16)),
        (('model',), dict(dynamo=True)),
        (('after',), {}),
    ]


def test_cast_to_long(mmdeploy):
    compat.let_mmdeploy_export()
    g = SimpleNamespace(op=lambda *args, **kwargs: (args, kwargs))
    (name, value), attributes = OPSET9._cast_Long(g, 'x', False)
    assert (name, value, int(attributes['to_i'])) == ('Cast', 'x', 7)  # INT64 of the standard


@pytest.mark.parametrize('file', CONFIGS, ids=lambda file: file.stem)
def test_deploy_configs(file):
    """mmdeploy imports what they name, and finds what its own tools look for."""
    cfg = Config.fromfile(file)
    assert cfg.codebase_config.module == ['mmunireplknet']
    assert cfg.codebase_config.type in ('mmpretrain', 'mmseg', 'mmdet')
    assert cfg.onnx_config.input_names == ['input']
    assert cfg.backend_config.type == ('tensorrt' if 'tensorrt' in file.stem else 'onnxruntime')
    if cfg.backend_config.type == 'tensorrt':
        assert cfg.backend_config.common_config.fp16_mode is False
        width, height = cfg.onnx_config.input_shape
        shapes = cfg.backend_config.model_inputs[0].input_shapes.input
        assert all(shape == [1, 3, height, width] for shape in shapes.values())
