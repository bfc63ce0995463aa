"""Check ImageNet-1K or ImageNet-22K. It cannot be downloaded from here: https://image-net.org asks for an account.

Example:
    python tools/dataset_preparation/imagenet.py                   # data/imagenet: classes, counts, a few images
    python tools/dataset_preparation/imagenet.py --deep            # decode every image: an hour or more
    python tools/dataset_preparation/imagenet.py --data 22k --root /data/imagenet21k

The exit code is 0 where the data set is complete.
"""

from __future__ import annotations

import argparse
import sys

from mmunireplknet.datasets import imagenet


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', choices=list(imagenet.DATA), default='1k', help='which (default: %(default)s)')
    parser.add_argument('--root', help='its folder (default: that of the configs)')
    parser.add_argument('--samples', type=int, default=8, help='images to decode in each split (default: %(default)s)')
    parser.add_argument('--deep', action='store_true', help='decode every image instead')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    report = imagenet.check(args.root, imagenet.DATA[args.data], args.samples, args.deep)
    print(report)
    return 0 if report.whole else 1


if __name__ == '__main__':
    sys.exit(main())
