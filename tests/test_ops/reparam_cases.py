"""The Dilated Reparam Block in training as torch has it, one branch after the other, and maps to compare it on.

Run as a program, it checks the compiled kernels and prints their instruction set, which they choose once for the life
of a process.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..procedural import image
from .cases import LAYOUTS

# Written down from the official code, so that the table of the package can be compared with it.
PUBLISHED = {
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
CUSTOM = {
    'one branch': ((7, 1),),
    'one tap': ((5, 1), (1, 1), (3, 2)),
    'twelve': (
        (9, 1),
        *((k, r) for k in (3, 5, 7, 9) for r in (1, 2, 3, 4) if (k - 1) * r < 9),
        (1, 2),
        (1, 3),
        (1, 4),
    ),
    'thirteen': ((13, 1), *((k, r) for k in (3, 5, 7, 9) for r in range(1, 7) if (k - 1) * r < 13)),
}
BRANCHES = {**{str(k): ((k, 1), *rest) for k, rest in PUBLISHED.items()}, **CUSTOM}
COLUMNS = ('y', 'mean', 'var', 'x', 'weights', 'gammas', 'betas')
# See `error`. The contract is 1e-5 and 1e-10. Of 16 bits, what is of their dtype is rounded once; the sums are not.
SINGLE = {'y': 1e-6, 'mean': 1e-6, 'var': 1e-6, 'x': 1e-6, 'weights': 5e-6, 'gammas': 2e-6, 'betas': 1e-6}
TOLERANCE = {
    torch.float32: SINGLE,
    torch.float64: dict.fromkeys(COLUMNS, 1e-13),
    torch.bfloat16: {**SINGLE, 'y': 4e-3, 'x': 4e-3},
    torch.float16: {**SINGLE, 'y': 5e-4, 'x': 5e-4},
}

# There the weights, and the gradients of the branches, are rounded to the 16 bits of the map as well, as autocast does;
# float32 is multiplied in three parts of 11 bits each.
TOLERANCE_ON_GPU = {
    torch.float32: {**dict.fromkeys(COLUMNS, 1e-5), 'weights': 3e-5, 'gammas': 3e-5},
    torch.float64: TOLERANCE[torch.float64],
    torch.bfloat16: dict.fromkeys(COLUMNS, 1.2e-2),
    torch.float16: dict.fromkeys(COLUMNS, 1.5e-3),
}


class Case(NamedTuple):
    """One input; ``branches`` names those of ``BRANCHES``."""

    branches: str
    size: tuple[int, int] = (9, 14)
    channels: int = 5
    batch: int = 2
    layout: str = 'contiguous'
    dtype: torch.dtype = torch.float32
    offset: float = 0.0
    grad_layout: str = 'contiguous'


class Inputs(NamedTuple):
    """What ``dilated_reparam_conv`` takes, and the gradient of its output."""

    x: Tensor
    weights: list[Tensor]
    dilations: list[int]
    gammas: list[Tensor]
    betas: list[Tensor]
    eps: list[float]
    grad: Tensor

    def double(self) -> Inputs:
        """The same values in float64."""
        return self.to(torch.float64)

    def to(self, where: torch.dtype | str) -> Inputs:
        """The same values in another dtype or on another device."""
        to = lambda t: t.to(where) if isinstance(t, Tensor) else t  # noqa: E731
        return Inputs(*([to(v) for v in value] if isinstance(value, list) else to(value) for value in self))


def inputs_of(case: Case) -> Inputs:
    """Random values; parameters in float32 at least, and another eps in each branch."""
    branches, c = BRANCHES[case.branches], case.channels
    shape, wide = (case.batch, c, *case.size), torch.promote_types(case.dtype, torch.float32)
    weights = [image((c, 1, k, k), 10 + i).to(wide) / k for i, (k, _) in enumerate(branches)]
    gammas, betas = ([image((c,), seed + i).to(wide) for i in range(len(branches))] for seed in (40, 70))
    x = LAYOUTS[case.layout]((image(shape) + case.offset).to(case.dtype))
    grad = LAYOUTS[case.grad_layout](image(shape, 1).to(case.dtype))
    eps = [1e-5 * 10 ** (i % 4) for i in range(len(branches))]
    return Inputs(x, weights, [r for _, r in branches], gammas, betas, eps, grad)


def per_branch(
    x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], gammas: Sequence[Tensor], betas: Sequence[Tensor],
    eps: Sequence[float], statistics: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum of the batch-normalized convolutions, their means and their biased variances.

    ``statistics`` are used as constants instead of those of the batch.
    """
    y, moments = torch.zeros_like(x), []
    for b, (weight, dilation) in enumerate(zip(weights, dilations, strict=True)):
        z = F.conv2d(x, weight, None, 1, dilation * (weight.shape[-1] // 2), dilation, x.shape[1])
        moments.append(torch.var_mean(z.detach(), (0, 2, 3), correction=0))
        kept = (None, None) if statistics is None else (statistics[0][b], statistics[1][b])
        y = y + F.batch_norm(z, *kept, gammas[b], betas[b], training=statistics is None, momentum=0.0, eps=eps[b])
    var, mean = (torch.stack(side) for side in zip(*moments, strict=True))
    return y, mean, var


def differentiate(function: Callable, inputs: Inputs) -> dict[str, list[Tensor]]:
    """What ``function`` returns and its gradients, in the order of ``COLUMNS``, one entry a branch where there are."""
    x, weights, dilations, gammas, betas, eps, grad = inputs
    leaves = [t.detach().requires_grad_() for t in (x, *weights, *gammas, *betas)]
    n = len(weights)
    y, mean, var = function(
        leaves[0], leaves[1 : n + 1], dilations, leaves[n + 1 : 2 * n + 1], leaves[2 * n + 1 :], eps
    )[:3]
    grads = torch.autograd.grad(y, leaves, grad.to(y.dtype))
    columns = (
        [y.detach()],
        [*mean],
        [*var],
        [grads[0]],
        grads[1 : n + 1],
        grads[n + 1 : 2 * n + 1],
        grads[2 * n + 1 :],
    )
    return dict(zip(COLUMNS, map(list, columns), strict=True))


class Expected(NamedTuple):
    """Results of the per-branch form in float64; ``terms``: its gradients with the statistics held constant."""

    values: dict[str, list[Tensor]]
    terms: dict[str, list[Tensor]]


@functools.lru_cache(maxsize=32)
def expected_of(case: Case) -> Expected:
    """In float64, of the input as it is rounded to its dtype."""
    inputs = inputs_of(case).double()
    values = differentiate(per_branch, inputs)
    statistics = torch.stack(values['mean']), torch.stack(values['var'])
    return Expected(values, differentiate(functools.partial(per_branch, statistics=statistics), inputs))


def error(actual: Tensor, expected: Tensor, terms: Tensor) -> float:
    """Relative L2 error.

    Where more than 90 % cancels, as in the gradient of the only tap, which batch normalization divides out again, what
    remains is little more than rounding noise: there the error is relative to the norm of what cancels, ``terms``.
    """
    norm, size = float(expected.norm()), float(terms.norm())
    difference = float((actual.double() - expected).norm())
    return difference / (norm if norm > 0.1 * size else size) if difference else 0.0


def errors(actual: dict[str, list[Tensor]], case: Case) -> dict[str, float]:
    """The largest error of every column; that of a mean is relative to the standard deviation."""
    values, terms = expected_of(case)
    found = {name: max(map(error, actual[name], values[name], terms[name])) for name in COLUMNS if name != 'mean'}
    offsets = zip(actual['mean'], values['mean'], values['var'], strict=True)
    found['mean'] = max(float((a.double() - e).norm() / var.sum().sqrt()) for a, e, var in offsets)
    return found


def mistakes(case: Case, backend: str, limits: dict[str, float] | None = None, device: str = 'cpu') -> list[str]:
    """What is out of tolerance, of the results and the gradients, and whatever has another dtype than its input."""
    from mmunireplknet.ops import dilated_reparam_conv

    inputs = inputs_of(case).to(device)
    limits = limits or (TOLERANCE if device == 'cpu' else TOLERANCE_ON_GPU)[case.dtype]
    actual = differentiate(functools.partial(dilated_reparam_conv, backend=backend), inputs)
    actual = {name: [t.cpu() for t in tensors] for name, tensors in actual.items()}
    found = errors(actual, case)
    wrong = [f'{name} of {case} with {backend} is off by {e:.1e}' for name, e in found.items() if not e < limits[name]]
    dtypes = {name: {t.dtype for t in actual[name]} for name in COLUMNS}
    wide = inputs.weights[0].dtype
    wrong += [f'{name} is {dtypes[name]}' for name in COLUMNS if dtypes[name] != {case.dtype if name in 'yx' else wide}]
    return wrong


def main() -> None:
    """Print whatever is out of tolerance, and at last the instruction set."""
    torch.set_num_threads(1)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for branches, channels, dtype in itertools.product(BRANCHES, (3, 17), dtypes):
        if len(BRANCHES[branches]) <= 12:
            case = Case(branches, (6, 11), channels, 2, 'channels_last', dtype)
            sys.stdout.writelines(f'{mistake}\n' for mistake in mistakes(case, 'cpp'))
    sys.stdout.write(torch.ops.mmuni_cpu.capability())


if __name__ == '__main__':
    main()
