"""The backbone without storage, traced, compiled and copied."""

import copy
import pickle

import pytest
import torch

from mmunireplknet import UniRepLKNet

from ..procedural import image, relative_error
from .tiny import TINY, step, tiny


@pytest.mark.parametrize('deploy', [False, True])
def test_meta_device(deploy):
    with torch.device('meta'):
        model = UniRepLKNet('xl', drop_path_rate=0.2, deploy=deploy)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {'meta'}
    with torch.device('meta'):
        small = UniRepLKNet(TINY, deploy=deploy)
    real = tiny(deploy=deploy).eval()
    small.load_state_dict(real.state_dict(), assign=True)
    x = image((1, 3, 32, 32))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(small.eval()(x), real(x), strict=True))


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('options', [{}, dict(channels_last=True), dict(out_indices=(1,))], ids=str)
def test_trace(deploy, options):
    """A trace computes the same on another batch and another size."""
    model = tiny(deploy=deploy, **options).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, image((1, 3, 64, 64)))
        for x in (image((1, 3, 64, 64), 1), image((2, 3, 96, 40), 2)):
            for a, b in zip(traced(x), model(x), strict=True):
                assert relative_error(a, b) < 1e-6


def test_trace_of_a_trunk():
    model = tiny(out_indices=(3,), gap_before_final_norm=True, deploy=True).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, image((1, 3, 64, 64)))
        assert relative_error(traced(image((2, 3, 80, 48)))[0], model(image((2, 3, 80, 48)))[0]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('channels_last', [False, True])
def test_compile_without_graph_breaks(deploy, channels_last):
    model = tiny(deploy=deploy, channels_last=channels_last).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    x = image((1, 3, 40, 56))
    with torch.no_grad():
        for a, b in zip(compiled(x), model(x), strict=True):
            assert relative_error(a, b) < 1e-6
    compiled.load_state_dict(compiled.state_dict())


@pytest.mark.parametrize('make_copy', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize(
    'options', [dict(with_cp=True, frozen_stages=1), dict(deploy=True), dict(norm_cfg=dict(type='SyncBN'))], ids=str
)
def test_copies(make_copy, options):
    model = tiny(**options)
    if model.deploy is False:
        step(model.train(), image((2, 3, 64, 64)))  # a model in use
    other = make_copy(model)
    x = image((1, 3, 40, 40))
    with torch.no_grad():
        expected = model.eval()(x)
        other.eval()
        assert all(torch.equal(a, b) for a, b in zip(other(x), expected, strict=True))
        for p in other.parameters():
            p.zero_()
        assert all(torch.equal(a, b) for a, b in zip(model(x), expected, strict=True))
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]
    assert other.train().stages[0][0].training == (options.get('frozen_stages', -1) < 1)
