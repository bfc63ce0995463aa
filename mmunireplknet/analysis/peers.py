"""The work that is measured, and everybody who does it: this package, torch as it is, and the published models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..models.arch_zoo import get_arch
from ..models.dilated_reparam import DilatedReparamBlock
from ..models.unireplknet import UniRepLKNet
from ..ops import DepthwiseConv2d, depthwise_conv2d

__all__ = [
    'DIRECTIONS', 'LAYOUTS', 'Contender', 'block_training', 'build_convnext', 'by_backend', 'by_torch',
    'convnext_forward',
    'convnext_training', 'depthwise', 'growth', 'training',
]  # fmt: skip

Shape = tuple[int, int, int, int]
LAYOUTS = {'NCHW': torch.contiguous_format, 'channels_last': torch.channels_last}
DIRECTIONS = ('forward', 'dgrad', 'wgrad')
BLOCK_KERNELS = ('mmuni_cpu::block_forward', 'mmuni_cpu::block_backward')
_GEMMS = ('aten.addmm', 'aten.mm', 'aten.bmm', 'aten.convolution')


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a row.

    Attributes:
        run: Does it once.
        kernels: Compiled kernels that it has to call and how often at least; without them its timing is void.
        flops: Floating-point operations, two a multiply-add; those on the padding count.
        gemm_flops: The part of them in matrix products and dense convolutions.
        forward: The forward pass alone, where the activations that it saves are counted; returns its outputs.
        owned: Parameters and buffers, which do not count there.
    """

    run: Callable[[], object]
    kernels: Mapping[str, int] = field(default_factory=dict)
    flops: float = 0.0
    gemm_flops: float = 0.0
    forward: Callable[[], object] | None = None
    owned: Sequence[Tensor] = ()


def depthwise(shape: Shape, kernel: int, direction: str) -> dict[str, Contender]:
    """Depthwise convolution of ``shape`` (N, C, H, W) with a KxK kernel, or one of its gradients.

    'ours' is channels_last, the layout of the backbone. 'torch NCHW' and 'torch channels_last' are ``F.conv2d`` and
    ``aten.convolution_backward``. 'torch backend' is this package without its compiled kernels: torch, led around its
    slow paths.
    """
    n, c, h, w = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(c, 1, kernel, kernel, generator=generator)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    flops = 2.0 * n * c * h * w * kernel**2
    compiled = {'mmuni_cpu::weight_grad' if direction == 'wgrad' else 'mmuni_cpu::forward': 1}
    contenders = {}
    for name, layout in (('ours', 'channels_last'), ('ours NCHW', 'NCHW'), ('torch backend', 'channels_last')):
        backend = 'torch' if name == 'torch backend' else 'auto'
        run = by_backend(direction, *_in(layout, x, grad), weight, backend)
        contenders[name] = Contender(run, compiled if backend == 'auto' else {}, flops)
    for layout in LAYOUTS:
        run = by_torch(direction, *_in(layout, x, grad), weight)
        contenders[f'torch {layout}'] = Contender(run, flops=flops)
    return contenders


def _in(layout: str, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    memory_format = LAYOUTS[layout]
    return x.contiguous(memory_format=memory_format), grad.contiguous(memory_format=memory_format)


def by_backend(direction: str, x: Tensor, grad: Tensor, weight: Tensor, backend: str) -> Callable[[], object]:
    """One of ``DIRECTIONS`` by this package: of ``x`` (N, C, H, W), ``grad`` alike and ``weight`` (C, 1, K, K)."""
    ops = torch.ops.mmuni
    return {
        'forward': lambda: depthwise_conv2d(x, weight, backend=backend),
        'dgrad': lambda: ops.depthwise_conv2d_input_grad(grad, weight, 1, backend),
        'wgrad': lambda: ops.depthwise_conv2d_weight_grad(x, grad, weight.shape[-1], 1, backend),
    }[direction]


def by_torch(direction: str, x: Tensor, grad: Tensor, weight: Tensor) -> Callable[[], object]:
    """One of ``DIRECTIONS`` as torch has it, without this package."""
    padding, groups = weight.shape[-1] // 2, x.shape[1]
    if direction == 'forward':
        return lambda: F.conv2d(x, weight, padding=padding, groups=groups)
    mask = [direction == 'dgrad', direction == 'wgrad', False]
    return lambda: torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], groups, mask
    )


def published_form(module: nn.Module, layout: str) -> nn.Module:
    """``module``, built with ``fused=False``, with torch's own convolutions, as the published code has them."""
    for layer in module.modules():
        if type(layer) is DepthwiseConv2d:
            layer.__class__ = nn.Conv2d  # type: ignore[assignment]
    return _laid_out(module, layout)


def _laid_out(module: nn.Module, layout: str) -> nn.Module:
    """``module`` with its weights in ``layout``: torch asks for that beside an input that is."""
    return module.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]


def block_training(shape: Shape, kernel: int) -> dict[str, Contender]:
    """Forward and backward of a Dilated Reparam Block, gradient of the input included.

    'ours' is channels_last, the layout of the backbone; the published form is there in either layout.
    """
    ours, x = DilatedReparamBlock(shape[1], kernel), _image(shape, 'channels_last').requires_grad_()
    contenders = {'ours': _train(ours, x, dict.fromkeys(BLOCK_KERNELS, 1))}
    for layout in LAYOUTS:
        published = published_form(DilatedReparamBlock(shape[1], kernel, fused=False), layout)
        contenders[f'published {layout}'] = _train(published, _image(shape, layout).requires_grad_())
    return contenders


def _train(module: nn.Module, x: Tensor, kernels: Mapping[str, int] | None = None) -> Contender:
    """A training step without its optimizer: forward, and backward into ``x``, if it asks for it, and parameters."""
    module.train()
    inputs = [t for t in (x, *module.parameters()) if t.requires_grad]
    grads: list[Tensor] = []

    def forward() -> tuple[Tensor, ...]:
        outs = module(x)
        return outs if isinstance(outs, tuple) else (outs,)

    def run() -> None:
        outs = forward()
        if not grads:  # no kernel is quicker on ones or zeros, but a loss has other gradients
            grads.extend(torch.randn_like(out) for out in outs)
        torch.autograd.grad(outs, inputs, grads, allow_unused=True)

    return Contender(run, kernels or {}, forward=forward, owned=[*module.parameters(), *module.buffers()])


def training(arch: str, shape: Shape) -> dict[str, Contender]:
    """Training step of a backbone.

    'ours', the published form in either layout, and 'identity', ours without its Dilated Reparam Blocks.
    """
    x = _image(shape)
    ours, identity = (UniRepLKNet(arch, channels_last=True) for _ in range(2))
    for module in list(identity.modules()):
        if isinstance(getattr(module, 'dwconv', None), DilatedReparamBlock):
            module.dwconv = nn.Identity()
    contenders = {'ours': _train(ours, x, _kernels(ours, *BLOCK_KERNELS)), 'identity': _train(identity, x)}
    for layout in LAYOUTS:
        published = published_form(UniRepLKNet(arch, channels_last=False, fused=False), layout)
        contenders[f'published {layout}'] = _train(published, _image(shape, layout))
    return contenders


def convnext_training(arch: str, shape: Shape, convnext: str) -> dict[str, Contender]:
    """Training step of a backbone, 'ours', and of a ConvNeXt of mmpretrain in either layout."""
    ours = UniRepLKNet(arch, channels_last=True)
    return {
        'ours': _train(ours, _image(shape), _kernels(ours, *BLOCK_KERNELS)),
        **{f'ConvNeXt {layout}': _train(build_convnext(convnext, layout), _image(shape, layout)) for layout in LAYOUTS},
    }


def _kernels(model: UniRepLKNet, *of_large_kernels: str) -> dict[str, int]:
    """What must run: ``of_large_kernels`` once for every large kernel, the pointwise sums once for every block."""
    large = sum(isinstance(module, DilatedReparamBlock) for module in model.modules())
    return {**dict.fromkeys(of_large_kernels, large), 'mmuni_cpu::sums': sum(model.arch.depths)}


def convnext_forward(arch: str, shape: Shape, convnext: str) -> dict[str, Contender]:
    """Features of a backbone in deploy form, 'ours', and of a ConvNeXt of mmpretrain in either layout."""
    others = {layout: _infer(build_convnext(convnext, layout), _image(shape, layout)) for layout in LAYOUTS}
    return {'ours': _deployed(arch, shape), **{f'ConvNeXt {layout}': Contender(run) for layout, run in others.items()}}


def growth(arch: str, shape: Shape, kernels: Sequence[int]) -> dict[str, Contender]:
    """Features of a backbone in deploy form with every large kernel changed to one size: 'K=7', 'K=13', ..."""
    sizes = get_arch(arch).kernel_sizes
    changed = {k: [[size if size < 7 else k for size in stage] for stage in sizes] for k in kernels}
    return {f'K={k}': _deployed(arch, shape, changed[k]) for k in kernels}


def _deployed(arch: str, shape: Shape, kernel_sizes: Sequence | None = None) -> Contender:
    model = UniRepLKNet(arch, deploy=True, channels_last=True, kernel_sizes=kernel_sizes)
    kernels = _kernels(model, 'mmuni_cpu::forward')
    return Contender(_infer(model, _image(shape)), kernels, *_count_flops(arch, shape, kernel_sizes))


def _count_flops(arch: str, shape: Shape, kernel_sizes: Sequence | None) -> tuple[float, float]:
    """FLOPs of the deploy form, and those of its matrix products and dense convolutions; nothing is computed."""
    with torch.device('meta'):
        # Layer by layer, because a fused operator might not know how to count its own.
        model = UniRepLKNet(arch, deploy=True, kernel_sizes=kernel_sizes, fused=False).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(shape))
    counts = {str(op): count for op, count in counter.get_flop_counts()['Global'].items()}
    return float(sum(counts.values())), float(sum(counts.get(op, 0) for op in _GEMMS))


def _infer(model: nn.Module, x: Tensor) -> Callable[[], object]:
    model.eval()  # by itself: that of mmpretrain's ConvNeXt returns nothing

    def run() -> object:
        with torch.inference_mode():
            return model(x)

    return run


def build_convnext(arch: str, layout: str) -> nn.Module:
    """mmpretrain's ConvNeXt as a backbone of four maps, with its weights in ``layout``."""
    from mmpretrain.models import ConvNeXt

    return _laid_out(ConvNeXt(arch=arch, out_indices=(0, 1, 2, 3), gap_before_final_norm=False), layout)


def _image(shape: Shape, layout: str = 'NCHW') -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=LAYOUTS[layout])
