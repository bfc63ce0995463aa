"""Configs as shipped whose heads use mmcv's operators or coordinates, with UniRepLKNet, in bfloat16 on the CPU."""

from dataclasses import replace

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

from .any_config import build, small_data, train_one_step
from .matrix import ROWS

# In bfloat16 torch's strided convolutions get wrong gradients from maps of one pixel width, as P6 of 64 pixels has.
SIZES = {
    'Mask R-CNN': (32, 64), 'Cascade Mask R-CNN': (32, 64), 'RetinaNet': (64, 128), 'FCOS': (64, 128),
    'TOOD': (64, 128), 'DINO': (192, 256), 'ArcFace': (64, 64),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('head', SIZES)
def test_shipped_config_trains(head):
    MMLogger.get_current_instance().setLevel('WARNING')
    row = replace(next(row for row in ROWS if row.head == head), size=SIZES[head])
    with DefaultScope.overwrite_default_scope(row.library):
        cfg, model = build(row)
        dtypes = set()
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(lambda _, __, y: dtypes.add(y.dtype))
        boxes = []
        if head == 'DINO':
            model.bbox_head.register_forward_hook(lambda _, __, given: boxes.append(given[1].dtype))
        train_one_step(cfg, model, small_data(row, cfg, model)(True), 'BF16OptimWrapper')
        assert dtypes == {torch.bfloat16}
        assert boxes == [torch.float32] * (head == 'DINO'), 'sums with reference points'
