"""Count the parameters and multiply-adds of a config's model, for one image, without weights or data.

Example:
    python tools/analysis/get_flops.py configs/cascade-mask-rcnn_unireplknet_t_coco.py
    python tools/analysis/get_flops.py configs/upernet_unireplknet_s_ade20k.py --shape 512 1024
"""

from __future__ import annotations

import argparse
import sys

from mmengine.config import DictAction

from mmunireplknet.analysis.flops import NUM_BOXES, NUM_MASKS, complexity
from mmunireplknet.engine.launch import load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help='default: 800 1280 for detectors, else that of the test pipeline',
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override config entries: key=value ...')
    args = parser.parse_args()
    cfg = load_config(args.config, args.cfg_options)
    result = complexity(cfg, tuple(args.shape) if args.shape else None)
    print(f'{args.config}, one image of {result.shape[0]} x {result.shape[1]} (height x width)')
    rows = [('parameters, train form', result.train_params / 1e6, 'M')]
    rows += [('parameters, deploy form', result.deploy_params / 1e6, 'M')]
    if result.auxiliary_params:
        rows += [('more in training: auxiliary head', result.auxiliary_params / 1e6, 'M')]
    rows += [('multiply-adds, deploy form', result.total / 1e9, 'G')]
    rows += [(f'    {name}', count / 1e9, 'G') for name, count in result.multiply_adds.items()]
    for name, value, unit in rows:
        print(f'{name:<32} {value:>9.2f} {unit}')
    print(
        "Counted by torch's FlopCounterMode: convolutions and matrix products; not norms, activations, RoIAlign, NMS."
    )
    print(f'Fixed boxes, as mmdet counts: {NUM_BOXES} pass each box stage and {NUM_MASKS} each mask stage.')


if __name__ == '__main__':
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
