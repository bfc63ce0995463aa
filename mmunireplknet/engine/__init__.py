"""Hooks, the layer-decay constructor and what the command-line tools do to a config."""

from .amp import CPUAmpOptimWrapper
from .atomic_checkpoint_hook import AtomicCheckpointHook, latest_checkpoint
from .checkpoint_fit_hook import CheckpointFitHook
from .layer_decay import LayerDecayOptimWrapperConstructor
from .non_finite_loss_hook import NonFiniteLossHook
from .random_state_hook import RandomStateHook

__all__ = [
    'AtomicCheckpointHook', 'CPUAmpOptimWrapper', 'CheckpointFitHook', 'LayerDecayOptimWrapperConstructor',
    'NonFiniteLossHook', 'RandomStateHook', 'latest_checkpoint',
]  # fmt: skip
