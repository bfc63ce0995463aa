"""The main job, from nothing to a picture: make data, train, test both forms, draw.

Example:
    python tools/demo.py
    python tools/demo.py --config configs/demo_upernet_resnet18_digit-scenes.py   # the same recipe, another backbone
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import mmcv
import numpy as np
from mmengine.config import Config

from mmunireplknet.analysis.figures import draw_results, read_scalars
from mmunireplknet.engine.atomic_checkpoint_hook import latest_checkpoint
from mmunireplknet.engine.inference import Predictor
from mmunireplknet.engine.launch import load_config

TOOLS = Path(__file__).resolve().parent
DEFAULT = TOOLS.parent / 'configs' / 'demo_upernet_unireplknet_a_digit-scenes.py'
PICTURES = 8


def call(script: str, *args: object) -> None:
    """Run one of the tools as a user would, with its output on the screen."""
    command = [sys.executable, str(TOOLS / script), *map(str, args)]
    print(f'\n$ python {" ".join(["tools/" + script, *map(str, args)])}', flush=True)
    if subprocess.run(command).returncode:
        sys.exit(f'{script} failed; its last lines above say why.')


def has_unireplknet(cfg: Config) -> bool:
    return cfg.model.backbone.type.endswith('UniRepLKNet')


def test(config: Path, checkpoint: str, work_dir: Path, *options: str) -> float:
    metrics = work_dir / f'metrics{"".join(options)}.json'
    call('test.py', config, checkpoint, '--work-dir', work_dir / 'test', '--metrics', metrics, *options)
    return float(json.loads(metrics.read_text())['mIoU'])


def draw(cfg: Config, checkpoint: str, work_dir: Path, deploy: bool, title: str) -> Path:
    predictor = Predictor(cfg, checkpoint, deploy=deploy)
    dataset = cfg.val_dataloader.dataset
    root = Path(dataset.data_root)
    files = sorted((root / dataset.data_prefix.img_path).iterdir())[:PICTURES]
    truths = [root / dataset.data_prefix.seg_map_path / f'{file.stem}.png' for file in files]
    predictions = [predictor(file).pred_sem_seg.data[0].cpu().numpy().astype(np.uint8) for file in files]
    out = work_dir / 'demo.png'
    draw_results(
        [mmcv.imread(str(file), channel_order='rgb') for file in files],
        [mmcv.imread(str(file), flag='unchanged') for file in truths],
        predictions,
        **dataset.metainfo,
        scalars=read_scalars(work_dir),
        out=out,
        title=title,
    )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', type=Path, default=DEFAULT)
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/<config name>')
    parser.add_argument('--train', type=int, default=4000, help='training images (default: %(default)s)')
    parser.add_argument('--val', type=int, default=200, help='validation images (default: %(default)s)')
    args = parser.parse_args()
    cfg = load_config(str(args.config), work_dir=args.work_dir and str(args.work_dir))
    work_dir = Path(cfg.work_dir)
    call('dataset_preparation/digit_scenes.py', '--out', cfg.data_root, '--difficulty', cfg.difficulty,
         '--train', args.train, '--val', args.val)  # fmt: skip
    start = time.monotonic()
    call('train.py', args.config, '--work-dir', work_dir, '--resume')
    minutes = (time.monotonic() - start) / 60
    checkpoint = latest_checkpoint(work_dir)
    deploys = has_unireplknet(cfg)
    miou = test(args.config, checkpoint, work_dir)
    lines = [
        f'training            {minutes:.1f} min (a finished run is not repeated: delete {work_dir} to train anew)',
        f'mIoU                {miou:.2f} %',
    ]
    if deploys:
        merged = test(args.config, checkpoint, work_dir, '--deploy')
        lines.append(f'mIoU with --deploy  {merged:.2f} % (difference {abs(merged - miou):.4f})')
        if abs(merged - miou) > 0.1:
            sys.exit(f'The deploy form scores {merged}, the training form {miou}: reparameterization is broken.')
    title = f'{args.config.stem}: mIoU {miou:.1f} % after {cfg.train_cfg.max_iters} iterations from scratch'
    picture = draw(cfg, checkpoint, work_dir, deploys, title)
    lines += [f'checkpoint          {checkpoint}', f'picture             {picture}']
    print('\n' + '\n'.join(lines))


if __name__ == '__main__':
    main()
