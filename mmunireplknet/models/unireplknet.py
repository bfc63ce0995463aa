"""UniRepLKNet backbone.

Paper: "UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series and
Image Recognition", CVPR 2024, https://arxiv.org/abs/2311.15599; extended in https://arxiv.org/abs/2410.08049.
Official code and weights: https://github.com/AILab-CVC/UniRepLKNet (Apache-2.0). This is an independent
implementation with the same state-dict keys and shapes, so the published weights load strictly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import compat
from ..ops import backends
from .arch_zoo import get_arch
from .block import UniRepLKNetBlock
from .checkpoint import adapt_stem, check_state_dict, load_pretrained
from .dilated_reparam import check_branch_sizes
from .layers import LayerNorm2d, is_channels_last

__all__ = ['UniRepLKNet', 'UniRepLKNetBlock']

TRUNC_NORMAL_INIT = (
    dict(type='TruncNormal', layer=['Conv2d', 'Linear'], std=0.02, bias=0.0),
    dict(type='Constant', layer=['LayerNorm', 'BatchNorm2d'], val=1.0, bias=0.0),
)
"""The published initialisation of classifiers. Dense backbones keep torch's default, as published."""


@MODELS.register_module()
class UniRepLKNet(BaseModule):
    """UniRepLKNet backbone with multi-scale outputs.

    Args:
        arch: Name of a published variant, 'a' 'f' 'p' 'n' 't' 's' 'b' 'l' 'xl', or a dict with ``depths``, ``dims``
            and ``kernel_sizes``.
        in_channels: Channels of the input. Weights published for 3 are adapted (see ``adapt_stem``).
        out_indices: Stages, from 0 to 3 in ascending order, whose maps are returned.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        layer_scale_init_value: Initial layer scale; None or 0 for none.
        kernel_sizes: Replaces the variant's: an int, one entry a stage, or one a block; odd, 3 to 31.
        branches: Kernel size -> (size, dilation) of the dilated branches, instead of the published ones; an
            empty list gives the large kernel alone. 3 and 5 are plain unless named here.
        norm_cfg: Norm in the blocks. BN and SyncBN fold away at deployment; GN and LN train, but do not fold.
        frozen_stages: 0 freezes the stem, n the stem and the first n stages, -1 nothing. Frozen BN is in eval mode.
        norm_eval: Keep every BN in eval mode during training.
        with_cp: Recompute blocks in the backward pass to save memory; BN statistics are updated once.
        deploy: Build the reparameterized form (inference).
        gap_before_final_norm: Return the pooled, normed (N, C) feature instead of maps; with
            ``out_indices=(3,)`` this is the trunk of the published classifier.
        channels_last: Compute in channels_last memory: the block's permutes become views. False computes in the
            layout of the input; None chooses what is known to be faster, channels_last on a CPU with the compiled
            kernels. The outputs have the layout of the input in every case.
        fused: Compute blocks by fused operators where there are any, with the same results; False computes every
            layer by itself, as published.
        init_cfg: mmengine's initialisation. ``dict(type='Pretrained', checkpoint=...)`` takes a file, an https
            address or the short name of a published file (``arch_zoo.CHECKPOINTS``).

    Raises:
        ValueError: Any argument out of its range, with what was expected.
    """

    def __init__(
        self,
        arch: str | Mapping = 's',
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float | None = 1e-6,
        kernel_sizes: int | Sequence | None = None,
        branches: Mapping[int, Sequence[tuple[int, int]]] | None = None,
        norm_cfg: Mapping | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        deploy: bool = False,
        gap_before_final_norm: bool = False,
        channels_last: bool | None = None,
        fused: bool = True,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if init_cfg is None and gap_before_final_norm:
            init_cfg = [dict(cfg) for cfg in TRUNC_NORMAL_INIT]
        super().__init__(init_cfg)
        norm_cfg = dict(norm_cfg or dict(type='BN'))
        _check_arguments(in_channels, out_indices, frozen_stages, drop_path_rate, gap_before_final_norm)
        if deploy and norm_cfg.get('type') not in ('BN', 'BN2d', 'SyncBN', 'DeviceAgnosticSyncBN'):
            raise ValueError(
                f'deploy=True with norm_cfg={norm_cfg}: the deploy form has BN folded into its convolutions, '
                'which is impossible for other norms. Use BN or SyncBN, or deploy=False.'
            )
        self.arch = get_arch(arch, kernel_sizes)
        check_branch_sizes(branches or {}, self.arch.kernel_sizes)
        self.in_channels = in_channels
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.deploy = deploy
        self.gap_before_final_norm = gap_before_final_norm
        self.channels_last = channels_last
        self.fused = fused
        dims = self.arch.dims

        self.downsample_layers = nn.ModuleList([_stem(in_channels, dims[0])])
        for i in range(3):
            conv = nn.Conv2d(dims[i], dims[i + 1], 3, stride=2, padding=1)
            self.downsample_layers.append(nn.Sequential(conv, LayerNorm2d(dims[i + 1])))

        rates = iter(torch.linspace(0, drop_path_rate, sum(self.arch.depths), device='cpu').tolist())
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    UniRepLKNetBlock(
                        dim,
                        size,
                        drop_path_rate=next(rates),
                        layer_scale_init_value=layer_scale_init_value,
                        branches=(branches or {}).get(size),
                        norm_cfg=norm_cfg,
                        with_cp=with_cp,
                        deploy=deploy,
                        fused=fused,
                    )
                    for size in sizes
                )
            )
            for dim, sizes in zip(dims, self.arch.kernel_sizes, strict=True)
        )
        for i in self.out_indices:
            name, norm = ('norm', nn.LayerNorm) if gap_before_final_norm else (f'norm{i}', LayerNorm2d)
            self.add_module(name, norm(dims[i], eps=1e-6))
        for i in range(self.out_indices[-1] + 1, 4):
            # Stages behind the last output take no part: DDP would wait for their gradients.
            self.downsample_layers[i].requires_grad_(False)
            self.stages[i].requires_grad_(False)
        self._freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature maps of ``x``.

        Args:
            x: (N, in_channels, H, W), any H and W.

        Returns:
            One map (N, dims[i], ceil(H / 2^(i+2)), ceil(W / 2^(i+2))) for every i of ``out_indices``; with
            ``gap_before_final_norm`` one (N, dims[-1]) feature. The maps have the memory layout of ``x``.
        """
        layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        if self._wants_channels_last(x):
            x = x.contiguous(memory_format=torch.channels_last)
        outs = []
        for i, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            x = stage(downsample(x))
            if i in self.out_indices:
                outs.append(self._output(i, x, layout))
            if i == self.out_indices[-1]:
                break
        return tuple(outs)

    def _output(self, i: int, x: Tensor, layout: torch.memory_format) -> Tensor:
        if self.gap_before_final_norm:
            return self.norm(x.mean((2, 3)))
        # What follows may depend on the layout: mmcv's RoIAlign reads every map as if it were contiguous.
        return getattr(self, f'norm{i}')(x).contiguous(memory_format=layout)

    def _wants_channels_last(self, x: Tensor) -> bool:
        if self.channels_last is not None or compat.needs_standard_operators():
            return bool(self.channels_last)
        return self.fused and backends.suits_cpp(x)

    def train(self, mode: bool = True) -> UniRepLKNet:
        """Set the mode; frozen stages, and with ``norm_eval`` every BN, stay in evaluation."""
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze_stages(self) -> None:
        for i in range(self.frozen_stages + 1):
            frozen = [self.downsample_layers[0]] if i == 0 else [self.stages[i - 1]]
            if i > 1:
                frozen.append(self.downsample_layers[i - 1])
            for module in frozen:
                module.eval()
                module.requires_grad_(False)

    def init_weights(self) -> None:
        """Initialise as ``init_cfg`` says; pretrained files load strictly and form-aware."""
        if isinstance(self.init_cfg, dict) and self.init_cfg.get('type') == 'Pretrained':
            if not self.is_init:  # type: ignore[has-type]
                load_pretrained(self, self.init_cfg)
                self.is_init = True
            return
        super().init_weights()

    def switch_to_deploy(self) -> None:
        """Reparameterize the whole backbone in place; a second call, or one that raises, changes nothing.

        Raises:
            RuntimeError: The backbone is in training mode.
            TypeError: Its norm is not BN.
        """
        self.check_foldable()
        for block in self._blocks():
            block.switch_to_deploy()
        self.deploy = True

    def check_foldable(self) -> None:
        """Raise what ``switch_to_deploy`` would raise, and change nothing."""
        if self.deploy:
            return
        if self.training:
            raise RuntimeError('The backbone is in training mode. Call model.eval() before switch_to_deploy().')
        for block in self._blocks():
            block.check_foldable()

    def _blocks(self) -> list[UniRepLKNetBlock]:
        return [m for m in self.stages.modules() if isinstance(m, UniRepLKNetBlock)]

    def get_layer_depth(self, param_name: str, prefix: str = '', num_layers: int = 12) -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning-rate decay, by the published rule, here for 12 layers.

        Stem 0; stage 1: 1; second downsampling and stage 2: 2; third downsampling 3; block B of stage 3: 3 + B // 3;
        last downsampling and stage 4: 12; everything else 13 (learning-rate scale 1). As published, the 18 blocks of
        variant T end at 8, so that depths 9 to 11 stay empty.

        Args:
            param_name: Full name of the parameter.
            prefix: What stands before the backbone's own names, e.g. 'backbone.'.
            num_layers: Depth of the last stage.

        Returns:
            The depth and the number of depths, ``num_layers + 2``.
        """
        name = param_name.removeprefix(prefix) if param_name.startswith(prefix) else ''
        return layer_depth(name, num_layers), num_layers + 2

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        check_state_dict(self, state_dict, prefix)
        adapt_stem(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def layer_depth(name: str, num_layers: int = 12) -> int:
    """Depth of the backbone parameter ``name`` (without prefix) for ``num_layers``; see ``get_layer_depth``."""
    part, _, rest = name.partition('.')
    index = rest.split('.')
    if part == 'downsample_layers':
        return {0: 0, 1: 2, 2: 3, 3: num_layers}[int(index[0])]
    if part == 'stages':
        stage, block = int(index[0]), int(index[1])
        return {0: 1, 1: 2, 2: 3 + block // 3, 3: num_layers}[stage]
    return num_layers + 1


def _stem(in_channels: int, dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, dim // 2, 3, stride=2, padding=1),
        LayerNorm2d(dim // 2),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        LayerNorm2d(dim),
    )


def _check_arguments(
    in_channels: int, out_indices: Sequence[int], frozen_stages: int, drop_path_rate: float, gap: bool
) -> None:
    if in_channels < 1:
        raise ValueError(f'in_channels={in_channels} must be at least 1.')
    ascending = isinstance(out_indices, Sequence) and list(out_indices) == sorted(set(out_indices))
    if not ascending or not out_indices or not set(out_indices) <= {0, 1, 2, 3}:
        raise ValueError(f'out_indices={out_indices} must be ascending stages out of 0, 1, 2, 3, in a tuple.')
    if gap and len(out_indices) != 1:
        raise ValueError(f'gap_before_final_norm returns one feature, but out_indices={out_indices}: name one stage.')
    if not -1 <= frozen_stages <= 4:
        raise ValueError(f'frozen_stages={frozen_stages} must be from -1 (none) to 4 (all).')
    if not 0.0 <= drop_path_rate < 1.0:
        raise ValueError(f'drop_path_rate={drop_path_rate} must be at least 0 and below 1.')
