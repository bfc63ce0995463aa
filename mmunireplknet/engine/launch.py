"""What tools/train.py and tools/test.py do to a config before it runs; every function changes ``cfg`` in place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import RUNNERS, init_default_scope
from mmengine.runner import Runner

from ..models.checkpoint import load_checkpoint
from ..models.reparam import switch_to_deploy
from .atomic_checkpoint_hook import latest_checkpoint

__all__ = ['build_runner', 'check_tta', 'evaluate', 'leave_process_group', 'load_config', 'prepare_training']


def load_config(
    file: str, options: Mapping[str, Any] | None = None, work_dir: str | None = None, launcher: str = 'none'
) -> Config:
    """Read a config and set what the command line gives.

    Args:
        file: Path of the config.
        options: ``--cfg-options``.
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
    cfg.merge_from_dict(dict(options or {}))
    cfg.launcher = launcher
    cfg.work_dir = work_dir or cfg.get('work_dir') or str(Path('work_dirs', path.stem))
    return cfg


def prepare_training(
    cfg: Config,
    resume: str | None = None,
    amp: bool = False,
    auto_scale_lr: bool = False,
    seed: int | None = None,
    deterministic: bool = False,
) -> None:
    """Apply the options of tools/train.py.

    Args:
        cfg: Changed in place.
        resume: None, 'auto' for the latest checkpoint of the work dir, or a checkpoint.
        amp: Mixed precision: fp16 with loss scaling on a GPU, bf16 on the CPU.
        auto_scale_lr: Scale the learning rate by the global batch size, accumulated iterations included, over the
            config's ``base_batch_size``.
        seed: Seed of all random number generators.
        deterministic: Deterministic algorithms; resuming then is bit-exact.

    Raises:
        ValueError: ``auto_scale_lr`` without a base batch size in the config, or AMP over another wrapper.
    """
    _use_safe_hooks(cfg)
    if amp:
        _use_amp(cfg)
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


def _use_safe_hooks(cfg: Config) -> None:
    """Write checkpoints atomically, with the states of all random generators; refuse those of another task."""
    hooks = cfg.setdefault('default_hooks', ConfigDict())
    checkpoint = hooks.setdefault('checkpoint', ConfigDict(type='CheckpointHook', interval=1))
    if checkpoint and checkpoint.get('type') == 'CheckpointHook':
        checkpoint.type = 'AtomicCheckpointHook'
    _add_hooks(cfg, 'CheckpointFitHook', 'RandomStateHook')


def _add_hooks(cfg: Config, *names: str) -> None:
    hooks = list(cfg.get('custom_hooks') or [])
    there = {hook.get('type') for hook in hooks}
    cfg.custom_hooks = [*hooks, *(ConfigDict(type=name) for name in names if name not in there)]


def _use_amp(cfg: Config) -> None:
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper', 'CPUAmpOptimWrapper'):
        raise ValueError(f'--amp replaces OptimWrapper, but the config has {kind}.')
    if torch.cuda.is_available():
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    else:
        cfg.optim_wrapper.type = 'CPUAmpOptimWrapper'
        cfg.optim_wrapper.pop('loss_scale', None)


def build_runner(cfg: Config) -> Runner:
    """Build the Runner, on GPUs or on CPU processes (gloo) alike."""
    if cfg.launcher != 'none' and not torch.cuda.is_available():
        _use_cpu_processes(cfg)
    return Runner.from_cfg(cfg) if 'runner_type' not in cfg else RUNNERS.build(cfg)


def _use_cpu_processes(cfg: Config) -> None:
    """mmengine's launcher and its DDP wrapper assume CUDA devices; torch's SyncBN refuses CPU tensors."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    os.environ.setdefault('LOCAL_RANK', '0')
    wrapper = cfg.get('model_wrapper_cfg') or ConfigDict(type='MMDistributedDataParallel')
    cfg.model_wrapper_cfg = ConfigDict({**wrapper, 'device_ids': None})
    _replace_sync_bn(cfg.model)


def leave_process_group() -> None:
    """Let the processes end together: one that outlives the others aborts when their connections close."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
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
