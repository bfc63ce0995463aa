"""Time this package against torch, mmpretrain's ConvNeXt and the published form, and compare with the targets.

Writes OUT/benchmark.md (the table), benchmark.json (all figures) and benchmark.png (the ratios). All rows take some
minutes on two cores with nothing beside them.

Example:
    python tools/analysis/benchmark.py --out work_dirs/benchmark
    python tools/analysis/benchmark.py --rows '13x13 wgrad|training' --rounds 9
"""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import sys
import time
from pathlib import Path

from mmunireplknet.analysis.benchmark import ROWS, run
from mmunireplknet.analysis.benchmark_report import write_report


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} must be a whole number, 1 or more.')
    return int(text)


def pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f'{text!r} is not a regular expression: {error}. Characters that mean themselves take a backslash.'
        ) from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmark'), help='default: %(default)s')
    parser.add_argument(
        '--rows', type=pattern, default='', metavar='REGEX', help='measure the rows whose name it is found in'
    )
    parser.add_argument('--threads', type=positive, default=2, help='default: %(default)s')
    parser.add_argument('--rounds', type=positive, help='default: as many as fit into the time of a row')
    parser.add_argument('--list', action='store_true', help='print the names of the rows')
    args = parser.parse_args()
    rows = [row for row in ROWS if args.rows.search(row.name)]
    if not rows:
        sys.exit(f'No row has {args.rows.pattern!r} in its name; --list prints them.')
    if args.list:
        print('\n'.join(row.name for row in rows))
        return
    start = time.monotonic()

    def progress(text: str) -> None:
        print(f'{time.monotonic() - start:4.0f} s  {text}', flush=True)

    report = run(rows, args.threads, args.rounds, progress)
    report.environment['date'] = f'{datetime.date.today()}, in {(time.monotonic() - start) / 60:.1f} min'
    report.environment['command'] = f'`python {shlex.join(sys.argv)}`'
    table = write_report(report, args.out)
    print(f'\n{table}\n{args.out}/benchmark.md, .json and .png')
    if void := [result.name for result in report.results if result.void]:
        sys.exit(f'{len(void)} rows are void: {", ".join(void)}')


if __name__ == '__main__':
    main()
