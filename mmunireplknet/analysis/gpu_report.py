"""The results of the benchmark on a GPU as tables, with targets beside what was measured, and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import gpu_pointwise
from .roofline import Card, Floors, floors

__all__ = ['depthwise_verdicts', 'draw', 'markdown']

Entry = Mapping[str, Any]
Times = dict[str, dict[str, float]]  # milliseconds by contender and mode

_LABELS = {'block': 'published', 'training': 'published', 'inference': 'ConvNeXt'}
_SPEED_UP = {'block': 4.0, 'training': 1.6, 'inference': 1.0}
_MEMORY = {'block': 0.35, 'training': 0.6}
_COLOURS = {'torch': '#9aa5b1', 'triton': '#4c9a6a', 'cuda': '#c8553d'}


def markdown(entries: Sequence[Entry], environment: Mapping[str, str], card: Card) -> str:
    """Where it was measured, and a table for every part; eager in brackets behind a replayed CUDA graph."""
    lines = [f'- {name}: {text}' for name, text in environment.items()]
    lines.append(
        f'- rates for the floors ({card.source}): {card.bandwidth / 1e12:.2f} TB/s, {card.fma / 1e12:.0f} TFLOP/s by '
        f'FMA, {card.tensor / 1e12:.0f} in tensor cores, {card.mma:.0%} of them by mma.sync; '
        'the roofline is the larger of memory and the smaller of the other two'
    )
    convolutions = [e for e in entries if 'kernel' in e]
    for kernel in sorted({e['kernel'] for e in convolutions}):
        for dtype in dict.fromkeys(e['dtype'] for e in convolutions):
            chosen = [e for e in convolutions if (e['kernel'], e['dtype']) == (kernel, dtype)]
            lines += _convolution_table(chosen, kernel, dtype, card) if chosen else []
    if chosen := [e for e in entries if e['part'] == 'pointwise']:
        lines += gpu_pointwise.table(chosen, card)
    for part in _LABELS:
        if chosen := [e for e in entries if e['part'] == part]:
            lines += _work_table(chosen, part)
    if failed := [e for e in entries if e['error']]:
        lines += ['', '| not measured | contender | mode | reason |', '|---|---|---|---|']
        lines += [f'| {e["row"]} | {e["contender"]} | {e["mode"]} | {_one_line(e["error"])} |' for e in failed]
    return '\n'.join(lines) + '\n'


def _one_line(text: str) -> str:
    return ' '.join(text.replace('|', '/').split())[:200]


def _rows(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    rows: dict[str, list[Entry]] = {}
    for entry in entries:
        rows.setdefault(entry['row'], []).append(entry)
    return rows


def _times(entries: Iterable[Entry]) -> Times:
    times: Times = {}
    for entry in entries:
        if not entry['error']:
            times.setdefault(entry['contender'], {})[entry['mode']] = entry['ms']
    return times


def _best(times: Times, names: Iterable[str], mode: str) -> float | None:
    """The least milliseconds of contenders, whose names begin so, in any layout."""
    found = [ms[mode] for contender, ms in times.items() if contender.split()[0] in names and mode in ms]
    return min(found, default=None)


def _convolution_table(entries: Sequence[Entry], kernel: int, dtype: str, card: Card) -> Iterator[str]:
    names = list(dict.fromkeys(e['contender'] for e in entries))
    yield from ('', f'**{kernel}x{kernel}, {dtype}**: microseconds under a CUDA graph (in eager mode)', '')
    header = ['work', *names, 'memory', 'FMA', 'Toeplitz', 'of the roofline', 'targets']
    yield f'| {" | ".join(header)} |'
    yield '|---' * len(header) + '|'
    for row in _rows(entries).values():
        first, times = row[0], _times(row)
        least = floors(card, tuple(first['shape']), kernel, 4 if dtype == 'float32' else 2)
        cells = [_cell(times.get(name, {}), 1e3) for name in names]
        cells += [f'{1e3 * ms:.1f}' for ms in (least.memory, least.fma, least.tensor)]
        ours = _best(times, ('triton', 'cuda'), 'graph')
        cells.append('' if ours is None else f'{least.roofline / ours:.0%}')
        cells.append('; '.join(depthwise_verdicts(first, times, least)))
        yield f'| {first["direction"]}, {first["where"]}, {tuple(first["shape"])} | {" | ".join(cells)} |'


def _cell(ms: Mapping[str, float], factor: float) -> str:
    texts = [_number(factor * ms[mode]) if mode in ms else '-' for mode in ('graph', 'eager')]
    return f'{texts[0]} ({texts[1]})' if ms else '-'


def _number(value: float) -> str:
    return f'{value:.1f}' if value < 100 else f'{value:.0f}'


def depthwise_verdicts(facts: Entry, times: Times, least: Floors) -> list[str]:
    """What is required of a 13x13 convolution, and whether it is met, by the better of our backends in each mode.

    Args:
        facts: The kernel, shape, dtype and direction of the row.
        times: By contender and mode.
        least: Floors of the row.
    """
    verdicts = []
    for mode in ('graph', 'eager') if facts['kernel'] == 13 else ():
        theirs, ours = _best(times, ('torch',), mode), _best(times, ('triton', 'cuda'), mode)
        if theirs is None or ours is None:
            continue
        if facts['dtype'] == 'float32':
            verdicts.append(_verdict(mode, theirs / ours, 2.0))
        elif theirs > 4 * least.roofline:
            verdicts.append(_verdict(mode, theirs / ours, 5.0 if facts['direction'] == 'wgrad' else 3.0))
        else:
            verdicts.append(_verdict(mode, least.roofline / ours, 0.6, 'roofline'))
        if facts['dtype'] != 'float32' and facts['direction'] != 'wgrad' and facts['shape'][0] >= 8:
            verdicts.append(_verdict(mode, least.tensor / ours, 0.35, 'Toeplitz'))
    return verdicts


def _verdict(mode: str, value: float, target: float, of: str = '') -> str:
    met = 'met' if value >= target else '**missed**'
    text, limit = (f'{value:.0%} of {of}', f'{target:.0%}') if of else (f'{value:.1f}x', f'{target:g}x')
    return f'{mode}: {text} (at least {limit}: {met})'


def _work_table(entries: Sequence[Entry], part: str) -> Iterator[str]:
    title = 'milliseconds in eager mode' if part == 'training' else 'milliseconds under a CUDA graph (in eager mode)'
    yield from ('', f'**{part}**: {title}; MiB at most beyond what was there before', '')
    yield from ('| work | contender | ms | MiB | targets |', '|---|---|---|---|---|')
    for name, row in _rows(entries).items():
        times, peaks = _times(row), {e['contender']: e['peak'] for e in row if not e['error'] and e['peak'] is not None}
        for contender, ms in times.items():
            cell = _number(ms['eager']) if part == 'training' and 'eager' in ms else _cell(ms, 1.0)
            peak = f'{peaks[contender] / 2**20:.0f}' if contender in peaks else '-'
            judged = contender == _fastest(times, 'ours')
            targets = '; '.join(_work_verdicts(part, times, peaks, contender)) if judged else ''
            yield f'| {name} | {contender} | {cell} | {peak} | {targets} |'


def _fastest(times: Times, name: str) -> str | None:
    """The fastest contender of that name, in the mode that all have."""
    of_name = {c: ms['eager'] for c, ms in times.items() if c.split()[0] == name and 'eager' in ms}
    return min(of_name, key=of_name.__getitem__, default=None)


def _work_verdicts(part: str, times: Times, peaks: Mapping[str, int], ours: str) -> Iterator[str]:
    peers = [_LABELS[part], *(['ConvNeXt'] if part == 'training' else [])]
    for peer in peers:
        target = _SPEED_UP[part] if peer == _LABELS[part] else 1.0
        for mode in ('graph', 'eager'):
            theirs = _best(times, (peer,), mode)
            if theirs is not None and mode in times[ours]:
                yield f'{peer}, {_verdict(mode, theirs / times[ours][mode], target)}'
    rival = _fastest(times, _LABELS[part])
    if part in _MEMORY and rival is not None and rival in peaks and ours in peaks:
        ratio = peaks[ours] / max(peaks[rival], 1)
        met = 'met' if ratio <= _MEMORY[part] else '**missed**'
        yield f'{ratio:.0%} of the memory of {rival} (at most {_MEMORY[part]:.0%}: {met})'


def draw(entries: Sequence[Entry], card: Card, title: str, file: Path) -> None:
    """Times over the roofline of all maps, sorted by size, a panel for each kernel and direction; 16 bits, graphs.

    Args:
        entries: The results.
        card: Of the roofline.
        title: Of the picture.
        file: To write; none is, where there is nothing to show.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [
        e for e in entries if 'kernel' in e and e['dtype'] == 'bfloat16' and e['mode'] == 'graph' and not e['error']
    ]
    kernels, directions = sorted({e['kernel'] for e in shown}), ('forward', 'dgrad', 'wgrad')
    if not shown:
        return
    figure = Figure(figsize=(4.2 * len(directions), 3.0 * len(kernels) + 0.6), layout='constrained')
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(kernels), len(directions), squeeze=False, sharey=True)
    for axes, kernel in zip(panels, kernels, strict=True):
        for axis, direction in zip(axes, directions, strict=True):
            _panel(axis, [e for e in shown if (e['kernel'], e['direction']) == (kernel, direction)], card)
            axis.set_title(f'{kernel}x{kernel} {direction}', fontsize=10, loc='left')
    panels[0][0].legend(fontsize=8, frameon=False)
    figure.supylabel('time over the roofline, bfloat16, CUDA graphs', fontsize=9)
    figure.supxlabel('values in the map', fontsize=9)
    figure.suptitle(title, fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _panel(axes: Any, entries: Sequence[Entry], card: Card) -> None:
    styles = {'NCHW': '-', 'channels_last': ':'}
    for contender in dict.fromkeys(e['contender'] for e in entries):
        name, layout = contender.split()
        points = []
        for entry in (e for e in entries if e['contender'] == contender):
            n, c, h, w = entry['shape']
            points.append((n * c * h * w, entry['ms'] / floors(card, (n, c, h, w), entry['kernel'], 2).roofline))
        axes.plot(*zip(*sorted(points), strict=True), styles[layout], color=_COLOURS[name], label=contender, marker='.')
    axes.axhline(1, color='black', linewidth=0.8)
    axes.set_xscale('log')
    axes.set_yscale('log')
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)
