"""Hooks, the layer-decay constructor, the exchange of backbones, and what the command-line tools do to a config."""

from .amp import CPUAmpOptimWrapper
from .atomic_checkpoint_hook import AtomicCheckpointHook, latest_checkpoint
from .checkpoint_fit_hook import CheckpointFitHook
from .layer_decay import LayerDecayOptimWrapperConstructor
from .non_finite_loss_hook import NonFiniteLossHook
from .random_state_hook import RandomStateHook
from .reparameterize_hook import ReparameterizeHook
from .swap_backbone import swap_backbone

__all__ = [
    'AtomicCheckpointHook', 'CPUAmpOptimWrapper', 'CheckpointFitHook', 'LayerDecayOptimWrapperConstructor',
    'NonFiniteLossHook', 'RandomStateHook', 'ReparameterizeHook', 'latest_checkpoint', 'swap_backbone',
]  # fmt: skip
