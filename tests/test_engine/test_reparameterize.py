"""State dicts and files into deploy form: exact, in their own dtype, refused where something is wrong."""

import copy

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmunireplknet import CheckpointError, switch_to_deploy
from mmunireplknet.engine import reparameterize
from mmunireplknet.engine.reparameterize import (
    AlreadyDeployedError,
    ParityError,
    Reparameterizer,
    deploy_mark,
    find_checkpoints,
    reparameterize_all,
    reparameterize_checkpoint,
)

from ..procedural import randomise
from ..test_models.tiny import TINY, tiny

SLOW = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float16, torch.float64)]
DTYPES = [torch.float32, *SLOW]
CFG = Config(dict(model=dict(type='UniRepLKNet', arch=TINY)))


class Two(nn.Module):
    """Two backbones and a head."""

    def __init__(self):
        super().__init__()
        self.rgb, self.depth = tiny(), tiny(in_channels=1)
        self.head = randomise(nn.BatchNorm2d(4))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_merge(dtype):
    model = Two().to(dtype).train()
    state = model.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    merged, parity = Reparameterizer(model).merge(state)
    expected = switch_to_deploy(copy.deepcopy(model).eval()).state_dict()
    assert merged.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(merged[key], value), key
        assert merged[key].dtype == value.dtype
    assert {name.split('[')[0].split(' ')[0] for name in parity.errors} == {'rgb', 'depth'}
    assert parity.dtype == str(dtype).split('.')[1]
    assert any('as float32' in name for name in parity.errors) == (dtype in (torch.bfloat16, torch.float16))
    assert merged._metadata['head']['version'] == 2
    assert model.training
    assert model.rgb.training
    assert not model.rgb.deploy
    assert all(torch.equal(state[key], value) for key, value in before.items())


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_a_small_fault_of_the_folding_is_found(dtype, monkeypatch):
    def wrong(model):
        switch_to_deploy(model)
        with torch.no_grad():
            model.stages[1][1].pwconv2[0].weight.mul_(0.97)

    monkeypatch.setattr(reparameterize, 'switch_to_deploy', wrong)
    model = tiny().to(dtype)
    with pytest.raises(ParityError, match=r'backbone.*\[1\].*Nothing was written'):
        Reparameterizer(model).merge(model.state_dict())


def test_a_tolerance_of_ones_own():
    model = tiny()
    with pytest.raises(ParityError, match=r'<= 1\.0e-12'):
        Reparameterizer(model, tolerance=1e-12).merge(model.state_dict())


def test_a_state_of_another_model():
    state = switch_to_deploy(tiny().eval()).state_dict()
    with pytest.raises(CheckpointError, match='in deploy form'):
        Reparameterizer(tiny()).merge(state)
    with pytest.raises(CheckpointError, match='holds no UniRepLKNet'):
        Reparameterizer(nn.Conv2d(1, 1, 1))


class TestFiles:
    @pytest.fixture
    def training(self, tmp_path):
        file = tmp_path / 'iter_1.pth'
        torch.save(
            dict(state_dict=tiny().state_dict(), meta=dict(dataset_meta=dict(classes=['a'])), optimizer={}), file
        )
        return file

    def test_mark(self, training, tmp_path):
        parity = reparameterize_checkpoint(CFG, training, tmp_path / 'new' / 'deploy.pth')
        assert parity.passed
        assert parity.images == 'a random image'
        written = torch.load(tmp_path / 'new' / 'deploy.pth', weights_only=True)
        assert set(written) == {'meta', 'state_dict'}
        assert written['meta']['dataset_meta'] == dict(classes=['a'])
        mark = deploy_mark(tmp_path / 'new' / 'deploy.pth')
        assert mark == written['meta']['mmunireplknet']
        assert (mark['source'], mark['relative_difference']) == ('iter_1.pth', parity.errors)
        assert deploy_mark(training) is None
        assert deploy_mark(tmp_path / 'nothing') is None

    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    def test_dtype(self, tmp_path, dtype):
        torch.save(tiny().to(dtype).state_dict(), tmp_path / 'in.pth')
        reparameterize_checkpoint(CFG, tmp_path / 'in.pth', tmp_path / 'out.pth')
        written = torch.load(tmp_path / 'out.pth')
        assert {v.dtype for v in written['state_dict'].values()} == {dtype}
        assert written['meta']['mmunireplknet']['dtype'] == str(dtype).split('.')[1]

    def test_never_over_itself(self, training):
        content = training.read_bytes()
        with pytest.raises(CheckpointError, match='would be lost'):
            reparameterize_checkpoint(CFG, training, training)
        assert training.read_bytes() == content

    def test_a_wrong_fold_writes_nothing(self, training, tmp_path, monkeypatch):
        monkeypatch.setattr(
            reparameterize, 'switch_to_deploy', lambda model: model.stages[0][0].norm.reset_parameters()
        )
        with pytest.raises(ParityError, match=r'iter_1\.pth: the deploy form does not compute'):
            reparameterize_checkpoint(CFG, training, tmp_path / 'out.pth')
        assert not (tmp_path / 'out.pth').exists()

    def test_one_bad_file_does_not_keep_the_others(self, training, tmp_path):
        torch.save(switch_to_deploy(tiny().eval()).state_dict(), tmp_path / 'a_deploy.pth')
        (tmp_path / 'b.pth').write_bytes(b'nothing')
        names = ['b.pth', 'a_deploy.pth', 'nowhere.pth', 'iter_1.pth']
        results = [r for _, r in reparameterize_all(CFG, [(tmp_path / n, tmp_path / 'out' / n) for n in names])]
        assert [type(r).__name__ for r in results] == [
            'CheckpointError', 'AlreadyDeployedError', 'FileNotFoundError', 'Parity'
        ]  # fmt: skip
        assert [p.name for p in (tmp_path / 'out').iterdir()] == ['iter_1.pth']

    def test_a_config_of_the_deploy_form(self, training, tmp_path):
        cfg = Config(dict(model=dict(type='UniRepLKNet', arch=TINY, deploy=True)))
        with pytest.raises(AlreadyDeployedError, match='nothing to convert'):
            reparameterize_checkpoint(cfg, training, tmp_path / 'x.pth')


def test_find_checkpoints(tmp_path):
    names = ['iter_10.pth', 'iter_9.pth', 'best_iter_9.safetensors']
    for name in [*names, 'last_checkpoint', 'iter_9.pth.7.tmp', 'run.log']:
        (tmp_path / name).write_bytes(b'')
    (tmp_path / 'deeper').mkdir()
    (tmp_path / 'deeper' / 'iter_1.pth').write_bytes(b'')
    found = [path.name for path in find_checkpoints([str(tmp_path)])]
    assert found == ['best_iter_9.safetensors', 'iter_9.pth', 'iter_10.pth']
    assert [p.name for p in find_checkpoints([f'{tmp_path}/iter_*.pth', f'{tmp_path}/iter_9.pth'])] == [
        'iter_9.pth', 'iter_10.pth'
    ]  # fmt: skip
    with pytest.raises(FileNotFoundError, match='no match'):
        find_checkpoints([f'{tmp_path}/epoch_*.pth'])
