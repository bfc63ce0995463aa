"""How fully sharded training (FSDP) divides a model into units."""

from __future__ import annotations

from mmengine.registry import FUNCTIONS
from torch import nn

from ..models.block import UniRepLKNetBlock


@FUNCTIONS.register_module()
def every_block(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """The ``auto_wrap_policy`` with a unit for every block, and the model as the unit of everything else.

    A block is gathered once, also where it recomputes itself (``with_cp``) or reads the weights of its layers (fused).

    Args:
        module: Candidate for a unit.
        recurse: FSDP asks whether to look at the children, not whether this is a unit.
        nonwrapped_numel: Parameters that are in no unit yet.
    """
    return recurse or isinstance(module, UniRepLKNetBlock)
