"""Export a model to a folder that runs without this package, with a report that it computes the same.

Example:
    python tools/export.py configs/upernet_unireplknet_s_ade20k.py upernet_unireplknet_s_ade20k out/upernet_s
    python tools/export.py configs/unireplknet_t_in1k.py unireplknet_t_in1k_224_acc83.21.pth out/t \\
        --format openvino --half --shape 1 224 224
    python tools/export.py configs/upernet_unireplknet_s_ade20k.py upernet_unireplknet_s_ade20k out/upernet_s_int8 \\
        --int8 data/ade/ADEChallengeData2016/images/training
"""

from __future__ import annotations

import argparse
import sys

from mmengine.config import DictAction

from mmunireplknet import CheckpointError
from mmunireplknet.deploy.export import export
from mmunireplknet.deploy.exportable import ExportError
from mmunireplknet.deploy.formats import FORMATS
from mmunireplknet.deploy.onnx_file import OPSET
from mmunireplknet.deploy.report import to_markdown
from mmunireplknet.engine.launch import load_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        'checkpoint', help='checkpoint in training or deploy form, or the short name of a published one'
    )
    parser.add_argument('out_dir', help='folder to make')
    parser.add_argument('--format', default='onnx', help=f'{", ".join(FORMATS)} (default: onnx)')
    size = parser.add_mutually_exclusive_group()
    size.add_argument('--shape', nargs=3, type=int, metavar=('N', 'H', 'W'), help='the only input it shall take')
    size.add_argument('--dynamic', action='store_true', help='any batch, height and width (the default)')
    parser.add_argument('--half', action='store_true', help='weights in float16; input and outputs stay float32')
    parser.add_argument('--int8', metavar='FOLDER', help='quantize, by calibration images (formats onnx, openvino)')
    parser.add_argument('--calibration-images', type=int, default=32, help='how many of them (default: %(default)s)')
    parser.add_argument('--backbone-only', action='store_true', help='feature maps instead of predictions')
    parser.add_argument('--argmax', action='store_true', help='of a segmentor: labels instead of logits')
    parser.add_argument('--opset', type=int, default=OPSET, help=f'version of the ONNX operators (default: {OPSET})')
    parser.add_argument('--exporter', choices=['dynamo', 'torchscript'], help="which of torch's ONNX exporters")
    parser.add_argument('--overwrite', action='store_true', help='replace a folder that an export made')
    parser.add_argument('--tolerance', type=float, help='largest relative difference (default: 1e-4, half 1e-2)')
    parser.add_argument('--threads', type=int, help='threads of the latencies')
    parser.add_argument(
        '--seconds', type=float, default=2.0, help='time spent on the latencies at each size, 0 for none'
    )
    parser.add_argument(
        '--no-metric', dest='metric', action='store_false', help='of --int8: no test of both models on the test data'
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override config entries: key=value ...')
    return parser.parse_args()


def main() -> None:
    args = vars(parse_args())
    del args['dynamic']
    cfg = load_config(args.pop('config'), args.pop('cfg_options'))
    print(to_markdown(export(cfg, **args)))


if __name__ == '__main__':
    try:
        main()
    except (CheckpointError, ExportError, FileNotFoundError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
