"""The backend ``triton``: what ``ops.backends`` asks of one, of the files beside this."""

from .block import block_backward, block_forward, block_stats, block_sums, block_supports
from .convolution import forward, supports
from .gram import weight_grad

__all__ = [
    'block_backward', 'block_forward', 'block_stats', 'block_sums', 'block_supports', 'forward', 'supports',
    'weight_grad',
]  # fmt: skip
