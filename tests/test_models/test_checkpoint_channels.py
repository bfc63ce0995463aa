"""Loading weights of three input channels into a model of another number."""

import mmengine
import pytest
import torch

from mmunireplknet import CheckpointError, UniRepLKNet, load_checkpoint

from ..procedural import image, relative_error
from .checkpoint_files import blank, published, saved
from .tiny import TINY, tiny


def by_load_checkpoint(model, file):
    load_checkpoint(model, file)


def by_init_cfg(model, file):
    model.init_cfg = dict(type='Pretrained', checkpoint=str(file))
    model._is_init = False
    model.init_weights()


def by_mmengine(model, file):
    mmengine.runner.load_checkpoint(model, str(file))


def by_load_state_dict(model, file):
    model.load_state_dict(torch.load(file, weights_only=True), strict=False)


@pytest.mark.parametrize('load', [by_load_checkpoint, by_init_cfg, by_mmengine, by_load_state_dict])
@pytest.mark.parametrize('in_channels', [1, 2, 4, 6])
def test_input_channels(tmp_path, checkpoint_log, load, in_channels):
    """One channel takes the sum over RGB; more take RGB repeated, times 3 / in_channels. One line says so."""
    state = published()
    stem = state['downsample_layers.0.0.weight']
    model = blank(in_channels=in_channels)
    load(model, saved(tmp_path / 'x.pth', state))
    adapted = model.downsample_layers[0][0].weight
    assert adapted.shape == (TINY['dims'][0] // 2, in_channels, 3, 3)
    for c in range(in_channels):
        expected = stem.sum(1) if in_channels == 1 else stem[:, c % 3] * 3 / in_channels
        assert torch.allclose(adapted[:, c], expected, rtol=1e-6, atol=0)
    lines = [line for line in checkpoint_log if 'adapted' in line]
    assert lines == [f'The stem was adapted from 3 to {in_channels} input channels (see adapt_stem).']
    assert torch.equal(model.stages[3][0].gamma, state['stages.3.0.gamma'])


@pytest.mark.parametrize('in_channels', [1, 6])
def test_response_to_adapted_channels(tmp_path, in_channels):
    """A grey image answers as its RGB copy, and RGB twice as RGB."""
    file = saved(tmp_path / 'x.pth', tiny().state_dict())
    model = UniRepLKNet(TINY, in_channels=in_channels).eval()
    load_checkpoint(model, file)
    if in_channels == 1:
        x = image((1, 1, 64, 64))
        rgb = x.expand(1, 3, 64, 64)
    else:
        rgb = image((1, 3, 64, 64))
        x = torch.cat([rgb, rgb], 1)
    with torch.no_grad():
        for a, b in zip(model(x), tiny().eval()(rgb), strict=True):
            assert relative_error(a, b) < 1e-5


def test_callers_dict_is_not_changed():
    state = tiny().state_dict()
    stem = state['downsample_layers.0.0.weight']
    UniRepLKNet(TINY, in_channels=1).load_state_dict(state)
    assert state['downsample_layers.0.0.weight'] is stem


def test_channels_that_are_not_adapted(tmp_path, checkpoint_log):
    """Only 3 channels are adapted: to a model of 3 others are refused."""
    for source, target in ((1, 3), (4, 3), (4, 6)):
        file = saved(tmp_path / 'x.pth', tiny(in_channels=source).state_dict())
        with pytest.raises(CheckpointError, match=rf'\(4, {source}, 3, 3\), not \(4, {target}, 3, 3\).*{target} input'):
            load_checkpoint(UniRepLKNet(TINY, in_channels=target), file)
    load_checkpoint(UniRepLKNet(TINY, in_channels=4), saved(tmp_path / 'x.pth', tiny(in_channels=4).state_dict()))
    assert not checkpoint_log
