"""Dilated Reparam Block: a large depthwise convolution trained with parallel dilated small ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar, cast

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .. import compat
from ..ops import DepthwiseConv2d, depthwise_conv2d, dilated_reparam_conv, merge_branches
from .layers import LayerNorm2d
from .norms import beta_of, gamma_of, is_hooked, is_plain_bn, is_watched, process_group_of, update_running_statistics
from .reparam import check_foldable, float64, norm_scale

__all__ = [
    'PUBLISHED_BRANCHES', 'DilatedReparamBlock', 'build_norm', 'check_branch_sizes', 'check_branches',
    'default_branches', 'depthwise_conv', 'with_weights',
]  # fmt: skip

PUBLISHED_BRANCHES: Mapping[int, tuple[tuple[int, int], ...]] = {
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
"""Kernel size -> (size, dilation) of the parallel branches, as in the official code; the paper's
figure shows 9 as an example. The authors call the code authoritative (their issue #4)."""


def default_branches(kernel_size: int) -> tuple[tuple[int, int], ...]:
    """Branches (size, dilation) of a kernel size: the published table, beyond it our own rule.

    For 19 to 31 (not published): a 5x5, the largest kernel that fits at dilation 2, and three 3x3 at about
    1/2, 2/3 and all but one of the radius. The rule gives the published rows for 13 and 17. 3 and 5 have none.
    """
    if kernel_size in PUBLISHED_BRANCHES:
        return PUBLISHED_BRANCHES[kernel_size]
    if kernel_size < 7:
        return ()
    radius = kernel_size // 2
    return ((5, 1), (radius // 2 * 2 + 1, 2), (3, radius // 2), (3, 2 * radius // 3), (3, radius - 1))


def check_branches(kernel_size: int, branches: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Validate user-given branches.

    Raises:
        ValueError: An even size, a dilation below 1, a repeated branch, or one that covers more than the kernel.
    """
    checked = tuple((int(k), int(r)) for k, r in branches)
    for k, r in checked:
        if k % 2 == 0 or k < 1 or r < 1 or (k - 1) * r + 1 > kernel_size:
            raise ValueError(
                f'branch (size {k}, dilation {r}) does not fit a {kernel_size}x{kernel_size} kernel: the size '
                f'must be odd, the dilation at least 1 and (size - 1) * dilation + 1 at most {kernel_size}.'
            )
    if len(set(checked)) != len(checked):
        raise ValueError(f'branches {checked} of the {kernel_size}x{kernel_size} kernel repeat one.')
    return checked


def check_branch_sizes(branches: Iterable[int], kernel_sizes: Iterable[Iterable[int]]) -> None:
    """Refuse branches for a kernel size that no block has; they would be left out without a word.

    Raises:
        ValueError: There is such a size, or it is no int.
    """
    sizes = sorted({size for stage in kernel_sizes for size in stage})
    if unused := [size for size in branches if size not in sizes]:
        raise ValueError(f'branches names the kernel sizes {unused}, but the blocks have {sizes} (ints).')


def depthwise_conv(dim: int, kernel_size: int, dilation: int = 1, bias: bool = False) -> DepthwiseConv2d:
    """Depthwise convolution of stride 1 that keeps the size of the map.

    Raises:
        ValueError: An even kernel size, which cannot keep it.
    """
    if kernel_size % 2 == 0:
        raise ValueError(f'kernel_size={kernel_size} must be odd: an even kernel cannot keep the size of the map.')
    padding = (kernel_size - 1) * dilation // 2
    return DepthwiseConv2d(dim, dim, kernel_size, padding=padding, dilation=dilation, groups=dim, bias=bias)


def build_norm(norm_cfg: Mapping, dim: int) -> nn.Module:
    """Norm layer over the channels of a (N, C, H, W) map.

    ``SyncBN`` is built as the device-agnostic one, ``LN`` as a LayerNorm over channels.
    """
    from mmcv.cnn import build_norm_layer

    cfg = dict(norm_cfg)
    if cfg.get('type') in ('LN', 'LN2d'):
        del cfg['type']
        trainable = cfg.pop('requires_grad', True)
        return LayerNorm2d(dim, **cfg).requires_grad_(trainable)
    if cfg.get('type') == 'SyncBN':
        cfg['type'] = 'DeviceAgnosticSyncBN'
    return build_norm_layer(cfg, dim)[1]


class DilatedReparamBlock(BaseModule):
    """``y = BN(DW_K(x)) + sum_j BN_j(DW_{k_j, dilation r_j}(x))``, (N, C, H, W) -> (N, C, H, W).

    The Dilated Reparam Block of UniRepLKNet, https://arxiv.org/abs/2311.15599. In the deploy form one KxK convolution
    with bias remains, under the same name ``lk_origin``.

    It is computed as one operation wherever its norms are BN: by ``dilated_reparam_conv`` with the statistics of the
    batch, and as one convolution with the merged kernel with the running ones. Without gradients that kernel is kept
    until a weight changes or ``train()`` or ``eval()`` is called; a change behind autograd's back (through ``.data``)
    counts from that call on. Hooks on the layers inside, other norms, tracing and export get the layers one by one.
    In several processes with SyncBN that must hold in all of them or in none: one all-reduce serves all branches, and
    one branch after the other takes one each.

    Args:
        dim: Channels C.
        kernel_size: Size K of the large kernel, odd.
        branches: (size, dilation) of the parallel branches; None takes ``default_branches``.
        norm_cfg: Norm after every convolution.
        deploy: Build the deploy form.
        fused: False computes every layer by itself, as published.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        branches: Sequence[tuple[int, int]] | None = None,
        norm_cfg: Mapping | None = None,
        deploy: bool = False,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.deploy = deploy
        self.fused = fused
        self._kept: tuple[list, list, Tensor, Tensor] | None = None
        self.lk_origin: nn.Conv2d = depthwise_conv(dim, kernel_size, bias=deploy)
        self.branches = check_branches(kernel_size, default_branches(kernel_size) if branches is None else branches)
        if deploy:
            return
        norm_cfg = norm_cfg or dict(type='BN')
        self.origin_bn = build_norm(norm_cfg, dim)
        for k, r in self.branches:
            self.add_module(f'dil_conv_k{k}_{r}', depthwise_conv(dim, k, r))
            self.add_module(f'dil_bn_k{k}_{r}', build_norm(norm_cfg, dim))

    def branch(self, k: int, r: int) -> tuple[nn.Conv2d, nn.Module]:
        """Convolution and norm of the branch of size ``k`` and dilation ``r``."""
        return getattr(self, f'dil_conv_k{k}_{r}'), getattr(self, f'dil_bn_k{k}_{r}')

    def layers(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        """Convolution and norm of every branch, the large kernel first."""
        return [(self.lk_origin, self.origin_bn), *(self.branch(k, r) for k, r in self.branches)]

    def forward(self, x: Tensor) -> Tensor:
        """Apply all branches to ``x`` (N, C, H, W)."""
        if self.deploy:
            return self.lk_origin(x)
        layers = self.layers()
        how = self._statistics(layers) if self.fused and not compat.needs_standard_operators() else ''
        if how == 'batch':
            return self._forward_batch(x, layers)
        if how == 'running':
            return self._forward_merged(x, layers)
        return sum(norm(conv(x)) for conv, norm in layers)  # type: ignore[return-value]

    def train(self, mode: bool = True) -> DilatedReparamBlock:
        """Set the mode, and forget the kernel merged before."""
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_kept': None}

    @staticmethod
    def _statistics(layers: list[tuple[nn.Conv2d, nn.Module]]) -> str:
        """'batch' or 'running', whichever all norms use; '' where the layers cannot be computed together."""
        if is_watched():
            return ''
        for conv, norm in layers:
            if type(conv) is not DepthwiseConv2d or not is_plain_bn(norm) or is_hooked(conv) or is_hooked(norm):
                return ''
        norms = [cast(_BatchNorm, norm) for _, norm in layers]
        uses_batch = {norm.training or norm.running_mean is None for norm in norms}
        groups = [process_group_of(norm) for norm in norms]
        if len(uses_batch) > 1 or any(group is not groups[0] for group in groups):
            return ''
        return 'batch' if uses_batch.pop() else 'running'

    def _forward_batch(self, x: Tensor, layers: list[tuple[nn.Conv2d, nn.Module]]) -> Tensor:
        convs, norms = [conv for conv, _ in layers], [cast(_BatchNorm, norm) for _, norm in layers]
        y, mean, var, count = dilated_reparam_conv(
            x,
            [conv.weight for conv in convs],
            [conv.dilation[0] for conv in convs],
            [gamma_of(norm, x.device) for norm in norms],
            [beta_of(norm, x.device) for norm in norms],
            [norm.eps for norm in norms],
            process_group_of(norms[0]),
            cast(DepthwiseConv2d, self.lk_origin).backend,
        )
        update_running_statistics(norms, mean.unbind(), var.unbind(), count)
        return y

    def _forward_merged(self, x: Tensor, layers: list[tuple[nn.Conv2d, nn.Module]]) -> Tensor:
        backend = cast(DepthwiseConv2d, self.lk_origin).backend
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
            return depthwise_conv2d(x, *_merge(layers), backend=backend)  # of a mode, it might not be what it seems
        tensors = [t for conv, norm in layers for t in (conv.weight, *norm.parameters(), *norm.buffers())]
        if any(t.is_inference() for t in tensors):  # they do not count their changes
            return depthwise_conv2d(x, *_merge(layers), backend=backend)
        key = [*((t._version, t.data_ptr()) for t in tensors), *(cast(_BatchNorm, norm).eps for _, norm in layers)]
        kept = self._kept  # read once: another thread may change it
        if kept is None or kept[0] != key:
            # The aliases hold the memory, so that no other tensor comes to lie at its address.
            self._kept = kept = (key, [t.detach() for t in tensors], *_merge(layers))
        return depthwise_conv2d(x, *kept[2:], backend=backend)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Kernel (C, 1, K, K) and bias (C,), float64 on the CPU, of the one equivalent convolution.

        Raises:
            RuntimeError: In training mode.
            TypeError: A norm that is not BN.
        """
        if self.deploy:
            weight, bias = self.lk_origin.weight, cast(Tensor, self.lk_origin.bias)
            return float64(weight), float64(bias)
        self.check_foldable()
        layers = self.layers()
        scales, shifts = zip(*(norm_scale(norm) for _, norm in layers), strict=True)
        weights = [float64(conv.weight) for conv, _ in layers]
        return merge_branches(weights, [conv.dilation[0] for conv, _ in layers], scales), sum(shifts)

    def check_foldable(self) -> None:
        """Raise what ``merged`` raises, and change nothing."""
        for _, norm in () if self.deploy else self.layers():
            check_foldable(norm, self)

    def switch_to_deploy(self) -> None:
        """Replace all branches by the one merged convolution, in place; a second call changes nothing."""
        if not self.deploy:
            self.store_merged(*self.merged())

    def store_merged(self, kernel: Tensor, bias: Tensor) -> None:
        """Become the deploy form with this kernel (C, 1, K, K) and bias (C,)."""
        self.lk_origin = with_weights(self.lk_origin, kernel, bias)
        for name in [n for n, _ in self.named_children() if n != 'lk_origin']:
            delattr(self, name)
        self.deploy = True


def _merge(layers: list[tuple[nn.Conv2d, nn.Module]]) -> tuple[Tensor, Tensor]:
    """Kernel (C, 1, K, K) and bias (C,) of the one convolution that all branches are with their running statistics."""
    norms = [cast(_BatchNorm, norm) for _, norm in layers]
    device = layers[0][0].weight.device
    scales = [gamma_of(norm, device) * torch.rsqrt(cast(Tensor, norm.running_var) + norm.eps) for norm in norms]
    shifts = [
        beta_of(norm, device) - cast(Tensor, norm.running_mean) * scale
        for norm, scale in zip(norms, scales, strict=True)
    ]
    weights = [conv.weight for conv, _ in layers]
    return merge_branches(weights, [conv.dilation[0] for conv, _ in layers], scales), torch.stack(shifts).sum(0)


Layer = TypeVar('Layer', nn.Conv2d, nn.Linear)


def with_weights(layer: Layer, weight: Tensor, bias: Tensor) -> Layer:
    """Give ``layer`` a new weight and bias in place, on its own device, in its own dtype, and return it."""
    old = layer.weight
    with_grad = old.requires_grad
    new = weight.to(device=old.device, dtype=old.dtype)
    layer.weight = nn.Parameter(new, requires_grad=with_grad)
    layer.bias = nn.Parameter(bias.to(device=old.device, dtype=old.dtype), requires_grad=with_grad)
    return layer
