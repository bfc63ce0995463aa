"""The benchmark: which work is measured, what is required of it, and how it is judged.

A row is one piece of work with everybody who does it; ``ROWS`` lists them all, and a new one is one more entry there.
All contenders of a row are timed in turn in one process. A timing that contains a fall-back is void.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..ops import backends
from . import peers
from .peers import Contender
from .profiling import breakdown, why_void
from .timing import Timing, gemm_rates, interleave, saved_bytes, thread_count

__all__ = ['ROWS', 'Check', 'Report', 'Result', 'Row', 'Verdict', 'judge', 'measure', 'run']

SGEMM = 'torch.mm'
SHAPES = ((1, 320, 32, 32), (2, 160, 64, 64), (1, 320, 50, 84))  # of UniRepLKNet-T at 512x512 and at 800x1333
AS_TORCH_HAS_IT = ('torch NCHW', 'torch channels_last')
EVERY_TORCH = (*AS_TORCH_HAS_IT, 'torch backend')
PUBLISHED = ('published NCHW', 'published channels_last')
CONVNEXT = ('ConvNeXt NCHW', 'ConvNeXt channels_last')


@dataclass(frozen=True)
class Check:
    """A ratio, and what it has to be.

    Attributes:
        what: 'speed-up', the peer's time over ours, at least ``limit``; 'time', ours over the peer's, at most;
            'memory', our saved activations over the peer's, at most; 'rate', our FLOP/s over those of ``torch.mm``,
            at least.
        peers: Contenders to compare with: the best of them counts.
        limit: The target; None for a ratio that is only reported.
        goal: What would be better still.
        ours: The contender that is judged.
        note: Added to its description.
    """

    what: str
    peers: tuple[str, ...] = ()
    limit: float | None = None
    goal: float | None = None
    ours: str = 'ours'
    note: str = ''

    @property
    def higher_is_better(self) -> bool:
        """Whether ``limit`` is the least that is required, not the most."""
        return self.what in ('speed-up', 'rate')

    def reaches(self, ratio: float, bound: float) -> bool:
        """Whether ``ratio`` is as good as ``bound``: ``limit`` or ``goal``."""
        return ratio >= bound if self.higher_is_better else ratio <= bound


@dataclass(frozen=True)
class Row:
    """One piece of work.

    Attributes:
        name: What ``--rows`` searches.
        contenders: Builds all who do it.
        checks: What is required.
        seconds: How long to measure.
        broken_down: Contenders whose time is broken down by kind of operator; of several layouts, all.
    """

    name: str
    contenders: Callable[[], Mapping[str, Contender]]
    checks: tuple[Check, ...]
    seconds: float = 3.0
    broken_down: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """A check with its ratio; ``met`` is None where nothing is required."""

    check: Check
    peer: str
    ratio: float
    met: bool | None


@dataclass
class Result:
    """What was measured of a row.

    Attributes:
        name: Of the row.
        timings: By contender.
        gflops: GFLOP/s by contender, where the work is counted.
        saved: Bytes of saved activations by contender, where a check asks for them.
        gemm_gflop: GFLOP in matrix products and dense convolutions by contender, where they are counted.
        groups: Milliseconds by kind of operator, by contender.
        void: Why the timings do not count; empty where they do.
        verdicts: Set by ``judge``.
    """

    name: str
    timings: dict[str, Timing] = field(default_factory=dict)
    gflops: dict[str, float] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)
    gemm_gflop: dict[str, float] = field(default_factory=dict)
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    void: str = ''
    verdicts: list[Verdict] = field(default_factory=list)


@dataclass
class Report:
    """All results, with where and how they were measured and the GFLOP/s of matrix products there."""

    environment: dict[str, str]
    gemm: dict[str, float]
    results: list[Result]


def _depthwise_rows() -> list[Row]:
    torch_channels_last = ('torch channels_last',)
    rate = Check('rate', limit=0.6)
    never_slower = Check('speed-up', EVERY_TORCH, 1.0)
    twice = Check('speed-up', EVERY_TORCH, 2.0)
    checks = {
        (13, 'forward'): (Check('speed-up', torch_channels_last, 1.8), rate),
        (13, 'dgrad'): (Check('speed-up', AS_TORCH_HAS_IT, 1.0), Check('speed-up', torch_channels_last, 1.2), rate),
        (13, 'wgrad'): (Check('speed-up', AS_TORCH_HAS_IT, 5.0), rate),
        **{(7, direction): (never_slower,) for direction in peers.DIRECTIONS},
        (31, 'forward'): (twice,),
        (31, 'dgrad'): (never_slower,),
        (31, 'wgrad'): (twice,),
    }
    return [
        Row(
            f'{kernel}x{kernel} {direction} ({", ".join(map(str, shape))})',
            partial(peers.depthwise, shape, kernel, direction),
            required,
        )
        for (kernel, direction), required in checks.items()
        for shape in SHAPES
    ]


ROWS: tuple[Row, ...] = (
    *_depthwise_rows(),
    Row(
        'Dilated Reparam Block, training, (1, 320, 32, 32)',
        partial(peers.block_training, (1, 320, 32, 32), 13),
        (Check('speed-up', PUBLISHED, 4.0), Check('memory', PUBLISHED, 0.35)),
        seconds=6,
    ),
    Row(
        'T deploy, 1x3x512x512',
        partial(peers.convnext_forward, 't', (1, 3, 512, 512), 'tiny'),
        (Check('time', CONVNEXT, 1.0, goal=0.9, note='ConvNeXt-T'),),
        seconds=15,
        broken_down=('ours', *CONVNEXT),
    ),
    *(
        Row(
            f'A training, {"x".join(map(str, shape))}',
            partial(peers.convnext_training, 'a', shape, 'atto'),
            (Check('time', CONVNEXT, limit, note='ConvNeXt-atto'),),
            seconds=15,
        )
        for shape, limit in (((4, 3, 128, 128), 1.5), ((8, 3, 224, 224), 1.25))
    ),
    Row(
        'T training, 2x3x224x224',
        partial(peers.training, 't', (2, 3, 224, 224)),
        (
            Check('speed-up', PUBLISHED, 2.2, goal=2.7),
            Check('time', ('identity',), 1.15, note='without its Dilated Reparam Blocks'),
            Check('memory', PUBLISHED, 0.85),
            Check('memory', PUBLISHED, 0.5, note='GELU and GRN are recomputed'),
        ),
        seconds=25,
    ),
    Row(
        'T deploy by kernel size, 1x3x512x512',
        partial(peers.growth, 't', (1, 3, 512, 512), (7, 13, 31)),
        tuple(Check('time', ('K=7',), ours=f'K={k}') for k in (13, 31)),
        seconds=15,
        broken_down=('K=7', 'K=13', 'K=31'),
    ),
)


def measure(row: Row, rounds: int | None = None) -> Result:
    """Time all contenders of a row; judged it is not yet.

    Args:
        row: Which.
        rounds: How often each is timed; None takes as many as fit into the row's time.
    """
    try:
        contenders = row.contenders()
    except ModuleNotFoundError as error:
        return Result(row.name, void=f'{error.name} is not installed')
    except ImportError as error:  # it is installed, but broken, or of a version that lacks what is asked for
        return Result(row.name, void=str(error))
    reasons = {name: why_void(c.run, c.kernels) for name, c in contenders.items() if c.kernels}
    void = '; '.join(f'{name}: {reason}' for name, reason in reasons.items() if reason)
    functions = {name: c.run for name, c in contenders.items()}
    timings = interleave(functions, row.seconds, rounds, partial(_hopeless, row.checks))
    if void and (reason := backends.why_not('cpp')):
        void = f'{reason} ({void})'
    result = Result(row.name, timings, void=void)
    for name, contender in contenders.items():
        if contender.flops:
            result.gflops[name] = contender.flops / timings[name].median / 1e6
        if contender.gemm_flops:
            result.gemm_gflop[name] = contender.gemm_flops / 1e9
        if contender.forward and any(c.what == 'memory' and name in (c.ours, *c.peers) for c in row.checks):
            result.saved[name] = saved_bytes(contender.forward, contender.owned)
        if name in row.broken_down:
            result.groups[name] = breakdown(contender.run)
    return result


def _hopeless(checks: Sequence[Check], seconds: Mapping[str, float]) -> list[str]:
    """Contenders that decide nothing: in every check, another peer is three times faster."""
    deciding = {check.ours for check in checks}
    for check in checks:
        fastest = min((seconds[name] for name in check.peers), default=0.0)
        deciding.update(name for name in check.peers if seconds[name] <= 3 * fastest)
    return [name for name in seconds if name not in deciding and seconds[name] > 3 * min(seconds.values())]


def judge(result: Result, checks: Sequence[Check], sgemm: float) -> list[Verdict]:
    """Compare what was measured with what is required.

    Args:
        result: Of ``measure``.
        checks: Of its row.
        sgemm: GFLOP/s of ``torch.mm``.

    Returns:
        A verdict for every check; none where the result is void.
    """
    if result.void:
        return []
    verdicts = []
    for check in checks:
        if check.what == 'rate':
            peer, ratio = SGEMM, result.gflops[check.ours] / sgemm
        else:
            values: Mapping[str, float] = result.saved
            if check.what != 'memory':
                values = {name: timing.median for name, timing in result.timings.items()}
            peer = min(check.peers, key=values.__getitem__)
            ratio = values[check.ours] / values[peer]
            ratio = 1 / ratio if check.higher_is_better else ratio
        met = None if check.limit is None else check.reaches(ratio, check.limit)
        verdicts.append(Verdict(check, peer, ratio, met))
    return verdicts


def run(
    rows: Sequence[Row],
    threads: int,
    rounds: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Measure and judge ``rows``.

    Args:
        rows: Which.
        threads: Of torch.
        rounds: See ``measure``.
        progress: Told what goes on, a line at a time.

    Returns:
        The results. The rates of matrix products are the better of those before and after all rows.
    """
    environment = describe_environment(threads)
    with thread_count(threads):
        progress('matrix products')
        before = gemm_rates(rounds or 7)
        results = []
        for index, row in enumerate(rows, 1):
            result = measure(row, rounds)
            results.append(result)
            times = ', '.join(f'{name} {timing.median:.2f}' for name, timing in result.timings.items())
            progress(f'[{index}/{len(rows)}] {row.name}: {f"VOID: {result.void}" if result.void else f"{times} ms"}')
        after = gemm_rates(rounds or 7)
    gemm = {name: max(rate, after[name]) for name, rate in before.items()}
    for row, result in zip(rows, results, strict=True):
        result.verdicts = judge(result, row.checks, gemm[SGEMM])
    return Report(environment, gemm, results)


def describe_environment(threads: int) -> dict[str, str]:
    """Machine and versions, as text."""
    kernels = '' if backends.why_not('cpp') else f', kernels for {torch.ops.mmuni_cpu.capability()}'
    load = f', load average before: {os.getloadavg()[0]:.1f}' if hasattr(os, 'getloadavg') else ''
    return {
        'machine': f'{_processor()}, {torch.backends.cpu.get_cpu_capability()}{kernels}, {os.cpu_count()} cores, '
        f'threads: {threads}{load}',
        'versions': ', '.join([f'Python {platform.python_version()}', *_versions()]),
    }


def _processor() -> str:
    cpuinfo = Path('/proc/cpuinfo')
    found = re.search(r'^model name\s*: (.+)$', cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _versions() -> list[str]:
    texts = [f'torch {torch.__version__}']
    for name in ('mmunireplknet', 'onedl-mmpretrain', 'mmpretrain'):
        try:
            texts.append(f'{name} {version(name)}')
        except PackageNotFoundError:
            continue
    return texts
