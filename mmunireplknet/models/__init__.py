"""The backbone and what it is made of."""

from .arch_zoo import ARCHS, CHECKPOINTS
from .checkpoint import CheckpointError, load_checkpoint
from .dilated_reparam import DilatedReparamBlock
from .reparam import switch_to_deploy
from .unireplknet import UniRepLKNet, UniRepLKNetBlock

__all__ = [
    'ARCHS', 'CHECKPOINTS', 'CheckpointError', 'DilatedReparamBlock', 'UniRepLKNet', 'UniRepLKNetBlock',
    'load_checkpoint', 'switch_to_deploy',
]  # fmt: skip
