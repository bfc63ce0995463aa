"""mmdet's detectors and instance segmentors as functions of tensors, with NMS inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from mmengine.config import Config
from torch import Tensor, nn

from ..compat import ensure_detection_operators
from .exportable import Exportable, ExportError

if TYPE_CHECKING:  # these two need mmdet
    from .dense_heads import DenseBoxes
    from .roi_heads import RoIInstances

__all__ = ['ExportableDetector', 'align_detections', 'make_detector']


class ExportableDetector(Exportable):
    """A detector of mmdet on one image: 'dets' (1, K, 5), 'labels' (1, K) and of a segmentor 'masks' (1, K, m, m).

    The image may have any size: padding to a multiple of what the config's data_preprocessor pads to happens inside,
    and boxes are clipped to the image, so that the result is mmdet's ``predict(rescale=False)``, in set and order.
    One image at a time, since ONNX's NonMaxSuppression of many images has no equal number of boxes for each.

    Args:
        model: A two-stage or single-stage detector, in evaluation and deploy form.
        boxes: What its dense head finds; of a two-stage detector the proposals.
        instances: What its roi_head makes of them.

    Raises:
        ExportError: A part of the model is none of those built here; the message names them.
    """

    task: Literal['detection', 'instance-segmentation'] = 'detection'  # type: ignore[assignment]
    exporter = 'torchscript'
    pads = True

    def __init__(self, model: nn.Module, boxes: DenseBoxes, instances: RoIInstances | None = None) -> None:
        super().__init__(model)
        self.boxes, self.instances = boxes, instances
        self.divisor = int(getattr(model.data_preprocessor, 'pad_size_divisor', 1))
        self.pad_value = float(getattr(model.data_preprocessor, 'pad_value', 0))
        self.output_names = ('dets', 'labels')
        self.meanings = {
            'dets': 'x1 y1 x2 y2 in pixels of the input, and the score; best first',
            'labels': 'class of each box',
        }
        self.dynamic_axes = {self.input_name: {2: 'H', 3: 'W'}, 'dets': {1: 'K'}, 'labels': {1: 'K'}}
        if instances is not None and len(instances.mask_heads):
            self.output_names = (*self.output_names, 'masks')
            self.meanings['masks'] = 'mask probabilities on a grid over each box'
            self.dynamic_axes['masks'] = {1: 'K'}
            self.task = 'instance-segmentation'

    def compute(self, input: Tensor) -> tuple[Tensor, ...]:
        """Detections in ``input`` (1, 3, H, W).

        Raises:
            ValueError: There is more than one image.
        """
        if not torch.jit.is_tracing() and input.shape[0] != 1:
            raise ValueError(f'{input.shape[0]} images were given; a detector takes one at a time: (1, 3, H, W).')
        size = input.shape[2:]
        maps = self.model.extract_feat(self._pad(input))
        boxes, scores, labels, *masks = self.boxes(maps, size)
        if self.instances is not None:
            boxes, scores, labels, *masks = self.instances(maps, boxes, size)
        return tuple(out[None] for out in (torch.cat([boxes, scores[:, None]], 1), labels, *masks))

    def _pad(self, input: Tensor) -> Tensor:
        """Below and to the right, as the data_preprocessor does."""
        if self.divisor <= 1:
            return input
        height, width = input.shape[2:]
        return F.pad(input, (0, -width % self.divisor, 0, -height % self.divisor), value=self.pad_value)

    def align(self, reference: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """``outputs`` in the order of ``reference``, see ``align_detections``."""
        return align_detections(reference, outputs)


def align_detections(reference: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``outputs`` in the order of ``reference``: to each box there the nearest of its class, once."""
    dets, labels = outputs[0][0], outputs[1][0]
    if outputs[0].shape != reference[0].shape:
        return outputs
    distance = (reference[0][0][:, None] - dets[None]).abs().amax(2)
    distance = distance.masked_fill(reference[1][0][:, None] != labels[None], torch.inf)
    order = []
    for row in distance:
        order.append(int(row.argmin()))
        distance[:, order[-1]] = torch.finfo(distance.dtype).max if row.isinf().any() else torch.inf
    return tuple(out[:, torch.tensor(order, dtype=torch.long)] for out in outputs)


def make_detector(model: nn.Module, cfg: Config) -> ExportableDetector:
    """Wrap a detector of mmdet for export.

    Args:
        model: In evaluation and deploy form.
        cfg: Its config.

    Raises:
        ExportError: A part of the model is none of those built here; the message names them.
        ModuleNotFoundError: There is no torchvision.
    """
    ensure_detection_operators()
    from mmdet.models.detectors import SingleStageDetector, TwoStageDetector

    from .dense_heads import DenseBoxes
    from .roi_heads import RoIInstances

    predict: Any = getattr(type(model), 'predict', None)
    if predict is TwoStageDetector.predict:
        return ExportableDetector(model, DenseBoxes(model.rpn_head, 'model.test_cfg.rpn'), RoIInstances(model.roi_head))
    if predict is SingleStageDetector.predict:
        return ExportableDetector(model, DenseBoxes(model.bbox_head, 'model.test_cfg'))
    raise ExportError(
        f'{type(model).__name__} predicts in a way of its own. Exported can be two-stage detectors with an RPN '
        '(Faster, Mask, Cascade and Cascade Mask R-CNN) and single-stage ones with dense boxes (RetinaNet, FCOS, ATSS, '
        'GFL, RTMDet). The backbone alone can be: backbone_only=True (--backbone-only).'
    )
