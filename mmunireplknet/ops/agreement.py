"""What is timed on a GPU must also be right: its first result is compared with torch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ['Agreeing', 'agreeing']

# Largest error, relative in the L2 norm: well above what rounding does (TF32, and sums in 16 bits by torch's kernels),
# as this is for kernels that are wrong.
LIMIT = {torch.float32: 0.01, torch.bfloat16: 0.05, torch.float16: 0.02}


class Agreeing:
    """A candidate that raises where its first result is not torch's.

    Args:
        candidate: What computes a map or the gradient of a weight, or a tuple that begins with it.
        exact: torch's result; None where torch cannot tell.
        dtype: Of the maps: torch rounds to it also what it hands over in float32, as the gradient of a weight.
    """

    def __init__(self, candidate: Callable[[], Any], exact: Callable[[], Tensor | None], dtype: torch.dtype) -> None:
        self.candidate, self.exact, self.dtype, self.is_checked = candidate, exact, dtype, False

    def __call__(self) -> object:
        """Compute it.

        Raises:
            RuntimeError: It is not what torch computes.
        """
        result = self.candidate()
        if not self.is_checked:
            self._check(_first(result))
            self.is_checked = True
        return result

    def _check(self, result: Tensor) -> None:
        exact = self.exact()
        if exact is None:
            return
        difference, norm = float((result.float() - exact.float()).norm()), float(exact.float().norm())
        limit, dtype = LIMIT.get(self.dtype, 0.0), torch.finfo(self.dtype)
        # The least number of the dtype: by so much may torch round any value, and in float16 gradients are that small.
        least = dtype.tiny * dtype.eps * math.sqrt(exact.numel())
        # Of infinities and NaN in the input each may make its own; of zeros nothing can be said by this measure.
        if 0 < norm < float('inf') and not difference <= limit * norm + least:
            raise RuntimeError(
                f'the result differs from that of torch by {difference / norm:.2g} of its norm, at most {limit} is '
                'left to rounding. Please report this, with the GPU and the versions of torch and Triton.'
            )


def agreeing(candidates: Mapping[str, Callable[[], Any]], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """``candidates`` for maps of ``dtype``, of which all but 'torch' are compared with that one at their first call."""
    results: list[Tensor | None] = []

    def exact() -> Tensor | None:
        if not results:
            try:
                results.append(_first(candidates['torch']()))
            except Exception:  # it is timed as well, which tells why
                results.append(None)
        return results[0]

    return {label: do if label == 'torch' else Agreeing(do, exact, dtype) for label, do in candidates.items()}


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
