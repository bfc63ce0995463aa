"""Hooks, the layer-decay constructor, the exchange of backbones, and what the command-line tools do to a config."""

from .amp import CPUAmpOptimWrapper
from .atomic_checkpoint_hook import AtomicCheckpointHook, latest_checkpoint
from .checkpoint_fit_hook import CheckpointFitHook
from .layer_decay import LayerDecayOptimWrapperConstructor
from .random_state_hook import RandomStateHook
from .swap_backbone import swap_backbone

__all__ = [
    'AtomicCheckpointHook', 'CPUAmpOptimWrapper', 'CheckpointFitHook', 'LayerDecayOptimWrapperConstructor',
    'RandomStateHook', 'latest_checkpoint', 'swap_backbone',
]  # fmt: skip
