"""What must hold of the pointwise half of a block where Triton computes it: run on a GPU by ``test_pointwise_on_gpu``,
and by Triton's interpreter on the CPU, to be sure it runs.

Each function raises where something does not hold.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mmunireplknet import UniRepLKNet
from mmunireplknet.models.block import UniRepLKNetBlock
from mmunireplknet.ops import passes, pointwise, pointwise_kernels

from ..procedural import image, randomise, relative_error
from . import pointwise_cases as cases
from .triton_pointwise import in_layout

ARCH = dict(depths=[1, 1, 1, 1], dims=[16, 16, 24, 24], kernel_sizes=[[3], [7], [13], [5]])
KINDS = (cases.Kind(), cases.Kind(kept=True), cases.Kind(multiplier=False, residual=False, biases=False, beta=False))


def sweep(
    device: str, sizes: Iterable[tuple[int, int]], channels: Iterable[int], dtypes: Iterable[torch.dtype]
) -> None:
    """Outputs and all gradients in both layouts."""
    wrong = []
    for size in sizes:
        for c in channels:
            for dtype in dtypes:
                for name in ('grn_mlp', 'normalize', 'gate'):
                    for kind in KINDS:
                        wrong += _mistakes(device, name, c, size, kind, dtype)
    assert not wrong, '\n'.join(wrong)


def _mistakes(
    device: str, name: str, c: int, size: tuple[int, int], kind: cases.Kind, dtype: torch.dtype
) -> Iterable[str]:
    for planes in (False, True):
        p = cases.problem(name, 2, c, size, kind, dtype)
        inputs = [None if t is None else t.to(device) for t in p.inputs]
        inputs[0] = in_layout(inputs[0], planes)
        mine = cases.differentiate(_on(device, name, kind, p), inputs, in_layout(p.grad.to(device), not planes))
        found = cases.errors(p, None, [t.cpu() for t in mine])
        if not max(found) < cases.TOLERANCE[dtype]:
            yield f'{name} of {c} channels, {size}, {kind}, {dtype}, planes={planes}: {found}'


def _on(device: str, name: str, kind: cases.Kind, p: cases.Problem) -> cases.Function:
    """The function of the package, with kept statistics where they are."""
    if not kind.kept or name == 'grn_mlp':
        return p.mine
    kept = [t.to(device) for t in cases.kept_statistics(p)]
    statistics = pointwise.Statistics(cases.EPS, *kept)
    if name == 'normalize':
        return lambda x, w, b, m, r: pointwise.normalize(x, w, b, statistics, m, r)[0]
    return lambda x, w, b, *se: pointwise.gate(x, w, b, statistics, se[:2], se[2:])[0]


def gelu(device: str) -> None:
    """Of float32, over [-12, 12]."""
    x = torch.linspace(-12, 12, 4001).view(1, 1, 1, -1)
    kernels = pointwise_kernels.passes_for(x.to(device))
    value, slope = (torch.empty_like(x, device=device) for _ in range(2))
    kernels.apply(x.to(device), None, None, None, value, True)
    kernels.grad(torch.ones_like(value), x.to(device), None, None, None, slope, True)
    right = [torch.empty_like(x, dtype=torch.float64) for _ in range(2)]
    passes.apply(x.double(), None, None, None, right[0], True)
    passes.grad(torch.ones_like(right[0]), x.double(), None, None, None, right[1], True)
    for mine, exact in zip((value, slope), right, strict=True):
        assert float((mine.cpu() - exact).abs().max()) < 1e-6


def blocks(device: str, dim: int = 16, **options: object) -> tuple[nn.Module, nn.Module]:
    """A randomised block as it is, and layer by layer."""
    mine = randomise(UniRepLKNetBlock(dim, 7, **options))
    other = copy.deepcopy(mine)
    for layer in other.modules():
        if hasattr(layer, 'fused'):
            layer.fused = False
    return mine.to(device), other.to(device)


def step(model: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and gradients of a pass, under autocast where there is a dtype."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        y = model(x)
    grad = image(tuple(y.shape), 9).to(y)
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], grad)]


def check_autocast(device: str, dtype: torch.dtype, training: bool) -> None:
    """No less exact than the layers."""
    mine, layers = (m.train(training) for m in blocks(device))
    x = image((2, 16, 9, 11)).to(device)
    exact = step(copy.deepcopy(layers).double(), x.double())
    found, theirs = step(mine, x, dtype), step(layers, x, dtype)
    assert found[0].dtype == theirs[0].dtype == torch.float32
    largest = max(float(e.norm()) for e in exact[2:])
    for i, (a, b, e) in enumerate(zip(found, theirs, exact, strict=True)):
        floor = max(float(e.norm()), 1e-2 * largest)
        error, other = (float((t - e).norm()) / floor for t in (a, b))
        assert error < 1.2 * other + 4 * torch.finfo(dtype).eps, (i, error, other)


def check_backbone(device: str, limit: float, training: bool, **options: object) -> None:
    """Maps and gradients of a backbone, against the same layer by layer."""
    results = []
    for fused in (True, False):
        model = randomise(UniRepLKNet(ARCH, fused=fused, **options)).to(device).train(training)
        parameters = [p for p in model.parameters() if p.requires_grad]
        outs = model(image((2, 3, 64, 96)).to(device))
        grads = torch.autograd.grad(outs, parameters, [image(o.shape, 3).to(device) for o in outs])
        results.append([*(o.detach() for o in outs), *grads])
    scale = max(float(g.norm()) for g in results[1])
    for a, b in zip(*results, strict=True):
        assert float((a - b).norm()) / max(float(b.norm()), 1e-3 * scale) < limit


def check_determinism(device: str) -> None:
    """The same bits at every pass."""
    model, _ = blocks(device)
    x = image((3, 16, 20, 21)).to(device)
    state = copy.deepcopy(model.state_dict())
    first = step(model, x)
    for _ in range(3):
        model.load_state_dict(state)
        assert all(torch.equal(a, b) for a, b in zip(first, step(model, x), strict=True))


def check_inference(device: str, dtype: torch.dtype, limit: float) -> None:
    """The deploy form, in both layouts."""
    model, layers = (m.eval() for m in blocks(device))
    exact = layers.double()(image((2, 16, 9, 11)).to(device).double()).detach()
    model.switch_to_deploy()
    model.to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = image((2, 16, 9, 11)).to(device, dtype).contiguous(memory_format=layout)
        with torch.inference_mode():
            y = model(x)
        assert y.stride() == x.stride()
        assert relative_error(y, exact) < limit
