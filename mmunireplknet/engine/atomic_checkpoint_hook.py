"""Checkpoints that a killed run cannot leave half-written, nor lose its last good one to.

mmengine's ``CheckpointHook`` writes a checkpoint in place, deletes the outdated one *before* it writes
the new one, and rewrites the text file ``last_checkpoint`` in place. Killed at the wrong moment
(preemption, out of memory, power), a run with ``max_keep_ckpts=1`` has nothing left to resume from.
"""

from __future__ import annotations

import logging
import os
import os.path as osp
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, get_file_backend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner

__all__ = ['AtomicCheckpointHook', 'AtomicLocalBackend', 'latest_checkpoint', 'replacing']

BACKEND_NAME = 'mmuni_atomic'
LAST_CHECKPOINT = 'last_checkpoint'
OUTDATED_INFO = 'outdated_ckpts'


@contextmanager
def replacing(filepath: str | Path) -> Iterator[str]:
    """Give the path of a temporary file that becomes ``filepath`` when the block ends without an error.

    Args:
        filepath: File to write or replace; its directory is made when it is missing.
    """
    target = os.fspath(filepath)
    directory = osp.dirname(target) or '.'
    os.makedirs(directory, exist_ok=True)
    temporary = f'{target}.{os.getpid()}.tmp'
    try:
        yield temporary
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise
    _sync_directory(directory)


@register_backend(BACKEND_NAME, force=True)
class AtomicLocalBackend(LocalBackend):
    """mmengine's local backend, except that a file appears complete or not at all.

    The content goes to ``<file>.<pid>.tmp`` in the same directory, is flushed to the disk and then
    renamed onto ``<file>``. A reader sees the old content or the new one, also after a power failure.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write ``obj`` to ``filepath``; the directory is made when it is missing."""
        with replacing(filepath) as temporary, open(temporary, 'wb') as file:
            file.write(obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Write the text ``obj`` to ``filepath``; the directory is made when it is missing."""
        self.put(obj.encode(encoding), filepath)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """``CheckpointHook`` with the same arguments whose work survives a kill at any moment.

    - Local checkpoints are written by :class:`AtomicLocalBackend`, unless ``backend_args`` (or the
      older ``file_client_args``) name another backend.
    - Outdated checkpoints (``max_keep_ckpts`` and the previous best) are removed after the new one
      stands and ``last_checkpoint`` names it. What a kill kept from being removed is listed in the
      checkpoint and removed when the run is resumed.
    - ``last_checkpoint`` is replaced atomically.
    - Temporary files that a killed run left behind are removed before training.

    The strategies of ``FlexibleRunner`` (FSDP, DeepSpeed) write their files themselves and ignore
    ``backend_args``: there a half-written file can remain, but never as the only checkpoint, and
    :func:`latest_checkpoint` does not take it.

    Examples:
        >>> default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook', interval=1, max_keep_ckpts=1))
    """

    out_dir: Any
    backend_args: dict[str, Any] | None
    file_backend: Any

    def before_train(self, runner: Runner) -> None:
        """Choose the backend, then clear away what a killed run left behind (rank 0).

        Args:
            runner: The runner of the training process.
        """
        if self.out_dir is not None:
            self.out_dir = os.fspath(self.out_dir)  # the base class cannot write a Path to last_checkpoint
        if self.backend_args is None and self.file_client_args is None:
            backend = get_file_backend(self.out_dir or runner.work_dir)
            if type(backend) is LocalBackend:
                self.backend_args = dict(backend=BACKEND_NAME)
        super().before_train(runner)
        if is_main_process():
            self._remove_leftovers(runner)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        # Replaces the method of the base class: same steps, removal last.
        with self._removals_after_saving(runner):
            if self.max_keep_ckpts > 0:
                self._rotate(runner, step)
            ckpt_filename = self.filename_tmpl.format(step)
            self.last_ckpt = self.file_backend.join_path(self.out_dir, ckpt_filename)
            runner.message_hub.update_info('last_ckpt', self.last_ckpt)
            runner.save_checkpoint(
                self.out_dir,
                ckpt_filename,
                self.file_client_args,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **self.args,
            )
            if is_main_process():
                AtomicLocalBackend().put_text(self.last_ckpt, osp.join(runner.work_dir, LAST_CHECKPOINT))

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, Any]) -> None:
        with self._removals_after_saving(runner):
            super()._save_best_checkpoint(runner, metrics)

    def _rotate(self, runner: Runner, step: int) -> None:
        """Enter ``step`` into the list of kept checkpoints and have the oldest one removed later.

        The list has to be right before the checkpoint is written, since it is part of it.
        """
        # A best checkpoint makes the last one be saved again at the same step.
        if self.keep_ckpt_ids and self.keep_ckpt_ids[-1] == step:
            return
        if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
            oldest = self.keep_ckpt_ids.popleft()
            if is_main_process():
                self.file_backend.remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(oldest)))
        self.keep_ckpt_ids.append(step)
        runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))

    @contextmanager
    def _removals_after_saving(self, runner: Runner) -> Iterator[None]:
        """Hold back what is removed inside; carry it out at the end, if nothing failed until there."""
        if isinstance(self.file_backend, _PostponedRemoval):  # inside of another one, which carries it out
            yield
            return
        outdated: list[str] = []

        def postpone(path: str) -> None:
            outdated.append(path)
            # Part of the new checkpoint: a run that resumes from it finishes the removal.
            runner.message_hub.update_info(OUTDATED_INFO, list(outdated))

        backend = self.file_backend
        self.file_backend = _PostponedRemoval(backend, postpone)
        runner.message_hub.update_info(OUTDATED_INFO, [])
        try:
            yield
        finally:
            self.file_backend = backend
        self._remove(outdated)

    def _remove(self, paths: list[str]) -> list[str]:
        """Remove the files (or DeepSpeed's directories) at ``paths`` that are not in use.

        Returns:
            What was there and has been removed.
        """
        removed = []
        for path in paths:
            if path in self._in_use():
                continue
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif self.file_backend.isdir(path):
                self.file_backend.rmtree(path)
            else:
                continue
            removed.append(path)
        return removed

    def _in_use(self) -> set[str]:
        """Paths of the last, the best and all kept checkpoints."""
        steps = self.keep_ckpt_ids if self.max_keep_ckpts > 0 else ()
        paths = {self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step)) for step in steps}
        paths.add(self.last_ckpt)
        paths.add(getattr(self, 'best_ckpt_path', None))
        paths.update(getattr(self, 'best_ckpt_path_dict', {}).values())
        return paths - {None}

    def _remove_leftovers(self, runner: Runner) -> None:
        """Remove the temporary files and the outdated checkpoints that a killed run left behind."""
        # Not there in a new run; in a resumed one it comes from the checkpoint.
        for path in self._remove(runner.message_hub.runtime_info.get(OUTDATED_INFO, [])):
            runner.logger.info(f'The outdated checkpoint {path} of the killed run is removed')
        suffix = re.escape(osp.splitext(self.filename_tmpl)[1])
        stale = re.compile(rf'(?:{LAST_CHECKPOINT}|.*{suffix})\.\d+\.tmp')
        for directory in {osp.abspath(runner.work_dir), osp.abspath(self.out_dir)}:
            names = os.listdir(directory) if osp.isdir(directory) else []
            for name in filter(stale.fullmatch, names):
                with suppress(FileNotFoundError):
                    os.remove(osp.join(directory, name))
                    runner.logger.info(f'The unfinished file {osp.join(directory, name)} is removed')


class _PostponedRemoval:
    """A file backend whose removals are passed to ``postpone`` instead of being carried out."""

    def __init__(self, backend: Any, postpone: Callable[[str], None]) -> None:
        self._backend = backend
        self._postpone = postpone

    def remove(self, filepath: str | Path) -> None:
        self._postpone(str(filepath))

    def rmtree(self, dir_path: str | Path) -> None:
        self._postpone(str(dir_path))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def latest_checkpoint(work_dir: str | Path) -> str | None:
    """Find the checkpoint to resume from, also after a run that was killed while saving.

    Args:
        work_dir: Directory of the run.

    Returns:
        What ``last_checkpoint`` names, if that is there and complete. Otherwise the complete
        ``iter_*.pth`` or ``epoch_*.pth`` in ``work_dir`` with the highest number (where there are both
        kinds, the file written last of the two highest). None if there is no such file.
    """
    work_dir = os.fspath(work_dir)
    named = ''
    with suppress(OSError, UnicodeDecodeError), open(osp.join(work_dir, LAST_CHECKPOINT)) as file:
        named = file.read().strip()
    # The second place is for a work directory that has been moved since.
    for path in (named, osp.join(work_dir, osp.basename(named.rstrip('/')))) if named else ():
        if '://' in path or _looks_complete(path):
            return path

    highest: dict[str, tuple[int, str]] = {}
    for name in os.listdir(work_dir) if osp.isdir(work_dir) else ():
        match = re.fullmatch(r'(iter|epoch)_(\d+)\.pth', name)
        if match and _looks_complete(osp.join(work_dir, name)):
            candidate = (int(match[2]), osp.join(work_dir, name))
            highest[match[1]] = max(candidate, highest.get(match[1], candidate))
    found = max((path for _, path in highest.values()), key=osp.getmtime, default=None)
    if named or found:
        print_log(
            f'{osp.join(work_dir, LAST_CHECKPOINT)} names {named or "no checkpoint"}'
            f'{", which is missing or incomplete" if named else ""}; using {found} instead',
            logger='current',
            level=logging.WARNING,
        )
    return found


def _looks_complete(path: str) -> bool:
    """Whether ``path`` is a whole zip file, as ``torch.save`` writes it, or a DeepSpeed directory.

    The index of a zip file is at its end: a file that was cut short has none.
    """
    if osp.isdir(path):
        return bool(os.listdir(path))
    return osp.isfile(path) and zipfile.is_zipfile(path)


def _sync_directory(directory: str) -> None:
    """Make a rename inside ``directory`` outlast a power failure, where the system can."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
