"""Check COCO 2017, and fetch it where asked to; or check any data set with annotation files in its format.

Example:
    python tools/dataset_preparation/coco.py               # data/coco: annotations, images, a few of them decoded
    python tools/dataset_preparation/coco.py --deep        # decode every image: an hour or so
    python tools/dataset_preparation/coco.py --download    # about 19 GB; goes on where it broke off
    python tools/dataset_preparation/coco.py --annotations mine/train.json --images mine/images

The exit code is 0 where the data set is complete.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmunireplknet.datasets import coco
from mmunireplknet.datasets.checks import missing_data_message
from mmunireplknet.datasets.files import print_progress


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--root', default=coco.ROOT, help='its folder (default: %(default)s)')
    parser.add_argument('--download', action='store_true', help='fetch and unpack what is not there')
    parser.add_argument('--samples', type=int, default=8, help='images to decode in each split (default: %(default)s)')
    parser.add_argument('--deep', action='store_true', help='decode every image instead')
    parser.add_argument('--annotations', type=Path, help='check this annotation file, not COCO')
    parser.add_argument('--images', type=Path, help='the folder of its images (default: that of the annotation file)')
    return parser.parse_args(argv)


def check_one(file: Path, folder: Path, samples: int, deep: bool) -> int:
    split = coco.check_split(file, folder, samples, deep)
    print('\n'.join(coco.text_of(str(file), split)))
    return 1 if split.faults else 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.annotations:
        return check_one(args.annotations, args.images or args.annotations.parent, args.samples, args.deep)
    if args.download:
        try:
            archives = coco.download(args.root, progress=print_progress)
        except (OSError, ValueError) as error:
            sys.exit(f'{error}')
        if archives:
            print(f'\nunpacked to {args.root}; {", ".join(map(str, archives))} may be deleted')
    report = coco.check(args.root, args.samples, args.deep)
    print(report)
    if missing := missing_data_message({'type': 'CocoDataset', 'data_root': args.root}):
        print(missing)
    return 0 if report.whole else 1


if __name__ == '__main__':
    sys.exit(main())
