"""A model in every form that it can be deployed in, to be timed in one process."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from ..deploy.exportable import Exportable, ExportError, make_exportable
from ..deploy.formats import FORMATS, Options, check_packages, open_exported, write
from ..deploy.parity import compare
from ..deploy.pooling import replace_pooling
from ..models.checkpoint import load_checkpoint
from ..models.layers import GRN
from ..models.reparam import switch_to_deploy
from ..models.unireplknet import UniRepLKNet
from .benchmark import Check, Row
from .peers import Contender, published_form

__all__ = ['EXPORTED', 'exported_folders', 'format_row', 'peer_forms', 'unireplknet_forms']

EXPORTED = ('torchscript', 'onnx', 'openvino')
PUBLISHED = 'published form'
AGREEMENT = 1e-3  # relative difference of outputs above which something else was timed
PEER = 'peer: '
TARGETS = {'openvino': 1.0, 'onnx': 1.15}  # of the peer's time in the same format, at most


class _Maps(Exportable):
    """The backbone of a model of any kind: its feature maps."""

    task = 'features'

    def __init__(self, model: nn.Module, outputs: int) -> None:
        super().__init__(model)
        self.output_names = tuple(f'feat{i}' for i in range(outputs))
        self.meanings = dict.fromkeys(self.output_names, 'feature map')
        self.dynamic_axes = {self.input_name: {}}

    def compute(self, input: Tensor) -> tuple[Tensor, ...]:
        """Feature maps."""
        return tuple(self.model(input))


def _ask_for_maps(backbone: ConfigDict) -> None:
    """Let a backbone return the maps of all stages, as detectors take them, and not a classifier's pooled vector."""
    backbone.out_indices = (0, 1, 2, 3)
    with MODELS.switch_scope_and_registry(None) as registry:
        takes = inspect.signature(registry.get(backbone.type)).parameters
    if 'gap_before_final_norm' in takes:
        backbone.gap_before_final_norm = False


def _build(cfg: Config, checkpoint: str | None, backbone_only: bool) -> nn.Module:
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    cfg = copy.deepcopy(cfg)
    if 'data_preprocessor' in cfg:  # beside the model, as mmpretrain's configs have it
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    if backbone_only and checkpoint is None:
        _ask_for_maps(cfg.model.backbone)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    if checkpoint:
        load_checkpoint(model, checkpoint)
    else:
        for module in model.modules():
            if isinstance(module, GRN):  # zero at first, which a runtime might leave out
                nn.init.normal_(module.gamma, std=0.3)
    return model.eval()


def _wrap(model: nn.Module, cfg: Config, backbone_only: bool, image: Tensor, ready: bool) -> Exportable:
    """The model, or its backbone, as a function of tensors; ``ready`` to be exported, or as it was built."""
    if ready:
        if any(isinstance(m, UniRepLKNet) for m in model.modules()):
            switch_to_deploy(model)
        replace_pooling(model)
    if not backbone_only:
        return make_exportable(model, cfg, deploy=False)
    backbone: Any = model.backbone
    with torch.no_grad():
        outputs = len(backbone(image))
    return _Maps(backbone, outputs).eval().requires_grad_(False)


def _eager(exportable: Callable[[Tensor], object], image: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return exportable(image)

    return run


def _exported(
    exportable: Exportable, image: Tensor, formats: Sequence[str], folder: Path, threads: int
) -> dict[str, Contender]:
    """The model written in each of ``formats`` for this size of image, and opened again."""
    found = {}
    for name in formats:
        check_packages(name)
        place = folder / name
        place.mkdir(parents=True)
        run = open_exported(write(name, exportable, image, place, Options(dynamic=False)), exportable, threads)
        found[name] = Contender(partial(run, image.numpy()))
    return found


def unireplknet_forms(
    cfg: Config,
    checkpoint: str | None,
    image: Tensor,
    folder: Path,
    threads: int,
    formats: Sequence[str] = EXPORTED,
    backbone_only: bool = False,
    compiled: bool = True,
) -> dict[str, Contender]:
    """A model with UniRepLKNet in every form.

    'published form' has separate branches, torch's own convolutions and NCHW maps, as the published code; 'training
    form' and 'deploy form' are this package without compilation; then ``torch.compile`` and the exported files.

    Args:
        cfg: Its config, in training form.
        checkpoint: Weights; None for random ones.
        image: (N, 3, H, W), normalized.
        folder: Empty, for the exported files.
        threads: Of onnxruntime and OpenVINO; the others follow torch.
        formats: Of ``deploy.formats``.
        backbone_only: Time the backbone alone.
        compiled: Whether torch.compile takes part.

    Raises:
        ExportError: A model that cannot be exported, or a form that computes something else.
    """
    plain = copy.deepcopy(cfg)
    plain.model.backbone.update(fused=False, channels_last=False)
    published = published_form(
        _wrap(_build(plain, checkpoint, backbone_only), cfg, backbone_only, image, False), 'NCHW'
    )
    training = _wrap(_build(cfg, checkpoint, backbone_only), cfg, backbone_only, image, False)
    merged = copy.deepcopy(training)
    switch_to_deploy(merged)
    forms = {
        PUBLISHED: Contender(_eager(published, image)),
        'training form': Contender(_eager(training, image)),
        'deploy form': Contender(_eager(merged, image)),
    }
    if compiled:
        forms['torch.compile'] = Contender(_eager(torch.compile(merged), image))
    ready = _wrap(_build(cfg, checkpoint, backbone_only), cfg, backbone_only, image, True)
    forms |= _exported(ready, image, formats, folder, threads)
    _check(ready, forms)
    return forms


def _check(exportable: Exportable, forms: dict[str, Contender]) -> None:
    """Compare the outputs of all forms with those of the published one; it also compiles what is compiled.

    Raises:
        ExportError: One differs.
    """
    reference = [torch.as_tensor(out) for out in forms[PUBLISHED].run()]  # type: ignore[attr-defined]
    for name, form in forms.items():
        outputs = [torch.as_tensor(out) for out in form.run()]  # type: ignore[attr-defined]
        for output, difference in compare(exportable, reference, outputs).items():
            if not difference.relative <= AGREEMENT:
                raise ExportError(
                    f'{output} of {name} differs from that of the {PUBLISHED} by {difference.relative:.1e}, more than '
                    f'{AGREEMENT:g}: not the same thing would be timed.'
                )


def exported_folders(folders: Sequence[Path], image: Tensor, threads: int) -> dict[str, Contender]:
    """Models that ``tools/export.py`` has written, int8 ones for instance, by the names of their folders.

    Their outputs are not compared: their own reports do that.

    Args:
        folders: With meta.json.
        image: (N, 3, H, W), normalized.
        threads: Of onnxruntime and OpenVINO.
    """
    found = {}
    for folder in folders:
        run = open_exported(folder / json.loads((folder / 'meta.json').read_text())['file'], threads=threads)
        found[folder.name] = Contender(partial(run, image.numpy()))
    return found


def peer_forms(
    cfg: Config, image: Tensor, folder: Path, threads: int, formats: Sequence[str], backbone_only: bool
) -> dict[str, Contender]:
    """Another model, with random weights, without compilation and exported the same way; names begin with 'peer: '."""
    model = _wrap(_build(cfg, None, backbone_only), cfg, backbone_only, image, True)
    forms = {'eager': Contender(_eager(model, image)), **_exported(model, image, formats, folder, threads)}
    return {PEER + name: form for name, form in forms.items()}


def format_row(
    name: str,
    contenders: Callable[[], dict[str, Contender]],
    formats: Sequence[str],
    peer: bool,
    compiled: bool,
    targets: bool = False,
) -> Row:
    """The row of the benchmark: each form against the published one, each exported file against the peer's.

    Args:
        name: Of the row.
        contenders: Builds them.
        formats: Exported ones.
        peer: Whether there is one.
        compiled: Whether torch.compile takes part.
        targets: Whether to hold it against what is required of the backbone T beside ConvNeXt-T.
    """
    quickest, bounds = ({'openvino': 2.0}, TARGETS) if targets else ({}, {})
    eager = ['deploy form', *(['torch.compile'] if compiled else [])]
    checks = [Check('speed-up', (PUBLISHED,), ours=form) for form in eager]
    checks += [Check('speed-up', (PUBLISHED,), quickest.get(form), ours=form) for form in formats]
    if peer:
        checks += [Check('time', (PEER + form,), bounds.get(form), ours=form) for form in formats if form in FORMATS]
    return Row(name, contenders, tuple(checks), seconds=40)
