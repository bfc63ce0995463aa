"""Convert a training checkpoint into its deploy form: merged kernels, no BN in the blocks, same outputs.

Example:
    python tools/reparameterize.py configs/upernet_unireplknet_s_ade20k.py iter_160000.pth deploy.pth
    python tools/test.py configs/upernet_unireplknet_s_ade20k.py deploy.pth \\
        --cfg-options model.backbone.deploy=True
"""

from __future__ import annotations

import argparse
import sys

from mmengine.config import DictAction

from mmunireplknet import CheckpointError
from mmunireplknet.engine.launch import load_config
from mmunireplknet.engine.reparameterize import reparameterize_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='training checkpoint, or the short name of a published one')
    parser.add_argument('out', help='file to write')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override config entries: key=value ...')
    args = parser.parse_args()
    error = reparameterize_checkpoint(load_config(args.config, args.cfg_options), args.checkpoint, args.out)
    print(f'{args.out} written; relative L2 difference of the backbone outputs on a random image: {error:.1e}')


if __name__ == '__main__':
    try:
        main()
    except (CheckpointError, FileNotFoundError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
