"""tools/use_unireplknet.py as a user calls it."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmunireplknet import UniRepLKNet

from .test_command_line import run_tool


def stock(library, config):
    pytest.importorskip(f'{library}.models')
    return Path(find_spec(library).origin).parent / '.mim' / 'configs' / config


def test_the_written_config_loads_and_builds(tmp_path):
    out = tmp_path / 'atss_unireplknet_a.py'
    source = stock('mmdet', 'atss/atss_r18_fpn_8xb8-amp-lsj-200e_coco.py')
    options = ['--arch', 'a', '--checkpoint', 'unireplknet_a_in1k', '--layer-decay', 0.9]
    assert (
        run_tool('use_unireplknet.py', source, out, *options, '--cfg-options', 'model.bbox_head.num_classes=3') is None
    )
    cfg = Config.fromfile(out)
    assert cfg.custom_imports['imports'] == ['mmunireplknet']
    assert not {'work_dir', 'launcher'} & set(cfg)
    assert cfg.optim_wrapper.paramwise_cfg.decay_rate == 0.9
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    assert isinstance(model.backbone, UniRepLKNet)
    assert model.bbox_head.num_classes == 3
    assert 'pass --overwrite' in run_tool('use_unireplknet.py', source, out)


def test_errors_are_one_sentence(tmp_path):
    source = stock('mmpretrain', 'vgg/vgg16_8xb16_voc.py')
    message = run_tool('use_unireplknet.py', source, tmp_path / 'out.py')
    assert 'VGG cannot be run by itself' in message
    assert '\n' not in message
    assert 'There is no config' in run_tool('use_unireplknet.py', tmp_path / 'nothing.py', tmp_path / 'out.py')
    assert not list(tmp_path.iterdir())
