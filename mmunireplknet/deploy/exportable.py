"""A whole model as a function of tensors, which is all that an exporter can write down."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from mmengine.config import Config
from torch import Tensor, nn

from ..models.reparam import switch_to_deploy
from ..models.unireplknet import UniRepLKNet
from .pooling import replace_pooling

__all__ = [
    'ExportError', 'Exportable', 'ExportableBackbone', 'ExportableClassifier', 'ExportableSegmentor', 'make_exportable',
]  # fmt: skip


class ExportError(ValueError):
    """Something that cannot be exported as it was asked for; the message says what to do instead."""


class Exportable(nn.Module):
    """A model that takes one image tensor and returns a tuple of tensors: what ``forward`` of a subclass is made of.

    A subclass sets the attributes below and defines ``compute``. Weights may be in half precision: the input is cast
    to it and floating outputs are returned in float32, so that who calls the exported model need not know.

    Args:
        model: The whole model in evaluation and deploy form. Not copied: export changes its pooling layers.

    Attributes:
        task: What the model does.
        input_name: Name of the input, (N, 3, H, W), normalized.
        output_names: Names of what ``compute`` returns, in order.
        meanings: One sentence for each output.
        dynamic_axes: For input and outputs the axes that may differ from call to call, by name: N, H, W or other.
        exporter: Which of torch's ONNX exporters writes it: 'dynamo', or 'torchscript' for the older one.
        pads: Whether it pads images itself, so that they have to come without padding.
    """

    model: Any
    task: Literal['features', 'classification', 'segmentation', 'detection', 'instance-segmentation']
    input_name: ClassVar[str] = 'input'
    output_names: tuple[str, ...]
    meanings: dict[str, str]
    dynamic_axes: dict[str, dict[int, str]]
    exporter: ClassVar[Literal['dynamo', 'torchscript']] = 'dynamo'
    pads: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Outputs for ``input`` (N, 3, H, W), in the order of ``output_names``."""
        weight = next(self.model.parameters())
        outputs = self.compute(input.to(weight.dtype))
        return tuple(out.float() if out.is_floating_point() else out for out in outputs)

    def compute(self, input: Tensor) -> tuple[Tensor, ...]:
        """As ``forward``, in the dtype of the weights."""
        raise NotImplementedError

    def align(self, reference: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """``outputs`` in the order of ``reference``, for a comparison of both.

        Lists of detections override this: two boxes of nearly the same score may have changed places.
        """
        return outputs


class ExportableBackbone(Exportable):
    """The backbone alone: 'feat0', 'feat1', ... (N, C, H / stride, W / stride), or 'feat' (N, C) of a trunk."""

    task = 'features'

    def __init__(self, model: UniRepLKNet) -> None:
        super().__init__(model)
        self.dynamic_axes = {self.input_name: {0: 'N', 2: 'H', 3: 'W'}}
        if model.gap_before_final_norm:
            self.output_names = ('feat',)
            self.meanings = {'feat': 'pooled feature (N, C)'}
            self.dynamic_axes['feat'] = {0: 'N'}
            return
        self.output_names = tuple(f'feat{i}' for i in model.out_indices)
        self.meanings = {f'feat{i}': f'feature map of stage {i}, stride {2 ** (i + 2)}' for i in model.out_indices}
        for i in model.out_indices:
            stride = 2 ** (i + 2)
            self.dynamic_axes[f'feat{i}'] = {0: 'N', 2: f'H/{stride}', 3: f'W/{stride}'}

    def compute(self, input: Tensor) -> tuple[Tensor, ...]:
        """Feature maps, one for each of ``out_indices``."""
        return self.model(input)


class ExportableClassifier(Exportable):
    """mmpretrain's ImageClassifier: 'logits' (N, classes)."""

    task = 'classification'
    output_names = ('logits',)
    meanings = {'logits': 'one logit a class; the softmax over them gives probabilities'}

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.dynamic_axes = {self.input_name: {0: 'N', 2: 'H', 3: 'W'}, 'logits': {0: 'N'}}

    def compute(self, input: Tensor) -> tuple[Tensor, ...]:
        """Logits (N, classes)."""
        return (self.model.head(self.model.extract_feat(input)),)


class ExportableSegmentor(Exportable):
    """mmseg's EncoderDecoder on whole images: 'logits' (N, classes, H, W), or 'labels' (N, H, W).

    A head with a single logit, of the foreground, has a threshold of its probability, which nobody who runs the model
    knows of: its logit is put before as that of the background, so that here, too, the largest is the class.

    Args:
        model: The segmentor.
        argmax: Return labels: what mmseg's postprocessing makes of the logits.
    """

    task = 'segmentation'

    def __init__(self, model: nn.Module, argmax: bool = False) -> None:
        super().__init__(model)
        self.argmax = argmax
        name, axes = ('labels', {0: 'N', 1: 'H', 2: 'W'}) if argmax else ('logits', {0: 'N', 2: 'H', 3: 'W'})
        self.output_names = (name,)
        self.meanings = {
            name: 'class of every pixel of the input'
            if argmax
            else 'one logit a class for every pixel of the input; the largest is the class'
        }
        self.dynamic_axes = {self.input_name: {0: 'N', 2: 'H', 3: 'W'}, name: axes}

    def compute(self, input: Tensor) -> tuple[Tensor, ...]:
        """Logits at the size of the input, or labels in int64."""
        size = input.shape[2:]
        logits = self.model.encode_decode(input, [dict(img_shape=size, pad_shape=size)])
        if self.model.out_channels == 1:
            threshold = torch.logit(torch.tensor(float(self.model.decode_head.threshold)), eps=1e-6).item()
            logits = logits.float()
            logits = torch.cat([torch.full_like(logits, threshold), logits], 1)
        return (logits.argmax(1) if self.argmax else logits,)


def make_exportable(
    model: nn.Module,
    cfg: Config,
    argmax: bool = False,
    backbone_only: bool = False,
    half: bool = False,
    deploy: bool = True,
) -> Exportable:
    """Reparameterize a whole model in place and wrap it for export.

    Args:
        model: Detector, segmentor, classifier or UniRepLKNet, in either form and mode; it is put into evaluation.
        cfg: Its config.
        argmax: Of a segmentor, labels instead of logits.
        backbone_only: Export the feature maps of the backbone.
        half: Weights in float16.
        deploy: False leaves the model in the form it has: what the exported model is compared with.

    Raises:
        ExportError: A model of another kind, or an option that does not fit it.
    """
    model.eval()
    if deploy:
        switch_to_deploy(model)
        replace_pooling(model)
    if half:
        model.half()
    exportable = _wrap(model, cfg, argmax, backbone_only)
    return exportable.eval().requires_grad_(False)


def _wrap(model: nn.Module, cfg: Config, argmax: bool, backbone_only: bool) -> Exportable:
    if argmax and (backbone_only or not hasattr(model, 'decode_head')):
        raise ExportError(f'argmax is for whole segmentors; {type(model).__name__} has no map of logits.')
    if backbone_only or isinstance(model, UniRepLKNet):
        backbone = next(m for m in model.modules() if isinstance(m, UniRepLKNet))
        return ExportableBackbone(backbone)
    if hasattr(model, 'decode_head') and hasattr(model, 'encode_decode'):
        return ExportableSegmentor(model, argmax)
    if hasattr(model, 'rpn_head') or hasattr(model, 'bbox_head') or hasattr(model, 'roi_head'):
        from .detection import make_detector  # it needs mmdet

        return make_detector(model, cfg)
    if hasattr(model, 'head') and hasattr(model, 'extract_feat'):
        return ExportableClassifier(model)
    raise ExportError(
        f'{type(model).__name__} cannot be exported whole: expected a classifier of mmpretrain, a segmentor of mmseg '
        'or a detector of mmdet. The backbone alone can be: backbone_only=True (--backbone-only).'
    )
