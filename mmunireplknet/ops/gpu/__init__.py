"""Kernels of the large depthwise convolution for GPUs, in Triton; importing them needs triton, but no GPU.

``forward``, which with the kernel turned by 180 degrees is the input gradient, ``weight_grad``, and ``supports``, which
says for what they are made. Tensor cores multiply matrices, so both are written as such: ``toeplitz`` lays every row of
a kernel out as a banded matrix, which turns a window of a row of the map into 16 neighbouring sums.
"""

from .convolution import forward, supports
from .gram import weight_grad

__all__ = ['forward', 'supports', 'weight_grad']
