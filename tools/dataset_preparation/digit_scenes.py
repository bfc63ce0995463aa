"""Make the Digit Scenes data set: real handwritten digits on real photographs, without a download.

Example:
    python tools/dataset_preparation/digit_scenes.py --out data/digit_scenes --train 512 --val 64
    python tools/dataset_preparation/digit_scenes.py --out data/digit_scenes_hard --size 256 320 --difficulty hard
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from mmengine.utils import ProgressBar

from mmunireplknet.datasets.digit_painting import DIFFICULTIES
from mmunireplknet.datasets.digit_scenes import generate


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='data/digit_scenes', help='folder to make (default: %(default)s)')
    parser.add_argument('--train', type=int, default=2000, help='training images, 0 for none (default: %(default)s)')
    parser.add_argument('--val', type=int, default=200, help='validation images, 0 for none (default: %(default)s)')
    parser.add_argument(
        '--size', type=int, nargs='+', default=[128], metavar='N', help='side, or height and width (default: 128)'
    )
    parser.add_argument('--difficulty', choices=list(DIFFICULTIES), default='easy', help='(default: %(default)s)')
    parser.add_argument('--num-classes', type=int, help='digits 0 to N - 1 instead of what the difficulty has')
    parser.add_argument('--digits', type=int, nargs=2, metavar=('LEAST', 'MOST'), help='digits an image, likewise')
    parser.add_argument('--seed', type=int, default=0, help='(default: %(default)s)')
    parser.add_argument('--overwrite', action='store_true', help='make it anew if --out holds Digit Scenes already')
    args = parser.parse_args(argv)
    if len(args.size) > 2:
        parser.error(f'--size takes one or two numbers, not {len(args.size)}')
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    bar: ProgressBar | None = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        bar = bar or ProgressBar(total)
        bar.update()
        if done == total:
            print()

    try:
        difficulty = DIFFICULTIES[args.difficulty]
        if args.num_classes is not None:
            difficulty = dataclasses.replace(difficulty, num_classes=args.num_classes)
        if args.digits is not None:
            difficulty = dataclasses.replace(difficulty, digits=tuple(args.digits))
        made = generate(
            args.out,
            {split: count for split, count in (('train', args.train), ('val', args.val)) if count},
            size=(args.size[0], args.size[-1]),
            seed=args.seed,
            difficulty=difficulty,
            progress=progress if sys.stdout.isatty() else None,
            overwrite=args.overwrite,
        )
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f'{error}')
    print(made)


if __name__ == '__main__':
    main()
