from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from .launches import launches_of


@pytest.mark.parametrize('flipped', [False, True])
@pytest.mark.parametrize(('kernel', 'dilation', 'columns', 'shift'), [(13, 1, 16, 2), (5, 3, 16, 0), (31, 1, 8, 1)])
def test_its_products_are_the_convolution(
    gpu: SimpleNamespace, kernel: int, dilation: int, columns: int, shift: int, flipped: bool
) -> None:
    height, reach = 5, dilation * (kernel // 2)
    x, weight = torch.randn(3, height, columns, dtype=torch.float64), torch.randn(3, 1, kernel, kernel)
    table = gpu.toeplitz.expand(weight, dilation, flipped, torch.float32, columns, shift, pad=1)
    assert not table[:, [0, -1]].any()
    depth = table.shape[2]
    rows = F.pad(x, (reach + shift, depth - columns - reach - shift, reach, reach))
    windows = torch.stack([rows[:, ky * dilation :][:, :height] for ky in range(kernel)], 1)
    out = (windows @ table[:, 1:-1].double()).sum(1)
    taps = weight.flip(2, 3) if flipped else weight
    expected = F.conv2d(x[None], taps.double(), padding=reach, dilation=dilation, groups=3)[0]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_has_the_dtype_that_is_asked_for(gpu: SimpleNamespace) -> None:
    weight = torch.randn(2, 1, 3, 3)
    for dtype in (torch.float16, torch.bfloat16):
        table = gpu.toeplitz.expand(weight, 1, False, dtype)
        assert table.shape == (2, 3, 32, 16)
        assert torch.equal(table[:, :, 3:6, 3], weight[:, 0].to(dtype))


def test_more_channels_than_the_second_side_of_a_grid_has() -> None:
    """65535, as every side but the first."""
    from mmunireplknet.ops.gpu import toeplitz

    (launch,) = launches_of(toeplitz.expand, torch.empty(70000, 1, 31, 31, device='meta'), 1, False, torch.float16)
    assert launch.grid[0] == 70000
    assert max(launch.grid[1:]) < 2**16
