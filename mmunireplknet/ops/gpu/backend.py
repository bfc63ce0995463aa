"""The backend ``triton``: what ``ops.backends`` and ``ops.pointwise_kernels`` ask of one, of the files beside this."""

from __future__ import annotations

import functools
from types import SimpleNamespace

from torch import Tensor

from . import tuning
from .block import block_backward, block_forward, block_stats, block_sums, block_supports
from .coefficients import affine, excite, excite_grads, gates, grn, grn_grads, normalize_grads
from .convolution import forward, supports
from .gram import weight_grad
from .moments import moments
from .pointwise import apply, grad, sums

__all__ = [
    'affine', 'apply', 'block_backward', 'block_forward', 'block_stats', 'block_sums', 'block_supports', 'divisions',
    'excite', 'excite_grads', 'forward', 'gates', 'grad', 'grn', 'grn_grads', 'moments', 'normalize_grads', 'sums',
    'supports', 'weight_grad',
]  # fmt: skip


def divisions(function: str, x: Tensor, dilation: int) -> dict[str, SimpleNamespace]:
    """This backend with each division of the work that is worth timing for a map ``x``, by label, best by rule first.

    Args:
        function: As ``backends.choose`` names it.
        x: (N, C, H, W).
        dilation: Pixels between neighbouring taps.
    """
    configs = tuning.worth_timing(function, tuple(x.shape), dilation, x.dtype)
    return {config.label: _divided(config) for config in configs}


@functools.cache
def _divided(config: tuning.Config) -> SimpleNamespace:
    return SimpleNamespace(
        forward=functools.partial(forward, config=config), weight_grad=functools.partial(weight_grad, config=config)
    )
