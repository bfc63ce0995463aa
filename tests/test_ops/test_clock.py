"""The clock of what is timed on a GPU, by a GPU that takes the time it is told to."""

import math
import warnings

import pytest
import torch

from mmunireplknet.ops import fastest


class Clock:
    """``torch.cuda`` as far as timing needs it: work is queued, and takes its time by itself."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.cycles: list[int] = []
        clock = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                clock.log.append('record')
                self.time = clock.now

            def synchronize(self) -> None:
                clock.log.append('wait')

            def elapsed_time(self, end: 'Event') -> float:
                return end.time - self.time

        self.Event = Event

    def _sleep(self, cycles: int) -> None:
        self.log.append('sleep')
        self.cycles.append(cycles)
        self.now += 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(torch.cuda, 'Event', clock.Event)
    monkeypatch.setattr(torch.cuda, '_sleep', clock._sleep, raising=False)
    monkeypatch.setattr(torch.cuda, 'device', lambda device: warnings.catch_warnings())
    return clock


GPU = torch.device('cuda', 0)
ONCE, REPEATED = (['sleep', 'record', *['call'] * count, 'record', 'wait'] for count in (1, fastest.REPEATS))


@pytest.mark.parametrize(('limit', 'rounds'), [(math.inf, 4), (3.5, 4), (2.5, 2)])
def test_time_of_the_gpu_alone(clock: Clock, limit: float, rounds: int) -> None:
    """Whatever the first call costs, and however long the GPU is kept busy before; not often where it is far behind."""
    durations = iter([1000.0, 3.0, 3.0, *[3.0] * 5, *[2.0] * 5])

    def candidate() -> None:
        clock.log.append('call')
        clock.now += next(durations)

    assert fastest._milliseconds(candidate, GPU, limit) == (2.0 if rounds == 4 else 3.0)
    assert clock.log == ['call', *ONCE, *ONCE, *(REPEATED + REPEATED if rounds == 4 else [])]
    assert min(clock.cycles) == fastest.HEAD_START


@pytest.mark.parametrize('disturbed', range(3))
def test_something_else_on_the_gpu_is_not_held_against_a_candidate(clock: Clock, disturbed: int) -> None:
    """A GPU that draws a desktop, or has other users, is away for milliseconds; the file would keep that."""
    durations = [0.1] * 14
    durations[disturbed] = 5.0

    def candidate() -> None:
        clock.now += durations.pop(0)

    assert fastest._milliseconds(candidate, GPU, 0.25) == pytest.approx(0.1)


def test_what_takes_long_to_queue_has_a_longer_head_start(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the GPU would wait for the launches of a block that is computed branch after branch."""
    seconds = iter([5.0, 5.004, 10.0, 10.004, 20.0, 20.02, 30.0, 99.0])
    monkeypatch.setattr(fastest.time, 'perf_counter', lambda: next(seconds))
    fastest._milliseconds(lambda: None, GPU)
    head_starts = [cycles / fastest.CLOCK for cycles in clock.cycles]
    assert head_starts[0] == fastest.HEAD_START / fastest.CLOCK
    assert all(0.02 < head_start < 0.1 for head_start in head_starts[1:])
