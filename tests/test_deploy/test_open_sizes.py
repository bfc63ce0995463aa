"""mmseg's resize with align_corners, in an export whose sizes are open."""

import pytest
import torch
from torch import nn

from mmunireplknet.compat import resize_of_open_sizes

from ..procedural import image


class Twice(nn.Module):
    def forward(self, x):
        from mmseg.models.utils import resize

        return resize(x, size=[2 * x.shape[2], 2 * x.shape[3]], mode='bilinear', align_corners=True)


def export(x):
    sizes = ({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    return torch.export.export(Twice(), (x,), dynamic_shapes=sizes, strict=False).module()


@pytest.mark.slow
def test_align_corners():
    resize = pytest.importorskip('mmseg.models.utils').resize
    x, other, before = image((1, 2, 6, 8)), image((1, 2, 9, 5)), resize.__defaults__
    with pytest.raises(Exception, match='Constraints violated'):  # else the work-around can go
        export(x)
    with resize_of_open_sizes():
        exported = export(x)
    assert resize.__defaults__ == before
    assert torch.allclose(exported(other), Twice()(other), atol=1e-6)
    with pytest.raises(RuntimeError, match='something'), resize_of_open_sizes():
        raise RuntimeError('something')
    assert resize.__defaults__ == before
