"""Test a checkpoint, or a model that tools/export.py has exported.

Example:
    python tools/test.py configs/upernet_unireplknet_s_ade20k.py work_dirs/upernet_unireplknet_s_ade20k/iter_160000.pth
    python tools/test.py configs/upernet_unireplknet_s_ade20k.py upernet_unireplknet_s_ade20k --deploy --tta
    python tools/test.py configs/upernet_unireplknet_s_ade20k.py exported/model.onnx --threads 2
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from mmengine.config import DictAction

from mmunireplknet.datasets.checks import missing_data_message, wrong_test_message
from mmunireplknet.deploy.evaluate import RUNTIMES, evaluate_exported, is_exported
from mmunireplknet.deploy.exportable import ExportError
from mmunireplknet.engine.launch import (
    STOPS,
    check_tta,
    evaluate,
    is_first_process,
    leave_process_group,
    load_config,
    sentence_of,
)
from mmunireplknet.models.checkpoint_file import find_checkpoint


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file, the short name of a published one, or an exported model')
    parser.add_argument('--deploy', action='store_true', help='reparameterize the backbone before the evaluation')
    parser.add_argument(
        '--tta', action='store_true', help='test-time augmentation (ADE20K: six scales and flip, as published)'
    )
    parser.add_argument('--show-dir', help='write predictions drawn over the images into this folder')
    parser.add_argument('--out', help='write all predictions into this .pkl file')
    parser.add_argument('--runtime', choices=RUNTIMES, help='of an exported model (default: by its format)')
    parser.add_argument('--threads', type=int, help='threads of the runtime of an exported model')
    parser.add_argument('--metrics', help='write the metrics into this .json file')
    parser.add_argument('--work-dir', help='where logs go (default: work_dirs/<config name>)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override config entries: key=value ...')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by the launcher')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    try:
        cfg = load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
        exported = is_exported(args.checkpoint)
        checkpoint = args.checkpoint if exported else find_checkpoint(args.checkpoint)
    except FileNotFoundError as error:
        sys.exit(str(error))
    if exported and (args.deploy or args.tta or args.show_dir or args.launcher != 'none'):
        sys.exit(
            '--deploy, --tta, --show-dir and --launcher are for checkpoints: an exported model is tested as it is.'
        )
    if not exported and (args.runtime or args.threads):
        sys.exit('--runtime and --threads are for exported models.')
    try:
        if args.tta:
            check_tta(cfg)
    except ValueError as error:
        sys.exit(str(error))
    data = cfg.test_dataloader.dataset
    if message := wrong_test_message(data, cfg.test_evaluator) if is_first_process() else missing_data_message(data):
        sys.exit(message)
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        sys.exit(f'--out {args.out}: predictions are written as .pkl')
    if args.out:
        evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
        cfg.test_evaluator = [*evaluators, dict(type='DumpResults', out_file_path=args.out)]
    if args.show_dir:
        if 'visualization' not in cfg.default_hooks:
            sys.exit('--show-dir needs default_hooks.visualization in the config, e.g. SegVisualizationHook.')
        hook = cfg.default_hooks.visualization
        hook.update(interval=1, **{'enable' if hook.type == 'VisualizationHook' else 'draw': True})  # mmpretrain's
        cfg.visualizer.save_dir = args.show_dir
    if exported:
        metrics = evaluate_exported(cfg, checkpoint, args.runtime, args.threads)
        print(json.dumps({name: float(value) for name, value in metrics.items()}, indent=2))
    else:
        metrics = evaluate(cfg, str(checkpoint), args.deploy, args.tta)
    leave_process_group()
    if args.metrics and os.environ.get('RANK', '0') == '0':
        with open(args.metrics, 'w') as file:
            json.dump({name: float(value) for name, value in metrics.items()}, file, indent=2)


if __name__ == '__main__':
    try:
        main()
    except (*STOPS, ExportError) as error:
        sys.exit(sentence_of(error))
