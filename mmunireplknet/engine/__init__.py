"""Hooks, the layer-decay constructor, the exchange of backbones, and what the command-line tools do to a config."""

from .amp import BF16OptimWrapper
from .atomic_checkpoint_hook import AtomicCheckpointHook, latest_checkpoint
from .checkpoint_fit_hook import CheckpointFitHook
from .layer_decay import LayerDecayOptimWrapperConstructor
from .non_finite_loss_hook import NonFiniteLossHook
from .random_state_hook import RandomStateHook
from .reparameterize_hook import ReparameterizeHook
from .sample_hook import SampleHook
from .sharding import every_block
from .swap_backbone import swap_backbone

__all__ = [
    'AtomicCheckpointHook', 'BF16OptimWrapper', 'CheckpointFitHook', 'LayerDecayOptimWrapperConstructor',
    'NonFiniteLossHook', 'RandomStateHook', 'ReparameterizeHook', 'SampleHook', 'every_block', 'latest_checkpoint',
    'swap_backbone',
]  # fmt: skip
