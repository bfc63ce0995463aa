"""Which deploy checkpoints and exported folders a run has written, and which of them are outdated."""

from __future__ import annotations

import os
import os.path as osp
import shutil
from collections.abc import Mapping
from contextlib import suppress

from .reparameterize import deploy_mark

__all__ = ['HOOK_NAME', 'DeployFiles']

HOOK_NAME = 'ReparameterizeHook'
SIGNATURE = f'.{HOOK_NAME}'  # file in an exported folder; a checkpoint has it in its meta


class DeployFiles:
    """What a run has written beside its training checkpoints, all in one folder.

    Args:
        folder: Of the training checkpoints.
        export_format: Of the exported folders; None without export.
        written: What an earlier part of the run has written, as ``written``.

    Attributes:
        written: Name of a training checkpoint -> names of what was written beside it. Names only, so that a folder can
            be moved before a run is resumed.
    """

    def __init__(
        self, folder: str, export_format: str | None = None, written: Mapping[str, list[str]] | None = None
    ) -> None:
        self._folder = folder
        self._export_format = export_format
        self.written = {source: list(names) for source, names in (written or {}).items()}

    def beside(self, source: str) -> list[str]:
        """Paths of the deploy checkpoint of ``source`` and, with export, of the exported folder."""
        stem, suffix = osp.splitext(source)
        return [f'{stem}_deploy{suffix}', *([f'{stem}_{self._export_format}'] if self._export_format else [])]

    def add(self, source: str, path: str) -> None:
        """Note that ``path`` was written for ``source``."""
        names = self.written.setdefault(osp.basename(source), [])
        if osp.basename(path) not in names:
            names.append(osp.basename(path))

    def sign(self, source: str, folder: str) -> None:
        """Mark an exported folder as the hook's, made of ``source``."""
        with open(osp.join(folder, SIGNATURE), 'w') as file:
            file.write(osp.basename(source))

    def adopt(self, source: str) -> None:
        """Note what an earlier part of the run, killed before its next checkpoint, has written beside ``source``."""
        for path in self.beside(source):
            if is_written(path, source):
                self.add(source, path)

    def check(self, source: str, path: str) -> None:
        """Refuse to replace what the hook did not write.

        Raises:
            FileExistsError: Something else stands at ``path``.
        """
        if osp.exists(path) and not is_written(path, source):
            raise FileExistsError(f'{path} is there and was not written by {HOOK_NAME}: move it away.')

    def remove_outdated(self) -> list[str]:
        """Remove what was written for training checkpoints that are gone.

        Returns:
            What has been removed.
        """
        removed = []
        for source in [name for name in self.written if not osp.exists(osp.join(self._folder, name))]:
            for name in self.written.pop(source):
                path = osp.join(self._folder, name)
                with suppress(FileNotFoundError):
                    shutil.rmtree(path) if osp.isdir(path) else os.remove(path)
                    removed.append(path)
        return removed


def is_written(path: str, source: str) -> bool:
    """Whether the hook has written the deploy checkpoint or exported folder ``path``, for a checkpoint of this name."""
    if osp.isfile(path):
        mark = deploy_mark(path) or {}
        return mark.get('writer') == HOOK_NAME and mark.get('source') == osp.basename(source)
    with suppress(OSError), open(osp.join(path, SIGNATURE)) as file:
        return file.read() == osp.basename(source)
    return False
