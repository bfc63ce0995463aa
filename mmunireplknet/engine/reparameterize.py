"""Training checkpoints into deploy checkpoints, with the difference measured before anything is written."""

from __future__ import annotations

import copy
import glob
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import save_checkpoint
from torch import Tensor, nn

from ..models.checkpoint import CheckpointError, identify, load_checkpoint, read_checkpoint
from ..models.checkpoint_file import all_tensors
from ..models.reparam import switch_to_deploy
from ..models.unireplknet import UniRepLKNet
from .atomic_checkpoint_hook import BACKEND_NAME
from .form_parity import Images, Parity, compare_forms, keep_few, prepare_images

__all__ = [
    'AlreadyDeployedError', 'ParityError', 'Reparameterizer', 'deploy_mark', 'find_checkpoints', 'first_images',
    'reparameterize_all', 'reparameterize_checkpoint',
]  # fmt: skip

MARK = 'mmunireplknet'  # entry of meta
SUFFIXES = ('.pth', '.safetensors')


class AlreadyDeployedError(CheckpointError):
    """A checkpoint in deploy form, where one in training form was expected."""


class ParityError(CheckpointError):
    """Both forms of a backbone differ by more than rounding explains."""


class Reparameterizer:
    """Merges the backbones in state dicts of one model. It works on copies, on the CPU: ``model`` is only read.

    Args:
        model: Detector, segmentor, classifier or backbone in training form; DDP and the like around it are fine.
        tolerance: Largest relative L2 difference of a map, instead of ``form_parity.tolerance_of``.

    Attributes:
        backbones: Copies of the backbones, by name.
        preprocessor: Copy of the model's data preprocessor, or None.

    Raises:
        CheckpointError: There is no UniRepLKNet in ``model``, it is in deploy form, or its weights are sharded.
        TypeError: Its norm cannot be folded (GN, LN).
    """

    def __init__(self, model: nn.Module, tolerance: float | None = None) -> None:
        kinds = {cls.__name__ for m in model.modules() for cls in type(m).__mro__}
        if kinds & {'FullyShardedDataParallel', 'FSDPModule'}:
            raise CheckpointError(
                f'{type(model).__name__} shards its weights over the processes: no process can merge them. Gather '
                'them in a checkpoint and run python tools/reparameterize.py CONFIG CHECKPOINT OUT.'
            )
        while is_model_wrapper(model):
            model = model.module  # type: ignore[assignment]
        found = {name: m for name, m in model.named_modules() if isinstance(m, UniRepLKNet)}
        if not found:
            raise CheckpointError(
                f'{type(model).__name__} holds no UniRepLKNet, so there is nothing to reparameterize.'
            )
        self.backbones = {name: copy.deepcopy(m).cpu().eval().requires_grad_(False) for name, m in found.items()}
        for backbone in self.backbones.values():
            if backbone.deploy:
                raise AlreadyDeployedError(
                    'the model is built in deploy form (deploy=True), so there is nothing to convert: give the config '
                    'of the training form.'
                )
            backbone.check_foldable()
        preprocessor = getattr(model, 'data_preprocessor', None)
        self.preprocessor: nn.Module | None = copy.deepcopy(preprocessor).to('cpu') if preprocessor else None
        self.tolerance = tolerance

    def prepare(self, inputs: Tensor | list[Tensor] | None, origin: str) -> Images | None:
        """See ``prepare_images``."""
        return prepare_images(inputs, self.preprocessor, origin)

    def merge(self, state: Mapping[str, Tensor], images: Images | None = None) -> tuple[dict[str, Tensor], Parity]:
        """Merge the backbones in ``state``; everything else is taken over as it is.

        Args:
            state: State dict of the whole model in training form, not changed.
            images: For the comparison of both forms; random ones if None.

        Returns:
            The state dict in deploy form, and how far its maps are from those of the training form.

        Raises:
            CheckpointError: ``state`` is not of this model.
            ParityError: Some map is farther off than it may be.
        """
        merged: OrderedDict[str, Tensor] = OrderedDict(state)
        if (metadata := getattr(state, '_metadata', None)) is not None:
            merged._metadata = metadata  # type: ignore[attr-defined]  # versions, which some layers look at
        errors: dict[str, float] = {}
        tolerances: dict[str, float] = {}
        for name, backbone in self.backbones.items():
            prefix = f'{name}.' if name else ''
            own = {key.removeprefix(prefix): value for key, value in merged.items() if key.startswith(prefix)}
            training = _with_dtype(backbone, own)
            training.load_state_dict(own)
            deploy = _folded(training)
            for found in self._compare(name or 'backbone', training, deploy, images):
                errors.update(found.errors)
                tolerances.update(found.tolerances)
                parity = Parity(errors, tolerances, found.images, found.dtype)
            for key in own:
                del merged[prefix + key]
            merged.update({prefix + key: value for key, value in deploy.state_dict().items()})
        if not parity.passed:
            raise ParityError(
                f'the deploy form does not compute what the training form does: {parity}. Nothing was written. Weights '
                'or BN statistics near the limits of their dtype can do this; else please report it with the weights.'
            )
        return merged, parity

    def _compare(
        self, name: str, training: UniRepLKNet, deploy: UniRepLKNet, images: Images | None
    ) -> Iterator[Parity]:
        """Compare both forms as they are; half-precision weights first in float32, where small faults show."""
        if next(training.parameters()).dtype in (torch.float16, torch.bfloat16):
            wide = copy.deepcopy(training).float()
            yield compare_forms(f'{name} as float32', wide, _folded(wide), images, self.tolerance)
        yield compare_forms(name, training, deploy, images, self.tolerance)

    def write(
        self,
        out: str | Path,
        meta: Mapping[str, Any],
        state: Mapping[str, Tensor],
        source: str,
        images: Images | None,
        writer: str,
    ) -> Parity:
        """Merge ``state`` and write it to ``out``, atomically, with ``meta`` and a mark of its form.

        Args:
            out: File to write.
            meta: Of the training checkpoint; all of it is kept.
            state: As for ``merge``.
            source: Name of the training checkpoint, for the mark.
            images: As for ``merge``.
            writer: Who writes it, for the mark.

        Raises:
            CheckpointError: As ``merge``; nothing is written then.
        """
        from .. import __version__

        merged, parity = self.merge(state, images)
        mark = dict(
            form='deploy', source=Path(source).name, writer=writer, version=__version__,
            relative_difference=parity.errors, tolerance=parity.tolerances, images=parity.images, dtype=parity.dtype,
        )  # fmt: skip
        contents = dict(meta={**meta, MARK: mark}, state_dict=merged)
        save_checkpoint(contents, os.fspath(out), backend_args=dict(backend=BACKEND_NAME))
        return parity


def _folded(training: UniRepLKNet) -> UniRepLKNet:
    deploy = copy.deepcopy(training)
    switch_to_deploy(deploy)
    return deploy


def _with_dtype(backbone: UniRepLKNet, state: Mapping[str, Tensor]) -> UniRepLKNet:
    """A copy that takes ``state`` without a cast, if all of it has one floating dtype."""
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    own = copy.deepcopy(backbone)
    return own.to(dtypes.pop()) if len(dtypes) == 1 else own


def deploy_mark(file: str | Path) -> dict[str, Any] | None:
    """What this module noted in the checkpoint ``file`` when it wrote it; None if it did not."""
    try:
        meta = read_checkpoint(file, mmap=True).get('meta')
    except (CheckpointError, OSError):
        return None
    mark = meta.get(MARK) if isinstance(meta, Mapping) else None
    return dict(mark) if isinstance(mark, Mapping) and mark.get('form') == 'deploy' else None


# ------------------------------------------------------------------------------------------ from a config


def first_images(cfg: Config) -> tuple[Tensor | list[Tensor] | None, str]:
    """The first image of the config's test data, not preprocessed; None, and why, where that cannot be had."""
    from ..datasets.checks import missing_data_message  # importing the package takes no data sets

    loader = cfg.get('test_dataloader')
    if not loader:
        return None, 'the config has no test data'
    if message := missing_data_message(loader):
        return None, message
    try:
        dataset = DATASETS.build(loader['dataset'])
        return keep_few(pseudo_collate([dataset[0]])), 'the test data'
    except Exception as error:  # of any data set; the comparison can do without
        return None, f'the test data cannot be read: {error!r}'


def reparameterize_checkpoint(cfg: Config, checkpoint: str | Path, out: str | Path) -> Parity:
    """Write the deploy form of ``checkpoint`` to ``out``; ``meta`` is kept, optimizer states are left out.

    Args:
        cfg: Config of the whole model, training form.
        checkpoint: File, https address or short name of a published file.
        out: File to write, atomically.

    Returns:
        How far the backbone's maps are from those of the training form, on the first image of the config's test data
        if that is there, else on a random one.

    Raises:
        CheckpointError: The checkpoint is not a training checkpoint of this config, ``out`` is the same file, or both
            forms differ by more than rounding explains; nothing is written then.
        FileNotFoundError: There is no such checkpoint.
    """
    ((_, result),) = reparameterize_all(cfg, [(checkpoint, out)])
    if isinstance(result, Exception):
        raise result
    return result


def reparameterize_all(
    cfg: Config, files: Iterable[tuple[str | Path, str | Path]]
) -> Iterator[tuple[str | Path, Parity | CheckpointError | OSError]]:
    """As ``reparameterize_checkpoint`` for several files of one config; one that fails does not keep the others.

    Args:
        cfg: Config of the whole model, training form.
        files: Checkpoints, each with the file to write.

    Yields:
        Each checkpoint, with the differences or what was wrong with it; an ``AlreadyDeployedError`` says that it is in
        deploy form.

    Raises:
        CheckpointError: The model of the config has nothing to convert.
    """
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    settings = copy.deepcopy(cfg.model)
    if 'data_preprocessor' in cfg and 'backbone' in settings:  # beside the model, as mmpretrain's configs have it
        settings.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(settings)
    reparameterizer = Reparameterizer(model)
    inputs, origin = first_images(cfg)
    images = reparameterizer.prepare(inputs, origin)
    if images is None:
        print_log(f'Both forms are compared on a random image: {origin}', logger='current')
    for checkpoint, out in files:
        try:
            yield checkpoint, _convert(copy.deepcopy(model), reparameterizer, checkpoint, out, images)
        except (CheckpointError, OSError) as error:
            yield checkpoint, error


def _convert(
    model: nn.Module, reparameterizer: Reparameterizer, checkpoint: str | Path, out: str | Path, images: Images | None
) -> Parity:
    data = read_checkpoint(checkpoint, mmap=True)
    weights = all_tensors(data)
    if identify(weights).form == 'deploy':
        raise AlreadyDeployedError(f'{checkpoint} is in deploy form already: there is nothing to convert.')
    if os.path.exists(out) and os.path.exists(checkpoint) and os.path.samefile(out, checkpoint):
        raise CheckpointError(f'{out} is the training checkpoint itself, which would be lost: name another file.')
    dtypes = {value.dtype for value in weights.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())  # loading casts to what the model has
    load_checkpoint(model, checkpoint)
    try:
        meta = data.get('meta') or {}
        return reparameterizer.write(
            out, meta, model.state_dict(), str(checkpoint), images, 'reparameterize_checkpoint'
        )
    except CheckpointError as error:
        raise type(error)(f'{checkpoint}: {error}') from error


def find_checkpoints(names: Iterable[str]) -> list[Path]:
    """Checkpoint files named by files, folders (not searched deeper) and globs, each once, iter_9 before iter_10.

    Raises:
        FileNotFoundError: A name that matches no checkpoint.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            files = [file for file in path.iterdir() if file.suffix in SUFFIXES]
        else:
            files = [path] if path.is_file() else [Path(file) for file in glob.glob(name)]
        if not files:
            raise FileNotFoundError(
                f'{name}: no such file, no checkpoint in this folder, and no match for this pattern.'
            )
        found.update(dict.fromkeys(sorted(files, key=_natural)))
    return list(found)


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), '') if part.isdigit() else (0, part) for part in re.split(r'(\d+)', path.name)]
