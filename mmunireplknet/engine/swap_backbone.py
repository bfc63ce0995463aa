"""UniRepLKNet in the place of the backbone of any mmdet, mmseg or mmpretrain config."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor

from ..models.arch_zoo import get_arch

__all__ = ['swap_backbone']

STAGES = {4: 0, 8: 1, 16: 2, 32: 3}  # by stride
SIZE = 128  # of the image that is sent through the original modules: every stride divides it
BY_HAND = 'Set in_channels in the config by hand, with backbone=dict(_delete_=True, type="UniRepLKNet", ...).'
# What the published weights were trained with, RGB.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class _Maps:
    """What one module hands to the next, in the original config and in the new one.

    Attributes:
        source: The type of that module.
        old: Its outputs in the original config.
        new: Tensors of the shapes that stand in their place.
    """

    source: str
    old: list[Tensor]
    new: list[Tensor]

    @property
    def pooled(self) -> bool:
        """Whether they are vectors (N, C)."""
        return self.old[0].dim() == 2

    @property
    def channels(self) -> tuple[list[int], list[int]]:
        """Channels of the old and of the new outputs."""
        return [x.shape[1] for x in self.old], [x.shape[1] for x in self.new]


def swap_backbone(
    cfg: Config,
    arch: str | Mapping = 's',
    checkpoint: str | None = None,
    drop_path_rate: float = 0.0,
    layer_decay: float | None = None,
) -> Config:
    """Replace the backbone of ``cfg``; neck and heads get the channels of the new one.

    Which maps the neck and the heads read is measured, by a run of the original backbone and neck without weights
    on a small image; no list of known types is involved. UniRepLKNet returns the maps of the same strides, or,
    where the original keeps a stride by dilation, those of the same stages with its own strides. The pooled feature
    stands for an original that returns vectors. Maps that nothing reads are left out (``out_indices``, with
    ``in_index`` and ``start_level`` counted anew), since DDP would wait for the gradients of their norms.

    Weights of the original (``init_cfg``, ``pretrained``, ``load_from``) are dropped. Everything else stays, the
    optimizer too.

    Args:
        cfg: A config of mmdet, mmseg or mmpretrain; it is not changed.
        arch: As in ``UniRepLKNet``.
        checkpoint: Weights of the new backbone: a file, an https address or the short name of a published file.
            None trains from scratch.
        drop_path_rate: As in ``UniRepLKNet``.
        layer_decay: Replaces the optimizer's constructor by layer-wise learning-rate decay with this rate.

    Returns:
        The new config, which can be dumped.

    Raises:
        ValueError: There is not exactly one backbone, its outputs are not what a pyramid of strides 4 to 32
            could replace, or something reads them in a way that cannot be known.
    """
    cfg = copy.deepcopy(cfg)
    if 'model' not in cfg:
        raise ValueError(f'The config {cfg.filename} has no model: name one of mmdet, mmseg or mmpretrain.')
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        owner = _owner(cfg.model)
        _replace(owner, arch, checkpoint, drop_path_rate)
    imports = cfg.get('custom_imports') or ConfigDict(imports=[], allow_failed_imports=False)
    names = [imports['imports']] if isinstance(imports['imports'], str) else list(imports['imports'])
    imports['imports'] = [*names, *({'mmunireplknet'} - set(names))]
    cfg.custom_imports = imports
    if cfg.get('load_from'):
        print_log(f'load_from={cfg.load_from} was dropped: those are weights of the original model.', 'current')
        cfg.load_from = None
    if layer_decay is not None:
        _use_layer_decay(cfg, layer_decay)
    if checkpoint:
        _check_normalisation(cfg)
    return cfg


def _owner(model: ConfigDict) -> ConfigDict:
    """The part of the model that holds the backbone."""
    owners = list(_owners(model, 'model'))
    if len(owners) != 1:
        found = ', '.join(name for name, _ in owners) or 'none'
        raise ValueError(f'The model {model.get("type")} must have one backbone; found: {found}. {BY_HAND}')
    return owners[0][1]


def _owners(node: Any, name: str) -> Iterator[tuple[str, ConfigDict]]:
    if not isinstance(node, Mapping):
        return
    encoder = node.get('image_encoder')  # mmpretrain's retrievers: [backbone, neck]
    if isinstance(node.get('backbone'), Mapping) or (isinstance(encoder, Sequence) and encoder):
        yield name, node  # type: ignore[misc]
        return
    for key, value in node.items():
        yield from _owners(value, f'{name}.{key}')


def _replace(owner: ConfigDict, arch: str | Mapping, checkpoint: str | None, drop_path_rate: float) -> None:
    encoder = owner.get('image_encoder')
    old, necks = (encoder[0], encoder[1:]) if encoder else (owner.backbone, owner.get('neck') or [])
    necks = [necks] if isinstance(necks, Mapping) else necks
    maps, stages = _backbone_maps(old, get_arch(arch).dims)
    pooled = maps.pooled
    unread = _drop_unread(necks[0]) if necks else 0
    stages = stages[unread:]
    for i, neck in enumerate(necks):
        maps = _neck_maps(neck, maps, unread if i == 0 else 0)
    read = _translate_heads(owner, maps, bool(necks))
    stages = tuple(stages[i] for i in read) if not necks else stages
    new = ConfigDict(type='UniRepLKNet', arch=arch, out_indices=stages, drop_path_rate=drop_path_rate)
    if old.get('in_channels', 3) != 3:
        new.in_channels = old.in_channels
    if 'SyncBN' in str((old.get('norm_cfg') or {}).get('type')):
        new.norm_cfg = dict(type='SyncBN')
    if pooled:
        new.gap_before_final_norm = True
    if checkpoint:
        new.init_cfg = dict(type='Pretrained', checkpoint=checkpoint)
    if encoder:
        owner.image_encoder = [new, *necks]
    else:
        owner.backbone = new
    if owner.get('pretrained'):
        owner.pretrained = None


def _run(cfg: Mapping, inputs: Any, what: str) -> list[Tensor]:
    """Outputs of the module ``cfg``, built without pretrained weights."""
    kind = cfg.get('type')
    plain = {key: value for key, value in cfg.items() if key not in ('init_cfg', 'pretrained')}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            module = MODELS.build(ConfigDict(plain))
            torch.nn.Module.train(module, False)
            outs = module(inputs)
    except Exception as error:  # whatever a module of somebody else raises
        raise ValueError(
            f'The {what} {kind} cannot be run by itself, so it is unknown what it reads and gives '
            f'({type(error).__name__}: {error}). {BY_HAND}'
        ) from error
    outs = list(outs) if isinstance(outs, (tuple, list)) else [outs]
    if not outs or not all(isinstance(x, Tensor) and x.dim() in (2, 4) for x in outs):
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in outs]
        raise ValueError(f'The {what} {kind} gives {shapes}, expected maps (N, C, H, W) or vectors (N, C). {BY_HAND}')
    return outs


def _backbone_maps(cfg: Mapping, dims: Sequence[int]) -> tuple[_Maps, tuple[int, ...]]:
    """Outputs of the original backbone and of the new one, and the stages of the new one to return."""
    kind = str(cfg.get('type'))
    old = _run(cfg, torch.zeros(1, cfg.get('in_channels', 3), SIZE, SIZE), 'backbone')
    if old[0].dim() == 2:
        if len(old) > 1:
            raise ValueError(f'The backbone {kind} gives {len(old)} vectors, but UniRepLKNet only one. {BY_HAND}')
        return _Maps(kind, old, [torch.zeros(1, dims[3])]), (3,)
    strides, channels = [SIZE // x.shape[-1] for x in old], [x.shape[1] for x in old]
    stages = [STAGES.get(stride, -1) for stride in strides]
    if channels == sorted(set(channels)) and stages == sorted(stages) and len(set(stages)) < len(stages) <= 4:
        stages = list(range(4 - len(stages), 4))
        print_log(
            f'{kind} has the strides {strides} by dilation; UniRepLKNet gives {[4 << i for i in stages]}.', 'current'
        )
    elif -1 in stages or stages != sorted(set(stages)):
        raise ValueError(
            f'The backbone {kind} gives maps of the strides {strides} with {channels} channels, which are no part of a '
            f'pyramid of the strides 4, 8, 16, 32. {BY_HAND}'
        )
    new = [torch.zeros(1, dims[i], SIZE >> (i + 2), SIZE >> (i + 2)) for i in stages]
    return _Maps(kind, old, new), tuple(stages)


def _drop_unread(neck: ConfigDict) -> int:
    """Have an FPN whose ``start_level`` leaves out the first maps not get them; how many those are.

    The norm of a map that nothing reads would get no gradient, for which DDP waits.
    """
    unread = neck.get('start_level', 0)
    if unread > 0:
        neck.start_level = 0
        if neck.get('end_level', -1) > 0:
            neck.end_level -= unread
    return max(unread, 0)


def _neck_maps(cfg: ConfigDict, maps: _Maps, unread: int = 0) -> _Maps:
    """Give the neck its new channels, without those of the first ``unread`` maps; what it hands on before and after."""
    original = cfg if not unread else ConfigDict(cfg, start_level=unread, end_level=cfg.get('end_level', -1))
    if unread and original.end_level > 0:
        original.end_level += unread
    old = _run(original, tuple(maps.old), 'neck')
    if 'in_channels' in cfg:
        indices = _indices(cfg.in_channels, maps, f'in_channels of the neck {cfg.type}')
        cfg.in_channels = _like(cfg.in_channels, [maps.channels[1][i] for i in indices[unread:]])
    new = _run(cfg, tuple(maps.new[unread:]), 'neck')
    if len(new) != len(old):
        raise ValueError(f'The neck {cfg.type} gives {len(new)} maps instead of {len(old)}. {BY_HAND}')
    return _Maps(str(cfg.type), old, new)


def _translate_heads(owner: ConfigDict, maps: _Maps, behind_neck: bool) -> list[int]:
    """Give the heads their new channels.

    Returns:
        The maps to keep: those that are read, for which ``in_index`` is counted anew, or all of a neck.
    """
    before, after = maps.channels
    everything = list(range(len(before)))
    if before == after:  # the neck hands on as many as before
        return everything
    if 'roi_head' in owner:
        raise ValueError(
            f'The roi_head {owner.roi_head.type} reads {maps.source} without a neck between them, through a head made '
            f'for it. Take a config with FPN. {BY_HAND}'
        )
    heads = [key for key, value in owner.items() if key.endswith('head') and value]
    readers = [reader for key in heads for reader in _readers(owner[key], key)]
    if not readers:
        raise ValueError(
            f'{maps.source} gives {before} channels, UniRepLKNet {after}, but no in_channels of '
            f'{", ".join(heads) or "a head"} says who reads them. {BY_HAND}'
        )
    chosen = [_indices(head.in_channels, maps, where, head.get('in_index')) for where, head in readers]
    _check_cascade(owner, maps, chosen)
    finest = [0 for _, head in readers if 'c1_in_channels' in head]  # what DeepLabV3+ adds
    read = everything if behind_neck else sorted({i for indices in chosen for i in indices} | set(finest))
    for (where, head), indices in zip(readers, chosen, strict=True):
        head.in_channels = _like(head.in_channels, [after[i] for i in indices])
        if 'in_index' in head and read != everything:
            head.in_index = _like(head.in_index, [read.index(i) for i in indices])
        if 'c1_in_channels' in head:
            _indices(head.c1_in_channels, maps, f'c1_in_channels of {where}', 0)
            head.c1_in_channels = after[0]
    return read


def _check_cascade(owner: ConfigDict, maps: _Maps, chosen: list[list[int]]) -> None:
    """Heads of a cascade combine their outputs, which takes maps of one size, as dilation gives them."""
    read = {i for indices in chosen for i in indices}
    before, after = (len({x[i].shape[2:] for i in read}) for x in (maps.old, maps.new))
    if isinstance(owner.get('decode_head'), (list, tuple)) and before == 1 and after > 1:
        raise ValueError(
            f'The heads of {owner.get("type")} read {maps.source} at one stride, by dilation, which UniRepLKNet '
            'does not have: take a config without it, such as OCRNet with HRNet, or give all heads one in_index.'
        )


def _readers(head: Any, name: str, top: bool = True) -> Iterator[tuple[str, ConfigDict]]:
    """Heads that read maps: those of the model, and those within them that choose maps by ``in_index``."""
    if isinstance(head, (list, tuple)):
        for i, part in enumerate(head):
            yield from _readers(part, f'{name}[{i}]', top)
    elif isinstance(head, Mapping):
        if 'in_channels' in head and (top or 'in_index' in head):
            yield f'in_channels of {name}, {head.get("type")},', head  # type: ignore[misc]
        for key, part in head.items():
            yield from _readers(part, f'{name}.{key}', top=False)


def _indices(
    value: int | Sequence[int], maps: _Maps, where: str, index: int | Sequence[int] | None = None
) -> list[int]:
    """Which maps have the channels ``value``.

    Args:
        value: What the config says, an int or a list.
        maps: What is read.
        where: Names the entry in errors.
        index: ``in_index``; without it all maps in order if that fits, else those of these channels.
    """
    before = maps.channels[0]
    given, count = _listed(value), len(before)
    if index is not None:
        indices = [i % count if -count <= i < count else count for i in _listed(index)]
    elif given == before:
        indices = list(range(count))
    elif len(set(before)) == count:
        indices = [before.index(channels) if channels in before else count for channels in given]
    else:
        indices = [count]
    if count in indices or [before[i] for i in indices] != given:
        chosen = '' if index is None else f' with in_index={index}'
        raise ValueError(f'{where} is {value}{chosen}, but {maps.source} gives {before} channels. {BY_HAND}')
    return indices


def _listed(value: int | Sequence[int]) -> list[int]:
    return list(value) if isinstance(value, Sequence) else [value]


def _like(value: int | Sequence[int], new: list[int]) -> Any:
    """``new`` as the list, tuple or int that ``value`` is: some modules insist on one of them."""
    if isinstance(value, tuple):
        return tuple(new)
    return new if isinstance(value, Sequence) else new[0]


def _use_layer_decay(cfg: Config, rate: float) -> None:
    if 'optim_wrapper' not in cfg:
        raise ValueError(f'layer_decay={rate} needs an optim_wrapper in the config, which has none.')
    if dropped := cfg.optim_wrapper.get('paramwise_cfg'):
        print_log(
            f'Layer decay replaces paramwise_cfg={dict(dropped)}, whose rules are not applied any more.',
            'current',
            logging.WARNING,
        )
    cfg.optim_wrapper.constructor = 'LayerDecayOptimWrapperConstructor'
    cfg.optim_wrapper.paramwise_cfg = ConfigDict(decay_rate=rate, num_layers=12)


def _check_normalisation(cfg: Config) -> None:
    found = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    rgb = found.get('bgr_to_rgb') or found.get('to_rgb')
    if not rgb or tuple(found.get('mean') or ()) != MEAN or tuple(found.get('std') or ()) != STD:
        print_log(
            f'data_preprocessor has mean={found.get("mean")}, std={found.get("std")}, to RGB: {bool(rgb)}. The '
            f'published weights expect RGB with mean={list(MEAN)}, std={list(STD)}.',
            'current',
            logging.WARNING,
        )
