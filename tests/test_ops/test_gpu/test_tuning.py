import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SHAPE = (1, 1, 4, 17)


@pytest.fixture
def tuning(gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    gpu.tuning.results.cache_clear()
    yield gpu.tuning
    gpu.tuning.results.cache_clear()


def prefers(nth: int) -> Callable[[Callable[[], object]], float]:
    """A timer for which the nth function is the fastest; it runs none but the first."""
    calls = iter(range(100))

    def timer(function: Callable[[], object]) -> float:
        call = next(calls)
        if call == 0:
            assert function() is not None
        return 1.0 if call == nth else 2.0

    return timer


@pytest.mark.parametrize('operation', ['forward', 'weight_grad'])
def test_takes_what_was_the_fastest(tuning: SimpleNamespace, operation: str) -> None:
    x = torch.empty(SHAPE, dtype=torch.float16)
    divisions = tuning.candidates(operation, SHAPE[3], x.dtype)
    assert tuning.choose(operation, x, 3, 1) != divisions[1]
    times = tuning.tune(operation, SHAPE, 3, 1, x.dtype, 'cpu', prefers(1))
    assert list(times) == divisions
    tuning.results.cache_clear()  # as in the next process
    assert tuning.choose(operation, x, 3, 1) == divisions[1]
    assert tuning.choose(operation, x, 5, 1) != divisions[1]
    assert tuning.choose(operation, x.float(), 3, 1) != divisions[1]
    assert list(tuning.results_file().parent.iterdir()) == [tuning.results_file()]


@pytest.mark.parametrize('text', ['', '{"a": ', '[1]', '{"GPU, forward, torch.float16, K3": [4, 16, 99, 64, 4]}'])
def test_a_file_that_is_broken_is_ignored_and_replaced(tuning: SimpleNamespace, text: str) -> None:
    tuning.results_file().parent.mkdir(parents=True)
    tuning.results_file().write_text(text)
    assert tuning.results() == {}
    tuning.tune('forward', SHAPE, 3, 1, torch.float16, 'cpu', prefers(2))
    assert len(json.loads(tuning.results_file().read_text())) == 1


def test_what_is_kept_is_bounded(tuning: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, 'MOST_RESULTS', 2)
    config = tuning.candidates('forward', 32, torch.float16)[0]
    keys = [f'GPU, forward, torch.float16, K{kernel}' for kernel in (3, 5, 7)]
    for key in keys:
        tuning._keep(key, config)
    assert list(tuning.results()) == keys[1:]


def test_a_file_is_never_written_in_part(tuning: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tuning.candidates('forward', 32, torch.float16)[0]
    tuning._keep('GPU, forward, torch.float16, K3', config)
    before = tuning.results_file().read_text()

    def fail(value: object, file: object, indent: int) -> None:
        file.write('{"GPU')
        raise OSError('the disk is full')

    monkeypatch.setattr(json, 'dump', fail)
    with pytest.raises(OSError, match='full'):
        tuning._keep('GPU, forward, torch.float16, K5', config)
    assert tuning.results_file().read_text() == before
    assert list(tuning.results_file().parent.iterdir()) == [tuning.results_file()]


def test_refuses_other_operations(tuning: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match='input_grad'):
        tuning.tune('input_grad', SHAPE, 3)


def test_the_rule_fills_programs_and_the_gpu(tuning: SimpleNamespace) -> None:
    def block(shape: tuple[int, int, int, int]) -> int:
        return tuning.by_rule('forward', shape, 1, torch.bfloat16).block

    assert block((16, 320, 32, 32)) == 128
    assert block((2, 320, 16, 16)) == 16
    assert block((1, 8, 64, 64)) < 64  # large programs would be fewer than multiprocessors
    assert tuning.by_rule('forward', (16, 320, 7, 7), 1, torch.bfloat16)[:2] == (8, 8)
