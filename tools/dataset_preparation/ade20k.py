"""Check ADE20K (ADEChallengeData2016), and fetch it where asked to.

Example:
    python tools/dataset_preparation/ade20k.py               # what is there
    python tools/dataset_preparation/ade20k.py --download    # about 1 GB; goes on where it broke off

The exit code is 0 where the data set is complete.
"""

from __future__ import annotations

import argparse
import sys

from mmunireplknet.datasets import ade20k
from mmunireplknet.datasets.checks import missing_data_message
from mmunireplknet.datasets.files import print_progress


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--root', default=ade20k.ROOT, help='its folder (default: %(default)s)')
    parser.add_argument('--download', action='store_true', help='fetch and unpack it where it is not there')
    parser.add_argument('--samples', type=int, default=8, help='masks to open in each split (default: %(default)s)')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.download and not ade20k.check(args.root, samples=0).whole:
        try:
            archive = ade20k.download(args.root, progress=print_progress)
        except (OSError, ValueError) as error:
            sys.exit(f'{error}')
        print(f'\nunpacked to {args.root}; {archive} may be deleted')
    report = ade20k.check(args.root, samples=args.samples)
    print(report)
    if not report.whole:
        missing = missing_data_message({'type': 'ADE20KDataset', 'data_root': args.root})
        print(missing or f'Move {args.root} away, then --download brings the whole of it.')
    return 0 if report.whole else 1


if __name__ == '__main__':
    sys.exit(main())
