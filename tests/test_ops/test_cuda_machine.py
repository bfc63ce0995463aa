"""The machine that runs CUDA kernels on the CPU: its matrix instructions are those of PTX, and it sees errors.

The tables here are those of the PTX ISA, 9.7.14.5 ("Matrix Fragments for mma.m16n8k16", "mma.m16n8k8") and "ldmatrix".
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable

import numpy as np
import pytest

from mmunireplknet.ops import build

from .cuda_emulation import compile_emulation

# A machine is compiled, which takes seconds.
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not build.compiler(), reason='there is no C++ compiler')]

GROUP, IN_GROUP = np.arange(32) >> 2, np.arange(32) % 4


@pytest.fixture(scope='module')
def machine(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = compile_emulation(tmp_path_factory.mktemp('machine'), 'checks')
    for name in ('make_mistake', 'product', 'matrices'):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def accumulators(i: int) -> tuple[np.ndarray, np.ndarray]:
    return (GROUP if i < 2 else GROUP + 8), IN_GROUP * 2 + (i & 1)


# Row and column of element i of every lane, of A and of B.
FRAGMENTS: list[tuple[int, int, Callable, Callable]] = [
    (
        0, 16,
        lambda i: (GROUP if i < 2 or 4 <= i < 6 else GROUP + 8, IN_GROUP * 2 + (i & 1) + (0 if i < 4 else 8)),
        lambda i: (IN_GROUP * 2 + (i & 1) + (0 if i < 2 else 8), GROUP),
    ),
    (
        1, 8,
        lambda i: (GROUP if i < 2 else GROUP + 8, IN_GROUP * 2 + (i & 1)),
        lambda i: (IN_GROUP * 2 + i, GROUP),
    ),
    (
        2, 8,
        lambda i: (GROUP if i in (0, 2) else GROUP + 8, IN_GROUP if i < 2 else IN_GROUP + 4),
        lambda i: (IN_GROUP if i == 0 else IN_GROUP + 4, GROUP),
    ),
]  # fmt: skip


@pytest.mark.parametrize(('kind', 'depth', 'place_a', 'place_b'), FRAGMENTS, ids=['m16n8k16', 'm16n8k8', 'tf32'])
def test_products_are_of_the_documented_fragments(
    machine: ctypes.CDLL, kind: int, depth: int, place_a: Callable, place_b: Callable
) -> None:
    rng = np.random.default_rng(kind)
    a, b = (rng.integers(-8, 8, shape).astype(np.float32) for shape in ((16, depth), (depth, 8)))
    dtype = np.float32 if kind == 2 else np.float16

    def fragments(matrix: np.ndarray, place: Callable, count: int, registers: int) -> np.ndarray:
        elements = np.stack([matrix[place(i)] for i in range(count)], 1).astype(dtype)
        words = np.ascontiguousarray(elements).view(np.uint32)
        return np.ascontiguousarray(np.pad(words, ((0, 0), (0, registers - words.shape[1]))))

    in_a, in_b = fragments(a, place_a, 16 * depth // 32, 4), fragments(b, place_b, 8 * depth // 32, 2)
    d = np.full((32, 4), np.nan, np.float32)
    assert machine.product(kind, pointer(in_a), pointer(in_b), pointer(d)) == b''
    for i in range(4):
        np.testing.assert_array_equal(d[:, i], (a @ b)[accumulators(i)])


def test_tensor_cores_do_not_see_the_last_bits_in_tf32(machine: ctypes.CDLL) -> None:
    a, b = (np.full((32, n), 1 + 2**-11 + 2**-23, np.float32) for n in (4, 2))
    d = np.zeros((32, 4), np.float32)
    assert machine.product(2, pointer(a), pointer(b), pointer(d)) == b''
    assert set(d.ravel()) == {8.0}


@pytest.mark.parametrize('sign', [1, -1])
def test_tensor_cores_cut_sums_off(machine: ctypes.CDLL, sign: int) -> None:
    """1 + 1.5 * 2**-24 is not rounded to the nearest, which is 1 + 2**-23; what is exact stays so."""
    for small, expected in ((1.5 * 2**-24, 1), (2**-23, 1 + 2**-23)):
        a, b = np.zeros((32, 4), np.float32), np.ones((32, 2), np.float32)
        a[IN_GROUP == 0, :2], a[IN_GROUP == 1, :2] = sign, sign * small
        d = np.zeros((32, 4), np.float32)
        assert machine.product(2, pointer(a), pointer(b), pointer(d)) == b''
        assert set(d.ravel()) == {np.float32(sign * expected)}


@pytest.mark.parametrize('transposed', [False, True])
def test_matrices_are_spread_as_documented(machine: ctypes.CDLL, transposed: bool) -> None:
    """Lane l gets row l / 4, elements 2 (l % 4) and the next; lanes 8 i to 8 i + 7 name the rows of matrix i."""
    rows = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    r = np.zeros((32, 4), np.uint32)
    assert machine.matrices(pointer(rows), pointer(r), transposed) == b''
    for matrix in range(4):
        expected = rows[matrix].T if transposed else rows[matrix]
        np.testing.assert_array_equal(r[:, matrix].copy().view(np.uint16).reshape(8, 8), expected)


@pytest.mark.parametrize(
    ('mistake', 'message'),
    [
        ('', ''),
        ('unwritten', 'is read, but was never written'),
        ('outside shared memory', 'shared memory has 1024'),
        ('outside the tensors', 'in no tensor'),
        ('unaligned', 'off its alignment of 16 bytes'),
        ('twice', 'written twice'),
        ('divergent', 'lanes of a warp are at'),
        ('deadlock', 'deadlock'),
        ('copy not awaited', 'while a copy to it is under way'),
        ('copy of others', 'race: .* was written by another thread|copy to it is under way|never written'),
        ('no barrier', 'race: .* was written by another thread|never written'),
        ('barrier of the warp alone', 'race: .* was written by another thread|never written'),
        ('written over too early', 'race: .* may be read by others still|race: .* was written by another thread'),
    ],
)
def test_mistakes_are_seen_in_every_order(machine: ctypes.CDLL, mistake: str, message: str) -> None:
    data = np.arange(64, dtype=np.uint32)
    for seed in range(20):
        said = machine.make_mistake(mistake.encode(), pointer(data), seed).decode()
        assert re.search(message, said) if message else said == '', (seed, said)
