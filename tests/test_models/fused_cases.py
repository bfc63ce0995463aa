"""What the tests of fused blocks share: the same model computed layer by layer, and the comparison of two results."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import pytest
import torch
from torch import Tensor, nn

from mmunireplknet import UniRepLKNet
from mmunireplknet.models.block import UniRepLKNetBlock
from mmunireplknet.models.dilated_reparam import DilatedReparamBlock

from ..procedural import image, randomise, relative_error

DIM = 12
TOLERANCE = 1e-5  # relative L2 in float32, see `differences`
Model = TypeVar('Model', bound=nn.Module)


def block(kernel: int = 13, **options: object) -> UniRepLKNetBlock:
    """A randomised block of ``DIM`` channels, in training mode."""
    return randomise(UniRepLKNetBlock(DIM, kernel, **options)).train()


def small(**options: object) -> UniRepLKNet:
    """A randomised backbone of one block a stage, in training mode."""
    arch = dict(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), kernel_sizes=((3,), (7,), (5,), (3,)))
    return randomise(UniRepLKNet(arch, **options)).train()


def map_of(n: int = 3, c: int = DIM, seed: int = 0) -> Tensor:
    """A channels_last input that is larger than one chunk of the kernels."""
    return image((n, c, 17, 19), seed).contiguous(memory_format=torch.channels_last)


def layered(model: Model) -> Model:
    """A copy that computes every layer by itself."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, 'fused'):
            module.fused = False
    return model


def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is computed fused from now on: 'block', and of its Dilated Reparam Block 'batch' or 'merged'."""
    calls: list[str] = []

    def wrap(method: Callable, label: str) -> Callable:
        def call(*args: object) -> Tensor:
            calls.append(label)
            return method(*args)

        return call

    for cls, name, label in (
        (UniRepLKNetBlock, '_forward_fused', 'block'),
        (DilatedReparamBlock, '_forward_batch', 'batch'),
        (DilatedReparamBlock, '_forward_merged', 'merged'),
    ):
        monkeypatch.setattr(cls, name, wrap(getattr(cls, name), label))
    return calls


class Results(NamedTuple):
    """Of one forward and backward pass."""

    outputs: list[Tensor]
    input_grad: Tensor
    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]


def results(model: nn.Module, x: Tensor, seed: int = 0, grad_seed: int = 9) -> Results:
    """Outputs, gradients of random products with them, and the buffers after that."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    torch.manual_seed(seed)
    outs = model(x)
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    torch.autograd.backward(outs, [image(tuple(y.shape), grad_seed + i).to(y) for i, y in enumerate(outs)])
    named = {name.removeprefix('_orig_mod.'): p for name, p in model.named_parameters()}  # of torch.compile
    grads = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    buffers = {name.removeprefix('_orig_mod.'): b.clone() for name, b in model.named_buffers()}
    return Results([y.detach() for y in outs], x.grad, grads, buffers)


def reference(model: nn.Module, x: Tensor, steps: int = 1) -> Results:
    """Layer by layer in float64, after ``steps`` passes."""
    exact = layered(model).double()
    for _ in range(steps):
        found = results(exact, x.double())
    return found


def differences(actual: Results, expected: Results) -> dict[str, float]:
    """Relative L2 errors: of the outputs, of every gradient and of every buffer.

    A gradient below a thousandth of the largest is what a batch normalization cancels, as that of a shift before it:
    what is left is noise, and the error is relative to the largest one.
    """
    assert actual.grads.keys() == expected.grads.keys()
    assert actual.buffers.keys() == expected.buffers.keys()
    pairs = zip(actual.outputs, expected.outputs, strict=True)
    found = {f'output {i}': relative_error(a, e) for i, (a, e) in enumerate(pairs)}
    found['input gradient'] = relative_error(actual.input_grad, expected.input_grad)
    largest = max([float(e.norm()) for e in expected.grads.values()], default=0.0)
    for name, e in expected.grads.items():
        norm = float(e.norm())
        found[name] = float((actual.grads[name].double() - e).norm()) / (norm if norm > 1e-3 * largest else largest)
    for name, e in expected.buffers.items():
        found[name] = relative_error(actual.buffers[name], e) if e.any() else float(actual.buffers[name].any())
    return found


def check(actual: Results, expected: Results, tolerance: float = TOLERANCE) -> None:
    """Raise where anything is off by more than ``tolerance``."""
    wrong = {name: f'{error:.1e}' for name, error in differences(actual, expected).items() if not error < tolerance}
    assert not wrong, wrong


def check_model(model: nn.Module, x: Tensor, tolerance: float = TOLERANCE) -> None:
    """Compare a pass of ``model`` with the layers in float64."""
    expected = reference(model, x)  # first: the pass changes running statistics
    check(results(model, x), expected, tolerance)


def figures(actual: Results, expected: Results) -> list[float]:
    """Relative errors of the output, its input's gradient, all other gradients together, and all statistics."""
    parts = [(r.outputs, [r.input_grad], r.grads.values(), r.buffers.values()) for r in (actual, expected)]
    flat = [[torch.cat([torch.ones(1), *(t.double().flatten() for t in part)]) for part in side] for side in parts]
    return [relative_error(a, e) for a, e in zip(*flat, strict=True)]
