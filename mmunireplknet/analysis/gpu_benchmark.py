"""The benchmark on a GPU: what is measured, a contender at a time, so that it can be stopped and taken up again.

``plan`` lists all the work; ``run`` does what is not in the file of results yet, and appends a line for each timing.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.dilated_reparam import DilatedReparamBlock
from ..models.unireplknet import UniRepLKNet
from . import gpu_pointwise
from .gpu_clock import CpuClock, GpuClock
from .peers import DIRECTIONS, LAYOUTS, build_convnext, by_backend, by_torch, published_form

__all__ = ['PARTS', 'Scale', 'Work', 'plan', 'read', 'run']

Shape = tuple[int, int, int, int]
Clock = GpuClock | CpuClock

PARTS = (
    'anchors-13', 'ours-13', 'block', 'pointwise', 'training', 'inference', 'anchors-7', 'ours-7', 'anchors-31',
    'ours-31',
)  # fmt: skip
DTYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16, 'float32': torch.float32}
WIDTHS = {'T': 80, 'S': 96, 'B': 128, 'L': 192}  # channels of stage 1, which double from stage to stage
IMAGES = ((16, 512, 512), (8, 640, 640), (2, 800, 1344))
OURS = ('triton', 'cuda')
FATAL = 'fatal: '  # before an error after which a process cannot use the GPU; it is not tried again


@dataclass(frozen=True)
class Scale:
    """How large everything is: as in the tables, or as small as a rehearsal needs.

    Attributes:
        shapes: Maps of the depthwise convolutions, by name.
        kernels: Their sizes that are measured.
        dtypes: Names of ``DTYPES``.
        modes: 'eager', 'graph'.
        block: Map of the Dilated Reparam Block, 13x13.
        arch: Of the backbone.
        convnext: What it is compared with.
        training: Batches of images.
        inference: Batches of images.
    """

    shapes: Mapping[str, Shape]
    kernels: tuple[int, ...]
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    block: Shape
    arch: Any
    convnext: str
    training: tuple[Shape, ...]
    inference: tuple[Shape, ...]


def _maps() -> dict[str, Shape]:
    return {
        f'{name} stage {stage + 1}, {n}x{h}x{w}': (n, width << stage, -(-h // (4 << stage)), -(-w // (4 << stage)))
        for name, width in WIDTHS.items()
        for n, h, w in IMAGES
        for stage in (1, 2, 3)
    }


FULL = Scale(
    _maps(), (7, 13, 31), tuple(DTYPES), ('eager', 'graph'), (16, 320, 32, 32), 's', 'small',
    ((16, 3, 512, 512), (2, 3, 800, 1344)),
    tuple((n, 3, size, size) for n in (1, 64) for size in (224, 512)),
)  # fmt: skip
QUICK = Scale(
    {name: shape for name, shape in _maps().items() if name.startswith(('T stage 3', 'S stage 2'))},
    (13,), ('bfloat16', 'float32'), ('eager', 'graph'), FULL.block, 's', 'small', FULL.training,
    ((1, 3, 224, 224), (64, 3, 224, 224)),
)  # fmt: skip
TINY = Scale(
    {'tiny': (2, 4, 9, 11)}, (7, 13, 31), ('bfloat16', 'float32'), ('eager', 'graph'), (2, 4, 9, 11),
    dict(depths=[1, 1, 1, 1], dims=[8, 8, 8, 8], kernel_sizes=[[3], [13], [13], [13]]), 'atto',
    ((2, 3, 32, 64),), ((1, 3, 32, 32),),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Work:
    """One contender of one row.

    Attributes:
        part: One of ``PARTS``.
        row: What is done.
        contender: Who does it.
        facts: What the row is about, for the tables.
        build: Given a device, returns what does it once.
    """

    part: str
    row: str
    contender: str
    facts: Mapping[str, Any]
    build: Callable[[torch.device], Callable[[], object]]


def plan(scale: Scale, parts: Sequence[str] = PARTS) -> list[Work]:
    """All the work of ``parts``, in their order; the anchors, torch as it is, before ours."""
    work: list[Work] = []
    for part in parts:
        kind, _, kernel = part.partition('-')
        if kind in ('anchors', 'ours'):
            work += _depthwise(scale, part, int(kernel)) if int(kernel) in scale.kernels else []
        else:
            kinds = {'block': _block, 'pointwise': _pointwise, 'training': _training, 'inference': _inference}
            work += kinds[kind](scale)
    return work


def _depthwise(scale: Scale, part: str, kernel: int) -> Iterator[Work]:
    names = ('torch',) if part.startswith('anchors') else OURS
    for where, shape in scale.shapes.items():
        for dtype in scale.dtypes:
            for direction in DIRECTIONS:
                facts = dict(kernel=kernel, shape=shape, dtype=dtype, direction=direction, where=where)
                row = f'{direction} {kernel}x{kernel} {dtype} {shape}'
                for name in names:
                    for layout in LAYOUTS:
                        build = partial(_convolution, shape, kernel, dtype, direction, name, layout)
                        yield Work(part, row, f'{name} {layout}', facts, build)


def _convolution(
    shape: Shape, kernel: int, dtype: str, direction: str, name: str, layout: str, device: torch.device
) -> Callable[[], object]:
    x, grad = (_draw(shape, device, layout).to(DTYPES[dtype]) for _ in range(2))
    weight = _draw((shape[1], 1, kernel, kernel), device)
    if name != 'torch':
        return by_backend(direction, x, grad, weight, name)
    return by_torch(direction, x, grad, weight.to(DTYPES[dtype]))


def _draw(shape: Shape, device: torch.device, layout: str = 'NCHW') -> Tensor:
    return torch.randn(shape, device=device).contiguous(memory_format=LAYOUTS[layout])


def _amp(device: torch.device, dtype: str) -> Any:
    return nullcontext() if dtype == 'float32' else torch.autocast(device.type, DTYPES[dtype])


def _block(scale: Scale) -> Iterator[Work]:
    def build(kind: str, layout: str, dtype: str, device: torch.device) -> Callable[[], object]:
        block: nn.Module = DilatedReparamBlock(scale.block[1], 13, fused=kind == 'ours')
        block = block if kind == 'ours' else published_form(block, layout)
        x = _draw(scale.block, device, layout).requires_grad_()
        return _step(block.to(device).train(), x, dtype, None)

    for dtype in scale.dtypes:
        row = f'Dilated Reparam Block, forward and backward, {dtype} {scale.block}'
        for kind in ('published', 'ours'):
            for layout in LAYOUTS:
                facts = dict(dtype=dtype, shape=scale.block)
                yield Work('block', row, f'{kind} {layout}', facts, partial(build, kind, layout, dtype))


def _pointwise(scale: Scale) -> Iterator[Work]:
    for dtype in scale.dtypes:
        for name in gpu_pointwise.PASSES:
            facts = dict(shape=scale.block, dtype=dtype, name=name)
            build = partial(gpu_pointwise.pass_of, name, scale.block, DTYPES[dtype])
            yield Work('pointwise', f'{name} {dtype} {scale.block}', 'triton', facts, build)


def _model(scale: Scale, kind: str, layout: str, **kwargs: Any) -> nn.Module:
    if kind == 'ConvNeXt':
        return build_convnext(scale.convnext, layout)
    if kind == 'ours':
        model: nn.Module = UniRepLKNet(scale.arch, channels_last=layout == 'channels_last', **kwargs)
        return model
    return published_form(UniRepLKNet(scale.arch, channels_last=False, fused=False, **kwargs), layout)


def _training(scale: Scale) -> Iterator[Work]:
    def build(kind: str, layout: str, shape: Shape, device: torch.device) -> Callable[[], object]:
        model = _model(scale, kind, layout).to(device)
        model.train()  # by itself: that of mmpretrain's ConvNeXt returns nothing
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
        return _step(model, _draw(shape, device, layout), 'bfloat16', optimizer)

    for shape in scale.training:
        row = f'training step, bfloat16 AMP, {"x".join(map(str, shape))}'
        for kind in ('published', 'ConvNeXt', 'ours'):
            for layout in LAYOUTS:
                yield Work('training', row, f'{kind} {layout}', dict(shape=shape), partial(build, kind, layout, shape))


def _step(model: nn.Module, x: Tensor, dtype: str, optimizer: torch.optim.Optimizer | None) -> Callable[[], object]:
    """Forward, backward into ``x``, if it asks for it, and the parameters, and the optimizer's step."""
    inputs = [t for t in (x, *model.parameters()) if t.requires_grad]
    grads: list[Tensor] = []

    def run() -> None:
        with _amp(x.device, dtype):
            outs = model(x)
        outs = outs if isinstance(outs, tuple) else (outs,)
        if not grads:  # no kernel is quicker on ones or zeros, but a loss has other gradients
            grads.extend(torch.randn_like(out) for out in outs)
        found = torch.autograd.grad(outs, inputs, grads, allow_unused=True)
        if optimizer is not None:
            for tensor, grad in zip(inputs, found, strict=True):
                tensor.grad = grad
            optimizer.step()

    return run


def _inference(scale: Scale) -> Iterator[Work]:
    def build(kind: str, layout: str, dtype: str, shape: Shape, device: torch.device) -> Callable[[], object]:
        model = _model(scale, kind, layout, **({} if kind == 'ConvNeXt' else {'deploy': True}))
        model.to(device, DTYPES[dtype])
        model.eval()
        x = _draw(shape, device, layout).to(DTYPES[dtype])

        def run() -> object:
            with torch.inference_mode():
                return model(x)

        return run

    for shape in scale.inference:
        for dtype in (name for name in scale.dtypes if name != 'float32'):
            row = f'deploy inference, {dtype}, {"x".join(map(str, shape))}'
            for kind in ('published', 'ConvNeXt', 'ours'):
                for layout in LAYOUTS:
                    facts = dict(shape=shape, dtype=dtype)
                    build_it = partial(build, kind, layout, dtype, shape)
                    yield Work('inference', row, f'{kind} {layout}', facts, build_it)


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of results so far; of a timing that was repeated, the last. A line that was cut off is left out."""
    found: dict[tuple, dict[str, Any]] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            entry = json.loads(line)
            found[entry['row'], entry['contender'], entry['mode']] = entry
        except (ValueError, KeyError):
            continue
    return list(found.values())


def run(
    work: Sequence[Work],
    clock: Clock,
    file: Path,
    modes: Sequence[str],
    seconds: float = float('inf'),
    progress: Callable[[str], None] = lambda _: None,
) -> int:
    """Measure what is not in ``file``, where it did not fail, and append every timing to it at once.

    Args:
        work: What.
        clock: Measures it.
        file: Of results, JSON, one a line.
        modes: See ``Scale``; a training step has no 'graph'.
        seconds: When to stop; the timing that is under way is finished.
        progress: Told what goes on, a line at a time.

    Returns:
        How many timings are left.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    done = {(e['row'], e['contender'], e['mode']) for e in read(file) if not e['error'] or e['error'].startswith(FATAL)}
    todo = [(w, m) for w in work for m in modes if not (w.part == 'training' and m == 'graph')]
    todo = [(w, m) for w, m in todo if (w.row, w.contender, m) not in done]
    kept: dict[Work, Callable[[], object]] = {}  # what was built last, for its other mode
    for index, (one, mode) in enumerate(todo):
        if time.monotonic() > end:
            return len(todo) - index
        entry = _measure(one, mode, clock, kept)
        with file.open('a') as stream:
            stream.write(json.dumps(entry) + '\n')
        said = entry['error'].splitlines()[0] if entry['error'] else f'{entry["ms"]:.4f} ms'
        progress(f'[{index + 1}/{len(todo)}] {one.row}: {one.contender}, {mode}: {said}')
        if entry['error'].startswith(FATAL):
            raise RuntimeError(f'The GPU cannot be used any more in this process; run it again to go on. {said}')
    return 0


def _measure(work: Work, mode: str, clock: Clock, kept: dict[Work, Callable[[], object]]) -> dict[str, Any]:
    """The line of results of a timing; a contender that cannot do it is a result as well."""
    entry = dict(part=work.part, row=work.row, contender=work.contender, mode=mode, error='', **work.facts)
    try:
        if work not in kept:
            kept.clear()
            _free(clock)
            kept[work] = work.build(clock.device)
        measured = clock.measure(kept[work], mode)
    except Exception as error:  # of a compiler, a library, a driver, or want of memory: the others go on
        entry['error'] = f'{type(error).__name__}: {error}'[:500]
        try:
            clock.synchronize()
        except RuntimeError:
            entry['error'] = FATAL + entry['error']
        return entry
    timing = measured.timing
    return entry | dict(ms=timing.median, low=timing.low, high=timing.high, rounds=timing.rounds, peak=measured.peak)


def _free(clock: Clock) -> None:
    gc.collect()
    if clock.device.type == 'cuda':
        torch.cuda.empty_cache()
