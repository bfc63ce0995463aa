"""Deploy checkpoints beside the training ones, and evaluation of the deploy form."""

from __future__ import annotations

import copy
import inspect
import os.path as osp
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from mmengine.dataset import pseudo_collate
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from ..models.checkpoint_file import CheckpointError, read_checkpoint
from ..models.reparam import switch_to_deploy
from ..models.unireplknet import UniRepLKNet
from .deploy_files import HOOK_NAME, DeployFiles
from .form_parity import Images, keep_few
from .random_state_hook import capture_random_state, restore_random_state
from .reparameterize import Reparameterizer

__all__ = ['ReparameterizeError', 'ReparameterizeHook']

WRITTEN_INFO = 'deploy_checkpoints'  # in the message hub, and so in the training checkpoints


class ReparameterizeError(CheckpointError):
    """The hook cannot do its work in this run, or has not done all of it; the message says what and why."""


@HOOKS.register_module()
class ReparameterizeHook(Hook):
    """Writes the deploy form of training checkpoints beside them (``iter_8_deploy.pth`` of ``iter_8.pth``).

    It reads the checkpoint file that ``CheckpointHook`` has just written, so that the weights are those that a test of
    this file would load: the averaged ones where EMAHook is on. The model in training, its optimizer, its average and
    all random states are left alone. Every map of the deploy form is compared with the training form's on images of
    the last validation, or training, batch (see ``form_parity``), in the dtype of the weights, on the CPU.

    Whatever goes wrong there is logged as an error at once and nothing is written; the training goes on, and only when
    it has ended and everything is saved, every process raises ``ReparameterizeError``. What can be known before
    (a norm that cannot be folded, an interval without checkpoints, a missing package) is raised before training.

    A deploy checkpoint goes when its training checkpoint has gone (``max_keep_ckpts``, a better best one); files that
    the run did not write are neither removed nor replaced.

    In ``Runner.test`` the deploy form is evaluated, of the weights that are tested: of the averaged ones too.

    Args:
        interval: Convert the checkpoint of every so many iterations, or epochs if ``CheckpointHook`` counts these; a
            multiple of its interval. The last checkpoint is converted in any case, at the end of the training.
        best: Convert every best checkpoint (``CheckpointHook(save_best=...)``).
        at_test: Evaluate the deploy form in tests.
        tolerance: Largest relative L2 difference of a map; by default what rounding explains.
        export: Arguments of ``mmunireplknet.deploy.export.export``, 'format' among them: each converted checkpoint
            is exported too, to a folder beside it (``iter_8_onnx``).

    Raises:
        ValueError: An argument out of its range.

    Examples:
        >>> custom_hooks = [dict(type='ReparameterizeHook', interval=4000, export=dict(format='onnx'))]
    """

    priority = 'LOWEST'  # after CheckpointHook has written, after EMAHook has swapped

    def __init__(
        self,
        interval: int | None = None,
        best: bool = True,
        at_test: bool = True,
        tolerance: float | None = None,
        export: Mapping[str, Any] | None = None,
    ) -> None:
        if interval is not None and interval < 1:
            raise ValueError(f'interval={interval} must be at least 1, or None for the last checkpoint only.')
        if tolerance is not None and not tolerance > 0:
            raise ValueError(f'tolerance={tolerance} must be above 0, or None for what rounding explains.')
        if export is not None and 'format' not in export:
            raise ValueError(f"export={dict(export)}: expected dict(format='onnx') or the like.")
        self.interval = interval
        self.best = best
        self.at_test = at_test
        self.tolerance = tolerance
        self.export = None if export is None else dict(export)
        self._checkpoints: CheckpointHook | None = None  # only while training
        self._reparameterizer: Reparameterizer | None = None
        self._inputs: dict[str, Tensor | list[Tensor] | None] = {}
        self._files = DeployFiles('.')
        self._done: dict[str, Any] = {}  # training file -> its score, of this process
        self._failures: list[str] = []
        self._tested: tuple[nn.Module, nn.Module] | None = None  # the model, its deploy form

    # ---------------------------------------------------------------------------------- training

    def before_train(self, runner: Runner) -> None:
        """Refuse what cannot work, and copy the backbones.

        Args:
            runner: The runner of the training process.

        Raises:
            ReparameterizeError: There is no local checkpoint to convert, the model cannot be folded, or packages for
                the export are missing.
        """
        self._inputs, self._done, self._failures = {}, {}, []
        self._checkpoints = self._check(runner)
        try:
            self._reparameterizer = Reparameterizer(runner.model, self.tolerance)
        except (CheckpointError, TypeError) as error:
            raise ReparameterizeError(f'ReparameterizeHook: {error}') from error
        if not is_main_process():
            self._reparameterizer = None
            return
        written = runner.message_hub.runtime_info.get(WRITTEN_INFO, {})
        self._files = DeployFiles(str(self._checkpoints.out_dir), (self.export or {}).get('format'), written)
        for path in self._wanted(runner):  # what a killed run wrote after its last checkpoint is not in there
            self._files.adopt(path)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Convert the checkpoint of this iteration.

        Args:
            runner: The runner of the training process.
            batch_idx: Index of the batch.
            data_batch: The batch.
            outputs: What the model returned.
        """
        self._inputs['the last training batch'] = keep_few(data_batch)
        if self._checkpoints is not None and not self._checkpoints.by_epoch:
            self._after_step(runner, runner.iter + 1)

    def after_train_epoch(self, runner: Runner) -> None:
        """Convert the checkpoint of this epoch.

        Args:
            runner: The runner of the training process.
        """
        if self._checkpoints is not None and self._checkpoints.by_epoch:
            self._after_step(runner, runner.epoch + 1)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Keep images of the first batch for the comparison.

        Args:
            runner: The runner of the training process.
            batch_idx: Index of the batch.
            data_batch: The batch.
            outputs: What the model returned.
        """
        if self._checkpoints is not None and batch_idx == 0:
            self._inputs['the validation data'] = keep_few(data_batch)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Convert a new best checkpoint.

        Args:
            runner: The runner of the training process.
            metrics: Results of the validation.
        """
        if self._checkpoints is None or not is_main_process():
            return
        for path, score in self._best(runner).items():
            if path not in self._done or self._done[path] != score:
                self._convert(runner, path, score)
        self._remove_outdated(runner)

    def after_train(self, runner: Runner) -> None:
        """Convert the last checkpoint, and the best ones of a resumed run.

        Args:
            runner: The runner of the training process.
        """
        if self._checkpoints is None or not is_main_process():
            return
        wanted = self._wanted(runner)
        if not wanted:
            runner.logger.warning('ReparameterizeHook: the run has written no checkpoint, so there is none to convert.')
        for path, score in wanted.items():
            if path not in self._done:
                self._convert(runner, path, score)
        self._remove_outdated(runner)

    def after_run(self, runner: Runner) -> None:
        """End the training with an error, in every process, if something could not be converted.

        Args:
            runner: The runner of the training process.

        Raises:
            ReparameterizeError: Something could not; all training checkpoints are there.
        """
        if self._checkpoints is None:
            return
        self._checkpoints = self._reparameterizer = None
        box = [self._failures]
        broadcast_object_list(box)
        if box[0]:
            raise ReparameterizeError(
                f'the training has ended and its checkpoints are saved, but ReparameterizeHook failed {len(box[0])} '
                f'times (the log has each). First: {box[0][0]}'
            )

    def _check(self, runner: Runner) -> CheckpointHook:
        saving = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
        if saving is None or saving.out_dir is None:
            raise ReparameterizeError(
                'ReparameterizeHook converts what CheckpointHook writes: put it into default_hooks.'
            )
        if '://' in str(saving.out_dir):
            raise ReparameterizeError(
                f'ReparameterizeHook converts local checkpoints, but they go to {saving.out_dir}: convert them by '
                'python tools/reparameterize.py CONFIG CHECKPOINT OUT.'
            )
        if self.interval is not None and (saving.interval < 1 or self.interval % saving.interval):
            raise ReparameterizeError(
                f'ReparameterizeHook(interval={self.interval}) is no multiple of CheckpointHook(interval='
                f'{saving.interval}), which writes what it converts.'
            )
        if self.export is not None:
            _find_export(self.export)
        return saving

    def _after_step(self, runner: Runner, step: int) -> None:
        saving = self._checkpoints
        if saving is None or not is_main_process():
            return
        path = osp.join(str(saving.out_dir), saving.filename_tmpl.format(step))
        if saving.last_ckpt != path:
            return
        if self.interval is not None and step % self.interval == 0:
            self._convert(runner, path, None)
        self._remove_outdated(runner)

    def _best(self, runner: Runner) -> dict[str, Any]:
        """Paths of the best checkpoints, with their scores."""
        info = runner.message_hub.runtime_info
        if not self.best:
            return {}
        return {
            path: info.get(name.replace('best_ckpt', 'best_score', 1))
            for name, path in info.items()
            if name.startswith('best_ckpt') and path and osp.isfile(path)
        }

    def _wanted(self, runner: Runner) -> dict[str, Any]:
        """Paths of the last and the best checkpoints, with the scores of the best."""
        last = runner.message_hub.runtime_info.get('last_ckpt')
        return {**({last: None} if last and osp.isfile(last) else {}), **self._best(runner)}

    # ---------------------------------------------------------------------------------- conversion

    def _convert(self, runner: Runner, path: str, score: Any) -> None:
        """Write the deploy form of ``path`` beside it and export it; a failure is for the end of the training."""
        self._done[path] = score
        with _random_state_kept():
            for out, write in zip(self._files.beside(path), (self._write, self._export), strict=False):
                try:
                    self._files.check(path, out)
                    write(runner, path, out)
                except Exception as error:  # whatever it is, it must not cost the training
                    self._failures.append(f'{out}: {type(error).__name__}: {error}')
                    runner.logger.error(f'ReparameterizeHook: {self._failures[-1]}', exc_info=error)
                    return
                self._files.add(path, out)
                runner.message_hub.update_info(WRITTEN_INFO, dict(self._files.written))

    def _write(self, runner: Runner, path: str, out: str) -> None:
        assert self._reparameterizer is not None
        data = read_checkpoint(path, mmap=True)
        images = self._images(runner)
        parity = self._reparameterizer.write(out, data.get('meta') or {}, data['state_dict'], path, images, HOOK_NAME)
        runner.logger.info(f'{out} is written; {parity}')

    def _export(self, runner: Runner, path: str, out: str) -> None:
        assert self.export is not None
        if osp.isdir(out):  # of an earlier part of the run, see check
            shutil.rmtree(out)
        _find_export(self.export)(copy.deepcopy(runner.cfg), path, out, **self.export)
        self._files.sign(path, out)
        runner.logger.info(f'{out} is written')

    def _images(self, runner: Runner) -> Images | None:
        """Images that validation or training has loaded, else some of the validation data."""
        assert self._reparameterizer is not None
        for origin in ('the validation data', 'the last training batch'):
            if images := self._reparameterizer.prepare(self._inputs.get(origin), origin):
                return images
        dataset = getattr(getattr(runner._val_loop, 'dataloader', None), 'dataset', None)
        if dataset is None:
            return None
        return self._reparameterizer.prepare(keep_few(pseudo_collate([dataset[0]])), 'the validation data')

    def _remove_outdated(self, runner: Runner) -> None:
        for path in self._files.remove_outdated():
            runner.logger.info(f'{path} is removed, as its training checkpoint is')
        runner.message_hub.update_info(WRITTEN_INFO, dict(self._files.written))

    # ---------------------------------------------------------------------------------- testing

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Put the deploy form in the place of the model, for this batch.

        EMAHook swaps weights by position when a test begins and ends, so that the model itself must keep its form, and
        be the runner's, at these moments.

        Args:
            runner: The runner of the testing process.
            batch_idx: Index of the batch; at the first one the deploy form is made of the model's weights.
            data_batch: The batch.
        """
        if not self.at_test:
            return
        if batch_idx == 0 or self._tested is None:
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            backbones = [m for m in model.modules() if isinstance(m, UniRepLKNet)]
            if all(backbone.deploy for backbone in backbones) and backbones:
                return
            self._tested = (runner.model, switch_to_deploy(copy.deepcopy(model)))
            runner.logger.info('The deploy form is evaluated (ReparameterizeHook, at_test).')
        runner.model = self._tested[1]

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Put the model back in its place.

        Args:
            runner: The runner of the testing process.
            batch_idx: Index of the batch.
            data_batch: The batch.
            outputs: What the model returned.
        """
        if self._tested is not None:
            runner.model = self._tested[0]

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Let go of the deploy form.

        Args:
            runner: The runner of the testing process.
            metrics: Results of the test.
        """
        self._tested = None


@contextmanager
def _random_state_kept() -> Iterator[None]:
    state = capture_random_state()
    try:
        yield
    finally:
        restore_random_state(state)


def _find_export(options: Mapping[str, Any]) -> Any:
    """``mmunireplknet.deploy.export.export``, which takes ``options`` and has all that it needs.

    Raises:
        ReparameterizeError: It has not.
    """
    try:
        export = import_module('mmunireplknet.deploy.export').export
        import_module('mmunireplknet.deploy.formats').check_packages(options['format'])
        inspect.signature(export).bind(None, None, None, **options)
    except (ImportError, TypeError, ValueError) as error:
        raise ReparameterizeError(f'ReparameterizeHook(export={dict(options)}): {error}') from error
    return export
