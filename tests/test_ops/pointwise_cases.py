"""The pointwise half of a block as torch has it, and maps to compare it on.

Run as a program, it checks the compiled kernels and prints their instruction set, which they choose once for the life
of a process.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..procedural import image

CHANNELS = (1, 3, 16, 37, 80)
SIZES = ((1, 1), (1, 7), (5, 4), (20, 33))  # the last is more than one chunk of 256 pixels
EPS = 1e-3
# Relative L2 error, see `errors`. Of 16 bits it is the roundoff of what is stored between the kernels.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
Function = Callable[..., Tensor]


class Kind(NamedTuple):
    """Which of the things that may be missing are there."""

    kept: bool = False  # running statistics
    multiplier: bool = True
    residual: bool = True
    biases: bool = True
    beta: bool = True


EVERYTHING = Kind()


def grn_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, gamma: Tensor, beta: Tensor | None, weight2: Tensor,
    bias2: Tensor | None,
) -> Tensor:  # fmt: skip
    """As the layers compute it."""
    y = F.gelu(F.linear(x, weight1, bias1))
    norm = torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True)
    y = y * (gamma * norm / (norm.mean(-1, keepdim=True) + 1e-6) + 1)
    return F.linear(y if beta is None else y + beta, weight2, bias2)


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor | None, residual: Tensor | None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """As the layers compute it, with the statistics of the batch or with ``kept`` ones."""
    mean, var = (None, None) if kept is None else (t.to(x.dtype) for t in kept)
    y = F.batch_norm(x.permute(0, 3, 1, 2), mean, var, weight, bias, kept is None, 0.0, EPS).permute(0, 2, 3, 1)
    y = y if multiplier is None else y * multiplier[:, None, None]
    return y if residual is None else y + residual


def gate(
    x: Tensor, weight: Tensor, bias: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """As the layers compute it."""
    y = normalize(x, weight, bias, None, None, kept)
    squeezed = F.relu(F.linear(y.mean((1, 2)), down, down_bias))
    return y * torch.sigmoid(F.linear(squeezed, up, up_bias))[:, None, None]


class Problem(NamedTuple):
    """A function of the package, the same of torch, what both take, and the gradient of their output."""

    mine: Function
    layers: Function
    inputs: list[Tensor | None]
    grad: Tensor


def problem(
    name: str, n: int, c: int, size: tuple[int, int], kind: Kind = EVERYTHING, dtype: torch.dtype = torch.float32
) -> Problem:
    """``name`` on (n, *size, c) maps; maps and the weights of linear layers are ``dtype``, all else is float32."""
    from mmunireplknet.ops import pointwise

    d, r = 4 * c, max(c // 4, 1)
    x, grad, residual = (image((n, *size, c), seed).to(dtype) for seed in range(3))
    small = [image(shape, 3 + i) for i, shape in enumerate([(c,)] * 4 + [(n, c), (d,), (d,), (d,), (r,)])]
    if name == 'grn_mlp':
        weight1, weight2 = (
            image(shape, 20 + i).to(dtype) / shape[1] ** 0.5 for i, shape in enumerate([(d, c), (c, d)])
        )
        bias1, bias2 = (small[5].to(dtype), small[0].to(dtype)) if kind.biases else (None, None)
        inputs = [x, weight1, bias1, small[6], small[7] if kind.beta else None, weight2, bias2]
        return Problem(pointwise.grn_mlp, grn_mlp, inputs, grad)
    kept = _kept(c) if kind.kept else None
    statistics = pointwise.Statistics(EPS, *kept) if kept else pointwise.Statistics(EPS)
    if name == 'normalize':
        inputs = [x, small[0], small[1], small[4] if kind.multiplier else None, residual if kind.residual else None]
        return Problem(
            lambda x, w, b, m, r: pointwise.normalize(x, w, b, statistics, m, r)[0],
            lambda *inputs: normalize(*inputs, kept),
            inputs,
            grad,
        )
    inputs = [x, *small[:2], image((r, c), 20) / c**0.5, small[8], image((c, r), 21) / (3 * r**0.5), small[2]]
    return Problem(
        lambda x, w, b, *se: pointwise.gate(x, w, b, statistics, se[:2], se[2:])[0],
        lambda *inputs: gate(*inputs, kept),
        inputs,
        grad,
    )


def _kept(c: int) -> tuple[Tensor, Tensor]:
    """Running statistics for ``c`` channels."""
    return image((c,), 5), image((c,), 6).square() + 0.1


def kept_statistics(p: Problem) -> tuple[Tensor, Tensor]:
    """Those that a problem with ``Kind.kept`` normalizes with."""
    return _kept(p.inputs[0].shape[-1])


def differentiate(function: Function, inputs: Sequence[Tensor | None], grad: Tensor) -> list[Tensor]:
    """Output of ``function`` and its gradients for those of ``inputs`` that are there."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], grad.to(y.dtype))]


def errors(p: Problem, function: Function | None = None, actual: list[Tensor] | None = None) -> list[float]:
    """Relative L2 errors of the output and of every gradient, ``actual`` or by ``function``, to the layers in float64.

    A gradient below a hundredth of what its input could get from ``grad`` is what cancels to zero, as that of a shift
    which a batch normalization takes out again; its error is compared with that much.
    """
    exact = differentiate(p.layers, [None if t is None else t.double() for t in p.inputs], p.grad.double())
    actual = differentiate(function or p.mine, p.inputs, p.grad) if actual is None else actual
    given = [t for t in p.inputs if t is not None]
    assert [t.dtype for t in actual] == [p.inputs[0].dtype, *(t.dtype for t in given)]
    assert [t.shape for t in actual] == [t.shape for t in exact]
    total = float(p.grad.double().norm()) * (p.grad.numel() / p.grad.shape[-1]) ** 0.5  # of all pixels of a channel
    floors = [1e-30, *(1e-2 * (total if t.dim() < 4 else float(p.grad.double().norm())) for t in given)]
    return [
        float((a.double() - e).norm()) / max(float(e.norm()), f) for a, e, f in zip(actual, exact, floors, strict=True)
    ]


def main() -> None:
    """Print whatever is out of tolerance, and at last the instruction set."""
    torch.set_num_threads(1)
    for name, c, kept, dtype in itertools.product(('grn_mlp', 'normalize', 'gate'), (3, 21), (False, True), TOLERANCE):
        p = problem(name, 2, c, (17, 31), Kind(kept), dtype)
        if not max(errors(p)) < TOLERANCE[dtype]:
            sys.stdout.write(f'{name} of {c} channels, kept={kept}, {dtype}: {max(errors(p)):.1e}\n')
    x = torch.linspace(-12, 12, 100_001).view(1, -1, 1)
    torch.ops.mmuni_cpu.apply(x, None, None, None, value := torch.empty_like(x), True)
    if not (error := float((value - F.gelu(x.double())).abs().max())) < 1e-6:
        sys.stdout.write(f'GELU is off by {error:.1e}\n')
    sys.stdout.write(torch.ops.mmuni_cpu.capability())


if __name__ == '__main__':
    from mmunireplknet.ops import backends

    backends.require('cpp')
    main()
