"""What a GPU can do, and how long a depthwise convolution takes on it at least."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ['CARDS', 'Card', 'Floors', 'card_of', 'floors']


@dataclass(frozen=True)
class Card:
    """Rates of a GPU.

    Attributes:
        name: What ``torch.cuda.get_device_name`` contains.
        bandwidth: Bytes a second to and from its memory.
        fma: FLOP/s of float32 outside of tensor cores.
        tensor: FLOP/s of bfloat16 and float16 in tensor cores, dense, summed in float32.
        mma: The part of ``tensor`` that ``mma.sync`` reaches; the rest takes the instructions of the newer generations.
        source: Where the rates are from.
    """

    name: str
    bandwidth: float
    fma: float
    tensor: float
    mma: float = 1.0
    source: str = "NVIDIA's data sheet"


# The first whose name is found counts.
CARDS = (
    Card('H200', 4.3e12, 60e12, 790e12, 0.62, 'measured: a copy, and products of 8192x8192 matrices'),
    Card('H100 PCIe', 2.0e12, 51e12, 756e12, 0.62),
    Card('H100', 3.35e12, 67e12, 989e12, 0.62),
    Card('A100-SXM4-80GB', 2.04e12, 19.5e12, 312e12),
    Card('A100', 1.56e12, 19.5e12, 312e12),
    Card('L40S', 0.86e12, 91.6e12, 362e12),
    Card('A10', 0.6e12, 31.2e12, 125e12),
    Card('RTX 4090', 1.01e12, 82.6e12, 165e12),
    Card('RTX 3090', 0.94e12, 35.6e12, 71e12),
)


def card_of(name: str, copy: float, float32: float, bfloat16: float) -> Card:
    """Rates of the GPU ``name``; those that were measured on it where it is not in ``CARDS``.

    Args:
        name: Of the device.
        copy: Bytes a second that a copy reads and writes.
        float32: FLOP/s of matrix products in float32, without TF32.
        bfloat16: FLOP/s of matrix products.
    """
    measured = Card(name, copy, float32, bfloat16, source='measured here: a copy, and matrix products')
    return next((card for card in CARDS if card.name in name), measured)


@dataclass(frozen=True)
class Floors:
    """Milliseconds that a convolution takes at least.

    Attributes:
        memory: To read and write its maps once.
        fma: For its multiply-adds outside of tensor cores.
        tensor: In tensor cores, as products with a Toeplitz matrix, of which K / depth is no zero; float32 as three
            products of TF32, which run at half the rate.
    """

    memory: float
    fma: float
    tensor: float

    @property
    def roofline(self) -> float:
        """The least that is possible by the better of the two units."""
        return max(self.memory, min(self.fma, self.tensor))


def floors(card: Card, shape: tuple[int, int, int, int], kernel: int, itemsize: int) -> Floors:
    """Of one convolution of ``shape`` (N, C, H, W), or of one of its gradients, which do and move as much."""
    values = math.prod(shape)
    flops = 2 * kernel**2 * values
    depth = math.ceil((16 + kernel - 1) / 16) * 16
    slower = 1 if itemsize == 2 else 6
    tensor = flops * slower / (card.tensor * card.mma * kernel / depth)
    return Floors(1e3 * 2 * itemsize * values / card.bandwidth, 1e3 * flops / card.fma, 1e3 * tensor)
