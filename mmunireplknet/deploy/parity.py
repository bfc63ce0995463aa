"""How far an exported model is from the one it was made of, and which layer differs first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.cnn import fuse_conv_bn
from torch import Tensor, nn

from ..compat import keep_signal_stack
from ..models.block import UniRepLKNetBlock
from ..models.checkpoint_file import read_checkpoint
from .exportable import Exportable
from .norm_precision import module_of
from .pointwise import with_convolutions

__all__ = ['TOLERANCES', 'Difference', 'compare', 'differences', 'first_difference', 'first_difference_of_forms']

TOLERANCES = {False: 1e-4, True: 1e-2}
"""By ``half``. Measured on randomised models: about 1e-6 in float32, 1e-3 in float16."""


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from its reference.

    Attributes:
        relative: L2 norm of the difference over the L2 norm of the reference; of integers, such as labels, the share
            of the entries that differ. This is what a tolerance is for.
        maximum: Largest absolute difference over the largest absolute value of the reference.
        mean: Mean absolute difference over the mean absolute value of the reference.
    """

    relative: float
    maximum: float
    mean: float

    @classmethod
    def of(cls, reference: Tensor | np.ndarray, actual: Tensor | np.ndarray) -> Difference:
        """Measure; tensors of different shapes, or with other than finite values, are infinitely far."""
        a, b = (torch.as_tensor(value) for value in (reference, actual))
        if a.shape != b.shape:
            return cls(math.inf, math.inf, math.inf)
        if not a.is_floating_point():
            share = float((a != b).double().mean()) if a.numel() else 0.0
            return cls(share, share, share)
        a, difference = a.double().flatten(), (b.double() - a.double()).flatten()
        if not a.numel():
            return cls(0.0, 0.0, 0.0)
        pairs = [
            (difference.norm(), a.norm()),
            (difference.abs().max(), a.abs().max()),
            (difference.abs().mean(), a.abs().mean()),
        ]
        return cls(*(_ratio(float(up), float(down)) for up, down in pairs))


def _ratio(difference: float, reference: float) -> float:
    if difference == 0:
        return 0.0
    return difference / reference if reference > 0 and math.isfinite(difference / reference) else math.inf


def compare(
    exportable: Exportable, reference: Iterable[Tensor | np.ndarray], actual: Iterable[Tensor | np.ndarray]
) -> dict[str, Difference]:
    """Difference of every output, by name."""
    return differences(exportable.output_names, reference, actual, exportable.align)


def differences(
    names: Sequence[str],
    reference: Iterable[Tensor | np.ndarray],
    actual: Iterable[Tensor | np.ndarray],
    align: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None,
) -> dict[str, Difference]:
    """Difference of every output, by name.

    Args:
        names: Of the outputs.
        reference: Their values.
        actual: The values that are compared with them.
        align: Puts these into the order of the reference, see ``Exportable.align``.
    """
    a, b = (tuple(torch.as_tensor(value) for value in values) for values in (reference, actual))
    if len(a) != len(b):
        raise ValueError(f'{len(b)} outputs where {len(a)} were expected: {", ".join(names)}.')
    pairs = zip(names, a, align(a, b) if align else b, strict=True)
    return {name: Difference.of(x, y) for name, x, y in pairs}


# ------------------------------------------------------------------------------------------ first layer


def first_difference(
    format: str, file: Path, exportable: Exportable, image: Tensor, tolerance: float, graph: Path | None = None
) -> str:
    """Say which layer of an exported model is the first to differ from ``exportable``.

    Args:
        format: Of ``file``.
        file: The exported model.
        exportable: What it was made of.
        image: Input to compare with.
        tolerance: Relative difference from which a layer differs.
        graph: The ONNX file that an OpenVINO model was converted from.

    Returns:
        A sentence. Graphs are compared value by value, the other formats weight by weight.
    """
    if format in ('onnx', 'openvino'):
        import onnx

        model = onnx.load(graph or file, load_external_data=False)
        torch_values = _module_outputs(_as_written(exportable), image)
        names = _values_of_modules(model, torch_values)
        run = _onnx_values if format == 'onnx' else _openvino_values
        values = run(model, file, [names[module] for module in torch_values if module in names], image.numpy())
        found = ((module, values[names[module]]) for module in torch_values if names.get(module) in values)
        return _first({m: (torch_values[m], torch.as_tensor(v)) for m, v in found}, tolerance)
    return _first_weight(exportable, _weights_of(format, file), tolerance)


def first_difference_of_forms(training: Exportable, deploy: Exportable, image: Tensor, tolerance: float) -> str:
    """Say which module of the deploy form is the first to differ from the training form."""
    before, after = _module_outputs(training, image), _module_outputs(deploy, image)
    inside = tuple(
        f'{_short(name)}.' for name, module in deploy.named_modules() if isinstance(module, UniRepLKNetBlock)
    )  # where both forms differ by design
    both = {name: (before[name], after[name]) for name in before if name in after and not name.startswith(inside)}
    return _first(both, tolerance)


def _short(name: str) -> str:
    return name.removeprefix('model.')


def _as_written(exportable: Exportable) -> Exportable:
    """A copy as it stands in the ONNX file, and with the heads' BN folded into the convolutions by the exporters."""
    return fuse_conv_bn(with_convolutions(exportable))


def _module_outputs(exportable: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Output of every module that returns one tensor, in the order in which they finish; of several calls the first."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.setdefault(name, output.detach().clone())

        return hook

    handles = [m.register_forward_hook(keep(_short(name))) for name, m in exportable.named_modules() if name]
    try:
        with torch.no_grad():
            exportable(image)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _values_of_modules(graph: Any, modules: Iterable[str]) -> dict[str, str]:
    """For modules the name of the value in the graph that is their output: that of their last node."""
    last: dict[str, str] = {}
    for node in graph.graph.node:
        if (name := module_of(node)) and node.output[0]:
            last[name] = node.output[0]
    found = {}
    for module in modules:
        # The older exporter leaves out the parents of modules that are not called themselves.
        matches = [name for name in last if module == name or module.endswith(f'.{name}')]
        if matches:
            found[module] = last[max(matches, key=len)]
    return found


def _onnx_values(model: Any, file: Path, names: list[str], image: np.ndarray) -> dict[str, np.ndarray]:
    import onnx
    import onnxruntime

    there = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in there)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # keep the values apart
    probe = file.with_name(f'probe-{file.name}')  # in the same folder, where its weights may be
    try:
        onnx.save(model, probe)
        session = onnxruntime.InferenceSession(str(probe), options, providers=['CPUExecutionProvider'])
        outputs = session.run(names, {model.graph.input[0].name: image})
    finally:
        probe.unlink(missing_ok=True)
    return dict(zip(names, outputs, strict=True))


@keep_signal_stack()
def _openvino_values(model: Any, file: Path, names: list[str], image: np.ndarray) -> dict[str, np.ndarray]:
    import openvino

    loaded = openvino.Core().read_model(file)
    there = {name for node in loaded.get_ordered_ops() for out in node.outputs() for name in out.get_names()}
    names = [name for name in dict.fromkeys(names) if name in there]
    loaded.add_outputs(names)
    compiled = openvino.Core().compile_model(loaded, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    results = compiled(image)
    return {name: np.array(results[name]) for name in names}


def _first(pairs: Mapping[str, tuple[Tensor, Tensor]], tolerance: float) -> str:
    for name, (reference, actual) in pairs.items():
        if reference.shape != actual.shape:
            continue  # the same values in another shape
        difference = Difference.of(reference, actual).relative
        if not difference <= tolerance:
            return f'the first layer that differs is {name}, by {difference:.1e}'
    return f'none of the {len(pairs)} layers that can be compared differs by itself, so it is what follows the last'


def _weights_of(format: str, file: Path) -> Mapping[str, Tensor]:
    if format == 'torchscript':
        return torch.jit.load(str(file)).state_dict()
    if format == 'pt2':
        return torch.export.load(file).state_dict
    return {f'model.{name}': value for name, value in read_checkpoint(file)['state_dict'].items()}


def _first_weight(exportable: Exportable, weights: Mapping[str, Tensor], tolerance: float) -> str:
    for name, own in exportable.state_dict().items():
        if name in weights and not (difference := Difference.of(own, weights[name]).relative) <= tolerance:
            layer, _, entry = _short(name).rpartition('.')
            return f'the first layer that differs is {layer}, its {entry} by {difference:.1e}'
    return 'all weights agree, so the difference arises in what is computed with them'
