"""Checkpoint files: found, downloaded, read without executing anything, and unwrapped."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from mmengine.dist import barrier
from mmengine.logging import print_log
from torch import Tensor

from ..compat import safe_torch_load
from .arch_zoo import CHECKPOINTS, PAGE
from .layouts import drop_ema_copies

__all__ = ['CheckpointError', 'all_tensors', 'find_checkpoint', 'read_checkpoint', 'some', 'unwrap']

WRAPPERS = ('state_dict', 'model', 'model_ema', 'module')


class CheckpointError(RuntimeError):
    """A checkpoint that is not what it should be; the message says what was found, expected, and what to do."""


def find_checkpoint(name: str | Path) -> Path:
    """Path of a checkpoint, downloaded if it is published and not there yet.

    Args:
        name: A path, an https address, or the short name, file name or address of one of ``CHECKPOINTS``.
            Published files are looked for in ``checkpoints/`` and in torch's hub folder, and downloaded to the latter.

    Raises:
        CheckpointError: It is not there and could not be downloaded, or is a directory.
        FileNotFoundError: Neither a file nor a published name.
    """
    text = str(name)
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise CheckpointError(f'{text} is a directory; expected a checkpoint file, such as one inside of it.')
    if text.startswith('http://'):
        raise CheckpointError(f'{text} is not encrypted: download checkpoints over https, or give a local file.')
    named = {entry.url if '://' in text else entry.file: entry for entry in CHECKPOINTS.values()}
    entry = CHECKPOINTS.get(text) or named.get(text if '://' in text else path.name)
    if entry is not None:
        if (local := Path('checkpoints', entry.file)).is_file():
            return local
        return _download(entry.url, entry.file, entry.sha256, f'get it from {PAGE} and put it at {local} or')
    if text.startswith('https://'):
        return _download(text, Path(urlsplit(text).path).name, '', f'get {text} by other means and put it at')
    raise FileNotFoundError(
        f'There is no checkpoint {text}: neither a file nor the short name of a published one, which are '
        f'{", ".join(CHECKPOINTS)}.'
    )


def _download(url: str, file: str, sha256: str, advice: str) -> Path:
    path = Path(torch.hub.get_dir(), 'checkpoints', file)
    problem = None
    if not path.is_file() and os.environ.get('LOCAL_RANK', '0') == '0':  # one process a machine
        print_log(f'Downloading {url} to {path}', logger='current')
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256 or None)
        except (OSError, RuntimeError, HTTPException) as error:
            problem = error
    barrier()  # reached after a failure too: the other processes wait here
    if not path.is_file():
        raise CheckpointError(
            f'{file} is not here and could not be downloaded ({problem or "see the first process"}): {advice} '
            f'{path}, or train without it by --cfg-options model.backbone.init_cfg=None'
        ) from problem
    return path


def read_checkpoint(name: str | Path, map_location: Any = 'cpu', mmap: bool = False) -> dict:
    """Read a checkpoint file as tensors and plain data; nothing in it is ever executed.

    Args:
        name: As for ``find_checkpoint``.
        map_location: As for ``torch.load``.
        mmap: Leave the tensors on the disk until they are used, where the format can; the file must not change then.

    Returns:
        The dict in the file, as it is; of a .safetensors file its tensors as 'state_dict', and 'meta'.

    Raises:
        CheckpointError: The file is truncated, no checkpoint, or holds objects that only code could restore.
    """
    path = find_checkpoint(name)
    try:
        if path.suffix == '.safetensors':
            return _read_safetensors(path, map_location)
        data = safe_torch_load(path, map_location, mmap=mmap and zipfile.is_zipfile(path))
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        wanted = re.search(r'(?:GLOBAL|global|Unsupported class|class) [`\']?([\w.]+)', str(error))
        what = f' ({wanted.group(1)})' if wanted else ''
        raise CheckpointError(
            f'{path} was refused and nothing in it was executed: it is no checkpoint, or it holds objects besides '
            f'tensors and plain data{what}. Take a file from a source you trust, saved with tensors only.'
        ) from error
    except Exception as error:  # damaged bytes raise anything, from IndexError to struct.error
        reason = (str(error).splitlines() or [''])[0]
        raise CheckpointError(
            f'{path} ({path.stat().st_size:,} bytes) cannot be read, it may be truncated or no checkpoint '
            f'({type(error).__name__}: {reason}). Download or save it again.'
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f'{path} holds a {type(data).__name__}; expected a dict of tensors.')
    return data


def _read_safetensors(path: Path, map_location: Any) -> dict:
    try:
        from safetensors import safe_open
    except ModuleNotFoundError as error:
        raise CheckpointError(f'{path}: reading this format takes the package safetensors: pip install it.') from error
    device = map_location if isinstance(map_location, (str, torch.device)) else 'cpu'
    with safe_open(path, framework='pt', device=str(device)) as file:
        text = (file.metadata() or {}).get('meta', '{}')
        return dict(meta=json.loads(text), state_dict={name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def unwrap(data: Mapping, key: str | None = None) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without wrappers, ``module.`` prefix and mmdet 2 EMA copies.

    Args:
        data: A raw state dict, or a dict that holds it as 'state_dict', 'model', 'model_ema' or 'module'.
        key: Take this entry, e.g. 'model_ema', instead of the first that is there.

    Raises:
        CheckpointError: There are no tensors, or ``key`` is not there.
    """
    state = all_tensors(data, key)
    drop_ema_copies(state)
    return state


def all_tensors(data: Mapping, key: str | None = None) -> dict[str, Tensor]:
    """As ``unwrap``, with the EMA copies."""
    if key is not None and not isinstance(data.get(key), Mapping):
        raise CheckpointError(f'the checkpoint has no weights as {key!r}; its entries are {some(data)}.')
    found = key or next((k for k in WRAPPERS if isinstance(data.get(k), Mapping)), None)
    state = data if found is None else data[found]
    tensors = {str(k).removeprefix('module.'): v for k, v in state.items() if isinstance(v, Tensor)}
    if found == 'ema_state_dict':
        tensors.pop('steps', None)  # mmengine's counter of updates
    if not tensors:
        raise CheckpointError(f'no tensors in the checkpoint; its entries are {some(data)}.')
    return tensors


def some(items: Iterable) -> str:
    """The first four of ``items`` and the number of the others, for a message."""
    names = [str(item) for item in items]
    more = f' and {len(names) - 4} more' if len(names) > 4 else ''
    return (', '.join(names[:4]) or 'none') + more
