"""Train a model.

Example:
    python tools/train.py configs/upernet_unireplknet_s_ade20k.py
    python tools/train.py configs/demo_upernet_unireplknet_a_digit-scenes.py --resume --seed 0 --deterministic
    bash tools/dist_train.sh configs/upernet_unireplknet_s_ade20k.py 8 --amp bf16
"""

from __future__ import annotations

import argparse
import os
import sys

from mmengine.config import DictAction

from mmunireplknet.datasets.checks import missing_data_message, missing_truth_message, wrong_data_message
from mmunireplknet.engine.launch import (
    STOPS,
    build_runner,
    check_work_dir,
    is_first_process,
    leave_process_group,
    load_config,
    prepare_training,
    sentence_of,
)

PRECISIONS = ('auto', 'fp16', 'bf16')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='where logs and checkpoints go (default: work_dirs/<config name>)')
    parser.add_argument(
        '--resume', nargs='?', const='auto', metavar='CHECKPOINT',
        help='go on from CHECKPOINT, or from the latest of the work dir',
    )  # fmt: skip
    parser.add_argument(
        '--amp', nargs='?', const='auto', choices=PRECISIONS, metavar='fp16|bf16',
        help='mixed precision; without a value fp16 on a GPU and bf16 on the CPU',
    )  # fmt: skip
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate by batch size / base_batch_size'
    )
    parser.add_argument('--seed', type=int, help='seed of all random number generators')
    parser.add_argument('--deterministic', action='store_true', help='deterministic algorithms, bit-exact resume')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override config entries: key=value ...')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by the launcher')
    given = sys.argv[1:]
    # argparse would take a config that follows a bare --amp for its value.
    bare = [a == '--amp' and b not in PRECISIONS for a, b in zip(given, [*given[1:], ''], strict=True)]
    return parser.parse_args([f'{a}=auto' if alone else a for a, alone in zip(given, bare, strict=True)])


def main() -> None:
    args = parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    try:
        cfg = load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
    except FileNotFoundError as error:
        sys.exit(str(error))
    notes: list[str] = []
    for data in [cfg[name].dataset for name in ('train_dataloader', 'val_dataloader') if cfg.get(name)]:
        if message := wrong_data_message(data, notes) if is_first_process() else missing_data_message(data):
            sys.exit(message)
    val = cfg.val_dataloader.dataset if cfg.get('val_dataloader') else None
    if message := missing_truth_message(val, cfg.get('val_evaluator'), 'val_evaluator'):
        sys.exit(message)
    check_work_dir(cfg)
    try:
        prepare_training(cfg, args.resume, args.amp, args.auto_scale_lr, args.seed, args.deterministic)
    except ValueError as error:
        sys.exit(str(error))
    runner = build_runner(cfg)
    for note in notes:
        runner.logger.warning(note)
    runner.train()
    del runner
    leave_process_group()


if __name__ == '__main__':
    try:
        main()
    except STOPS as error:
        sys.exit(sentence_of(error))
