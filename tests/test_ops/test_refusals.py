"""What does not fit is refused before the compiled kernels read or write beside a tensor, divide by zero or run out."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmunireplknet.ops import depthwise_conv2d, dilated_reparam_conv

from ..procedural import image, relative_error

ROOT = Path(__file__).resolve().parents[2]
CPP = torch.ops.mmuni_cpu
X, W = torch.zeros(2, 4, 9, 8), torch.zeros(4, 1, 5, 5)
SMALL, DOUBLE, META = torch.zeros(1, 4, 3, 3), X.double(), X.to('meta')
GAMMA, FLAT = torch.zeros(2, 4), torch.zeros(4 * 34)
ROWS, N_C, TOTAL = torch.zeros(2, 9, 4), torch.zeros(2, 4), torch.zeros(2, 2, 4)


def forward(x: Tensor = X, w: Tensor = W, bias: Tensor | None = None, out: Tensor = X, k: int = 5, r: int = 1) -> None:
    CPP.forward(x, w, bias, out.clone(), k, r, False)


def weight_grad(x: Tensor = X, grad: Tensor = X, out: Tensor = W, k: int = 5, r: int = 1) -> None:
    CPP.weight_grad(x, grad, out.clone(), k, r)


def block_forward(
    k: tuple = (5, 3), r: tuple = (1, 2), eps: tuple = (1.0, 1.0), w: Tensor = FLAT, gamma: Tensor = GAMMA,
    beta: Tensor = GAMMA[0], mean: Tensor = GAMMA, y: Tensor = X,
) -> None:  # fmt: skip
    CPP.block_forward(X, k, r, eps, w, gamma, beta, mean.clone(), GAMMA.clone(), y.clone())


def block_backward(
    grad: Tensor = X, grad_x: Tensor = X, grad_w: Tensor | None = FLAT, grad_gamma: Tensor = GAMMA,
    grad_beta: Tensor = GAMMA[0], given: bool = False,
) -> None:  # fmt: skip
    CPP.block_backward(
        grad, X, (5, 3), (1, 2), (1.0, 1.0), FLAT, GAMMA, GAMMA, GAMMA + 1, grad_x.clone(), grad_w, grad_gamma.clone(),
        grad_beta.clone(), given, 1.0,
    )  # fmt: skip


def apply(x: Tensor = ROWS, scale: Tensor = N_C, residual: Tensor = ROWS, out: Tensor = ROWS) -> None:
    CPP.apply(x, scale, N_C, residual, out.clone(), False)


def grad(g: Tensor = ROWS, slope: Tensor = N_C, out: Tensor = ROWS) -> None:
    CPP.grad(g, ROWS, N_C, N_C, slope, out.clone(), False)


def sums(g: Tensor = ROWS, pivot: Tensor = N_C[0], out: Tensor = ROWS, total: Tensor = TOTAL) -> None:
    CPP.sums(ROWS, g, pivot, out.clone(), total.clone(), False)


def test_what_fits_is_computed(cpp: Path) -> None:
    for function in (forward, weight_grad, block_forward, block_backward, apply, grad, sums):
        function()
    block_backward(grad_w=None)
    block_backward(given=True)


@pytest.mark.parametrize(
    ('function', 'arguments', 'message'),
    [
        (forward, dict(out=SMALL), 'out has 1 elements in dimension 0, but x has 2'),
        (forward, dict(out=X[..., 1:]), 'out has 7 elements in dimension 3, but x has 8'),
        (forward, dict(x=DOUBLE), 'x must be float32, bfloat16 or float16, not Double'),
        (forward, dict(x=X[0]), 'x must be a map .* not of 3 dimensions'),
        (forward, dict(w=W[..., 1:, 1:], k=4), 'kernel 4 must be odd'),
        (forward, dict(w=W[..., 1:-1]), 'weight must be 100 contiguous float32 values on the CPU, not 60 scattered'),
        (forward, dict(w=W.double()), 'weight must be 100 .* not 100 contiguous Double values'),
        (forward, dict(w=torch.cat((W, W))), 'weight must be 100 .* not 200 contiguous Float values'),
        (forward, dict(bias=GAMMA), 'bias must be 4 contiguous'),
        (forward, dict(k=-1), 'kernel -1 must be odd, and between 1 and 4095'),
        (forward, dict(r=0), 'dilation 0 must be at least 1'),
        (weight_grad, dict(grad=SMALL), 'grad has 1 elements in dimension 0'),
        (weight_grad, dict(out=W[:1]), 'out must be 100 .* not 25'),
        (weight_grad, dict(r=-3), 'dilation -3 must be at least 1'),
        (block_forward, dict(r=(1,)), '2 branches have 1 dilations and 2 eps'),
        (block_forward, dict(eps=(1.0,)), '2 branches have 2 dilations and 1 eps'),
        (block_forward, dict(r=(1, 0)), 'dilation 0 must be'),
        (block_forward, dict(k=(5, 4)), 'kernel 4 must be odd'),
        (block_forward, dict(k=(1,) * 13), 'at most 12 branches'),
        (block_forward, dict(w=FLAT[1:]), 'weight must be 136 .* not 135'),
        (block_forward, dict(gamma=GAMMA[:1]), 'gamma must be 8 .* not 4'),
        (block_forward, dict(beta=GAMMA), 'beta must be 4 .* not 8'),
        (block_forward, dict(mean=GAMMA[0]), 'mean must be 8 .* not 4'),
        (block_forward, dict(y=SMALL), 'y has 1 elements'),
        (block_backward, dict(grad=SMALL), 'grad has 1 elements'),
        (block_backward, dict(grad_x=SMALL), 'grad_x has 1 elements'),
        (block_backward, dict(grad_w=FLAT[:9]), 'grad_weight must be 136 .* not 9'),
        (block_backward, dict(grad_w=None, given=True), 'grad_weight is missing'),
        (block_backward, dict(grad_gamma=GAMMA[0]), 'grad_gamma must be 8 .* not 4'),
        (block_backward, dict(grad_beta=GAMMA[0, :1]), 'grad_beta must be 4 .* not 1'),
        (apply, dict(x=ROWS.mT), 'x must be contiguous'),
        (apply, dict(x=ROWS[0, 0]), r'x must be contiguous, \(N, ..., C\) and on the CPU, not 4 values of 1 dim'),
        (apply, dict(scale=N_C[0]), 'scale must be 8 .* not 4'),
        (apply, dict(residual=ROWS.double()), 'residual must be 72 contiguous Float values .* not 72 .* Double'),
        (apply, dict(out=ROWS[:1]), 'out must be 72 contiguous Float values on the CPU, as x, not 36'),
        (grad, dict(g=ROWS.bfloat16()), 'grad must be 72 .* not 72 contiguous BFloat16 values'),
        (grad, dict(slope=N_C[0]), 'slope must be 8 .* not 4'),
        (grad, dict(out=ROWS.mT), 'out must be 72 .* not 72 scattered Float values'),
        (sums, dict(g=ROWS[:1]), 'grad must be 72 .* not 36'),
        (sums, dict(pivot=N_C), 'pivot must be 4 .* not 8'),
        (sums, dict(out=ROWS[:1]), 'out must be 72 .* not 36'),
        (sums, dict(total=N_C), 'result must be 16 .* not 8'),
    ],
)  # fmt: skip
def test_compiled_operators(function: Callable, arguments: dict, message: str, cpp: Path) -> None:
    with pytest.raises(RuntimeError, match=message):
        function(**arguments)


BLOCK = dict(
    x=X, weights=[W, W[..., 1:-1, 1:-1]], dilations=[1, 2], gammas=[*GAMMA], betas=[*GAMMA], eps=[1.0, 1.0]
)  # fmt: skip


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(dilations=[1], eps=[1e-5]), 'got 2 weights, 1 dilations, 2 gammas, 2 betas, 1 eps'),
        (dict(weights=[], dilations=[], gammas=[], betas=[], eps=[]), 'got 0 weights'),
        (dict(gammas=[GAMMA[0]]), '1 gammas'),
        (dict(dilations=[1, 0]), r'dilations\[1\] is 0: it must be at least 1'),
        (dict(weights=[W, W[..., 1:, 1:]]), r'weights\[1\] is \(4, 1, 4, 4\): it must be \(4, 1, K, K\) with an odd K'),
        (dict(weights=[W[..., 1:-1], W]), r'weights\[0\] is \(4, 1, 5, 3\)'),
        (dict(weights=[W, torch.cat((W, W))]), r'weights\[1\] is \(8, 1, 5, 5\)'),
        (dict(weights=[W[:, 0], W]), r'weights\[0\] is \(4, 5, 5\)'),
        (dict(betas=[GAMMA[0], GAMMA[0, :1]]), r'betas\[1\] is \(1,\): it must be \(4,\)'),
        (dict(x=X[0]), r'x must be a floating \(N, C, H, W\) map, got torch.float32 \(4, 9, 8\)'),
        (dict(x=X.int()), 'got torch.int32'),
    ],
)
def test_dilated_reparam_conv(arguments: dict, message: str, backend: str) -> None:
    dilated_reparam_conv(**BLOCK, backend=backend)
    with pytest.raises(ValueError, match=message):
        dilated_reparam_conv(**{**BLOCK, **arguments}, backend=backend)


@pytest.mark.parametrize('weight', [W[..., 1:, 1:], W[..., 1:-1], W[..., 1:-1, :]], ids=lambda w: str(tuple(w.shape)))
def test_weights_of_the_operators(weight: Tensor, backend: str) -> None:
    """They are not square or not odd, and the output of a convolution would have another size."""
    for function in (torch.ops.mmuni.depthwise_conv2d, torch.ops.mmuni.depthwise_conv2d_input_grad):
        bias = (None,) if function is torch.ops.mmuni.depthwise_conv2d else ()
        with pytest.raises(ValueError, match=r'weight \(4, 1, .* must be \(C, 1, K, K\) with an odd K'):
            function(X, weight, *bias, 1, backend)


@pytest.mark.parametrize('dilation', [9, 10**9, 2**31 - 1, 2**31, 2**32, 2**62])
def test_taps_that_are_far_away(dilation: int, cpp: Path) -> None:
    """They meet zeros only; the one in the middle is left."""
    x, weight, grad = image((2, 4, 9, 8)), image((4, 1, 5, 5), 1).requires_grad_(), image((2, 4, 9, 8), 2)
    y = depthwise_conv2d(x.requires_grad_(), weight, None, dilation, 'cpp')
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    middle = weight.detach()[..., 2:3, 2:3].view(-1, 1, 1)
    assert torch.equal(y, x * middle)
    assert torch.equal(grad_x, grad * middle)
    expected = torch.zeros_like(weight)
    expected[:, 0, 2, 2] = (x * grad).detach().double().sum((0, 2, 3))
    assert relative_error(grad_weight, expected) < 1e-6


OUT_OF_MEMORY = """
import resource, torch
from mmunireplknet.ops import backends, depthwise_conv2d, dilated_reparam_conv
torch.set_num_threads(1)
backends.require('cpp')
x, w = torch.ones(16, 16, 256, 256), [torch.ones(16, 1, 13, 13), torch.ones(16, 1, 3, 3)]
c = [torch.ones(16)] * 2
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 150 * 2**20, -1))
try:
    dilated_reparam_conv(x, w, [1, 1], c, c, [1.0, 1.0])
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print(float(depthwise_conv2d(x[:1, :, :16, :16], w[1]).sum()), len(dilated_reparam_conv(x, w, [1, 1], c, c, [1.0] * 2)))
"""


def run(program: str, **env: str) -> subprocess.CompletedProcess:
    """A Python process with the compiled kernels."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', **env}
    return subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, env=env)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc, and limits the memory of a process as Linux does')
def test_out_of_memory(cpp: Path) -> None:
    """It raises, and afterwards everything works as before. The maps take 67 MB, and their tiles three times that."""
    done = run(OUT_OF_MEMORY)
    assert done.returncode == 0, done.stderr
    message, rest = done.stdout.splitlines()
    assert 'mmuni_cpu: out of memory, ' in message
    assert rest == f'{16 * 46**2:.1f} 4'


CHOICE = 'from mmunireplknet.ops import backends; print(backends.why_not("cpp"))'


@pytest.mark.slow
@pytest.mark.parametrize('name', ['protable', 'AVX2', 'sse'])
def test_unknown_instruction_set(name: str, cpp: Path) -> None:
    done = run(CHOICE, MMUNI_CPU_CAPABILITY=name)
    assert f'MMUNI_CPU_CAPABILITY={name} is unknown: it must be avx512, avx2 or portable.' in done.stdout
    assert 'the compiled CPU kernels are not used' in done.stderr


@pytest.mark.slow
def test_no_wish_for_an_instruction_set(cpp: Path) -> None:
    assert run(CHOICE, MMUNI_CPU_CAPABILITY='').stdout == '\n'
