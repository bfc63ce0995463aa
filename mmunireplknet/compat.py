"""Every workaround for the version of a dependency, each with the version and the reason."""

from __future__ import annotations

import argparse
import ctypes
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

_SCHEMAS: torch.library.Library | None = None  # keeps the declared schemas alive
_KERNELS: torch.library.Library | None = None  # keeps the kernels alive


def ensure_torchvision() -> str:
    """Make a CUDA-built torchvision importable beside a CPU-only torch.

    PyPI's torchvision wheel (seen with 0.28) dies beside a CPU torch with ``operator torchvision::nms does not
    exist``, because its C extension cannot be loaded; mmpretrain, and through it mmdet and mmseg, import it at
    top level. Declaring the two schemas that torchvision registers fakes for is enough, and must happen before
    the first of those imports.

    Returns:
        'absent', 'native' or 'declared'.
    """
    global _SCHEMAS
    try:
        import torchvision
    except ModuleNotFoundError:
        return 'absent'
    except RuntimeError as error:
        if 'torchvision::nms' not in str(error):
            raise
    else:
        return 'native'
    for name in [n for n in sys.modules if n.partition('.')[0] == 'torchvision']:
        del sys.modules[name]
    _SCHEMAS = torch.library.Library('torchvision', 'DEF')
    _SCHEMAS.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    _SCHEMAS.define('qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    import torchvision  # noqa: F401

    return 'declared'


def ensure_detection_operators() -> None:
    """Have torch.ops.torchvision.nms and roi_align, which every exporter of torch writes in standard operators.

    A torchvision without its C extension (``ensure_torchvision``, seen with 0.28) has the names only; the kernels
    of mmcv, which compute the same, then stand behind them.

    Raises:
        ModuleNotFoundError: There is no torchvision.
    """
    global _KERNELS
    if ensure_torchvision() == 'absent':
        raise ModuleNotFoundError('Exporting a detector needs torchvision: pip install torchvision.')
    from torchvision.extension import _has_ops

    if _KERNELS is not None or _has_ops():
        return
    from mmcv.ops import nms, roi_align

    library = torch.library.Library('torchvision', 'FRAGMENT')
    library.define(
        'roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, '
        'int sampling_ratio, bool aligned) -> Tensor'
    )

    def nms_of_mmcv(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
        return nms(dets, scores, iou_threshold)[1]

    def roi_align_of_mmcv(
        input: Tensor, rois: Tensor, scale: float, height: int, width: int, sampling_ratio: int, aligned: bool
    ) -> Tensor:
        return roi_align(input.contiguous(), rois, (height, width), scale, max(sampling_ratio, 0), 'avg', aligned)

    def roi_align_shape(
        input: Tensor, rois: Tensor, scale: float, height: int, width: int, sampling_ratio: int, aligned: bool
    ) -> Tensor:
        return input.new_empty((rois.shape[0], input.shape[1], height, width))

    for device in ('CPU', 'CUDA'):
        library.impl('nms', nms_of_mmcv, device)
        library.impl('roi_align', roi_align_of_mmcv, device)
    library.impl('roi_align', roi_align_shape, 'Meta')
    _KERNELS = library


def _named(function: Callable, module: str, name: str) -> Callable:
    """``function`` under the name by which torch's safe unpickler looks it up (torch 2.4 and 2.5 know no aliases)."""
    function.__module__, function.__name__, function.__qualname__ = module, name, name
    return function


def _allow_checkpoint_types() -> None:
    """Let ``torch.load(weights_only=True)`` read mmengine's and the published training checkpoints.

    Allowed beyond torch's own list: argparse.Namespace (published training script), numpy arrays and scalars and
    mmengine's HistoryBuffer (its message hub). A pickled HistoryBuffer names its four statistics through
    ``getattr``; allowed is only a ``getattr`` for just those.
    """
    from mmengine.logging.history_buffer import HistoryBuffer

    def history_method(cls: Any, name: str) -> Any:
        if cls is not HistoryBuffer or name not in ('current', 'max', 'mean', 'min'):
            raise pickle.UnpicklingError(f'getattr of {name!r} is not allowed in a checkpoint')
        return getattr(cls, name)

    core = import_module('numpy._core.multiarray' if hasattr(np, '_core') else 'numpy.core.multiarray')

    def reconstruct(*args: Any) -> Any:
        return core._reconstruct(*args)

    def scalar(*args: Any) -> Any:
        return core.scalar(*args)

    allowed = [argparse.Namespace, HistoryBuffer, np.ndarray, np.dtype, core._reconstruct, core.scalar]
    allowed += [
        type(np.dtype(code)) for code in ('f8', 'f4', 'f2', 'i8', 'i4', 'i2', 'i1', 'u8', 'u4', 'u2', 'u1', '?')
    ]
    allowed.append(_named(history_method, 'builtins', 'getattr'))
    other = 'numpy.core.multiarray' if hasattr(np, '_core') else 'numpy._core.multiarray'  # numpy 1 and 2 files
    allowed += [_named(reconstruct, other, '_reconstruct'), _named(scalar, other, 'scalar')]
    torch.serialization.add_safe_globals(allowed)


def safe_torch_load(file: Any, map_location: Any = None, mmap: bool = False) -> Any:
    """``torch.load`` that restores tensors and plain data, and never executes anything.

    Raises:
        pickle.UnpicklingError: The file holds anything else.
    """
    return torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)


def install_safe_loading() -> None:
    """Have mmengine read checkpoints by ``read_checkpoint``, for load_from, resume and init_cfg of every model.

    That is files, https addresses, and the names that mmengine turns into either (torchvision://, open-mmlab://).
    Other objects than tensors and plain data are refused, and http:// too.

    onedl-mmengine 0.10.12 repeats a refused safe load with ``weights_only=False``, which executes whatever the
    file holds; mmengine 0.10.7 passes no ``weights_only``, which on torch below 2.6 does the same and on newer
    torch fails on its own checkpoints (HistoryBuffer).
    """
    from mmengine.logging import print_log
    from mmengine.runner import checkpoint
    from mmengine.runner.checkpoint import CheckpointLoader

    def load_from_mmunireplknet(filename: str, map_location: Any = None, **_: Any) -> Any:
        from .models.checkpoint_file import read_checkpoint
        from .models.layouts import drop_ema_copies

        data = read_checkpoint(filename, map_location)
        if isinstance(data.get('state_dict'), dict) and (copies := drop_ema_copies(data['state_dict'])):
            print_log(f'{filename}: left out {len(copies)} ema_* copies; the plain entries are the averages', 'current')
        if isinstance(data.get('meta'), dict):
            data['meta'].pop('config', None)  # mmengine's resume executes this text, of mmcv 1's files, as Python
        return data

    load = load_from_mmunireplknet  # the part behind load_from_ is what mmengine's log line says
    _allow_checkpoint_types()
    CheckpointLoader.register_scheme(prefixes='', loader=load, force=True)
    CheckpointLoader.register_scheme(prefixes=('http://', 'https://'), loader=load, force=True)
    checkpoint.load_from_http = load  # what torchvision:// and open-mmlab:// call
    if hasattr(checkpoint, '_safe_torch_load'):  # what the remaining schemes of the maintained mmengine call

        def strict_load(file: Any, map_location: Any = None, weights_only: Any = None) -> Any:
            return safe_torch_load(file, map_location)

        checkpoint._safe_torch_load = strict_load


# Modules of mmcv.ops and their operators that detectors use.
_OPERATORS = {
    'deform_conv': ['DeformConv2dFunction'],
    'modulated_deform_conv': ['ModulatedDeformConv2dFunction'],
    'multi_scale_deform_attn': ['MultiScaleDeformableAttnFunction'],
    'nms': ['NMSop', 'SoftNMSop'],
    'roi_align': ['RoIAlignFunction'],
}


def let_mmcv_take_bfloat16() -> None:
    """Have mmcv's operators compute in float32 what they are given in bfloat16, on every device.

    onedl-mmcv 2.3.6 and mmcv 2.1.0 have no kernels for it (``expected scalar type Float but found BFloat16``,
    ``"ROIAlign_forward" not implemented for 'BFloat16'``). Other dtypes go through as before; it lasts, because
    recomputing (``with_cp``) calls them again in the backward pass, outside of any context.
    """
    for name, operators in _OPERATORS.items():
        module = sys.modules.get(f'mmcv.ops.{name}')  # a model that uses it has imported it
        for operator in (getattr(module, o) for o in operators) if module else ():
            if not hasattr(operator.forward, '__wrapped__'):
                operator.forward = staticmethod(_in_float32(operator.forward))


def _in_float32(forward: Callable) -> Callable:
    @wraps(forward)
    def run(ctx: Any, *args: Any) -> Any:
        return forward(ctx, *float32_of(args))

    return run


def float32_of(value: Any) -> Any:
    """``value`` with float32 in the place of bfloat16 in every tensor, also in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype == torch.bfloat16 else value
    if isinstance(value, dict):
        return {key: float32_of(item) for key, item in value.items()}
    return type(value)(float32_of(item) for item in value) if type(value) in (list, tuple) else value


def let_fsdp_resume() -> None:
    """Have mmengine's FSDPStrategy give torch the optimizer's state in the right place.

    onedl-mmengine 0.10.12 and mmengine 0.10.7 pass the arguments in the order of torch 2.0, so that resuming ends in
    ``TypeError: unhashable type: 'dict'``.
    """
    if not torch.distributed.is_available():
        return
    from mmengine._strategy import FSDPStrategy
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    from .models.checkpoint_file import CheckpointError

    def load_optim_state_dict(self: Any, state_dict: dict) -> None:
        if any(isinstance(key, int) for key in state_dict['state']):  # else torch asks the number for its names
            raise CheckpointError(
                'the checkpoint is of a run without FSDP, whose optimizer cannot be divided: resume it without FSDP, '
                'or start from its weights by --cfg-options load_from=FILE.'
            )
        wrapper = self.optim_wrapper
        wrapper.load_state_dict(FSDP.optim_state_dict_to_load(self.model, wrapper.optimizer, state_dict))

    FSDPStrategy.load_optim_state_dict = load_optim_state_dict


class _SignalStack(ctypes.Structure):
    """``stack_t`` of sigaltstack(2)."""

    _fields_ = (('sp', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t))


@contextmanager
def keep_signal_stack() -> Iterator[None]:
    """Put back the stack for signal handlers that OpenVINO exchanges inside.

    Its CPU plugin sets one of its own when a model is compiled, and sets the one before when it goes. Of two plugins
    that go in the order in which they came, the second one sets the freed stack of the first (2026.4.1). The next
    signal then kills the process, SIGCHLD at the end of a data loader's worker for instance.
    """
    if sys.platform != 'linux':
        yield
        return
    library, before = ctypes.CDLL(None), _SignalStack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(ctypes.byref(before), None)


@contextmanager
def resize_of_open_sizes() -> Iterator[None]:
    """Have mmseg's ``resize`` not look at sizes in Python inside, which fixes them in what torch.export writes.

    With ``align_corners=True`` it does so for a warning, in mmseg 1.2.2 and onedl-mmsegmentation 1.4.2, and its callers
    take its default, which asks for that.
    """
    wrappers = sys.modules.get('mmseg.models.utils.wrappers')
    if wrappers is None:
        yield
        return
    resize = wrappers.resize
    defaults = resize.__defaults__  # a function that many modules have imported by name has one object in common
    resize.__defaults__ = (*defaults[:-1], False)
    try:
        yield
    finally:
        resize.__defaults__ = defaults


def let_mmdeploy_export() -> None:
    """Have mmdeploy 1.3.1 export models of this package, where a deploy config's ``codebase_config.module`` names it.

    Without mmdeploy in the process this does nothing. With it, three things are put right:

    - ``torch.onnx.export`` traces no more unless it is told to (seen with torch 2.13), and knows nothing of mmdeploy's
      rewriters then: it gets ``dynamo=False`` while mmdeploy exports, and only then.
    - Its RoIAlign calls ``torch.onnx.symbolic_opset9._cast_Long``, which torch 2.13 no longer has.
    - It reparameterizes a model that it has just built, in training mode, where folding is refused: it is put into
      evaluation, in which it is exported anyway, a step earlier.
    """
    if 'mmdeploy' not in sys.modules:
        return
    from mmdeploy.codebase.base.task import BaseTask
    from mmdeploy.core import FUNCTION_REWRITER

    opset9: Any = import_module('torch.onnx.symbolic_opset9')
    if hasattr(BaseTask.build_pytorch_model, '__wrapped__'):
        return  # done already

    def export_by_tracing(*args: Any, **kwargs: Any) -> Any:
        return FUNCTION_REWRITER.get_context().origin_func(*args, **{'dynamo': False, **kwargs})

    def cast_long(g: Any, value: Any, non_blocking: bool) -> Any:
        return g.op('Cast', value, to_i=torch.onnx.TensorProtoDataType.INT64)

    FUNCTION_REWRITER.register_rewriter('torch.onnx.export')(export_by_tracing)
    if not hasattr(opset9, '_cast_Long'):
        opset9._cast_Long = cast_long
    BaseTask.build_pytorch_model = _folding_in_evaluation(BaseTask.build_pytorch_model)


def _folding_in_evaluation(build: Callable) -> Callable:
    """mmdeploy's ``build_pytorch_model`` with ``eval()`` before ``switch_to_deploy()``, at the step between."""
    import mmengine.model

    @wraps(build)
    def build_in_evaluation(*args: Any, **kwargs: Any) -> Any:
        revert = mmengine.model.revert_sync_batchnorm
        mmengine.model.revert_sync_batchnorm = lambda model: revert(model).train(False)
        try:
            return build(*args, **kwargs)
        finally:
            mmengine.model.revert_sync_batchnorm = revert

    return build_in_evaluation


def needs_standard_operators() -> bool:
    """Whether only operators of torch itself will do: in tracing, export, and under torch.func and forward-mode AD.

    The last two look through an operator with registered autograd and silently find no derivative (torch 2.13).
    """
    if torch.jit.is_tracing():
        return True
    if torch.compiler.is_compiling():  # torch below 2.7 has no is_exporting
        return _is_transforming() or bool(getattr(torch.compiler, 'is_exporting', lambda: False)())
    return _is_transforming() or torch.onnx.is_in_onnx_export()


@torch.compiler.assume_constant_result  # dynamo enters the transforms that it traces, but cannot trace the question
def _is_transforming() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def convolutions_may_use_tf32() -> bool:
    """Whether torch lets convolutions of float32 maps round their factors to TF32.

    The switch has a name of its own per operator since torch 2.9; to read the old one fails once the new one is set.
    """
    conv = getattr(torch.backends.cudnn, 'conv', None)
    return torch.backends.cudnn.allow_tf32 if conv is None else conv.fp32_precision == 'tf32'
