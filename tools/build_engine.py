"""Build a TensorRT engine of a folder that tools/export.py --format onnx has made, and compare it with onnxruntime.

It needs TensorRT and an NVIDIA GPU; without them it says which trtexec command to run where they are. Shapes are batch,
height and width; those that are not given are taken from the sizes in the folder's report. Weights in float16 come from
tools/export.py --half.

Example:
    python tools/build_engine.py out/upernet_s
    python tools/build_engine.py out/upernet_s --shape-min 1 256 256 --shape-opt 1 512 512 --shape-max 4 1024 1024
"""

from __future__ import annotations

import argparse
import sys

from mmunireplknet.deploy.exportable import ExportError
from mmunireplknet.deploy.report import to_markdown
from mmunireplknet.deploy.tensorrt_engine import build_engine


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', help='folder with model.onnx')
    parser.add_argument('--out-dir', help='folder to make (default: FOLDER/tensorrt)')
    for kind, what in (('min', 'least'), ('opt', 'usual'), ('max', 'largest')):
        parser.add_argument(f'--shape-{kind}', nargs=3, type=int, metavar=('N', 'H', 'W'), help=f'{what} input')
    parser.add_argument('--tf32', action='store_true', help='let float32 be multiplied in TF32')
    parser.add_argument(
        '--tolerance', type=float, help='largest relative difference (default: 1e-4, in float16 or TF32 1e-2)'
    )
    parser.add_argument('--overwrite', action='store_true', help='replace a folder that this has made')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    shapes = (args.shape_min, args.shape_opt, args.shape_max)
    print(to_markdown(build_engine(args.folder, args.out_dir, shapes, args.tf32, args.tolerance, args.overwrite)))


if __name__ == '__main__':
    try:
        main()
    except ExportError as error:
        sys.exit(f'{type(error).__name__}: {error}')
