"""What tools/train.py and tools/test.py do to a config before it runs; every function changes ``cfg`` in place."""

from __future__ import annotations

import gc
import inspect
import os
import re
import tempfile
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import MODELS, RUNNERS, init_default_scope
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ..datasets.label_ranges import label_ranges
from ..datasets.sample_errors import SampleError, name_samples
from ..models.checkpoint import load_checkpoint
from ..models.checkpoint_file import CheckpointError
from ..models.reparam import switch_to_deploy
from .atomic_checkpoint_hook import latest_checkpoint
from .non_finite_loss_hook import NonFiniteLossError

__all__ = [
    'STOPS', 'ConfigError', 'build_runner', 'check_tta', 'check_work_dir', 'evaluate', 'is_first_process',
    'leave_process_group', 'load_config', 'prepare_training', 'sentence_of',
]  # fmt: skip


class ConfigError(ValueError):
    """A config that nothing can be built from; the message says which entry."""


STOPS = (CheckpointError, ConfigError, NonFiniteLossError, SampleError)  # their message is all that a user needs


def sentence_of(error: BaseException) -> str:
    """What a tool says when one of ``STOPS`` ends it."""
    return f'{type(error).__name__}: {error.sentence if isinstance(error, SampleError) else error}'


def is_first_process() -> bool:
    """Whether this is the first or the only process, told before there is a process group."""
    ranks = (os.environ.get(name) for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'))
    return next((rank for rank in ranks if rank is not None), '0') == '0'


def load_config(
    file: str, options: Mapping[str, Any] | None = None, work_dir: str | None = None, launcher: str = 'none'
) -> Config:
    """Read a config and set what the command line gives.

    Args:
        file: Path of the config.
        options: ``--cfg-options``. ``data_root`` moves every data set and evaluator of the config there.
        work_dir: Wins over the config's; the default is work_dirs/<name of the config>.
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'.

    Raises:
        FileNotFoundError: There is no such file; the message lists near matches.
    """
    path = Path(file)
    if not path.is_file():
        near = get_close_matches(path.name, [p.name for p in path.parent.glob('*.py')], n=5)
        hint = f' The nearest in {path.parent}: {", ".join(near)}.' if near else ''
        raise FileNotFoundError(f'There is no config {file}.{hint}')
    cfg = Config.fromfile(path)
    options = dict(options or {})
    place = options.get('data_root')
    root = cfg.get('data_root') or cfg.get('train_dataloader', {}).get('dataset', {}).get('data_root')
    cfg.merge_from_dict(options)
    if place and root:
        for name in [name for name in cfg if name.endswith(('_dataloader', '_evaluator'))]:
            cfg[name] = _moved(cfg[name], root.rstrip('/'), place.rstrip('/'))
    cfg.launcher = launcher
    cfg.work_dir = work_dir or cfg.get('work_dir') or str(Path('work_dirs', path.stem))
    return cfg


def _moved(value: Any, old: str, new: str) -> Any:
    """``value`` with every path in or below ``old`` in or below ``new``."""
    if isinstance(value, Mapping):
        return {key: _moved(inner, old, new) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(inner, old, new) for inner in value)
    inside = isinstance(value, str) and (value == old or value.startswith(f'{old}/'))
    return new + value.removeprefix(old) if inside else value


def check_work_dir(cfg: Config) -> None:
    """Make the folders of logs and checkpoints, and write to them.

    Raises:
        ConfigError: That fails.
    """
    hook = cfg.get('default_hooks', {}).get('checkpoint') or {}
    for folder in filter(None, [cfg.work_dir, hook.get('out_dir')]):
        if '://' in folder:
            continue
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b'x')
        except OSError as error:
            raise ConfigError(
                f'nothing can be written to {folder} ({error.strerror}), where logs and checkpoints are to go: '
                'make it writable, or name another by --work-dir.'
            ) from error


def prepare_training(
    cfg: Config,
    resume: str | None = None,
    amp: str | None = None,
    auto_scale_lr: bool = False,
    seed: int | None = None,
    deterministic: bool = False,
) -> None:
    """Apply the options of tools/train.py.

    Args:
        cfg: Changed in place.
        resume: None, 'auto' for the latest checkpoint of the work dir, or a checkpoint.
        amp: Mixed precision: 'fp16' with loss scaling (on a GPU), 'bf16', or 'auto': fp16 on a GPU, bf16 on the CPU.
        auto_scale_lr: Scale the learning rate by the global batch size, accumulated iterations included, over the
            config's ``base_batch_size``.
        seed: Seed of all random number generators.
        deterministic: Deterministic algorithms; resuming then is bit-exact.

    Raises:
        ValueError: ``auto_scale_lr`` without a base batch size in the config, AMP over another wrapper, or one that
            the device cannot do; FSDP in one process, with averaged weights or clipped gradients.
    """
    _check_sharding(cfg)
    _use_safe_hooks(cfg)
    if amp:
        _use_amp(cfg, amp)
    if auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise ValueError('--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the config.')
        cfg.auto_scale_lr.enable = True
        # mmengine compares it with the images of one iteration, the learning rate is for those of one step.
        cfg.auto_scale_lr.base_batch_size /= cfg.optim_wrapper.get('accumulative_counts', 1)
    if seed is not None or deterministic:
        cfg.randomness = ConfigDict({**cfg.get('randomness', {}), **({} if seed is None else dict(seed=seed))})
        cfg.randomness.deterministic = deterministic or cfg.randomness.get('deterministic', False)
    if resume:
        file = latest_checkpoint(cfg.work_dir) if resume == 'auto' else resume
        if file is None:
            print_log(f'No checkpoint in {cfg.work_dir} to resume from: training starts.', logger='current')
        cfg.resume, cfg.load_from = file is not None, file or cfg.get('load_from')
        if file is not None:  # its weights replace the pretrained ones, which need not be there any more
            cfg.model.backbone.init_cfg = None


def _check_sharding(cfg: Config) -> None:
    if _class_name(cfg.get('strategy') or {}) != 'FSDPStrategy':
        return
    if cfg.launcher == 'none':
        raise ConfigError(
            'FSDPStrategy divides the weights among processes: start it by tools/dist_train.sh or tools/slurm_train.sh.'
        )
    if cfg.optim_wrapper.get('clip_grad'):
        raise ConfigError(
            'clip_grad would measure in every process only the gradients that FSDP keeps there: train without it by '
            '--cfg-options optim_wrapper.clip_grad=None, or without FSDP.'
        )
    if any(_class_name(hook) == 'EMAHook' for hook in cfg.get('custom_hooks') or []):
        raise ConfigError(
            'EMAHook copies the model, which is impossible where FSDP holds a part of it in each process: train '
            'without the average by --cfg-options custom_hooks=[], or without FSDP.'
        )


def _use_safe_hooks(cfg: Config) -> None:
    """Checkpoints are written atomically with all random states; what is wrong with one, a loss or a sample is told."""
    hooks = cfg.setdefault('default_hooks', ConfigDict())
    checkpoint = hooks.setdefault('checkpoint', ConfigDict(type='CheckpointHook', interval=1))
    if checkpoint and checkpoint.get('type') == 'CheckpointHook':
        checkpoint.type = 'AtomicCheckpointHook'
    _add_hooks(cfg, 'CheckpointFitHook', 'NonFiniteLossHook', 'RandomStateHook', 'SampleHook')


def _add_hooks(cfg: Config, *names: str) -> None:
    hooks = list(cfg.get('custom_hooks') or [])
    there = {hook.get('type') for hook in hooks}
    cfg.custom_hooks = [*hooks, *(ConfigDict(type=name) for name in names if name not in there)]


def _use_amp(cfg: Config, kind: str) -> None:
    """Replace the type of the optimizer's wrapper; what else the config says of it stays."""
    wrapper = cfg.optim_wrapper
    name = _class_name(wrapper) or 'OptimWrapper'
    if name not in ('OptimWrapper', 'AmpOptimWrapper', 'BF16OptimWrapper'):
        raise ValueError(f'--amp replaces OptimWrapper, but the config has {name}.')
    gpu = torch.cuda.is_available()
    if kind == 'auto':
        kind = 'fp16' if gpu else 'bf16'
    if kind == 'fp16' and not gpu:
        raise ValueError('--amp fp16 needs a GPU, and torch sees none: use --amp bf16, or train without --amp.')
    if kind == 'bf16' and gpu and not torch.cuda.is_bf16_supported():
        raise ValueError('--amp bf16: this GPU has no bfloat16; use --amp fp16, or train without --amp.')
    wrapper.pop('dtype', None)
    if kind == 'fp16':
        wrapper.type = 'AmpOptimWrapper'
        wrapper.setdefault('loss_scale', 'dynamic')
    else:
        wrapper.type = 'BF16OptimWrapper'
        for key in ('loss_scale', 'use_fsdp'):
            wrapper.pop(key, None)


def build_runner(cfg: Config) -> Runner:
    """Build the Runner, on GPUs or on CPU processes (gloo) alike; what fails in a data pipeline names its sample.

    Raises:
        ConfigError: The config gives something an argument that it does not take.
    """
    if cfg.launcher != 'none' and not torch.cuda.is_available():
        _use_cpu_processes(cfg)
    try:
        runner = Runner.from_cfg(cfg) if 'runner_type' not in cfg else RUNNERS.build(cfg)
    except TypeError as error:
        if message := _unknown_argument(str(error)):
            raise ConfigError(message) from error
        raise
    build = runner.build_dataloader  # what the loops call; their workers may start before any hook is asked

    def build_naming(dataloader: Any, *args: Any, **kwargs: Any) -> DataLoader:
        trains = dataloader is runner._train_dataloader  # metrics may ignore other labels than losses
        loader = build(dataloader, *args, **kwargs)
        name_samples(loader.dataset, label_ranges(runner.model) if trains else ())
        return loader

    runner.build_dataloader = build_naming  # type: ignore[method-assign]
    return runner


def _unknown_argument(error: str) -> str | None:
    """One sentence for the TypeError of an unknown argument, else None."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", error)
    if found is None:
        return None
    name, argument = found.groups()
    cls = MODELS.get(name)
    known = list(inspect.signature(cls).parameters) if cls is not None else []
    near = get_close_matches(argument, known, n=1)
    hint = f', did you mean {near[0]}?' if near else f'; it takes {", ".join(known)}.' if known else '.'
    return f'{name} in the config takes no argument {argument!r}{hint}'


def _use_cpu_processes(cfg: Config) -> None:
    """mmengine's launcher and its DDP wrapper assume CUDA devices; torch's SyncBN refuses CPU tensors."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    os.environ.setdefault('LOCAL_RANK', '0')
    wrapper = cfg.get('model_wrapper_cfg') or ConfigDict(type='MMDistributedDataParallel')
    cfg.model_wrapper_cfg = ConfigDict({**wrapper, 'device_ids': None})
    if sharded := cfg.get('strategy', {}).get('model_wrapper'):  # FSDP would take the rank for a CUDA device
        sharded.device_id = torch.device('cpu')
        # Offloading copies nothing that is on the CPU already: of the gathered weights it frees what it returns, and
        # crashes; of the optimizer's averages the second overwrites the first (torch 2.13).
        whole = dict(rank0_only=True, offload_to_cpu=False)
        cfg.strategy.state_dict_cfg = dict(
            state_dict_type='FULL_STATE_DICT',
            state_dict_config=dict(type='FullStateDictConfig', **whole),
            optim_state_dict_config=dict(type='FullOptimStateDictConfig', **whole),
        )
    _replace_sync_bn(cfg.model)


def leave_process_group() -> None:
    """Let the processes end together: one that outlives the others aborts when their connections close.

    The runner must be out of use by then: what it holds in cycles (DDP, optimizer) is collected here, since a process
    that finds it at its very end aborts now and then.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        gc.collect()
        torch.distributed.destroy_process_group()


def _replace_sync_bn(node: Any) -> None:
    if isinstance(node, Mapping):
        if node.get('type') == 'SyncBN':
            node['type'] = 'DeviceAgnosticSyncBN'  # type: ignore[index]
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            _replace_sync_bn(child)


def _class_name(cfg: Mapping[str, Any]) -> str:
    """Name of the class that a config builds, which ``type`` names with its scope or without, or is."""
    kind = cfg.get('type', '')
    return getattr(kind, '__name__', str(kind)).rpartition('.')[2]


def check_tta(cfg: Config) -> None:
    """Make sure that ``cfg`` says what test-time augmentation is; a classifier's default is a flip, as in mmpretrain.

    Raises:
        ValueError: It has no ``tta_model`` and ``tta_pipeline``.
    """
    if {'tta_model', 'tta_pipeline'} <= set(cfg):
        return
    if cfg.get('default_scope') != 'mmpretrain':
        raise ValueError('--tta needs tta_model and tta_pipeline in the config, which has not both.')
    *steps, pack = cfg.test_dataloader.dataset.pipeline
    flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
    cfg.tta_model = ConfigDict(type='AverageClsScoreTTA')
    cfg.tta_pipeline = [*steps, ConfigDict(type='TestTimeAug', transforms=[flips, [pack]])]


def evaluate(cfg: Config, checkpoint: str, deploy: bool = False, tta: bool = False) -> dict[str, float]:
    """Test a checkpoint, in its own form or reparameterized first.

    Args:
        cfg: Config with a test loop; changed in place.
        checkpoint: File, https address or short name of a published file.
        deploy: Call ``switch_to_deploy`` on the loaded model before the evaluation.
        tta: Test-time augmentation, see ``check_tta``.

    Returns:
        The metrics.

    Raises:
        CheckpointError: The checkpoint is not one, or does not fit the config exactly.
        ValueError: ``tta`` with a config that has none.
    """
    cfg.load_from, cfg.resume = None, False
    if _class_name(cfg.get('strategy') or {}) == 'FSDPStrategy':  # the checkpoint is of the model in one piece
        cfg.pop('runner_type')
        cfg.pop('strategy')
    # The state_dict of a checkpoint holds the averaged weights; EMAHook would swap parameters by position.
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or [] if _class_name(hook) != 'EMAHook']
    if tta:
        check_tta(cfg)
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    runner = build_runner(cfg)
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    load_checkpoint(model.module if isinstance(model, BaseTTAModel) else model, checkpoint)
    runner._has_loaded = True
    if deploy:
        runner.model.eval()
        switch_to_deploy(runner.model)
        print_log('The backbone was reparameterized before the evaluation.', logger='current')
    return runner.test()
