"""Convert a checkpoint: leave out optimizer and EMA copies, cast, write .pth or .safetensors, or the published layout.

Examples:
    python tools/convert_checkpoint.py upernet_unireplknet_t_ade20k upernet_t.safetensors --dtype fp16
    python tools/convert_checkpoint.py configs/upernet_unireplknet_t_ade20k.py \\
        checkpoints/upernet_unireplknet_t_512_160k_ade20k_miou48.56.pth upernet_t.pth
    python tools/convert_checkpoint.py work_dirs/run/iter_160000.pth upernet_mmseg0.pth --to published

With a config every entry is checked against its model; without one only the backbone is.
"""

from __future__ import annotations

import argparse
import sys

from mmengine.config import DictAction

from mmunireplknet import CheckpointError
from mmunireplknet.engine.convert import DTYPES, convert_checkpoint
from mmunireplknet.engine.launch import load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', nargs='?', help='config that the weights must fit')
    parser.add_argument('source', help='checkpoint, or the short name of a published one')
    parser.add_argument('target', help='file to write: .pth, .pt or .safetensors')
    parser.add_argument('--dtype', choices=list(DTYPES), help='cast to this; default: as they are')
    parser.add_argument('--key', help='entry of the source to take, e.g. model_ema')
    parser.add_argument(
        '--to', dest='layout', choices=['mm', 'published'], default='mm', help='names to write (default: %(default)s)'
    )
    parser.add_argument('--overwrite', action='store_true', help='replace an existing file')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override config entries: key=value ...')
    args = parser.parse_args()
    cfg = load_config(args.config, args.cfg_options) if args.config else None
    done = convert_checkpoint(args.source, args.target, cfg, args.dtype, args.key, args.layout, args.overwrite)
    print(f'{args.target}: {done.weights}, {done.entries:,} entries, {done.size:,} bytes; left out: {done.left_out}')
    print(f'sha256 {done.sha256}')


if __name__ == '__main__':
    try:
        main()
    except (CheckpointError, OSError, ValueError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
