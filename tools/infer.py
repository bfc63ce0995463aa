"""Predict on images and draw the result over them.

Example:
    python tools/infer.py configs/demo_upernet_unireplknet_a_digit-scenes.py \\
        work_dirs/demo_upernet_unireplknet_a_digit-scenes/iter_1200.pth \\
        data/digit_scenes/images/validation --out-dir out
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmengine.config import DictAction
from rich.progress import track

from mmunireplknet import CheckpointError
from mmunireplknet.engine.inference import Predictor, find_images
from mmunireplknet.engine.launch import load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file, or the short name of a published one')
    parser.add_argument('images', nargs='+', help='files, folders or globs')
    parser.add_argument('--out-dir', required=True, help='folder for the pictures')
    parser.add_argument('--deploy', action='store_true', help='reparameterize the backbone first')
    parser.add_argument('--device', help='default: a GPU if there is one')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override config entries: key=value ...')
    args = parser.parse_args()
    images = find_images(args.images)
    predictor = Predictor(load_config(args.config, args.cfg_options), args.checkpoint, args.device, args.deploy)
    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    names = [path.stem for path in images]
    for path in track(images, description='Predicting'):
        # Images of one name in different folders must not overwrite each other.
        unique = path.stem if names.count(path.stem) == 1 else '_'.join(path.with_suffix('').parts).strip('/_.')
        predictor.draw(path, predictor(path), out_dir / f'{unique}.png')
    print(f'{len(images)} pictures in {out_dir}')


if __name__ == '__main__':
    try:
        main()
    except (CheckpointError, FileNotFoundError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
