"""Hooks, the layer-decay constructor and what the command-line tools do to a config."""

from .amp import CPUAmpOptimWrapper
from .atomic_checkpoint_hook import AtomicCheckpointHook, latest_checkpoint
from .checkpoint_fit_hook import CheckpointFitHook
from .layer_decay import LayerDecayOptimWrapperConstructor
from .random_state_hook import RandomStateHook

__all__ = [
    'AtomicCheckpointHook', 'CPUAmpOptimWrapper', 'CheckpointFitHook', 'LayerDecayOptimWrapperConstructor',
    'RandomStateHook', 'latest_checkpoint',
]  # fmt: skip
