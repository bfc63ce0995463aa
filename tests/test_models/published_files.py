"""Stand-ins for the published full-model files, which cannot be had here.

Names and shapes are kept by hand: the backbone's as the official code writes them in its "features" mode (commit
b5677d8), the heads' as mmdet 2.28.1 (FPN, RPNHead, ConvFCBBoxHead, FCNMaskHead) and mmseg 0.27.0 (UPerHead, FCNHead)
write them with mmcv-full 1.5.0. Nothing here asks the package under test. What surrounds the weights is mmcv 1's:
``meta`` with classes, palette and the text of the config, AdamW's state, and the buffers of mmdet 2's EMA hook.
"""

from __future__ import annotations

import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from ..procedural import fill

Shapes = dict[str, tuple[int, ...]]

# depths, channels of the first stage, kernel sizes that stage 3 repeats
VARIANTS = {
    'a': ((2, 2, 6, 2), 40, (13,)),
    't': ((3, 3, 18, 3), 80, (13, 3)),
    's': ((3, 3, 27, 3), 96, (13, 3, 3)),
    'b': ((3, 3, 27, 3), 128, (13, 3, 3)),
    'l': ((3, 3, 27, 3), 192, (13, 3, 3)),
    'xl': ((3, 3, 27, 3), 256, (13, 3, 3)),
}
BRANCHES_OF_13 = ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5))  # kernel size, dilation


def norm(name: str, dim: int, batch: bool = True) -> Shapes:
    """Batch norm, or layer norm."""
    shapes: Shapes = {f'{name}.weight': (dim,), f'{name}.bias': (dim,)}
    if batch:
        shapes |= {f'{name}.running_mean': (dim,), f'{name}.running_var': (dim,), f'{name}.num_batches_tracked': ()}
    return shapes


def layer(name: str, *shape: int, bias: bool = True) -> Shapes:
    """Convolution or linear layer; a transposed convolution has as many outputs as inputs here."""
    return {f'{name}.weight': shape, **({f'{name}.bias': shape[:1]} if bias else {})}


def conv_bn(name: str, *shape: int) -> Shapes:
    """mmcv's ConvModule with a norm."""
    return layer(f'{name}.conv', *shape, bias=False) | norm(f'{name}.bn', shape[0])


def block(name: str, dim: int, kernel: int) -> Shapes:
    shapes: Shapes = {f'{name}.gamma': (dim,)}
    if kernel == 13:
        shapes |= layer(f'{name}.dwconv.lk_origin', dim, 1, 13, 13, bias=False) | norm(f'{name}.dwconv.origin_bn', dim)
        for size, dilation in BRANCHES_OF_13:
            shapes |= layer(f'{name}.dwconv.dil_conv_k{size}_{dilation}', dim, 1, size, size, bias=False)
            shapes |= norm(f'{name}.dwconv.dil_bn_k{size}_{dilation}', dim)
    else:
        shapes |= layer(f'{name}.dwconv', dim, 1, kernel, kernel, bias=False)
    shapes |= norm(f'{name}.norm', dim)
    shapes |= layer(f'{name}.se.down', dim // 4, dim, 1, 1) | layer(f'{name}.se.up', dim, dim // 4, 1, 1)
    shapes |= layer(f'{name}.pwconv1.1', 4 * dim, dim)
    shapes |= {f'{name}.act.1.gamma': (1, 1, 1, 4 * dim), f'{name}.act.1.beta': (1, 1, 1, 4 * dim)}
    return shapes | layer(f'{name}.pwconv2.0', dim, 4 * dim, bias=False) | norm(f'{name}.pwconv2.2', dim)


def trunk(arch: str) -> Shapes:
    """What classifiers and dense backbones share."""
    depths, base, pattern = VARIANTS[arch]
    dims = [base, 2 * base, 4 * base, 8 * base]
    name = 'downsample_layers'
    shapes = layer(f'{name}.0.0', base // 2, 3, 3, 3) | norm(f'{name}.0.1', base // 2, batch=False)
    shapes |= layer(f'{name}.0.3', base, base // 2, 3, 3) | norm(f'{name}.0.4', base, batch=False)
    for i in (1, 2, 3):
        shapes |= layer(f'{name}.{i}.0', dims[i], dims[i - 1], 3, 3) | norm(f'{name}.{i}.1', dims[i], batch=False)
    for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        for i in range(depth):
            kernel = (3, 13, pattern[i % len(pattern)], 13)[stage]
            shapes |= block(f'stages.{stage}.{i}', dim, kernel)
    return shapes


def classifier(arch: str, classes: int = 1000) -> Shapes:
    dim = 8 * VARIANTS[arch][1]
    return trunk(arch) | norm('norm', dim, batch=False) | layer('head', classes, dim)


def dense(arch: str) -> Shapes:
    """Backbone of a detector or segmentor."""
    shapes = trunk(arch)
    for i in range(4):
        shapes |= norm(f'norm{i}', VARIANTS[arch][1] * 2**i, batch=False)
    return {f'backbone.{name}': shape for name, shape in shapes.items()}


def cascade_mask_rcnn(arch: str, width: int = 256, fc: int = 1024, classes: int = 80) -> Shapes:
    """mmdet 2.28.1: FPN, RPN, three ConvFCBBoxHeads of 4 convolutions and 1 linear layer, three FCNMaskHeads."""
    shapes = dense(arch)
    for i in range(4):
        shapes |= layer(f'neck.lateral_convs.{i}.conv', width, VARIANTS[arch][1] * 2**i, 1, 1)
    for i in range(4):
        shapes |= layer(f'neck.fpn_convs.{i}.conv', width, width, 3, 3)
    shapes |= layer('rpn_head.rpn_conv', width, width, 3, 3)
    shapes |= layer('rpn_head.rpn_cls', 3, width, 1, 1) | layer('rpn_head.rpn_reg', 12, width, 1, 1)
    for stage in range(3):
        name = f'roi_head.bbox_head.{stage}'
        shapes |= layer(f'{name}.fc_cls', classes + 1, fc) | layer(f'{name}.fc_reg', 4 * classes, fc)
        for i in range(4):
            shapes |= conv_bn(f'{name}.shared_convs.{i}', width, width, 3, 3)
        shapes |= layer(f'{name}.shared_fcs.0', fc, width * 7 * 7)
    for stage in range(3):
        name = f'roi_head.mask_head.{stage}'
        for i in range(4):
            shapes |= layer(f'{name}.convs.{i}.conv', width, width, 3, 3)
        shapes |= layer(f'{name}.upsample', width, width, 2, 2) | layer(f'{name}.conv_logits', classes, width, 1, 1)
    return shapes


def upernet(arch: str, width: int = 512, auxiliary: int = 256, classes: int = 150) -> Shapes:
    """mmseg 0.27.0: UPerHead and an auxiliary FCNHead."""
    dims = [VARIANTS[arch][1] * 2**i for i in range(4)]
    shapes = dense(arch) | layer('decode_head.conv_seg', classes, width, 1, 1)
    for i in range(4):
        shapes |= conv_bn(f'decode_head.psp_modules.{i}.1', width, dims[3], 1, 1)
    shapes |= conv_bn('decode_head.bottleneck', width, dims[3] + 4 * width, 3, 3)
    for i in range(3):
        shapes |= conv_bn(f'decode_head.lateral_convs.{i}', width, dims[i], 1, 1)
    for i in range(3):
        shapes |= conv_bn(f'decode_head.fpn_convs.{i}', width, width, 3, 3)
    shapes |= conv_bn('decode_head.fpn_bottleneck', width, 4 * width, 3, 3)
    shapes |= layer('auxiliary_head.conv_seg', classes, auxiliary, 1, 1)
    return shapes | conv_bn('auxiliary_head.convs.0', auxiliary, dims[2], 3, 3)


# ------------------------------------------------------------------------------------------ files


def is_buffer(name: str) -> bool:
    return name.endswith(('running_mean', 'running_var', 'num_batches_tracked'))


def payload(shapes: Shapes, ema: bool) -> int:
    """Bytes of all tensors in the file: weights, two moments of AdamW, and the EMA hook's copies of everything."""
    numbers = sum(int(np.prod(shape)) for name, shape in shapes.items() if not name.endswith('num_batches_tracked'))
    counters = sum(name.endswith('num_batches_tracked') for name in shapes)
    trained = sum(int(np.prod(shape)) for name, shape in shapes.items() if not is_buffer(name))
    return (4 * numbers + 8 * counters) * (2 if ema else 1) + 8 * trained


def weights(shapes: Shapes) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((name, torch.from_numpy(fill(name, shape))) for name, shape in shapes.items())


def adamw(shapes: Shapes) -> dict:
    """AdamW's state as torch 1.11 writes it, one parameter group a parameter; moments take no space in the file."""
    trained = [name for name in shapes if not is_buffer(name)]
    zero = torch.zeros(1)
    return dict(
        state={
            i: dict(step=7, exp_avg=zero.expand(shapes[name]), exp_avg_sq=zero.expand(shapes[name]))
            for i, name in enumerate(trained)
        },
        param_groups=[
            dict(lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05, amsgrad=False, maximize=False,
                 param_names=[name], lr_scale=0.8, group_name=f'layer_{i}_decay', initial_lr=1e-4, params=[i])
            for i, name in enumerate(trained)
        ],
    )  # fmt: skip


def file_of(path: Path, shapes: Shapes, ema: bool = False, classes: tuple = ('cat', 'dog')) -> OrderedDict:
    """Write what mmcv 1.5.0 writes, numpy scalars of numpy 1 included; the weights that loading must give."""
    state = weights(shapes)
    stored = OrderedDict(state)
    if ema:  # buffers of the model itself come before those of its parts
        copies = OrderedDict((f'ema_{name.replace(".", "_")}', value + 1) for name, value in state.items())
        stored = OrderedDict([*copies.items(), *state.items()])
    stored._metadata = OrderedDict({'': dict(version=1), 'backbone': dict(version=1)})
    meta = dict(
        mmcv_version='1.5.0', time='Sun Nov 26 03:14:15 2023', CLASSES=classes, PALETTE=[(220, 20, 60), (119, 11, 32)],
        config="model = dict(type='X')\n", env_info='sys.platform: linux', seed=0, exp_name='x.py', epoch=36, iter=7330,
        hook_msgs=dict(best_score=np.float64(0.449), best_ckpt='best_segm_mAP_epoch_36.pth', last_ckpt=None),
    )  # fmt: skip
    torch.save(dict(meta=meta, state_dict=stored, optimizer=adamw(shapes)), path)
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, 'w') as archive:
        for name, data in entries:
            archive.writestr(name, re.sub(rb'numpy\._core', b'numpy.core', data) if name.endswith('.pkl') else data)
    return state
