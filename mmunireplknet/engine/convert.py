"""Checkpoint files made smaller, cast, and moved between the published layout and that of OpenMMLab 2.x models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor

from ..models.checkpoint import CheckpointError, check_full, identify, read_checkpoint
from ..models.checkpoint_file import all_tensors, find_checkpoint, some
from ..models.layouts import STEM, drop_ema_copies, from_published, task_of, to_published
from .atomic_checkpoint_hook import replacing

__all__ = ['DTYPES', 'Converted', 'convert_checkpoint']

DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}
SUFFIXES = ('.pth', '.pt', '.safetensors')
DATASET_NAMES = {'CLASSES': 'classes', 'PALETTE': 'palette'}  # mmcv 1's meta, mmengine's dataset_meta


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        weights: Variant, form and task of the weights.
        entries: Number of them.
        left_out: What the source had besides.
        sha256: Of the written file.
        size: Of it, in bytes.
    """

    weights: str
    entries: int
    left_out: str
    sha256: str
    size: int


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    cfg: Config | None = None,
    dtype: str | None = None,
    key: str | None = None,
    layout: str = 'mm',
    overwrite: bool = False,
) -> Converted:
    """Write the weights of ``source`` and its ``meta`` to ``target``, without optimizer and EMA copies.

    Args:
        source: File, https address or short name of a published file.
        target: File to write: .pth, .pt, or .safetensors, whose ``meta`` is JSON.
        cfg: Config that the weights must fit entry by entry; without one only the backbone is checked.
        dtype: Cast floating-point entries to 'fp32', 'fp16' or 'bf16'.
        key: Entry of the source to take, e.g. 'model_ema' or 'ema_state_dict'.
        layout: 'mm' for names of OpenMMLab 2.x models, 'published' for those of the published files.
        overwrite: Replace an existing ``target``.

    Raises:
        CheckpointError: The source is no checkpoint of a UniRepLKNet, does not fit ``cfg``, or does not fit ``dtype``.
        FileExistsError: ``target`` exists and ``overwrite`` is not set.
        ValueError: Another suffix, ``dtype`` or ``layout``.
    """
    target = Path(target)
    if target.suffix not in SUFFIXES:
        raise ValueError(f'{target}: the suffix must be one of {", ".join(SUFFIXES)}.')
    if dtype not in (None, *DTYPES) or layout not in ('mm', 'published'):
        raise ValueError(f'dtype={dtype!r}, layout={layout!r}: expected one of {", ".join(DTYPES)}; mm or published.')
    if target.exists() and not overwrite:
        raise FileExistsError(f'{target} exists: name another file, or pass --overwrite to replace it.')
    path = find_checkpoint(source)
    data = read_checkpoint(path, mmap=True)
    try:
        state = all_tensors(data, key)
        copies = drop_ema_copies(state)
        state = from_published(state)
        weights = _checked(state, cfg)
        state = _cast(state, DTYPES[dtype]) if dtype else state
    except CheckpointError as error:
        raise CheckpointError(f'{path}: {error}') from error
    left_out = [str(name) for name in data if name not in ('meta', 'state_dict') and not isinstance(data[name], Tensor)]
    left_out = [*left_out, f'{len(copies)} EMA copies'] if copies else left_out
    meta = data.get('meta') if isinstance(data.get('meta'), Mapping) else {}
    _write(target, _meta(meta or {}, layout), to_published(state) if layout == 'published' else state)
    return Converted(weights, len(state), some(left_out), _sha256(target), target.stat().st_size)


def _checked(state: Mapping[str, Tensor], cfg: Config | None) -> str:
    """Identify the weights; with a config, check every entry against its model."""
    prefix = next((name.removesuffix(STEM) for name in state if name.endswith(STEM)), None)
    if prefix is None:
        raise CheckpointError(f'there is no UniRepLKNet: no entry ends with {STEM}, it has {some(state)}.')
    found = identify({name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)})
    if found.form == 'mixed' or found.arch is None:
        raise CheckpointError(f'it holds {found}; expected all of a UniRepLKNet, in one form.')
    if cfg is not None:
        init_default_scope(cfg.get('default_scope', 'mmengine'))
        with torch.device('meta'):
            model = MODELS.build(cfg.model)
        check_full(model, state)
    task = task_of(state)
    return f'{found}, {"backbone only or unknown heads" if task == "unknown" else task}'


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    cast = {}
    for name, value in state.items():
        cast[name] = value.to(dtype) if value.is_floating_point() else value
        if value.is_floating_point() and not cast[name].isfinite().all() and value.isfinite().all():
            raise CheckpointError(f'{name} has values up to {float(value.abs().max()):.3g}, too large for {dtype}.')
    return cast


def _meta(meta: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """Meta of mmengine from that of mmcv 1, or the other way round; nothing is lost.

    mmengine names classes and palette ``dataset_meta``, and its resume would execute the text ``config``.
    """
    result: dict[str, Any] = {}
    dataset = {ours: meta[theirs] for theirs, ours in DATASET_NAMES.items() if theirs in meta}
    for name, value in meta.items():
        if layout == 'mm' and name in DATASET_NAMES and 'dataset_meta' not in meta:
            result['dataset_meta'] = dataset
        elif layout == 'mm' and name == 'config' and 'mmcv_version' in meta:
            result['mmcv1_config'] = value
        elif layout == 'published' and name == 'dataset_meta':
            value = dict(value or {})
            result.update({theirs: value.pop(ours) for theirs, ours in DATASET_NAMES.items() if ours in value})
            result.update(dict(dataset_meta=value) if value else {})
        else:
            result['config' if layout == 'published' and name == 'mmcv1_config' else name] = value
    return result


def _write(target: Path, meta: dict[str, Any], state: dict[str, Tensor]) -> None:
    if target.suffix == '.safetensors':
        try:
            from safetensors.torch import save_file
        except ModuleNotFoundError as error:
            raise CheckpointError(f'{target}: this format takes the package safetensors: pip install it.') from error
        text = dict(meta=json.dumps(meta, default=_plain))  # one entry: several are written in any order
        # Entries that share memory, or lie in another one's, are refused there.
        own = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
        with replacing(target) as temporary:
            save_file(own, temporary, metadata=text)
        return
    raw = not meta and STEM in state  # published classifiers
    state = {name: value.clone() for name, value in state.items()}  # else a view's whole storage is written
    with replacing(target) as temporary, open(temporary, 'wb') as file:
        torch.save(state if raw else dict(meta=meta, state_dict=state), file)  # given a name, it would be in the file


def _plain(value: Any) -> Any:
    """For ``json``: numbers and lists of numpy and torch, the text of anything else."""
    return value.tolist() if hasattr(value, 'tolist') else str(value)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open('rb') as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
