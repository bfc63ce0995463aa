"""Time a model in every form that it can be deployed in, side by side: which one is quickest on this machine?

Timed are the published form (separate branches, torch's own convolutions), training and deploy form of this package,
torch.compile, and the exported files, of a peer too if one is named. Writes OUT/benchmark.md, .json and .png.

Example:
    python tools/analysis/benchmark_formats.py configs/unireplknet_t_in1k.py --backbone-only --shape 1 512 512
    python tools/analysis/benchmark_formats.py configs/upernet_unireplknet_s_ade20k.py iter_160000.pth
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from mmunireplknet.analysis.benchmark import run
from mmunireplknet.analysis.benchmark_report import write_report
from mmunireplknet.analysis.formats import EXPORTED, exported_folders, format_row, peer_forms, unireplknet_forms
from mmunireplknet.analysis.peers import Contender
from mmunireplknet.deploy.exportable import ExportError
from mmunireplknet.deploy.formats import FORMATS
from mmunireplknet.deploy.preprocessing import real_images, to_input
from mmunireplknet.engine.launch import load_config
from mmunireplknet.engine.swap_backbone import MEAN, STD


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of a model with UniRepLKNet')
    parser.add_argument('checkpoint', nargs='?', help='weights in training form; without them random ones')
    parser.add_argument('--peer', metavar='CONFIG', help='another model, exported the same way, with random weights')
    parser.add_argument('--backbone-only', action='store_true', help='time the backbones')
    parser.add_argument('--shape', nargs=3, type=int, default=[1, 512, 512], metavar=('N', 'H', 'W'))
    parser.add_argument('--formats', nargs='+', choices=list(FORMATS), default=list(EXPORTED))
    parser.add_argument(
        '--exported', nargs='+', type=Path, default=[], metavar='FOLDER', help='time what tools/export.py wrote as well'
    )
    parser.add_argument('--no-compile', action='store_true', help='leave torch.compile out')
    parser.add_argument(
        '--targets', action='store_true', help='hold it against what is required of the backbone T beside ConvNeXt-T'
    )
    parser.add_argument('--threads', type=int, default=2, help='default: %(default)s')
    parser.add_argument('--rounds', type=int, help='default: as many as fit into 40 s')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmark_formats'), help='default: %(default)s')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    start = time.monotonic()
    cfg, peer = load_config(args.config), load_config(args.peer) if args.peer else None
    images, _ = real_images(cfg)
    rules = dict(preprocess=dict(mean=MEAN, std=STD))
    image = to_input(images, tuple(args.shape), dict(**rules, input=dict(channels='RGB')))
    torch.set_num_threads(args.threads)

    def progress(text: str) -> None:
        print(f'{time.monotonic() - start:4.0f} s  {text}', flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        shared = dict(threads=args.threads, formats=args.formats, backbone_only=args.backbone_only)
        own = partial(
            unireplknet_forms, cfg, args.checkpoint, image, place / 'own', compiled=not args.no_compile, **shared
        )

        def contenders() -> dict[str, Contender]:
            forms = own() | exported_folders(args.exported, image, args.threads)
            return forms if peer is None else forms | peer_forms(peer, image, place / 'peer', **shared)

        formats = [*args.formats, *(folder.name for folder in args.exported)]
        what = (
            f'{Path(args.config).stem}{", backbone" if args.backbone_only else ""}, {"x".join(map(str, image.shape))}'
        )
        row = format_row(what, contenders, formats, peer is not None, not args.no_compile, args.targets)
        report = run([row], args.threads, args.rounds, progress)
    report.environment['date'] = f'{datetime.date.today()}, in {(time.monotonic() - start) / 60:.1f} min'
    report.environment['command'] = f'`python {shlex.join(sys.argv)}`'
    table = write_report(report, args.out)
    print(f'\n{table}\n{args.out}/benchmark.md, .json and .png')
    if void := report.results[0].void:
        sys.exit(f'nothing was timed: {void}')


if __name__ == '__main__':
    try:
        main()
    except (ExportError, FileNotFoundError, ValueError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
