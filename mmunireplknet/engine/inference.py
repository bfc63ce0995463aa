"""Load a whole model from a config and a checkpoint, and predict on image files, for every task."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import mmcv
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, VISUALIZERS, init_default_scope
from torch import nn

from ..models.checkpoint import load_checkpoint, read_checkpoint
from ..models.reparam import switch_to_deploy

__all__ = ['Predictor', 'dataset_meta', 'find_images']

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


def find_images(names: Iterable[str]) -> list[Path]:
    """Image files named by files, folders (searched to any depth) and globs, in order, each once.

    Raises:
        FileNotFoundError: A name that matches no image.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(name)
        if path.is_file():
            matches = [path]
        else:
            candidates = path.rglob('*') if path.is_dir() else map(Path, glob.glob(name, recursive=True))
            matches = sorted(p for p in candidates if p.suffix.lower() in IMAGE_SUFFIXES)
        if not matches:
            raise FileNotFoundError(f'{name}: no such file, no image ({", ".join(IMAGE_SUFFIXES)}) in it, or no match.')
        found.update(dict.fromkeys(matches))
    return list(found)


def dataset_meta(cfg: Config, checkpoint: str) -> dict[str, Any]:
    """Classes, palette and the like: what a checkpoint says, or else the config's test data."""
    meta = read_checkpoint(checkpoint).get('meta') or {}
    if 'dataset_meta' in meta:
        return dict(meta['dataset_meta'])
    dataset = cfg.test_dataloader.dataset
    return {**getattr(DATASETS.get(dataset.type), 'METAINFO', {}), **dataset.get('metainfo', {})}


class Predictor:
    """A model in evaluation with its test pipeline and visualizer.

    Args:
        cfg: Config of mmseg, mmdet or mmpretrain.
        checkpoint: File, https address or short name of a published file; loaded strictly.
        device: Where to run; a GPU if there is one by default.
        deploy: Reparameterize the backbone after loading.

    Raises:
        CheckpointError: The checkpoint is not one or does not fit.
        ValueError: The config is of another task family.
    """

    def __init__(self, cfg: Config, checkpoint: str, device: str | None = None, deploy: bool = False) -> None:
        self.scope = cfg.get('default_scope', 'mmengine')
        if self.scope not in ('mmseg', 'mmdet', 'mmpretrain'):
            raise ValueError(f'default_scope={self.scope!r}: expected a config of mmseg, mmdet or mmpretrain.')
        init_default_scope(self.scope)
        if 'test_pipeline' not in cfg:  # where mmseg's inference_model looks
            cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
        device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
        if 'data_preprocessor' in cfg:  # beside the model, as mmpretrain's configs have it
            cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
        model: nn.Module = MODELS.build(cfg.model)
        load_checkpoint(model, checkpoint)
        model = revert_sync_batchnorm(model).to(device).eval()
        meta = dataset_meta(cfg, checkpoint)
        # Where the inference functions of mmseg and mmdet look, and mmpretrain's.
        vars(model).update(cfg=cfg, dataset_meta=meta, _config=cfg, _dataset_meta=meta)
        self.model = switch_to_deploy(model) if deploy else model
        self.visualizer = VISUALIZERS.build({**cfg.visualizer, 'name': f'predict-{id(self)}', 'vis_backends': None})
        self.visualizer.dataset_meta = meta

    def __call__(self, image: str | Path) -> Any:
        """Predict on one image file; returns the data sample of the task."""
        if self.scope == 'mmseg':
            from mmseg.apis import inference_model
        elif self.scope == 'mmdet':
            from mmdet.apis import inference_detector as inference_model
        else:
            from mmpretrain.apis import ImageClassificationInferencer

            return ImageClassificationInferencer(self.model)(str(image), return_datasamples=True)[0]
        return inference_model(self.model, str(image))

    def draw(self, image: str | Path, sample: Any, out: str | Path) -> None:
        """Write ``image`` with the prediction over it to ``out``."""
        picture = mmcv.imread(str(image), channel_order='rgb')
        if self.scope == 'mmpretrain':
            draw = self.visualizer.visualize_cls
        else:
            draw = partial(self.visualizer.add_datasample, '')
        draw(picture, sample, draw_gt=False, show=False, out_file=str(out))
