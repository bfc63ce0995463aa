"""The results of the benchmark as a table, as JSON, and as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from .benchmark import Check, Report, Result, Verdict

__all__ = ['draw', 'markdown', 'write_json', 'write_report']

_COLOURS = {True: '#4c9a6a', False: '#c8553d', None: '#9aa5b1'}  # met, missed, nothing required


def write_json(report: Report, file: str | Path) -> None:
    """Write everything that was measured."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(asdict(report), indent=1) + '\n')


def write_report(report: Report, folder: Path) -> str:
    """Write benchmark.md, .json and .png into ``folder``; returns what is in the first."""
    table = markdown(report)
    write_json(report, folder / 'benchmark.json')
    draw(report, folder / 'benchmark.png')
    (folder / 'benchmark.md').write_text(table)
    return table


def markdown(report: Report) -> str:
    """Where it was measured, the table of all rows, and the tables of what the time went into."""
    lines = [f'- {name}: {text}' for name, text in report.environment.items()]
    lines.append(f'- GFLOP/s of matrix products, float32: {_join(f"{n} {r:.0f}" for n, r in report.gemm.items())}')
    if spreads := [(t.high - t.low) / t.median for result in report.results for t in result.timings.values()]:
        lines.append(f'- distance of the quartiles: {median(spreads):.0%} of the median, in the median of all timings')
    fractions = ' / of '.join(report.gemm)
    lines += ['', f'| work | ours, ms (quartiles) | GFLOP/s (of {fractions}) | others, ms | ratio (target) |']
    lines += ['|---|---|---|---|---|', *(_row(result, report.gemm) for result in report.results)]
    if products := [line for result in report.results for line in _matrix_products(result, report.gemm)]:
        lines += ['', f'| model | ms | GFLOP in matrix products | ms for them at the rate of {fractions} |']
        lines += ['|---|---|---|---|', *products]
    if any(result.groups for result in report.results):
        lines += ['', *_breakdowns(report.results)]
    return '\n'.join(lines) + '\n'


def _row(result: Result, gemm: Mapping[str, float]) -> str:
    if result.void:
        return f'| {result.name} | void | | | {result.void} |'
    ours = [name for name in result.timings if name in {verdict.check.ours for verdict in result.verdicts}]
    texts = []
    for name in ours:
        t = result.timings[name]
        label = '' if ours == ['ours'] else f'{name}: '
        texts.append(f'{label}{_ms(t.median)} ({_ms(t.low)}-{_ms(t.high)})')
    rates = _join(_rate(result.gflops[name], gemm) for name in ours if name in result.gflops)
    others = _join(f'{name} {_ms(t.median)}' for name, t in result.timings.items() if name not in ours)
    return f'| {result.name} | {_join(texts)} | {rates} | {others} | {"; ".join(map(_sentence, result.verdicts))} |'


def _rate(gflops: float, gemm: Mapping[str, float]) -> str:
    return f'{gflops:.0f} ({" / ".join(f"{gflops / rate:.0%}" for rate in gemm.values())})'


def _sentence(verdict: Verdict) -> str:
    check, ratio = verdict.check, verdict.ratio
    who = '' if check.ours == 'ours' else f'{check.ours} '
    note = f', {check.note}' if check.note else ''
    text = {
        'speed-up': f'{who}{_factor(ratio)} as fast as {verdict.peer}{note}',
        'time': f'{who}{ratio:.2f} of the time of {verdict.peer}{note}',
        'memory': f'{who}{100 * ratio:.0f} % of the saved activations of {verdict.peer}{note}',
        'rate': f'{who}{100 * ratio:.0f} % of the rate of {verdict.peer}',
    }[check.what]
    return text + _target(verdict)


def _target(verdict: Verdict) -> str:
    check = verdict.check
    if check.limit is None:
        return ''
    form = '{:.0%}' if check.what in ('rate', 'memory') else '{:g}'
    bound = 'at least' if check.higher_is_better else 'at most'
    goal = ''
    if check.goal is not None:
        goal = f', goal {form.format(check.goal)}: {"" if check.reaches(verdict.ratio, check.goal) else "not "}reached'
    return f' ({bound} {form.format(check.limit)}: {"met" if verdict.met else "**missed**"}{goal})'


def _matrix_products(result: Result, gemm: Mapping[str, float]) -> Iterable[str]:
    """Beside each model, how long its matrix products alone would take at the measured rates.

    Neither is a bound: other sizes run at other rates, and a model takes the quicker library for each.
    """
    for name, gflop in result.gemm_gflop.items():
        label = result.name if name == 'ours' else f'{result.name}: {name}'
        times = ' / '.join(_ms(1e3 * gflop / rate) for rate in gemm.values())
        yield f'| {label} | {_ms(result.timings[name].median)} | {gflop:.1f} | {times} |'


def _breakdowns(results: Iterable[Result]) -> list[str]:
    groups = {f'{result.name}: {name}': values for result in results for name, values in result.groups.items()}
    names = list(next(iter(groups.values())))
    lines = [f'| ms in the profiler | {" | ".join(names)} | sum |', '|---' * (len(names) + 2) + '|']
    for label, values in groups.items():
        cells = ' | '.join(_ms(values[name]) for name in names)
        lines.append(f'| {label} | {cells} | {_ms(sum(values.values()))} |')
    return lines


def _ms(value: float) -> str:
    return f'{value:.2f}' if value < 10 else f'{value:.1f}' if value < 100 else f'{value:.0f}'


def _factor(value: float) -> str:
    return f'{value:.2f}x' if value < 10 else f'{value:.0f}x'


def _join(texts: Iterable[str]) -> str:
    return ', '.join(texts)


def draw(report: Report, file: str | Path) -> None:
    """Draw a bar for every check: how many times better than the peer, on a logarithmic axis, with its target.

    Args:
        report: The results; void ones are left out.
        file: Picture to write; none is, where there is nothing to show.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    verdicts = [(result, verdict) for result in report.results for verdict in result.verdicts]
    columns = [panels for panels in (_panels(verdicts, True), _panels(verdicts, False)) if panels]
    if not columns:
        return
    most = max(sum(len(bars) + 3 for bars in panels.values()) for panels in columns)
    figure = Figure(figsize=(7.0 * len(columns), 1.0 + 0.21 * most), layout='constrained')
    FigureCanvasAgg(figure)
    parts = figure.subfigures(1, len(columns), squeeze=False)[0]
    for part, panels in zip(parts, columns, strict=True):
        sizes = [len(bars) + 2 for bars in panels.values()]
        every_axes = part.subplots(len(panels), 1, squeeze=False, height_ratios=sizes)[:, 0]
        for axes, (title, bars) in zip(every_axes, panels.items(), strict=True):
            _bars(axes, bars)
            axes.set_title(title, fontsize=10, loc='left')
    _legend(parts[-1])
    figure.suptitle(report.environment['machine'], fontsize=10)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


_Bar = tuple[Result, Verdict]


def _panels(bars: list[_Bar], first: bool) -> dict[str, list[_Bar]]:
    """Bars of the first or of the second column of the picture by the title of their panel; none is empty."""
    panels: dict[str, list[_Bar]] = {}
    for result, verdict in bars:
        is_operator = bool(result.gflops) and not result.gemm_gflop
        what = {'memory': 'Saved activations: times smaller', 'rate': 'GFLOP/s: times as many'}.get(verdict.check.what)
        if first == (is_operator and what is None):
            title = what or f'{"Depthwise convolutions" if is_operator else "Block and models"}: times faster'
            panels.setdefault(title, []).append((result, verdict))
    return panels


def _bars(axes: Any, bars: list[_Bar]) -> None:
    for y, (_, verdict) in enumerate(bars):
        better, target = (_times_better(verdict.check, value) for value in (verdict.ratio, verdict.check.limit))
        axes.barh(y, better - 1, left=1, color=_COLOURS[verdict.met], height=0.7)
        if target:
            axes.plot([target, target], [y - 0.42, y + 0.42], color='black', linewidth=2)
        end = (max(better, target, 1), y)
        axes.annotate(_factor(better), end, (4, 0), textcoords='offset points', va='center', fontsize=8)
    labels = [_label(result.name, verdict) for result, verdict in bars]
    axes.set_yticks(range(len(bars)), labels, fontsize=8)
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter('{x:g}x')
    axes.tick_params(axis='x', labelsize=8)
    axes.axvline(1, color='black', linewidth=0.8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.margins(x=0.15)
    axes.grid(axis='x', alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)


def _times_better(check: Check, ratio: float | None) -> float:
    """A ratio, or a target, as a factor that is large where we are good; 0 for no target."""
    if ratio is None:
        return 0.0
    return ratio if check.higher_is_better else 1 / ratio


def _label(name: str, verdict: Verdict) -> str:
    who = '' if verdict.check.ours == 'ours' else f', {verdict.check.ours}'
    note = f', {verdict.check.note}' if verdict.check.what == 'memory' and verdict.check.note else ''
    return f'{name}{who} / {verdict.peer}{note}'


def _legend(part: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    labels = {True: 'target met', False: 'target missed', None: 'no target'}
    handles: list[Any] = [Patch(color=_COLOURS[met], label=label) for met, label in labels.items()]
    handles.append(Line2D([], [], color='black', linewidth=2, label='target'))
    part.legend(handles=handles, loc='outside lower center', ncols=4, frameon=False, fontsize=9)
