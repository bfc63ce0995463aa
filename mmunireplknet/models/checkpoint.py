"""Published and own checkpoint files: find, read without executing anything, identify, refuse or load.

State-dict forms: the *training* form holds BN and dilated branches, the *deploy* form one merged kernel a block.
mmengine loads non-strictly, so that a file of the wrong form would leave most of a model at random values without
an error; ``check_state_dict`` therefore stands inside ``UniRepLKNet._load_from_state_dict``, where every loader passes.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from ..compat import safe_torch_load
from .arch_zoo import CHECKPOINTS, PAGE, Arch, identify_arch

if TYPE_CHECKING:
    from .unireplknet import UniRepLKNet

__all__ = ['CheckpointError', 'find_checkpoint', 'load_checkpoint', 'read_checkpoint']

STEM = 'downsample_layers.0.0.weight'
WRAPPERS = ('state_dict', 'model', 'model_ema', 'module')
CONVERT = 'python tools/reparameterize.py CONFIG CHECKPOINT OUT'


class CheckpointError(RuntimeError):
    """A checkpoint that is not what it should be; the message says what was found, expected, and what to do."""


# ------------------------------------------------------------------------------------------ find and read


def find_checkpoint(name: str | Path) -> Path:
    """Path of a checkpoint, downloaded if it is published and not there yet.

    Args:
        name: A path, an https address, or a short name of ``CHECKPOINTS``. Published files are looked for in
            ``checkpoints/`` and in torch's hub folder.

    Raises:
        CheckpointError: It is not there and could not be downloaded.
        FileNotFoundError: Neither a file nor a published name.
    """
    text = str(name)
    if text.startswith('http://'):
        raise CheckpointError(f'{text} is not encrypted: download checkpoints over https, or give a local file.')
    if text.startswith('https://'):
        return _download(text, text.rsplit('/', 1)[-1], '')
    path = Path(text).expanduser()
    if path.is_file():
        return path
    by_file = {entry.file: entry for entry in CHECKPOINTS.values()}
    entry = CHECKPOINTS.get(text) or by_file.get(path.name)
    if entry is None:
        raise FileNotFoundError(
            f'There is no checkpoint {text}: neither a file nor the short name of a published one, which are '
            f'{", ".join(CHECKPOINTS)}.'
        )
    if (local := Path('checkpoints', entry.file)).is_file():
        return local
    return _download(entry.url, entry.file, entry.sha256)


def _download(url: str, file: str, sha256: str) -> Path:
    from mmengine.dist import barrier, is_main_process

    path = Path(torch.hub.get_dir(), 'checkpoints', file)
    if is_main_process() and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        print_log(f'Downloading {url} to {path}', logger='current')
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256 or None)
        except (OSError, RuntimeError) as error:
            page = PAGE if file in url and 'UniRepLKNet' in url else url
            raise CheckpointError(
                f'{file} is not here and could not be downloaded ({error}): get it from {page} and put it at '
                f'checkpoints/{file} or {path}, or train without it by --cfg-options model.backbone.init_cfg=None'
            ) from error
    barrier()
    return path


def read_checkpoint(name: str | Path, map_location: Any = 'cpu') -> dict:
    """Read a checkpoint file as tensors and plain data; nothing in it is ever executed.

    Args:
        name: As for ``find_checkpoint``.
        map_location: As for ``torch.load``.

    Returns:
        The dict in the file, as it is.

    Raises:
        CheckpointError: The file is truncated, no checkpoint, or holds objects that only code could restore.
    """
    path = find_checkpoint(name)
    try:
        data = safe_torch_load(path, map_location)
    except pickle.UnpicklingError as error:
        wanted = re.search(r'(?:GLOBAL|global|Unsupported class|class) [`\']?([\w.]+)', str(error))
        what = f' ({wanted.group(1)})' if wanted else ''
        raise CheckpointError(
            f'{path} was refused and nothing in it was executed: it is no checkpoint, or it holds objects besides '
            f'tensors and plain data{what}. Take a file from a source you trust, saved with tensors only.'
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise CheckpointError(
            f'{path} ({size:,} bytes) is truncated or not a checkpoint: {str(error).splitlines()[0]} '
            'Download or save it again.'
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f'{path} holds a {type(data).__name__}; expected a dict of tensors.')
    return data


def unwrap(data: Mapping, key: str | None = None) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without wrappers, ``module.`` prefix and mmdet 2 EMA copies.

    Args:
        data: A raw state dict, or a dict that holds it as 'state_dict', 'model', 'model_ema' or 'module'.
        key: Take this entry, e.g. 'model_ema', instead of the first that is there.

    Raises:
        CheckpointError: There are no tensors, or ``key`` is not there.
    """
    if key is not None and key not in data:
        raise CheckpointError(f'the checkpoint has no entry {key!r}, only {", ".join(map(str, data))}.')
    found = key or next((k for k in WRAPPERS if isinstance(data.get(k), Mapping)), None)
    state = data if found is None else data[found]
    tensors = {k.removeprefix('module.'): v for k, v in state.items() if isinstance(v, Tensor)}
    if not tensors:
        raise CheckpointError(f'no tensors in the checkpoint; its entries are {", ".join(map(str, data)) or "none"}.')
    # mmdet 2's EMA hook keeps copies named ema_backbone_stages_...; the plain keys hold the averages.
    return {k: v for k, v in tensors.items() if not (k.startswith('ema_') and '.' not in k)}


# ------------------------------------------------------------------------------------------ identify


@dataclass(frozen=True)
class Identity:
    """What a state dict says of the UniRepLKNet in it.

    Attributes:
        form: 'training', 'deploy' or 'mixed'.
        arch: Shape inferred from the weights; None where keys are missing.
        in_channels: Channels of the input.
    """

    form: str
    arch: Arch | None
    in_channels: int | None

    def __str__(self) -> str:
        return f'{identify_arch(self.arch) if self.arch else "an incomplete UniRepLKNet"} in {self.form} form'


def identify(state: Mapping[str, Tensor]) -> Identity:
    """Identify a backbone from its own keys (no prefix)."""
    train = any('.origin_bn.' in k or '.pwconv2.2.' in k or '.act.1.beta' in k for k in state)
    deploy = any(k.endswith('.pwconv2.0.bias') for k in state)
    form = 'mixed' if train and deploy else 'deploy' if deploy else 'training'
    stem = state.get(STEM)
    return Identity(form, _infer_arch(state), None if stem is None else stem.shape[1])


def _infer_arch(state: Mapping[str, Tensor]) -> Arch | None:
    kernels: dict[tuple[int, int], int] = {}
    for key, value in state.items():
        if match := re.fullmatch(r'stages\.(\d)\.(\d+)\.dwconv\.(?:lk_origin\.)?weight', key):
            kernels[int(match[1]), int(match[2])] = value.shape[-1]
    names = ('downsample_layers.0.3.weight', *(f'downsample_layers.{i}.0.weight' for i in (1, 2, 3)))
    if not all(name in state for name in names):
        return None
    dims = tuple(state[name].shape[0] for name in names)
    depths = tuple(1 + max((b for s, b in kernels if s == i), default=-1) for i in range(4))
    if any((i, b) not in kernels for i in range(4) for b in range(depths[i])):
        return None
    return Arch(depths, dims, tuple(tuple(kernels[i, b] for b in range(depths[i])) for i in range(4)))


def _backbone_part(state: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    parts = (prefix + 'downsample_layers.', prefix + 'stages.')
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(parts)}


# ------------------------------------------------------------------------------------------ guard


def check_state_dict(model: UniRepLKNet, state: Mapping[str, Tensor], prefix: str = '') -> None:
    """Refuse a state dict that is not of ``model``'s form and shape, whatever loader brings it.

    Raises:
        CheckpointError: Another form, another variant, missing or misshapen entries, or none at all.
    """
    found = _backbone_part(state, prefix)
    expected = Identity('deploy' if model.deploy else 'training', model.arch, model.in_channels)
    if not found:
        raise CheckpointError(
            f'the checkpoint holds no weights under "{prefix}downsample_layers" and "{prefix}stages". Expected '
            f'{expected}. If it is a classification file, name it in model.backbone.init_cfg or call '
            'mmunireplknet.load_checkpoint(model.backbone, file).'
        )
    given = identify(found)
    if given.form != expected.form:
        raise CheckpointError(f'the checkpoint holds {given}, but the model is {expected}. {_way_out(given.form)}')
    own = _backbone_part(model.state_dict(), '')
    missing = [k for k in own if k not in found and not k.endswith('num_batches_tracked')]
    if given.arch is not None and given.arch != expected.arch:
        raise CheckpointError(
            f'the checkpoint holds {given}, but the model is {expected}. Build the model with the '
            "checkpoint's arch, or take the checkpoint of the model's."
        )
    if missing:
        raise CheckpointError(
            f'the checkpoint lacks {len(missing)} of {len(own)} backbone entries, first {missing[0]}. Expected '
            f'{expected}, with norm {type(_first_norm(model)).__name__}. It is incomplete or of another configuration.'
        )
    wrong = [k for k in own if k in found and found[k].shape != own[k].shape and not _is_adaptable(model, k, found[k])]
    extra = [k for k in found if k not in own]
    if wrong or extra:
        detail = (
            f'{wrong[0]} is {tuple(found[wrong[0]].shape)}, not {tuple(own[wrong[0]].shape)}' if wrong else extra[0]
        )
        raise CheckpointError(
            f'the checkpoint has {len(wrong)} misshapen and {len(extra)} unknown backbone entries, first {detail}. '
            f'Expected {expected} with {model.in_channels} input channels.'
        )


def _way_out(form: str) -> str:
    if form == 'training':
        return f'Convert it: {CONVERT} (or build the model with deploy=False, then call switch_to_deploy).'
    if form == 'deploy':
        return (
            'A merged kernel cannot be split again: build the model with deploy=True '
            '(--cfg-options model.backbone.deploy=True), or take the training checkpoint it was made from.'
        )
    return f'Part of it is reparameterized: take the training checkpoint and convert it whole: {CONVERT}'


def _first_norm(model: UniRepLKNet) -> nn.Module:
    return model.stages[0][0].norm


# ------------------------------------------------------------------------------------------ input channels


def _is_adaptable(model: UniRepLKNet, key: str, weight: Tensor) -> bool:
    return (
        key == STEM and weight.shape[1] == 3 and model.in_channels != 3 and weight.shape[0] == model.arch.dims[0] // 2
    )


def adapt_stem(model: UniRepLKNet, state: dict[str, Tensor], prefix: str = '') -> None:
    """Fit a stem trained on 3 channels to ``model.in_channels``, in place, with one log line.

    Channel c of the new stem takes the weights of channel c % 3 times 3 / in_channels, so that an input that
    repeats RGB gives the response of RGB; a single channel takes the sum over RGB (a grey image gives the same
    response as its RGB copy).
    """
    weight = state.get(prefix + STEM)
    if weight is None or not _is_adaptable(model, STEM, weight):
        return
    channels = model.in_channels
    if channels == 1:
        adapted = weight.sum(1, keepdim=True)
    else:
        adapted = weight[:, [c % 3 for c in range(channels)]] * (3 / channels)
    state[prefix + STEM] = adapted
    print_log(f'The stem was adapted from 3 to {channels} input channels (see adapt_stem).', logger='current')


# ------------------------------------------------------------------------------------------ load


def load_checkpoint(
    model: nn.Module, file: str | Path, key: str | None = None, map_location: Any = 'cpu'
) -> dict[str, list[str]]:
    """Load a published or own checkpoint strictly.

    A backbone takes a classification file (its classifier and final norm are left out, the norms of the stages
    stay as they are) or the backbone of a full model's file. A full model takes a full model's file; an
    ImageClassifier also a published classification file (``head`` becomes ``head.fc``).

    Args:
        model: A UniRepLKNet, or a detector, segmentor or classifier with one.
        file: Path, https address, or short name of a published file.
        key: Entry of the file to take, e.g. 'model_ema'; by default the first of 'state_dict', 'model', ...
        map_location: As for ``torch.load``.

    Returns:
        ``missing`` and ``unexpected``: the entries that legitimately stayed as they were or were left out.

    Raises:
        CheckpointError: Anything else is missing, unexpected, misshapen, of another form or variant.
    """
    from .unireplknet import UniRepLKNet

    state = unwrap(read_checkpoint(file, map_location), key)
    stem = next((k for k in state if k.endswith(STEM)), None)
    if stem is None:
        raise CheckpointError(f'{file} holds no UniRepLKNet: no entry ends with {STEM}. It has {_some(list(state))}.')
    prefix = stem.removesuffix(STEM)
    try:
        if isinstance(model, UniRepLKNet):
            report = _load_backbone(model, state, prefix)
        else:
            report = _load_full(model, state if prefix else _as_classifier(state))
    except CheckpointError as error:
        raise CheckpointError(f'{file}: {error}') from error
    for what, names in report.items():
        if names:
            print_log(f'{file}: {len(names)} {what} entries, as it should be: {_some(names)}', logger='current')
    return report


def load_pretrained(model: UniRepLKNet, init_cfg: Mapping) -> None:
    """Load what ``init_cfg`` of type Pretrained names into a backbone.

    Raises:
        ValueError: An entry of ``init_cfg`` that is not known.
    """
    unknown = set(init_cfg) - {'type', 'checkpoint', 'prefix', 'map_location', 'key'}
    if unknown or not init_cfg.get('checkpoint'):
        raise ValueError(
            f'init_cfg={dict(init_cfg)}: expected type, checkpoint and optionally prefix, map_location, key.'
        )
    load_checkpoint(model, init_cfg['checkpoint'], init_cfg.get('key'), init_cfg.get('map_location') or 'cpu')


def _load_backbone(model: UniRepLKNet, state: dict[str, Tensor], prefix: str) -> dict[str, list[str]]:
    mine = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    own = model.state_dict()
    allowed_missing = re.compile(r'norm[0-3]\.(weight|bias)' if 'norm.weight' in mine else r'(?!)')
    allowed_extra = re.compile(r'(norm|norm[0-3]|head)\.(weight|bias)')
    dropped = [k for k in mine if k not in own and allowed_extra.fullmatch(k)]
    outcome = model.load_state_dict({k: v for k, v in mine.items() if k not in dropped}, strict=False)
    missing = [k for k in outcome.missing_keys if not k.endswith('num_batches_tracked')]
    bad = [k for k in missing if not allowed_missing.fullmatch(k)] + outcome.unexpected_keys
    if bad:
        raise CheckpointError(f'{len(bad)} entries do not match the model: {_some(bad)}')
    others = [k for k in state if not k.startswith(prefix)]
    return dict(missing=missing, unexpected=dropped + others)


def _load_full(model: nn.Module, state: dict[str, Tensor]) -> dict[str, list[str]]:
    own = model.state_dict()
    missing = [k for k in own if k not in state and not k.endswith('num_batches_tracked')]
    extra = [k for k in state if k not in own]
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape and not k.endswith(STEM)]
    backbone_differs = any('.stages.' in k or '.downsample_layers.' in k for k in (*missing, *extra, *wrong))
    if (missing or extra or wrong) and not backbone_differs:
        raise CheckpointError(
            f'the file does not fit {type(model).__name__}: missing {_some(missing)}; unexpected {_some(extra)}; '
            f'of another shape {_some(wrong)}. Heads must agree with the config (num_classes, channels); '
            'to take only the backbone, call load_checkpoint(model.backbone, file).'
        )
    model.load_state_dict(state)  # a backbone that differs is refused here, by check_state_dict
    return dict(missing=[], unexpected=[])


def _as_classifier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        k.replace('head.', 'head.fc.', 1) if k.startswith('head.') else f'backbone.{k}': v for k, v in state.items()
    }


def _some(names: list[str]) -> str:
    return ', '.join(names[:4]) + (f' and {len(names) - 4} more' if len(names) > 4 else '') if names else 'none'
