"""The main job, from nothing to a picture: make data, train, test both forms, draw.

Example:
    python tools/demo.py
    python tools/demo.py --config configs/demo_upernet_resnet18_digit-scenes.py   # the same recipe, another backbone
    python tools/demo.py --config configs/demo_mask-rcnn_unireplknet_a_digit-scenes.py   # instance segmentation
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from mmunireplknet.analysis.figures import compare, draw_results, percentages, read_scalars
from mmunireplknet.engine.atomic_checkpoint_hook import latest_checkpoint
from mmunireplknet.engine.launch import load_config

TOOLS = Path(__file__).resolve().parent
DEFAULT = TOOLS.parent / 'configs' / 'demo_upernet_unireplknet_a_digit-scenes.py'
LARGEST_DIFFERENCE = 0.1  # of a metric between both forms, in points


def call(script: str, *args: object) -> None:
    """Run one of the tools as a user would, with its output on the screen."""
    command = [sys.executable, str(TOOLS / script), *map(str, args)]
    print(f'\n$ python {" ".join(["tools/" + script, *map(str, args)])}', flush=True)
    if subprocess.run(command).returncode:
        sys.exit(f'{script} failed; its last lines above say why.')


def test(config: Path, scope: str, checkpoint: str, work_dir: Path, *options: str) -> dict[str, float]:
    metrics = work_dir / f'metrics{"".join(options)}.json'
    call('test.py', config, checkpoint, '--work-dir', work_dir / 'test', '--metrics', metrics, *options)
    return percentages(scope, json.loads(metrics.read_text()))


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
    deploys = cfg.model.backbone.type.endswith('UniRepLKNet')
    scores = test(args.config, cfg.default_scope, checkpoint, work_dir)
    merged = test(args.config, cfg.default_scope, checkpoint, work_dir, '--deploy') if deploys else {}
    lines = [f'training            {minutes:.1f} min (a finished run is not repeated: delete {work_dir} to train anew)']
    for name, score in scores.items():
        lines.append(f'{name:20}{score:.2f} %')
        if name in merged:
            difference = abs(merged[name] - score)
            lines[-1] += f', with --deploy {merged[name]:.2f} % (difference {difference:.4f})'
            if difference > LARGEST_DIFFERENCE:
                sys.exit(f'{name}: the deploy form has {merged[name]}, the training form {score}: they are not equal.')
    name, score = next(iter(scores.items()))
    title = f'{args.config.stem}: {name} {score:.1f} % after {cfg.train_cfg.max_iters} iterations from scratch'
    picture = work_dir / 'demo.png'
    draw_results(compare(cfg, checkpoint, deploys), cfg.default_scope, read_scalars(work_dir), picture, title)
    lines += [f'checkpoint          {checkpoint}', f'picture             {picture}']
    print('\n' + '\n'.join(lines))


if __name__ == '__main__':
    main()
