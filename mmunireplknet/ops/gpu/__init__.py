"""Kernels of the large depthwise convolution for GPUs, in Triton; importing them needs triton, but no GPU.

``convolution`` has the forward convolution, which with the kernel turned by 180 degrees is the input gradient, ``gram``
the weight gradient. Tensor cores multiply matrices, so both are written as such: ``toeplitz`` lays every row of a
kernel out as a banded matrix, which turns a window of a row of the map into 16 neighbouring sums.
"""
