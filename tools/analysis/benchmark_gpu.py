"""Time the kernels and models on a GPU: torch as it is first, then ours, each against its roofline and its target.

Appends every timing to OUT/results.jsonl at once, and writes OUT/benchmark_gpu.md, .json and .png of all that is there
when it ends: run it again to go on where it stopped. Everything takes an hour or more; --quick some minutes.

Example:
    python tools/analysis/benchmark_gpu.py --quick
    python tools/analysis/benchmark_gpu.py --part anchors-13 ours-13 --minutes 9
    python tools/analysis/benchmark_gpu.py --device cpu --out work_dirs/rehearsal  # tiny, to see whether it would run
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import time
from pathlib import Path

import torch

from mmunireplknet.analysis.gpu_benchmark import FULL, PARTS, QUICK, TINY, plan, read, run
from mmunireplknet.analysis.gpu_clock import CpuClock, GpuClock
from mmunireplknet.analysis.gpu_report import draw, markdown
from mmunireplknet.analysis.roofline import card_of


def session(out: Path, clock: GpuClock | CpuClock) -> dict:
    """What is written beside the results, made once: the card, its rates, and the commands so far.

    The results of two cards or versions do not go into one table.
    """
    file, environment = out / 'session.json', clock.environment()
    if file.exists():
        found = json.loads(file.read_text())
        if found['environment'] != environment:
            sys.exit(
                f'{out} has results of {found["environment"]}, but this is {environment}: take another folder by --out.'
            )
    else:
        found = {'environment': environment, 'rates': clock.ceilings(), 'commands': []}
    found['commands'].append(f'{datetime.date.today()}: python {shlex.join(sys.argv)}')
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + '\n')
    return found


def report(out: Path, found: dict, is_rehearsal: bool) -> None:
    """Write the tables and the picture of all results in ``out``."""
    entries, rates = read(out / 'results.jsonl'), found['rates']
    name = found['environment']['card'].partition(',')[0]
    card = card_of(name, rates['copy'], rates['float32'], rates['bfloat16'])
    heading = '**Rehearsal on a CPU: these figures say nothing.**\n\n' if is_rehearsal else ''
    measured = ', '.join(f'{key} {value / 1e12:.3g}' for key, value in rates.items())
    environment = {
        **found['environment'],
        'measured rates': f'{measured} (TB/s; TFLOP/s of matrix products)',
        'commands': '; '.join(f'`{command}`' for command in found['commands']),
    }
    (out / 'benchmark_gpu.md').write_text(heading + markdown(entries, environment, card))
    (out / 'benchmark_gpu.json').write_text(json.dumps({**found, 'results': entries}, indent=1) + '\n')
    draw(entries, card, ('rehearsal, ' if is_rehearsal else '') + name, out / 'benchmark_gpu.png')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmark_gpu'), help='default: %(default)s')
    parser.add_argument('--part', nargs='+', choices=PARTS, default=PARTS, help='default: all, in this order')
    parser.add_argument('--quick', action='store_true', help='few maps, 13x13, bfloat16 and float32')
    parser.add_argument('--minutes', type=float, default=float('inf'), help='stop then; default: at the end')
    parser.add_argument('--seconds', type=float, default=0.2, help='for a timing; default: %(default)s')
    parser.add_argument(
        '--device', choices=['cuda', 'cpu'], default='cuda', help='cpu: a rehearsal in tiny, which measures nothing'
    )
    args = parser.parse_args()
    start, is_rehearsal = time.monotonic(), args.device == 'cpu'
    if not is_rehearsal and not torch.cuda.is_available():
        sys.exit('There is no CUDA device; --device cpu rehearses without one.')
    scale = TINY if is_rehearsal else QUICK if args.quick else FULL
    torch.backends.cudnn.allow_tf32 = False  # what is called float32 in the tables is, for everybody
    clock = CpuClock() if is_rehearsal else GpuClock(args.seconds)
    found = session(args.out, clock)

    def progress(text: str) -> None:
        print(f'{time.monotonic() - start:5.0f} s  {text}', flush=True)

    seconds = 60 * args.minutes - (time.monotonic() - start)
    try:
        left = run(plan(scale, args.part), clock, args.out / 'results.jsonl', scale.modes, seconds, progress)
    finally:  # whatever happens, what was measured is shown
        report(args.out, found, is_rehearsal)
    print(f'{args.out}/benchmark_gpu.md, .json and .png')
    if left:
        print(f'{left} timings are left: run the same command again.')


if __name__ == '__main__':
    main()
