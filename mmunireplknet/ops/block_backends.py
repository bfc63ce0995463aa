"""Which implementation of the Dilated Reparam Block is taken: the fused one of a backend, or branch after branch.

Both keep the same for the backward pass, the input and the statistics, so that each of the four functions of the block
is chosen by itself, and every process of a distributed training by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import backends, fastest

__all__ = ['compute_block']

Result = TypeVar('Result')

SCRATCH = 32  # bytes a pixel at most that a block takes branch after branch, beside its input and output


def compute_block(
    name: str, plain: Callable[[], Result], backend: str, x: Tensor, kernel: Sequence[int], dilation: Sequence[int],
    arguments: tuple,
) -> Result:  # fmt: skip
    """A function of the Dilated Reparam Block by a backend that has it, or branch after branch.

    On a GPU ``auto`` takes the fused kernels, unless branch after branch was found to take less than their time by more
    than a tenth (``fastest.HANDICAP``): they need less memory. Where branch after branch would not fit it is not taken.

    Args:
        name: 'block_forward', 'block_stats', 'block_sums' or 'block_backward'.
        plain: Computes it branch after branch.
        backend: See ``backends.choose``.
        x: (N, C, H, W).
        kernel: Of every branch.
        dilation: Of every branch.
        arguments: Of the function.
    """
    if not x.numel():
        return plain()
    if backends.is_on_gpu(x) and backends.is_auto(backend):
        return _compute_on_gpu(name, plain, x, kernel, dilation, arguments)
    taken = backends.choose(backend, x, max(kernel))
    function = _function_of(taken, name, x, kernel, dilation)
    return plain() if function is None else function(*arguments)


def _function_of(
    backend: str, name: str, x: Tensor, kernel: Sequence[int], dilation: Sequence[int]
) -> Callable[..., Any] | None:
    """That of a backend whose convolutions work; None where it has none for such a block, or it does not work."""
    module = backends.module_of(backend)
    if not hasattr(module, name) or module.block_supports(x, kernel, dilation):
        return None
    if x.device.type == 'cuda' and backends.why_no_block(backend, x.device):
        return None
    return getattr(module, name)


def _compute_on_gpu(
    name: str, plain: Callable[[], Result], x: Tensor, kernel: Sequence[int], dilation: Sequence[int], arguments: tuple
) -> Result:
    kind = fastest.kind_of(name, x, max(kernel), len(kernel))
    fused: dict[str, Callable[[], Result]] = {}
    for candidate in _working(kind, x):
        if (function := _function_of(candidate, name, x, kernel, dilation)) is not None:
            fused[candidate] = functools.partial(function, *arguments)
    if not fused:
        return plain()
    taken = _taken(kind, fused, plain, x)
    if taken == fastest.BRANCHES:
        try:
            return plain()
        except Exception as error:
            if not fastest.is_out_of_memory(error) or fastest.is_capturing(x.device):
                raise
        fastest.mark_failed(kind, fastest.BRANCHES)  # or every step would begin with that
        torch.cuda.empty_cache()
    for candidate in sorted(fused, key=lambda label: label != taken):
        try:
            return fused[candidate]()
        except Exception as error:  # whatever it is, torch computes without it
            if fastest.is_capturing(x.device):
                raise  # the graph is lost
            backends.give_up(candidate, kind, error)
    return plain()


def _working(kind: fastest.Kind, x: Tensor) -> list[str]:
    """Backends that work on this GPU and may have kernels for the block."""
    if x.dtype == torch.float64:
        return []
    names = [name for name in backends.ON_GPU if not fastest.is_failed(kind, name)]
    # While a graph is captured a check would wait for the GPU.
    names = [n for n in names if backends.is_checked(n, x.device, 'block') or not fastest.is_capturing(x.device)]
    return [name for name in names if not backends.why_not(name, x.device)]


def _taken(kind: fastest.Kind, fused: dict[str, Callable[[], Result]], plain: Callable[[], Result], x: Tensor) -> str:
    """The label of what to compute it by."""
    taken = fastest.remembered(kind)
    if taken is not None and (taken in fused or taken == fastest.BRANCHES):
        return taken
    if not fastest.may_time(x, kind):
        return next(iter(fused))
    candidates: dict[str, Callable[[], object]] = {**fused}
    if not fastest.is_failed(kind, fastest.BRANCHES):
        candidates[fastest.BRANCHES] = plain if _fits(x) else _refuse
    taken, errors = fastest.find(kind, candidates, x.device, size=x.shape)
    for backend in fused.keys() & errors.keys():
        backends.give_up(backend, kind, errors[backend])
    return taken


def _fits(x: Tensor) -> bool:
    """Whether there is memory to compute the block branch after branch."""
    if x.device.type != 'cuda':
        return True
    free = torch.cuda.mem_get_info(x.device)[0]
    cached = torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
    return SCRATCH * x.numel() < free + cached


def _refuse() -> None:
    raise torch.cuda.OutOfMemoryError('the branches would not fit into the memory of the GPU.')
