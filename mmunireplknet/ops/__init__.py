"""Convolutions with large depthwise kernels: one operator, a reference in pure torch, and compiled kernels."""

from .depthwise import DepthwiseConv2d, depthwise_conv2d
from .dilated_reparam import dilated_reparam_conv, merge_branches
from .pooled import depthwise_conv2d_pooled

__all__ = ['DepthwiseConv2d', 'depthwise_conv2d', 'depthwise_conv2d_pooled', 'dilated_reparam_conv', 'merge_branches']
