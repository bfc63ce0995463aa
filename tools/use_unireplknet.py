"""Write a config of mmdet, mmseg or mmpretrain with UniRepLKNet in the place of its backbone.

Example:
    python tools/use_unireplknet.py mmdetection/configs/atss/atss_r50_fpn_1x_coco.py atss_unireplknet_t.py \\
        --arch t --checkpoint unireplknet_t_in1k --drop-path 0.2 --layer-decay 0.8
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmengine.config import DictAction

from mmunireplknet.engine import swap_backbone
from mmunireplknet.engine.launch import load_config
from mmunireplknet.models.arch_zoo import ARCHS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('out', type=Path, help='config file to write')
    parser.add_argument('--arch', choices=list(ARCHS), default='s', help='variant (default: %(default)s)')
    parser.add_argument('--checkpoint', help='weights of the backbone: a file, or the short name of a published one')
    parser.add_argument('--drop-path', type=float, default=0.0, help='stochastic depth (default: %(default)s)')
    parser.add_argument('--layer-decay', type=float, help='layer-wise learning-rate decay with this rate')
    parser.add_argument('--overwrite', action='store_true', help='replace an existing file')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override config entries: key=value ...')
    args = parser.parse_args()
    if args.out.suffix != '.py' or (args.out.exists() and not args.overwrite):
        sys.exit(f'{args.out} exists, or is no .py file: name another one, or pass --overwrite to replace it.')
    cfg = load_config(args.config, args.cfg_options)
    for key in ('work_dir', 'launcher'):  # of this run, not of the new config
        cfg.pop(key)
    cfg = swap_backbone(cfg, args.arch, args.checkpoint, args.drop_path, args.layer_decay)
    cfg.dump(args.out)
    print(f'{args.out}: UniRepLKNet-{args.arch.upper()}, stages {cfg.model.backbone.out_indices}')


if __name__ == '__main__':
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
