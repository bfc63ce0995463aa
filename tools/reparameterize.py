"""Convert training checkpoints into their deploy form: merged kernels, no BN in the blocks, same outputs.

Example:
    python tools/reparameterize.py configs/upernet_unireplknet_s_ade20k.py iter_160000.pth deploy.pth
    python tools/test.py configs/upernet_unireplknet_s_ade20k.py deploy.pth \\
        --cfg-options model.backbone.deploy=True
    python tools/reparameterize.py configs/upernet_unireplknet_s_ade20k.py work_dirs/ade20k OUT_DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmengine.config import Config, DictAction

from mmunireplknet import CheckpointError
from mmunireplknet.engine.launch import load_config
from mmunireplknet.engine.reparameterize import (
    AlreadyDeployedError,
    find_checkpoints,
    reparameterize_all,
    reparameterize_checkpoint,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        'checkpoint',
        nargs='+',
        help='training checkpoint, or the short name of a published one; several, a folder or a pattern: all of them, '
        'those in deploy form left out',
    )
    parser.add_argument('out', type=Path, help='file to write; of several checkpoints the folder, for NAME_deploy.pth')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override config entries: key=value ...')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    first = Path(args.checkpoint[0])
    if len(args.checkpoint) > 1 or first.is_dir() or (not first.is_file() and any(c in '*?[' for c in first.name)):
        convert_all(cfg, args.checkpoint, args.out)
        return
    parity = reparameterize_checkpoint(cfg, args.checkpoint[0], args.out)
    print(f'{args.out} written; {parity}; largest: {parity.worst:.1e}')


def convert_all(cfg: Config, names: list[str], folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        sys.exit(f'{folder} is a file; of several checkpoints the deploy forms go into a folder.')
    files = {file: folder / f'{file.stem}_deploy.pth' for file in find_checkpoints(names)}
    if len(set(files.values())) < len(files):
        sys.exit('Some of these checkpoints have the same name: convert them one folder after the other.')
    written = skipped = failed = 0
    for file, result in reparameterize_all(cfg, files.items()):
        if isinstance(result, AlreadyDeployedError):
            skipped += 1
            print(f'{file}: skipped, it is in deploy form already')
        elif isinstance(result, Exception):
            failed += 1
            print(f'{file}: FAILED, {result}')
        else:
            written += 1
            print(f'{file}: {files[Path(file)]} written; {result}')
    print(f'{written} written, {skipped} skipped, {failed} failed')
    sys.exit(1 if failed else None)


if __name__ == '__main__':
    try:
        main()
    except (CheckpointError, FileNotFoundError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
