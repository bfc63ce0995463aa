"""Boxes as an exporter can follow them: tensor operations only, and no size that Python has looked at.

Every function gives what mmdet gives, in the same order. NMS and RoIAlign are torchvision's operators, which
``torch.onnx`` writes as NonMaxSuppression and RoiAlign of the ONNX standard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .exportable import ExportError

__all__ = ['Rules', 'at_most', 'clip', 'keep_best', 'large_enough', 'read_rules', 'top']

KNOWN = {'score_thr', 'nms', 'max_per_img', 'nms_pre', 'min_bbox_size', 'mask_thr_binary'}
KNOWN_NMS = {'type', 'iou_threshold', 'iou_thr', 'class_agnostic', 'split_thr'}


@dataclass(frozen=True)
class Rules:
    """Which boxes stay: the part of mmdet's ``test_cfg`` that concerns one head.

    Attributes:
        iou: Of two boxes of one group that overlap by more, the one of the lower score goes.
        class_agnostic: All boxes are one group.
        limit: How many stay at the end; None for all.
        score: Only boxes with a higher score.
        candidates: How many of each level of the pyramid are looked at; None for all.
        min_size: Width and height must be larger; negative for no such rule.
    """

    iou: float
    class_agnostic: bool
    limit: int | None
    score: float
    candidates: int | None
    min_size: float


def read_rules(test_cfg: Mapping[str, Any] | None, where: str) -> Rules:
    """The rules in ``test_cfg``.

    Args:
        test_cfg: Of one head.
        where: Its place in the config, for errors.

    Raises:
        ExportError: There is none, or it asks for something that is not built here, such as Soft-NMS.
    """
    if not test_cfg:
        raise ExportError(f'The config has no {where}, so it is unknown which boxes to keep. Set its nms.')
    nms = test_cfg.get('nms') or {}
    unknown = sorted(set(test_cfg) - KNOWN) + [f'nms.{key}' for key in sorted(set(nms) - KNOWN_NMS)]
    iou = nms.get('iou_threshold', nms.get('iou_thr'))
    if unknown or nms.get('type', 'nms') != 'nms' or iou is None:
        raise ExportError(
            f'{where} is {dict(test_cfg)}{"; unknown: " + ", ".join(unknown) if unknown else ""}. Exported can be '
            f"{', '.join(sorted(KNOWN))}, with nms=dict(type='nms', iou_threshold=..., class_agnostic=...), which is "
            f'what ONNX has. Set that, for example --cfg-options {where}.nms="dict(type=\'nms\', iou_threshold=0.5)".'
        )
    limit, candidates = test_cfg.get('max_per_img', -1), test_cfg.get('nms_pre', -1)
    return Rules(
        iou=float(iou),
        class_agnostic=bool(nms.get('class_agnostic', False)),
        limit=limit if limit > 0 else None,
        score=float(test_cfg.get('score_thr', 0)),
        candidates=candidates if candidates > 0 else None,
        min_size=float(test_cfg.get('min_bbox_size', -1)),
    )


def at_most(size: Any, limit: int) -> Any:
    """``min(size, limit)`` of a size that may be symbolic: a Tensor while tracing, a SymInt in torch.export."""
    if isinstance(size, Tensor):
        return torch.minimum(size, torch.tensor(limit))
    return torch.sym_min(size, limit)


def top(scores: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """The ``count`` highest of ``scores`` (n,), or all if there are fewer, in falling order, and where they were."""
    size = scores.shape[0]
    return torch.topk(scores, size if count is None else at_most(size, count))


def clip(boxes: Tensor, size: Any) -> Tensor:
    """Boxes (..., 4) in x1 y1 x2 y2 within an image of ``size`` (height, width), which may be symbolic."""
    height, width = (torch.scalar_tensor(length, dtype=boxes.dtype, device=boxes.device) for length in size)
    return torch.minimum(boxes.clamp(min=0), torch.stack([width, height, width, height]))


def large_enough(boxes: Tensor, min_size: float) -> Tensor:
    """Which of the boxes (n, 4) are wider and higher than ``min_size`` pixels."""
    return (boxes[:, 2] - boxes[:, 0] > min_size) & (boxes[:, 3] - boxes[:, 1] > min_size)


def keep_best(boxes: Tensor, scores: Tensor, groups: Tensor, rules: Rules) -> Tensor:
    """Indices of the boxes that stay, by falling score: NMS within each group, as mmcv's ``batched_nms``.

    The groups are moved apart by more than the largest coordinate, and all go through one NMS. The same sums of the
    same numbers as in mmcv keep the rounding, on which a box at the threshold depends.

    Args:
        boxes: (n, 4), of non-negative coordinates.
        scores: (n,).
        groups: (n,) classes or levels.
        rules: IoU, limit and whether the groups count.
    """
    if not rules.class_agnostic:
        largest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max()  # n may be 0
        boxes = boxes + (groups.to(boxes) * (largest + 1))[:, None]
    kept = torch.ops.torchvision.nms(boxes, scores, rules.iou)
    return kept if rules.limit is None else kept[: rules.limit]
