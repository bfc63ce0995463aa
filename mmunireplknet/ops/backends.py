"""Which implementations of the large depthwise convolution there are, which work here, and which is taken when.

A backend is a module with

- ``forward(x, weight, bias, dilation, flipped=False)``, with the kernel turned by 180 degrees where ``flipped``;
- ``weight_grad(x, grad, kernel, dilation)``, (C, 1, K, K) in float32;
- ``supports(x, kernel, dilation)``, why it cannot do that, empty where it can;

and may have ``block_supports`` with the ``block_*`` of the Dilated Reparam Block (see ``cpp``, ``block_backends``), a
``forward`` that also sums (see ``compute_pooled``), and ``divisions(function, x, dilation)``: itself, by label, with
each division of its work that is worth timing, the first of which it takes where nothing is timed.

``torch`` is always there. ``cpp`` are the compiled CPU kernels in ``csrc/cpu``, ``cuda`` those in ``csrc/cuda``, built
by ``setup.py`` or by ``python -m mmunireplknet.ops.build``; its ``why_not()`` says why they are not there. ``triton``
needs nothing but the package triton, which torch for CUDA brings along.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import cpp, fastest, reference
from .agreement import agreeing
from .self_check import self_check

__all__ = [
    'BACKENDS',
    'choose',
    'compute',
    'compute_pooled',
    'give_up',
    'is_auto',
    'is_on_gpu',
    'module_of',
    'require',
    'suits_cpp',
    'why_no_block',
    'why_not',
]

Result = TypeVar('Result')

BACKENDS = ('torch', 'cpp', 'triton', 'cuda')
ON_GPU = ('cuda', 'triton')  # in the order in which they are taken where nothing is timed
OLDEST = (8, 0)  # compute capability: bfloat16 and TF32 in tensor cores, asynchronous copies
NO_MEMORY = 'there is too little memory left for the self-check.'
_MODULES = {'triton': '.gpu.backend', 'cuda': '.cuda'}
_PARTS = {'convolutions': '', 'block': ' of the Dilated Reparam Block', 'pointwise': ' of the pointwise layers'}
_checked: dict[tuple[str, int], str] = {}  # why not, by backend and GPU
_postponed: set[tuple[str, int]] = set()  # for which there was too little memory to find out
_warned: set[str] = set()


def why_not(backend: str, device: torch.device | None = None) -> str:
    """Why ``backend`` cannot be used here; empty where it can.

    Args:
        backend: One of ``BACKENDS``.
        device: The GPU that is asked about; None for the current one.

    Raises:
        ValueError: There is no such backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f'backend={backend!r} is unknown: it must be auto, {", ".join(BACKENDS)}.')
    if backend in ON_GPU:
        return _why_not_on_gpu(backend, device)
    return _why_not_cpp() if backend == 'cpp' else ''


@functools.cache
def _why_not_cpp() -> str:
    from . import build  # not at the top: python -m mmunireplknet.ops.build warns of a module that is there already

    file = build.library_file()
    if file is None:
        return f'the CPU kernels are not built: {build.why_not() or "run python -m mmunireplknet.ops.build."}'
    try:
        cpp.load(str(file))
        problem = self_check('cpp', cpp, torch.device('cpu'))
    except (OSError, RuntimeError) as error:
        problem = f'{file} does not work: {error}'
    if problem:
        warnings.warn(f'mmunireplknet: the compiled CPU kernels are not used: {problem}', stacklevel=2)
    return problem


def _why_not_on_gpu(backend: str, device: torch.device | None) -> str:
    known = _checked.get((backend, device.index)) if device is not None and device.index is not None else None
    if known is not None:  # asked at every convolution
        return known
    if reason := _why_not_there(backend):
        return reason
    if _is_interpreted(backend):
        return ''
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    return _checked_on_gpu(backend, torch.device('cuda', index))


def _why_not_there(backend: str) -> str:
    return _why_not_installed(backend) or _why_no_gpu(backend) or _why_not_loaded(backend)


@functools.cache
def _why_not_installed(backend: str) -> str:
    if backend == 'cuda':
        return _why_not_loaded(backend) or module_of(backend).why_not()
    if importlib.util.find_spec('triton') is None:
        return 'the package triton is missing: torch for CUDA brings it on Linux; on Windows it is triton-windows.'
    return ''


def _why_no_gpu(backend: str) -> str:
    if _is_interpreted(backend):
        return ''
    if torch.version.hip is not None:
        return 'the kernels are for GPUs of NVIDIA; on those of AMD, torch computes.'
    if torch.cuda.is_available():
        return ''
    return 'there is no CUDA device' + ('.' if torch.version.cuda else f', and torch {torch.__version__} has no CUDA.')


@functools.cache
def _why_not_loaded(backend: str) -> str:
    try:
        module_of(backend)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # of a triton that is too old, or broken
        return f'its kernels cannot be imported: {type(error).__name__}: {error}'
    return ''


def _is_interpreted(backend: str) -> bool:
    """Whether triton runs on the CPU by its interpreter, as it does in tests."""
    return backend == 'triton' and os.environ.get('TRITON_INTERPRET') == '1'


def why_no_block(backend: str, device: torch.device) -> str:
    """Why ``backend``, whose convolutions work, cannot compute the block on a GPU; empty where it can."""
    return _checked_on_gpu(backend, device, 'block')


def is_checked(backend: str, device: torch.device, part: str = 'convolutions') -> bool:
    """Whether it is known if the part of ``backend``, of ``_PARTS``, works: to find out waits for the GPU."""
    return _key(backend, device, part) in _checked


def _key(backend: str, device: torch.device, part: str = 'convolutions') -> tuple[str, int]:
    return (backend if part == 'convolutions' else f'{backend} {part}'), device.index or 0


def _checked_on_gpu(backend: str, device: torch.device, part: str = 'convolutions') -> str:
    key = _key(backend, device, part)
    if key not in _checked:
        reason = _check_on_gpu(backend, device, part)
        if reason == NO_MEMORY:  # another time there may be more
            _postponed.add(key)
            return reason
        _postponed.discard(key)
        _checked[key] = reason
    return _checked[key]


def _check_on_gpu(backend: str, device: torch.device, part: str) -> str:
    capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    if capability < OLDEST:
        found = '.'.join(map(str, capability))
        return f'{name} has compute capability {found}; the kernels take 8.0 (Ampere) or newer.'
    try:
        problem = self_check(backend, module_of(backend), device, part)
    except Exception as error:  # of triton's compiler, of the driver: whatever it is, torch computes without it
        if fastest.is_out_of_memory(error):
            return NO_MEMORY
        problem = f'the self-check on {name} failed: {type(error).__name__}: {error}'
    if problem:
        what = f'{backend} kernels{_PARTS[part]}'
        warnings.warn(f'mmunireplknet: the {what} are not used: {problem}', stacklevel=2)
    return problem


def module_of(backend: str) -> Any:
    """The module of ``backend``, whether or not it works here."""
    if backend in _MODULES:
        return importlib.import_module(_MODULES[backend], __package__)
    return cpp if backend == 'cpp' else reference


def require(backend: str, device: torch.device | None = None) -> None:
    """Check that ``backend`` works here.

    Args:
        backend: One of ``BACKENDS``.
        device: See ``why_not``.

    Raises:
        RuntimeError: It does not, with the reason.
        ValueError: There is no such backend.
    """
    if reason := why_not(backend, device):
        raise RuntimeError(f'backend {backend!r} of depthwise_conv2d cannot be used: {reason}')


def choose(
    backend: str,
    x: Tensor,
    kernel: int,
    dilation: int = 1,
    function: str = 'forward',
    do: Callable[[Any], object] | None = None,
) -> str:
    """The backend for a map ``x`` (N, C, H, W) and a KxK kernel.

    ``auto`` reads ``MMUNI_DW_BACKEND``; where that says nothing it takes what was measured to be the fastest: on a CPU
    for device, dtype, layout and size (docs/benchmarks.md), on a GPU by ``fastest``, here and now.

    Args:
        backend: One of ``BACKENDS``, or 'auto'.
        x: What is convolved.
        kernel: K.
        dilation: Distance of its taps.
        function: What is computed: 'forward', 'input_grad', 'weight_grad' or 'pooled'.
        do: Computes it by the module that it is given; None where nothing may be timed.

    Raises:
        RuntimeError: The backend that is asked for cannot be used here, or not for such a map.
        ValueError: It is unknown.
    """
    if backend == 'auto':
        backend = _wanted()
    if backend == 'auto':
        if is_on_gpu(x):
            return _choose_on_gpu(x, kernel, dilation, function, do)
        return 'cpp' if suits_cpp(x) and not _torch_is_faster(x, kernel) else 'torch'
    require(backend, x.device if x.device.type == 'cuda' else None)
    if backend == 'torch':
        return backend
    device = 'cpu' if backend == 'cpp' or _is_interpreted(backend) else 'cuda'
    if x.device.type != device and not (device == 'cuda' and is_on_gpu(x)):
        name = 'the CPU' if device == 'cpu' else 'CUDA devices'
        raise RuntimeError(f'backend {backend!r} computes on {name}, but the input is on {x.device}.')
    if x.dtype == torch.float64:
        return 'torch'  # the precision of references
    if reason := module_of(backend).supports(x, kernel, dilation):
        raise RuntimeError(f'backend {backend!r} cannot convolve this: {reason}')
    if device == 'cuda' and do is not None and hasattr(module_of(backend), 'divisions'):
        kind = fastest.kind_of(function, x, kernel, dilation)
        if fastest.remembered(kind, backend) is None and fastest.may_time(x, kind):
            fastest.find(kind, _candidates(backend, function, x, dilation, do), x.device, backend, x.shape)
    return backend


def _choose_on_gpu(x: Tensor, kernel: int, dilation: int, function: str, do: Callable[[Any], object] | None) -> str:
    kind = fastest.kind_of(function, x, kernel, dilation)
    taken = (fastest.remembered(kind) or '').partition(' ')[0]
    if taken == 'torch' or (taken and _suits(taken, kind, x, kernel, dilation)):
        return taken
    names = [name for name in ON_GPU if _suits(name, kind, x, kernel, dilation)]
    postponed = any(_key(name, x.device) in _postponed for name in ON_GPU)  # what is timed without one would stay
    if not names or do is None or postponed or not fastest.may_time(x, kind):
        return fastest.guess(function, kernel, names)
    of_backends = {name: _candidates(name, function, x, dilation, do) for name in (*names, 'torch')}
    candidates = {label: candidate for some in of_backends.values() for label, candidate in some.items()}
    label, errors = fastest.find(kind, agreeing(candidates, x.dtype), x.device, size=x.shape)
    for name, some in of_backends.items():
        if some.keys() <= errors.keys():
            give_up(name, kind, next(errors[label] for label in some))
    return label.partition(' ')[0]


def _candidates(
    name: str, function: str, x: Tensor, dilation: int, do: Callable[[Any], object]
) -> dict[str, Callable[[], object]]:
    """What the backend ``name`` can be timed with, by label."""
    module = module_of(name)
    if not hasattr(module, 'divisions'):
        return {name: functools.partial(do, module)}
    divided = [*module.divisions(function, x, dilation).items()]
    # As a part of something else that is timed one is enough: each takes seconds to compile.
    return {
        f'{name} {label}': functools.partial(do, part) for label, part in divided[: 1 if fastest.is_timing() else None]
    }


def _suits(name: str, kind: fastest.Kind, x: Tensor, kernel: int, dilation: int) -> bool:
    if fastest.is_failed(kind, name) or (not is_checked(name, x.device) and fastest.is_capturing(x.device)):
        return False  # a check would wait for the GPU, which is an error while a graph is captured
    return not why_not(name, x.device) and not module_of(name).supports(x, kernel, dilation)


def give_up(name: str, kind: fastest.Kind, error: Exception) -> None:
    """Have others do work of this kind from now on, and say so once for a backend; not for want of memory."""
    if fastest.is_out_of_memory(error):
        return  # another time there may be more
    fastest.mark_failed(kind, name)
    if name not in _warned:
        _warned.add(name)
        what = f'{kind[1]} of a {kind[2]}x{kind[2]} kernel in {kind[4].removeprefix("torch.")}'
        warnings.warn(
            f'mmunireplknet: the {name} kernels fail in the {what}, and are not used for it: '
            f'{type(error).__name__}: {error}',
            stacklevel=2,
        )


def compute(do: Callable[[Any], Result], backend: str, function: str, x: Tensor, kernel: int, dilation: int) -> Result:
    """``do`` by the backend that ``choose`` names; where ``auto`` chose one that raises, by torch.

    Args:
        do: Computes it by the module that it is given.
        backend: See ``choose``, as all others.
        function: See there.
        x: See there.
        kernel: See there.
        dilation: See there.
    """
    name = choose(backend, x, kernel, dilation, function, do)
    if name not in ON_GPU or not is_auto(backend):
        return do(module_of(name))
    try:
        return do(module_of(name))
    except Exception as error:  # as in `_check_on_gpu`
        if fastest.is_capturing(x.device):
            raise  # the graph is lost
        give_up(name, fastest.kind_of(function, x, kernel, dilation), error)
    return do(reference)


def compute_pooled(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, backend: str, layout: torch.memory_format
) -> tuple[Tensor, Tensor]:
    """The convolution, in memory of that layout, and the sums (N, C) of its maps, in float32 at least.

    By one pass where the backend's ``forward`` takes ``pooled=True`` and ``layout=``.
    """

    def do(module: Any) -> tuple[Tensor, Tensor]:
        if _pools(module.forward):
            return module.forward(x, weight, bias, dilation, pooled=True, layout=layout)
        y = module.forward(x, weight, bias, dilation).contiguous(memory_format=layout)
        return y, y.sum((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))

    return compute(do, backend, 'pooled', x, weight.shape[-1], dilation)


@functools.cache
def _pools(forward: Callable) -> bool:
    return {'pooled', 'layout'} <= set(inspect.signature(forward).parameters)


def suits_cpp(x: Tensor) -> bool:
    """Whether the compiled CPU kernels are here, not switched off, and made for maps like ``x``."""
    return x.device.type == 'cpu' and x.dtype in cpp.DTYPES and _cpp_is_usable()


def is_on_gpu(x: Tensor) -> bool:
    """Whether ``x`` is where ``ON_GPU`` compute."""
    return x.device.type == 'cuda'


def is_auto(backend: str) -> bool:
    """Whether the choice is free."""
    return backend == 'auto' and _wanted() == 'auto'


@torch.compiler.assume_constant_result
def _wanted() -> str:
    return os.environ.get('MMUNI_DW_BACKEND') or 'auto'


@torch.compiler.assume_constant_result
def _cpp_is_usable() -> bool:
    return _wanted() in ('auto', 'cpp') and not _why_not_cpp()


def _torch_is_faster(x: Tensor, kernel: int) -> bool:
    """Whether oneDNN wins: a 3x3 kernel on a large channels_last map, which is all memory traffic."""
    return kernel == 3 and x.dtype == torch.float32 and x.stride(1) == 1 and x.shape[2] * x.shape[3] > 1024
