"""How far the deploy form of a backbone is from its training form, map by map, and how far it may be.

**Tolerance.** Folding is exact in real numbers and done in float64; a merged weight is rounded once. What remains is
that the two forms round at other places. A block rounds each of its intermediate results to the dtype of the weights,
with unit roundoff u = 2^-24 (float32), 2^-11 (float16), 2^-8 (bfloat16). These errors are independent, and the
residual stream adds them up: behind L blocks the relative L2 difference is about c * u * sqrt(L). For c: some ten
roundings a block in each form, each of standard deviation u / sqrt(3), give sqrt(2 * 10 / 3) = 2.6 where the block's
branch is all there is, and less as the residual dominates. In half precision that is all, since the sums are
accumulated in float32. In float32 the accumulation itself rounds too, on sums of up to 5120 terms.

Measured c, the largest of all maps, with and without fused operators (torch 2.13, CPU, 1 thread, 2026-11; variants A,
T and S with random weights and BN statistics, A trained for segmentation and for detection): 4.8 in float32, 1.1 in
float16, 1.1 in bfloat16. ``SAFETY`` is about ten times that in float32, where real faults are far away, and seven
times in half precision: variant T may differ by 2.0e-5, 2.0e-2 and 1.6e-1. The last two would let small faults of the
folding pass. ``Reparameterizer`` therefore folds half-precision weights in float32 too, and compares these as well.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from ..models.unireplknet import UniRepLKNet

__all__ = ['Images', 'Parity', 'compare_forms', 'keep_few', 'prepare_images', 'random_images', 'tolerance_of']

SAFETY = {torch.float64: 64.0, torch.float32: 64.0, torch.float16: 8.0, torch.bfloat16: 8.0}
NUM_IMAGES = 2
MAX_SIZE = 512  # pixels; bounds the time that a hook takes on a CPU


@dataclass(frozen=True)
class Images:
    """What both forms are computed on.

    Attributes:
        tensor: (N, C, H, W), normalized.
        origin: What it is, for a log.
    """

    tensor: Tensor
    origin: str


@dataclass(frozen=True)
class Parity:
    """Relative L2 differences between both forms.

    Attributes:
        errors: One for each output map, such as 'backbone[2]': the map of stage 2 of ``model.backbone``.
        tolerances: What each may be.
        images: What they were measured on.
        dtype: Of the weights.
    """

    errors: dict[str, float]
    tolerances: dict[str, float]
    images: str
    dtype: str

    @property
    def worst(self) -> float:
        """The largest difference; NaN if any is."""
        return max(self.errors.values(), key=lambda error: (error != error, error))

    @property
    def passed(self) -> bool:
        """Whether every map is within its tolerance."""
        return all(error <= self.tolerances[name] for name, error in self.errors.items())

    def __str__(self) -> str:
        maps = ', '.join(f'{name} {error:.1e} (<= {self.tolerances[name]:.1e})' for name, error in self.errors.items())
        return f'relative L2 difference of both forms on {self.images}, {self.dtype}: {maps}'


def tolerance_of(dtype: torch.dtype, num_blocks: int) -> float:
    """Largest relative L2 difference that rounding explains, see the text of this module.

    Args:
        dtype: Of the weights.
        num_blocks: Blocks before the map.
    """
    return SAFETY[dtype] * torch.finfo(dtype).eps / 2 * num_blocks**0.5


@torch.no_grad()
def compare_forms(
    name: str, training: UniRepLKNet, deploy: UniRepLKNet, images: Images | None, tolerance: float | None = None
) -> Parity:
    """Compute both forms on the same images, in the dtype of the weights.

    Args:
        name: Of the backbone, for the names of the maps.
        training: Training form, in evaluation mode, on the CPU.
        deploy: Deploy form, likewise.
        images: Random ones if None, or if they have another number of channels.
        tolerance: For every map, instead of ``tolerance_of``.
    """
    if images is None or images.tensor.shape[1] != training.in_channels:
        images = random_images(training.in_channels)
    dtype = next(training.parameters()).dtype
    x = images.tensor.to(dtype)
    errors, tolerances = {}, {}
    for i, before, after in zip(training.out_indices, training(x), deploy(x), strict=True):
        difference, norm = (after.double() - before.double()).norm(), before.double().norm()
        errors[f'{name}[{i}]'] = float(difference / norm) if norm else float(difference)
        default = tolerance_of(dtype, sum(training.arch.depths[: i + 1]))
        tolerances[f'{name}[{i}]'] = default if tolerance is None else tolerance
    return Parity(errors, tolerances, images.origin, str(dtype).removeprefix('torch.'))


def random_images(channels: int) -> Images:
    """One image of noise, always the same, without a trace in any random state."""
    noise = torch.randn(1, channels, 128, 128, generator=torch.Generator().manual_seed(0))
    return Images(noise, 'a random image')


def keep_few(batch: Any) -> Tensor | list[Tensor] | None:
    """The first images of a data loader's batch, as they are; None where there are none to be found."""
    inputs = batch.get('inputs') if isinstance(batch, Mapping) else None
    if isinstance(inputs, Tensor) and inputs.dim() == 4:
        return inputs[:NUM_IMAGES]
    if isinstance(inputs, (list, tuple)) and inputs and all(isinstance(one, Tensor) for one in inputs):
        return [one for one in inputs[:NUM_IMAGES] if one.shape == inputs[0].shape and one.dim() == 3]
    return None


def prepare_images(inputs: Tensor | list[Tensor] | None, preprocessor: nn.Module | None, origin: str) -> Images | None:
    """Images as the backbone gets them, at most the first two and their upper left 512x512 pixels.

    Args:
        inputs: What ``keep_few`` returns.
        preprocessor: The model's data preprocessor; it is copied, and used in evaluation mode on the CPU.
        origin: What the images are, for a log.

    Returns:
        None where there are no images, or the preprocessor takes more than images.
    """
    if inputs is None or not len(inputs):
        return None
    try:
        if preprocessor is not None:
            data = dict(inputs=inputs, data_samples=None)
            inputs = copy.deepcopy(preprocessor).to('cpu').eval()(data, False)['inputs']
        # A preprocessor that only moves data leaves a list.
        x = torch.stack(inputs) if isinstance(inputs, (list, tuple)) else inputs
        x = x.detach().to('cpu', torch.float32)[..., :MAX_SIZE, :MAX_SIZE]
    except Exception as error:  # somebody's own preprocessor may want, and raise, anything
        print_log(f'No images for the comparison of both forms from {origin}: {error!r}', logger='current')
        return None
    if x.dim() != 4:
        return None
    height, width = x.shape[2:]
    return Images(x, f'{len(x)} image{"s" if len(x) > 1 else ""} of {origin}, {height}x{width}')
