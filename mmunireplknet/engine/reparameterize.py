"""A training checkpoint into a deploy checkpoint, with the difference measured."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import save_checkpoint

from ..models.checkpoint import CheckpointError, load_checkpoint, read_checkpoint
from ..models.reparam import switch_to_deploy
from ..models.unireplknet import UniRepLKNet
from .atomic_checkpoint_hook import BACKEND_NAME

__all__ = ['reparameterize_checkpoint']

TOLERANCE = 1e-4


def reparameterize_checkpoint(cfg: Config, checkpoint: str, out: str | Path) -> float:
    """Write the deploy form of ``checkpoint`` to ``out``; ``meta`` is kept, optimizer states are left out.

    Args:
        cfg: Config of the whole model, training form.
        checkpoint: File, https address or short name of a published file.
        out: File to write, atomically.

    Returns:
        The largest relative L2 difference of the backbone's outputs between both forms, on a random image.

    Raises:
        CheckpointError: The checkpoint is not a training checkpoint of this config, or both forms differ by
            more than 1e-4, in which case nothing is written.
    """
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model = MODELS.build(cfg.model)
    load_checkpoint(model, checkpoint)
    model.eval()
    backbone: UniRepLKNet = next(m for m in model.modules() if isinstance(m, UniRepLKNet))
    if backbone.deploy:
        raise CheckpointError(f'{checkpoint} is in deploy form already: there is nothing to convert.')
    before = copy.deepcopy(backbone)
    switch_to_deploy(model)
    error = _difference(before, backbone)
    if not error <= TOLERANCE:
        raise CheckpointError(f'both forms differ by {error:.1e}, more than {TOLERANCE}: {out} was not written.')
    meta = read_checkpoint(checkpoint).get('meta') or {}
    contents = dict(meta=meta, state_dict=model.state_dict())
    save_checkpoint(contents, os.fspath(out), backend_args=dict(backend=BACKEND_NAME))
    return error


@torch.no_grad()
def _difference(before: UniRepLKNet, after: UniRepLKNet) -> float:
    weight = next(before.parameters())
    image = torch.randn(1, before.in_channels, 128, 128, generator=torch.Generator().manual_seed(0))
    pairs = zip(before(image.to(weight)), after(image.to(weight)), strict=True)
    return max(float((b.double() - a.double()).norm() / a.double().norm()) for a, b in pairs)
