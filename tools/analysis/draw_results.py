"""Draw what a segmentor or a detector predicts on validation images, beside the truth.

Example:
    python tools/analysis/draw_results.py configs/mask-rcnn_unireplknet_a_nuclei.py \\
        work_dirs/mask-rcnn_unireplknet_a_nuclei/iter_4000.pth nuclei.png
"""

from __future__ import annotations

import argparse
import sys

from mmengine.config import DictAction

from mmunireplknet.analysis.figures import compare, draw_results, read_scalars
from mmunireplknet.datasets.checks import missing_data_message
from mmunireplknet.engine.launch import STOPS, load_config, sentence_of
from mmunireplknet.models.checkpoint_file import find_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file of mmseg or mmdet')
    parser.add_argument('checkpoint', help='checkpoint file, or the short name of a published one')
    parser.add_argument('out', help='picture to write')
    parser.add_argument('--images', type=int, default=8, help='how many (default: %(default)s)')
    parser.add_argument('--curves', metavar='WORK_DIR', help="the training's work dir: draw its loss and metrics too")
    parser.add_argument('--deploy', action='store_true', help='reparameterize the backbone first')
    parser.add_argument('--title', default='')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override config entries: key=value ...')
    args = parser.parse_args()
    cfg = load_config(args.config, args.cfg_options)
    if message := missing_data_message(cfg.val_dataloader):
        sys.exit(message)
    scalars = read_scalars(args.curves) if args.curves else {}
    comparison = compare(cfg, str(find_checkpoint(args.checkpoint)), args.deploy, args.images)
    draw_results(comparison, cfg.default_scope, scalars, args.out, args.title)
    print(f'{args.out} written')


if __name__ == '__main__':
    try:
        main()
    except STOPS as error:
        sys.exit(sentence_of(error))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
