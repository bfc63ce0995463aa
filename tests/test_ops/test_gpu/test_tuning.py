from types import SimpleNamespace

import pytest
import torch

from mmunireplknet.ops import backends, fastest

SHAPES = [
    (16, 320, 64, 64), (16, 512, 32, 32), (2, 320, 50, 84), (2, 320, 16, 16), (1, 8, 64, 64), (16, 320, 7, 7),
    (1, 5, 9, 17),
]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for memory in ('_times', '_divisions'):
        monkeypatch.setattr(fastest, memory, {})


@pytest.mark.parametrize('function', ['forward', 'input_grad', 'pooled', 'weight_grad'])
def test_takes_what_was_the_fastest(gpu: SimpleNamespace, function: str) -> None:
    """For maps of the kind that was timed, and for no others."""
    tuning, shape = gpu.tuning, (2, 3, 40, 37)
    x = torch.empty(shape, dtype=torch.float16)
    by_rule = tuning.choose(function, x, 3, 1)
    other = next(config for config in tuning.candidates(function, 37, x.dtype) if config != by_rule)
    fastest._learn(fastest.kind_of(function, x, 3, 1), f'triton {other.label}', 1.0)
    fastest._learn(fastest.kind_of(function, x, 3, 1), f'triton {by_rule.label}', 2.0)
    assert tuning.choose(function, x, 3, 1) == other
    assert tuning.choose(function, x[..., :33], 3, 1) == other
    for args in ((x, 5, 1), (x, 3, 2), (x.bfloat16(), 3, 1), (x[..., :30], 3, 1)):
        kind, rule = (
            fastest.kind_of(function, *args),
            tuning.worth_timing(function, tuple(args[0].shape), args[2], x.dtype),
        )
        assert (tuning.choose(function, *args), fastest.division(kind, 'triton')) == (rule[0], '')


def test_a_division_for_another_width_is_not_taken(gpu: SimpleNamespace) -> None:
    """Maps of 8 and of 15 columns are of one kind, but have patches of another form: the number of them counts."""
    wide, narrow = torch.empty(2, 3, 8, 15), torch.empty(2, 3, 8, 8)
    fastest._learn(fastest.kind_of('forward', wide, 3, 1), 'triton 32', 1.0)
    assert gpu.tuning.choose('forward', wide, 3, 1)[:3] == (4, 16, 32)
    assert gpu.tuning.choose('forward', narrow, 3, 1)[:3] == (8, 8, 32)
    fastest._learn(fastest.kind_of('weight_grad', wide, 3, 1), 'triton 32', 1.0)  # in 16 bits only
    assert gpu.tuning.choose('weight_grad', wide, 3, 1).block == 16


def test_the_rule_fills_programs_and_the_gpu(gpu: SimpleNamespace) -> None:
    def block(shape: tuple[int, int, int, int]) -> int:
        return gpu.tuning.worth_timing('forward', shape, 1, torch.bfloat16)[0].block

    assert block((16, 320, 32, 32)) == 128
    assert block((2, 320, 16, 16)) == 16
    assert block((1, 8, 64, 64)) < 64  # large programs would be fewer than multiprocessors
    assert gpu.tuning.worth_timing('forward', (16, 320, 7, 7), 1, torch.bfloat16)[0][:2] == (8, 8)


@pytest.mark.parametrize('function', ['forward', 'weight_grad'])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_what_is_worth_timing(
    gpu: SimpleNamespace, function: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """The first is taken where nothing is timed; few others, with labels of their own."""
    worth = gpu.tuning.worth_timing(function, shape, 1, dtype)
    assert gpu.tuning.choose(function, torch.empty(shape, dtype=dtype, device='meta'), 13, 1) == worth[0]
    assert {*worth} <= {*gpu.tuning.candidates(function, shape[3], dtype)}
    assert len({config.label for config in worth}) == len(worth) <= (2 if function == 'weight_grad' else 3)


def test_the_backend_has_its_divisions() -> None:
    """Each computes by itself, and sums where that is asked for."""
    backend = backends.module_of('triton')
    x = torch.empty(16, 320, 32, 32, dtype=torch.bfloat16, device='meta')
    divisions = backend.divisions('forward', x, 1)
    assert [*divisions] == ['128', '64', '32']
    assert [part.forward.keywords['config'].label for part in divisions.values()] == [*divisions]
    assert [*backend.divisions('weight_grad', x, 1)] == ['32', '16']
    assert backends._pools(divisions['64'].forward)
    assert backend.divisions('forward', x, 1)['64'] is divisions['64']


def test_every_function_asks_for_its_own(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name that ``backends`` times it under; a division that is given is taken without a question."""
    asked: list[str] = []

    def choose(function: str, x: torch.Tensor, *_: int) -> object:
        asked.append(function)
        return gpu.tuning.candidates(function, x.shape[3], x.dtype)[0]

    x, weight = torch.ones(1, 1, 4, 9), torch.ones(1, 1, 3, 3)
    config = gpu.tuning.candidates('forward', 9, x.dtype)[1]
    monkeypatch.setattr(gpu.tuning, 'choose', choose)
    gpu.convolution.forward(x, weight, None, 1, config=config)
    assert asked == []
    gpu.convolution.forward(x, weight, None, 1)
    gpu.convolution.forward(x, weight, None, 1, True)
    gpu.convolution.forward(x, weight, None, 1, pooled=True)
    gpu.gram.weight_grad(x, x, 3, 1)
    assert asked == ['forward', 'input_grad', 'pooled', 'weight_grad']
