"""Boxes of mmdet's dense heads, the RPN among them, from what their ``forward`` returns."""

from __future__ import annotations

import math
from typing import Any

import torch
from mmdet.models.dense_heads import GFLHead, RPNHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder
from mmdet.structures.bbox import distance2bbox
from torch import Tensor

from .boxes import Rules, clip, keep_best, large_enough, read_rules, top
from .exportable import ExportError

__all__ = ['DenseBoxes', 'check_coder', 'decode']

BUILT = (
    'the RPN, and dense heads whose boxes are those of mmdet\'s BaseDenseHead (RetinaNet, FCOS, ATSS, RTMDet '
    'and others) or GFLHead'
)  # fmt: skip
MAX_RATIO = abs(math.log(16 / 1000))  # of a box to the one it comes from, as mmdet's coder has it


def check_coder(head: Any) -> None:
    """Refuse a head whose boxes ``decode`` does not know.

    Raises:
        ExportError: Its coder is another.
    """
    coder = head.bbox_coder
    if type(coder) not in (DeltaXYWHBBoxCoder, DistancePointBBoxCoder):
        raise ExportError(
            f'{type(head).__name__} codes its boxes with {type(coder).__name__}. Exported can be '
            'DeltaXYWHBBoxCoder and DistancePointBBoxCoder.'
        )


def decode(head: Any, priors: Tensor, deltas: Tensor, size: Any) -> Tensor:
    """Boxes (n, 4) in pixels, by the head's coder, within the image where the coder does that.

    Args:
        head: Has the coder.
        priors: (n, 4) boxes or (n, 2) points.
        deltas: (n, 4).
        size: Height and width of the image; may be symbolic.
    """
    coder = head.bbox_coder
    boxes = (
        distance2bbox(priors, deltas) if isinstance(coder, DistancePointBBoxCoder) else _shift(coder, priors, deltas)
    )
    return clip(boxes, size) if coder.clip_border else boxes


def _shift(coder: DeltaXYWHBBoxCoder, boxes: Tensor, deltas: Tensor) -> Tensor:
    """``boxes`` (n, 4) moved by ``deltas``: mmdet's ``delta2bbox``, which a trace cannot follow.

    That asks whether n is 0, and a trace of an image without detections would always take that way.
    """
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    size = boxes[:, 2:] - boxes[:, :2]
    moved, grown = size * deltas[:, :2], deltas[:, 2:]
    if coder.add_ctr_clamp:
        moved, grown = moved.clamp(-coder.ctr_clamp, coder.ctr_clamp), grown.clamp(max=MAX_RATIO)
    else:
        grown = grown.clamp(-MAX_RATIO, MAX_RATIO)
    centre, half = (boxes[:, :2] + boxes[:, 2:]) * 0.5 + moved, size * grown.exp() * 0.5
    return torch.cat([centre - half, centre + half], 1)


def _level_rows(level: Tensor, columns: int) -> Tensor:
    """(1, priors * columns, H, W) as (H * W * priors, columns)."""
    return level[0].permute(1, 2, 0).reshape(-1, columns)


class DenseBoxes:
    """What ``head.predict`` finds, as a function of feature maps of one image.

    Args:
        head: Of the classes that the error below names, in evaluation; it stays where it is in the model.
        where: Place of its ``test_cfg`` in the config, for errors.

    Raises:
        ExportError: The head makes its boxes in a way of its own, or its ``test_cfg`` asks for something unknown.
    """

    def __init__(self, head: Any, where: str) -> None:
        single = getattr(type(head), '_predict_by_feat_single', None)
        known = (
            BaseDenseHead._predict_by_feat_single,
            RPNHead._predict_by_feat_single,
            GFLHead._predict_by_feat_single,
        )
        if single not in known or type(head).predict_by_feat is not BaseDenseHead.predict_by_feat:
            raise ExportError(f'{type(head).__name__} makes its boxes in a way of its own. Exported can be: {BUILT}.')
        if getattr(head.loss_cls, 'custom_cls_channels', False):
            raise ExportError(
                f'{type(head).__name__} has scores of its loss {type(head.loss_cls).__name__}: not built.'
            )
        check_coder(head)
        self.head = head
        self.rules: Rules = read_rules(head.test_cfg, where)
        self.integral = single is GFLHead._predict_by_feat_single
        self.proposals = single is RPNHead._predict_by_feat_single

    def __call__(self, maps: tuple[Tensor, ...], size: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, best first.

        Args:
            maps: (1, C, h, w) of each level.
            size: Height and width of the image; may be symbolic.

        Returns:
            Boxes (k, 4) in x1 y1 x2 y2, scores (k,), labels (k,) int64; all zero of proposals.
        """
        outs = self.head(maps)
        factors = outs[2] if len(outs) > 2 else [None] * len(outs[0])
        priors = self.head.prior_generator.grid_priors(
            [level.shape[-2:] for level in outs[0]], dtype=torch.float32, device=maps[0].device
        )
        levels = [
            self._candidates(i, *level) for i, level in enumerate(zip(outs[0], outs[1], factors, priors, strict=True))
        ]
        points, deltas, scores, groups, weights = (torch.cat(parts) for parts in zip(*levels, strict=True))
        boxes = decode(self.head, points, deltas, size)
        keep = torch.ones_like(scores, dtype=torch.bool) if self.proposals else scores > self.rules.score
        if self.rules.min_size >= 0:
            keep = keep & large_enough(boxes, self.rules.min_size)
        chosen = keep.nonzero().squeeze(1)
        boxes, scores, groups = boxes[chosen], (scores * weights)[chosen], groups[chosen]
        best = keep_best(boxes, scores, groups, self.rules)
        labels = torch.zeros_like(groups) if self.proposals else groups
        return boxes[best], scores[best], labels[best]

    def _candidates(
        self, index: int, logits: Tensor, deltas: Tensor, factors: Tensor | None, priors: Tensor
    ) -> tuple[Tensor, ...]:
        """Of one level the best by score: priors, deltas, scores, groups (classes, or the level), further factors."""
        head = self.head
        classes = head.cls_out_channels
        logits = _level_rows(logits.float(), classes)
        scores = logits.sigmoid() if head.use_sigmoid_cls else logits.softmax(-1)[:, :-1]
        classes = scores.shape[1]
        scores, order = top(scores.flatten(), self.rules.candidates)
        rows, labels = order // classes, order % classes
        weights = torch.ones_like(scores) if factors is None else _level_rows(factors.float(), 1).sigmoid()[rows, 0]
        if self.integral:
            stride = head.prior_generator.strides[index][0]
            deltas = head.integral(_level_rows(deltas.float(), 4 * (head.reg_max + 1))[rows]) * stride
            priors = head.anchor_center(priors[rows])
        else:
            deltas, priors = _level_rows(deltas.float(), 4)[rows], priors[rows]
        return priors, deltas, scores, torch.full_like(labels, index) if self.proposals else labels, weights
