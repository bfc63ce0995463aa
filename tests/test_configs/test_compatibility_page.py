"""The lines of the pages for configs of mmdet, mmseg and mmpretrain, merged into what they name."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmunireplknet import UniRepLKNet

from .any_config import shipped_file

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r'```python\n# (mm\w+): (\S+)\n(.*?)```', re.S)
BLOCKS = [
    pytest.param(*block, id=f'{page.name}-{block[0]}')
    for page in (ROOT / 'README.md', ROOT / 'docs' / 'compatibility.md')
    for block in BLOCK.findall(page.read_text())
]


def test_all_three_libraries_are_shown():
    assert {param.values[0] for param in BLOCKS} == {'mmdet', 'mmseg', 'mmpretrain'}


@pytest.mark.parametrize(('library', 'config', 'lines'), BLOCKS)
def test_lines_below_base(library, config, lines, tmp_path):
    file = tmp_path / 'config.py'
    file.write_text(f'_base_ = {str(shipped_file(library, config))!r}\n{lines}')
    cfg = Config.fromfile(file)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model).eval()
    assert isinstance(model.backbone, UniRepLKNet)
    with torch.no_grad():
        feature = model.extract_feat(torch.zeros(1, 3, 64, 64))
        outs = model(torch.zeros(1, 3, 64, 64), mode='tensor') if library != 'mmdet' else model.rpn_head(feature)
    first = outs[0][0] if library == 'mmdet' else outs[0]
    assert first.isfinite().all()
    if 'init_cfg' in cfg.model.backbone:
        assert cfg.model.backbone.init_cfg.checkpoint == 'unireplknet_s_in1k'
