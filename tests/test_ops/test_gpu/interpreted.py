"""The GPU package in Triton's interpreter, which runs on a CPU, beside the compiled one in the same process.

A kernel is interpreted or compiled depending on a switch at the time of its definition. So the files of the package
are loaded a second time, under another name and with the switch on: the same sources, and nothing else changes.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import triton
import triton.language as tl

from .checked_memory import checked_memory

NAME = 'mmunireplknet.ops._interpreted_gpu'
MODULES = (
    'toeplitz', 'layouts', 'tuning', 'convolution', 'gram', 'branches', 'statistics', 'outputs', 'gradients', 'block',
    'pointwise', 'moments', 'coefficients', 'backend',
)  # fmt: skip


@contextlib.contextmanager
def interpreted_package() -> Iterator[SimpleNamespace]:
    """The modules of ``mmunireplknet.ops.gpu``, interpreted; to be run within ``interpreting``."""
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        _load_package()
        modules = {name: importlib.import_module(f'{NAME}.{name}') for name in MODULES}
    yield SimpleNamespace(**modules)
    for name in [name for name in sys.modules if name.startswith(NAME)]:
        del sys.modules[name]


def _load_package() -> ModuleType:
    spec = importlib.util.find_spec('mmunireplknet.ops.gpu')
    copy = importlib.util.spec_from_file_location(
        NAME, spec.origin, submodule_search_locations=[*spec.submodule_search_locations]
    )
    sys.modules[NAME] = package = importlib.util.module_from_spec(copy)
    copy.loader.exec_module(package)
    return package


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Meanwhile functions like ``tl.sum``, which are kernels themselves, are interpreted, and cannot be compiled."""
    import triton.experimental.gluon  # imported at the first launch otherwise, and wants the functions compiled
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle, _patch_lang
    from triton.runtime.jit import JITFunction

    def call(self: InterpretedFunction, *args: Any, **options: Any) -> Any:
        """What triton 3.7 does when a kernel calls another, but taking back the changes that it makes to tl."""
        changes = _patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **options)
        finally:
            changes.restore()

    language, standard = triton.language, triton.language.standard
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def converted(self: InterpreterBuilder, source: Any, target: Any) -> Any:
        """As a GPU does; triton 3.7 cuts off what does not fit into bfloat16, and takes its bits for whole numbers."""
        if source.dtype.scalar == target.scalar or tl.bfloat16 not in (source.dtype.scalar, target.scalar):
            return cast(self, source, target)
        source = _widened(source)
        if target.scalar != tl.bfloat16:
            return source if target.scalar == tl.float32 else cast(self, source, target)
        return TensorHandle(_to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)

    def multiplied(self: InterpreterBuilder, a: Any, b: Any, *rest: Any) -> Any:
        """Numbers in bfloat16; triton 3.7 takes their bits for whole numbers."""
        return dot(self, _widened(a), _widened(b), *rest)

    with pytest.MonkeyPatch.context() as patch, checked_memory():
        patch.setattr(InterpretedFunction, '__call__', call)
        patch.setattr(InterpreterBuilder, 'cast_impl', converted)
        patch.setattr(InterpreterBuilder, 'create_dot', multiplied)
        for name, function in list(vars(standard).items()):
            if isinstance(function, JITFunction):
                mine = InterpretedFunction(function.fn)
                patch.setattr(standard, name, mine)
                if getattr(language, name, None) is function:
                    patch.setattr(language, name, mine)
        yield


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest numbers, of two as near the even one; NaN stays NaN."""
    bits = values.view(np.uint32)
    nearest = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, nearest).astype(np.uint16)


def _widened(handle: Any) -> Any:
    from triton.runtime.interpreter import TensorHandle

    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
