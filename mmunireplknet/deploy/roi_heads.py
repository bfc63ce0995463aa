"""Boxes and masks of mmdet's StandardRoIHead and CascadeRoIHead."""

from __future__ import annotations

from typing import Any

import torch
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor, nn

from .boxes import Rules, keep_best, read_rules
from .dense_heads import check_coder, decode
from .exportable import ExportError

__all__ = ['RoIFeatures', 'RoIInstances']


class RoIFeatures:
    """mmdet's SingleRoIExtractor: from each box the features of the level that fits its size.

    Args:
        extractor: With mmcv's RoIAlign by averages.

    Raises:
        ExportError: It is another extractor or layer.
    """

    def __init__(self, extractor: Any) -> None:
        layer: Any = extractor.roi_layers[0] if hasattr(extractor, 'roi_layers') else None
        if type(extractor) is not SingleRoIExtractor or type(layer) is not RoIAlign or layer.pool_mode != 'avg':
            raise ExportError(
                f'RoI features come from {type(extractor).__name__} with {layer}. Exported can be SingleRoIExtractor '
                "with RoIAlign, pool_mode='avg', as ONNX knows it."
            )
        self.extractor = extractor

    def __call__(self, maps: tuple[Tensor, ...], boxes: Tensor) -> Tensor:
        """Features (k, C, h, w) of ``boxes`` (k, 4), from ``maps`` (1, C, H, W) of each level."""
        layers = self.extractor.roi_layers
        rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1)
        if len(layers) == 1:
            return self._align(0, maps[0], rois)
        levels = self.extractor.map_roi_levels(rois, len(layers))
        chosen = [(levels == i).nonzero().squeeze(1) for i in range(len(layers))]
        features = torch.cat([self._align(i, maps[i], rois[rows]) for i, rows in enumerate(chosen)])
        return features[torch.argsort(torch.cat(chosen))]

    def _align(self, index: int, level: Tensor, rois: Tensor) -> Tensor:
        """In float32, which is what the runtimes' CPU kernels have."""
        layer = self.extractor.roi_layers[index]
        features = torch.ops.torchvision.roi_align(
            level.float(), rois, layer.spatial_scale, *layer.output_size, layer.sampling_ratio, layer.aligned
        )
        return features.to(level.dtype)


class RoIInstances:
    """What ``head.predict`` finds, as a function of feature maps and proposals of one image.

    Masks stay as the head gives them, on a grid over the box: ``deploy.masks.paste`` puts them into the image.

    Args:
        head: In evaluation; it stays where it is in the model.

    Raises:
        ExportError: A part of it, or its ``test_cfg``, is none of those built here.
    """

    def __init__(self, head: Any) -> None:
        if type(head) not in (StandardRoIHead, CascadeRoIHead) or head.with_shared_head:
            raise ExportError(
                f'The roi_head is {type(head).__name__}{" with a shared head" * head.with_shared_head}. Exported can '
                'be StandardRoIHead and CascadeRoIHead without one.'
            )
        self.head = head
        self.rules: Rules = read_rules(head.test_cfg, 'model.test_cfg.rcnn')
        self.bbox_heads = _listed(head.bbox_head)
        self.bbox_features = [RoIFeatures(x) for x in _listed(head.bbox_roi_extractor)]
        self.mask_heads = _listed(head.mask_head) if head.with_mask else []
        extractors = head.mask_roi_extractor if head.with_mask else []  # the boxes' own where they are shared
        self.mask_features = [RoIFeatures(x) for x in _listed(extractors)]
        for part in self.bbox_heads:
            self._check_bbox_head(part)
        for part in self.mask_heads:
            if type(part).forward is not FCNMaskHead.forward or type(part).predict_by_feat is not (
                FCNMaskHead.predict_by_feat
            ):
                raise ExportError(f'The mask_head is {type(part).__name__}. Exported can be FCNMaskHead.')

    @staticmethod
    def _check_bbox_head(head: Any) -> None:
        check_coder(head)
        unchanged = all(
            getattr(type(head), name) is getattr(BBoxHead, name)
            for name in ('predict_by_feat', '_predict_by_feat_single', 'regress_by_class')
        )
        if not unchanged or not head.with_cls or not head.with_reg or head.custom_cls_channels:
            raise ExportError(
                f'The bbox_head {type(head).__name__} makes its boxes or scores in a way of its own. Exported can be '
                'those of BBoxHead: Shared2FCBBoxHead, Shared4Conv1FCBBoxHead, ConvFCBBoxHead with a softmax.'
            )

    def __call__(self, maps: tuple[Tensor, ...], boxes: Tensor, size: Any) -> tuple[Tensor, ...]:
        """Instances, best first.

        Args:
            maps: (1, C, h, w) of each level.
            boxes: Proposals (n, 4).
            size: Height and width of the image; may be symbolic.

        Returns:
            Boxes (k, 4) in x1 y1 x2 y2, scores (k,), labels (k,) int64, and of a head with masks their
            probabilities (k, m, m).
        """
        total = torch.zeros((), device=boxes.device)
        last = len(self.bbox_heads) - 1
        for i, (head, features) in enumerate(zip(self.bbox_heads, self.bbox_features, strict=True)):
            logits, deltas = (out.float() for out in head(features(maps, boxes)))
            total = total + logits
            if i < last:
                boxes = _refine(head, boxes, logits, deltas, size)
        scores = (total / len(self.bbox_heads)).softmax(-1)[:, :-1]
        boxes, scores, labels = self._choose(boxes, scores, deltas, size)
        if not self.mask_heads:
            return boxes, scores, labels
        return boxes, scores, labels, self._masks(maps, boxes, labels)

    def _choose(self, boxes: Tensor, scores: Tensor, deltas: Tensor, size: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (k, 4), scores and labels (k,) of the proposals (n, 4) with scores (n, classes)."""
        head = self.bbox_heads[-1]
        classes = head.num_classes
        flat = scores.flatten()
        chosen = (flat > self.rules.score).nonzero().squeeze(1)
        rows, labels, scores = chosen // classes, chosen % classes, flat[chosen]
        deltas = deltas[rows] if head.reg_class_agnostic else deltas.reshape(-1, 4)[chosen]
        boxes = decode(head, boxes[rows], deltas, size)
        best = keep_best(boxes, scores, labels, self.rules)
        return boxes[best], scores[best], labels[best]

    def _masks(self, maps: tuple[Tensor, ...], boxes: Tensor, labels: Tensor) -> Tensor:
        """Probabilities (k, m, m), the mean over the stages."""
        total = torch.zeros((), device=boxes.device)
        for head, features in zip(self.mask_heads, self.mask_features, strict=True):
            masks = head(features(maps, boxes)).float().sigmoid()
            index = torch.zeros_like(labels) if head.class_agnostic else labels
            index = index[:, None, None, None].expand(-1, 1, masks.shape[2], masks.shape[3])
            total = total + masks.gather(1, index)[:, 0]
        return total / len(self.mask_heads)


def _listed(part: Any) -> list[Any]:
    return list(part) if isinstance(part, (nn.ModuleList, list)) else [part]


def _refine(head: Any, boxes: Tensor, logits: Tensor, deltas: Tensor, size: Any) -> Tensor:
    """The boxes (n, 4) for the next stage, by the deltas of the likeliest class."""
    if not head.reg_class_agnostic:
        likeliest = logits[:, :-1].argmax(1)[:, None, None].expand(-1, 1, 4)
        deltas = deltas.reshape(-1, head.num_classes, 4).gather(1, likeliest)[:, 0]
    return decode(head, boxes, deltas, size)
