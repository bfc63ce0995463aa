"""State dicts: identify, refuse or load.

State-dict forms: the *training* form holds BN and dilated branches, the *deploy* form one merged kernel a block.
mmengine loads non-strictly, so that a file of the wrong form would leave most of a model at random values without
an error; ``check_state_dict`` therefore stands inside ``UniRepLKNet._load_from_state_dict``, where every loader passes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from torch import Size, Tensor, nn

from .arch_zoo import Arch, identify_arch
from .checkpoint_file import CheckpointError, all_tensors, read_checkpoint, some
from .layouts import STEM, drop_ema_copies, from_published, other_task

if TYPE_CHECKING:
    from .unireplknet import UniRepLKNet

__all__ = [
    'CheckpointError', 'adapt_stem', 'check_full', 'check_state_dict', 'identify', 'load_checkpoint', 'read_checkpoint',
]  # fmt: skip

CONVERT = 'python tools/reparameterize.py CONFIG CHECKPOINT OUT'


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


def _backbone_part(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
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
    own = _own_shapes(model)
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
    shapes = {k: shape for k, shape in own.items() if shape is not None and k in found}
    wrong = [k for k, shape in shapes.items() if found[k].shape != shape and not _is_adaptable(model, k, found[k])]
    extra = [k for k in found if k not in own]
    if wrong or extra:
        detail = f'{wrong[0]} is {tuple(found[wrong[0]].shape)}, not {tuple(shapes[wrong[0]])}' if wrong else extra[0]
        raise CheckpointError(
            f'the checkpoint has {len(wrong)} misshapen and {len(extra)} unknown backbone entries, first {detail}. '
            f'Expected {expected} with {model.in_channels} input channels.'
        )


def _own_shapes(model: UniRepLKNet) -> dict[str, Size | None]:
    """Names in the model's state dict with their shapes, which are None inside of FSDP's units: these are in pieces."""
    if not any('_fsdp_wrapped_module' in name for name, _ in model.named_modules()):
        return {name: value.shape for name, value in _backbone_part(model.state_dict(), '').items()}
    named = dict([*model.named_parameters(), *model.named_buffers()])  # a state_dict would gather them
    shapes = {
        name.replace('_fsdp_wrapped_module.', ''): None if '_fsdp_wrapped_module' in name else value.shape
        for name, value in named.items()
    }
    return _backbone_part(shapes, '')


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
    return next(m for name, m in model.stages.named_modules() if name.endswith('.norm'))


# ------------------------------------------------------------------------------------------ input channels


def _is_adaptable(model: UniRepLKNet, key: str, weight: Tensor) -> bool:
    return (
        key == STEM and weight.shape[1] == 3 and model.in_channels != 3 and weight.shape[0] == model.arch.dims[0] // 2
    )


def adapt_stem(model: UniRepLKNet, state: dict[str, Tensor], prefix: str = '') -> None:
    """Fit a stem trained on 3 channels to ``model.in_channels``, in place, with one log line.

    A single channel takes the sum over RGB: a grey image gives the same response as its RGB copy. Of more
    channels, channel c takes the weights of channel c % 3 times 3 / in_channels: an input that repeats RGB whole
    gives the response of RGB, and any other a response of about the same scale.
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
    model: nn.Module,
    file: str | Path,
    key: str | None = None,
    prefix: str | None = None,
    map_location: Any = 'cpu',
) -> dict[str, list[str]]:
    """Load a published or own checkpoint strictly.

    A backbone takes a classification file (its classifier and final norm are left out, the norms of the stages
    stay as they are) or the backbone of a full model's file. A full model takes a full model's file; an
    ImageClassifier also a published classification file (``head`` becomes ``head.fc``).

    Args:
        model: A UniRepLKNet, or a detector, segmentor or classifier with one; DDP and the like around it are fine.
        file: Path, https address, or short name of a published file.
        key: Entry of the file to take, e.g. 'model_ema'; by default the first of 'state_dict', 'model',
            'model_ema' and 'module'.
        prefix: What stands before the names of a backbone's weights in the file, e.g. 'backbone.'; found by itself
            unless the file holds several.
        map_location: As for ``torch.load``.

    Returns:
        ``missing`` and ``unexpected``: the entries that legitimately stayed as they were or were left out.

    Raises:
        CheckpointError: Anything else is missing, unexpected, misshapen, of another form or variant.
    """
    from .unireplknet import UniRepLKNet

    while is_model_wrapper(model):
        model = cast(nn.Module, model.module)
    data = read_checkpoint(file, map_location)
    try:
        state = all_tensors(data, key)
        copies = drop_ema_copies(state)
        prefix = _find_prefix(state, prefix)
        if isinstance(model, UniRepLKNet):
            report = _load_backbone(model, state, prefix)
        else:
            state = from_published(state)
            check_full(model, state)
            model.load_state_dict(state)
            report = dict(missing=[], unexpected=[])
    except CheckpointError as error:
        raise CheckpointError(f'{file}: {error}') from error
    report['unexpected'] += copies
    for what, names in report.items():
        if names:
            print_log(f'{file}: {len(names)} {what} entries, as it should be: {some(names)}', logger='current')
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
    load_checkpoint(
        model,
        init_cfg['checkpoint'],
        key=init_cfg.get('key'),
        prefix=init_cfg.get('prefix'),
        map_location=init_cfg.get('map_location') or 'cpu',
    )


def _find_prefix(state: Mapping[str, Tensor], wanted: str | None) -> str:
    prefixes = [k.removesuffix(STEM) for k in state if k.endswith(STEM)]
    if not prefixes:
        raise CheckpointError(f'there is no UniRepLKNet: no entry ends with {STEM}, it has {some(state)}.')
    if wanted is None:
        return prefixes[0]
    if wanted and not wanted.endswith('.'):  # mmengine takes it with and without
        wanted += '.'
    if wanted not in prefixes:
        raise CheckpointError(f'no UniRepLKNet stands under the prefix {wanted!r}, but under {some(prefixes)!r}.')
    return wanted


def _load_backbone(model: UniRepLKNet, state: dict[str, Tensor], prefix: str) -> dict[str, list[str]]:
    mine = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    own = model.state_dict()
    allowed_missing = re.compile(r'norm[0-3]\.(weight|bias)' if 'norm.weight' in mine else r'(?!)')
    allowed_extra = re.compile(r'(norm|norm[0-3]|head)\.(weight|bias)')
    missing = [k for k in own if k not in mine and not k.endswith('num_batches_tracked')]
    extra = [k for k in mine if k not in own]
    check_state_dict(model, mine)
    bad_missing = [k for k in missing if not allowed_missing.fullmatch(k)]
    bad_extra = [k for k in extra if not allowed_extra.fullmatch(k)]
    if bad_missing or bad_extra:
        raise CheckpointError(f'missing in the file: {some(bad_missing)}; not in the model: {some(bad_extra)}.')
    model.load_state_dict({k: v for k, v in mine.items() if k in own}, strict=False)
    return dict(missing=missing, unexpected=extra + [k for k in state if not k.startswith(prefix)])


def check_full(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse weights that do not fit a whole model entry by entry.

    Args:
        model: A detector, segmentor or classifier, also on the meta device.
        state: Weights by the model's own names (see ``layouts.from_published``).

    Raises:
        CheckpointError: Another task, form or variant; anything missing, unexpected or misshapen.
    """
    from .unireplknet import UniRepLKNet

    own = model.state_dict()
    if message := other_task(state, own):
        raise CheckpointError(message)
    for name, module in model.named_modules():
        if isinstance(module, UniRepLKNet):
            check_state_dict(module, state, f'{name}.')
    missing = [k for k in own if k not in state and not k.endswith('num_batches_tracked')]
    extra = [k for k in state if k not in own]
    wrong = [
        f'{k} {[*state[k].shape]} for {[*own[k].shape]}'
        for k in own
        if k in state and own[k].shape != state[k].shape and not k.endswith(STEM)
    ]
    if missing or extra or wrong:
        raise CheckpointError(
            f'the file does not fit {type(model).__name__}: missing {some(missing)}; unexpected {some(extra)}; '
            f'of another shape {some(wrong)}. Heads must agree with the config (num_classes, channels); '
            'to take only the backbone, call load_checkpoint(model.backbone, file).'
        )
