"""The five lines of the README, merged into configs as mmseg ships them."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / 'README.md').read_text()


@pytest.mark.parametrize('base', ['upernet/upernet_r50_4xb4-160k_ade20k-512x512.py'])
def test_five_lines_in_a_stock_config(base, tmp_path):
    lines = next(block for block in re.findall(r'```python\n(.*?)```', README, re.S) if 'custom_imports' in block)
    stock = Path(find_spec('mmseg').origin).parent / '.mim' / 'configs' / base
    config = tmp_path / 'config.py'
    config.write_text(f'_base_ = {str(stock)!r}\n{lines}')
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    assert cfg.model.backbone.pop('init_cfg').checkpoint == 'unireplknet_s_in1k'
    with torch.no_grad():
        maps = model.eval().backbone(torch.zeros(1, 3, 64, 64))
        assert model.decode_head(maps).shape == (1, 150, 16, 16)
        assert model.auxiliary_head(maps).shape == (1, 150, 4, 4)
