"""What holds for every config, whatever its task."""

import inspect
import re

import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from mmunireplknet.models import CHECKPOINTS, UniRepLKNetBlock

from .comparing import CONFIGS, NAMES, build, load

SCOPES = {'': 'mmpretrain', 'upernet': 'mmseg', 'mask-rcnn': 'mmdet', 'cascade-mask-rcnn': 'mmdet'}
NAME = re.compile(
    r'(?:demo_)?(?:([a-z-]+)_)?(unireplknet_(a|f|p|n|t|s|b|l|xl)(-in22k)?|resnet18|convnext-atto)_[a-z\d_-]+'
)
READ_ELSEWHERE = {'custom_imports', 'difficulty', 'tta_model', 'tta_pipeline'}  # by mmengine and the tools


@pytest.mark.parametrize('name', NAMES)
def test_short(name):
    assert len((CONFIGS / f'{name}.py').read_text().splitlines()) <= 25


@pytest.mark.parametrize('name', NAMES)
def test_name(name):
    """<method>_<backbone>_<arch>_<data>: says what is in it."""
    method, backbone, arch, pretrained = NAME.fullmatch(name).groups()
    cfg = load(name)
    assert cfg.default_scope == SCOPES[method or '']
    assert cfg.model.backbone.type.rpartition('.')[2].lower() == re.sub(r'[\d_-].*', '', backbone)
    if arch is None:
        return
    assert cfg.model.backbone.arch == arch
    if start := cfg.model.backbone.get('init_cfg'):
        checkpoint = CHECKPOINTS[start.checkpoint]
        assert start.type == 'Pretrained'
        assert (checkpoint.arch, checkpoint.task) == (arch, 'classification')
        assert ('in22k' in start.checkpoint) == bool(pretrained)


@pytest.mark.parametrize('name', NAMES)
def test_what_every_run_needs(name):
    cfg = load(name)
    assert cfg.custom_imports == dict(imports=['mmunireplknet'], allow_failed_imports=False)
    assert cfg.default_hooks.checkpoint.type == 'AtomicCheckpointHook'
    hooks = [hook.type for hook in cfg.custom_hooks]
    assert hooks.count('RandomStateHook') == 1
    assert len(set(hooks)) == len(hooks)
    loaders = [cfg.train_dataloader, *filter(None, (cfg.val_dataloader, cfg.test_dataloader))]
    assert all(loader.dataset.data_root.startswith('data/') for loader in loaders)
    assert [loader.sampler.shuffle for loader in loaders] == [True, *[False] * (len(loaders) - 1)]


@pytest.mark.parametrize('name', NAMES)
def test_no_entry_is_misspelt(name):
    """What the Runner takes no argument for, and the file or its bases mention but once, has no effect."""
    cfg = load(name)
    others = cfg.keys() - inspect.signature(Runner.__init__).parameters.keys() - READ_ELSEWHERE
    assert [key for key in others if len(re.findall(rf'\b{key}\b', cfg.text)) < 2] == []


@pytest.mark.parametrize('name', NAMES)
def test_survives_being_written(name, monkeypatch):
    """The work dir holds the config as text, which mmengine can read again; the layout, which takes long, is yapf's."""
    for module in ('mmengine.config.config', 'yapf.yapflib.yapf_api'):  # where the two families look for it
        monkeypatch.setattr(f'{module}.FormatCode', lambda text, **_: (text, True), raising=False)
    cfg = load(name)
    assert Config.fromstring(cfg.pretty_text, '.py').to_dict() == cfg.to_dict()
    cfg.merge_from_dict({'model.backbone.init_cfg': None})
    assert cfg.model.backbone.init_cfg is None


@pytest.mark.parametrize('name', [name for name in NAMES if 'unireplknet' in name])
def test_builds(name):
    """With the drop path rates as published, rate_i = rate * i / (number of blocks - 1), and checkpointing."""
    backbone = load(name).model.backbone
    blocks = [m for m in build(name).backbone.modules() if isinstance(m, UniRepLKNetBlock)]
    expected = [backbone.get('drop_path_rate', 0.0) * i / (len(blocks) - 1) for i in range(len(blocks))]
    assert [getattr(block.drop_path, 'drop_prob', 0.0) for block in blocks] == pytest.approx(expected, abs=1e-7)
    assert {block.with_cp for block in blocks} == {backbone.get('with_cp', False)}
