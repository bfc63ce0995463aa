"""tools/reparameterize.py on folders, patterns and lists of checkpoints, with and without data."""

import shutil

import pytest
import torch

from mmunireplknet import switch_to_deploy
from mmunireplknet.datasets.digit_scenes import generate

from ..test_models.tiny import tiny
from .test_command_line import run_tool

CONFIG = """
custom_imports = dict(imports=['mmunireplknet'], allow_failed_imports=False)
arch = dict(depths=(1, 2, 2, 1), dims=(8, 12, 16, 20), kernel_sizes=((3,), (7, 5), (13, 3), (19,)))
model = dict(type='UniRepLKNet', arch=arch)
"""
DATA = """
default_scope = 'mmseg'
test_dataloader = dict(dataset=dict(
    type='BaseSegDataset', data_root={root!r}, metainfo=dict(classes=['a', 'b']), reduce_zero_label=False,
    data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='PackSegInputs')],
))
"""


@pytest.fixture
def config(tmp_path):
    file = tmp_path / 'tiny.py'
    file.write_text(CONFIG)
    return file


@pytest.fixture
def run(tmp_path):
    """A folder with two training checkpoints, a deploy one and a damaged one."""
    folder = tmp_path / 'run'
    folder.mkdir()
    state = tiny().state_dict()
    for name in ('iter_9.pth', 'iter_10.pth'):
        torch.save(dict(state_dict=state, meta=dict(iter=name)), folder / name)
    torch.save(dict(state_dict=switch_to_deploy(tiny().eval()).state_dict()), folder / 'iter_9_deploy.pth')
    (folder / 'iter_8.pth').write_bytes((folder / 'iter_9.pth').read_bytes()[:-100])
    (folder / 'last_checkpoint').write_text('iter_10.pth')
    return folder


def test_a_folder(config, run, tmp_path, capsys):
    out = tmp_path / 'out'
    assert run_tool('reparameterize.py', config, run, out) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if 'mmengine' not in line]
    assert [line.split(':')[0].rpartition('/')[2] for line in lines[:-1]] == [
        'iter_8.pth', 'iter_9.pth', 'iter_9_deploy.pth', 'iter_10.pth'
    ]  # fmt: skip
    assert 'FAILED' in lines[0]
    assert 'truncated' in lines[0]
    assert 'written; relative L2 difference of both forms on a random image' in lines[1]
    assert 'skipped, it is in deploy form already' in lines[2]
    assert lines[4] == '2 written, 1 skipped, 1 failed'
    assert {p.name for p in out.iterdir()} == {'iter_9_deploy.pth', 'iter_10_deploy.pth'}
    assert torch.load(out / 'iter_10_deploy.pth')['meta']['iter'] == 'iter_10.pth'

    (run / 'iter_8.pth').unlink()
    assert run_tool('reparameterize.py', config, run, run) is None
    assert 'iter_10_deploy.pth' in {p.name for p in run.iterdir()}, 'they may stand beside the training ones'


@pytest.mark.slow
def test_patterns_and_lists(config, run, tmp_path, capsys):
    out = tmp_path / 'out'
    assert run_tool('reparameterize.py', config, f'{run}/iter_1*.pth', out) is None
    assert run_tool('reparameterize.py', config, run / 'iter_9.pth', run / 'iter_10.pth', out) is None
    assert capsys.readouterr().out.count('0 skipped, 0 failed') == 2
    assert {p.name for p in out.iterdir()} == {'iter_9_deploy.pth', 'iter_10_deploy.pth'}


def test_what_cannot_be_done_is_one_sentence(config, run, tmp_path):
    assert 'no match' in run_tool('reparameterize.py', config, f'{run}/epoch_*.pth', tmp_path / 'out')
    assert 'is a file' in run_tool('reparameterize.py', config, run, run / 'iter_9.pth')
    shutil.copytree(run, tmp_path / 'other')
    assert 'the same name' in run_tool('reparameterize.py', config, run, tmp_path / 'other', tmp_path / 'out')
    assert 'would be lost' in run_tool('reparameterize.py', config, run / 'iter_10.pth', run / 'iter_10.pth')
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_a_real_image_where_there_is_one(config, run, tmp_path, capsys):
    pytest.importorskip('mmseg.datasets')
    generate(tmp_path / 'scenes', dict(train=1, val=1), size=(64, 80))
    for root, images in (('scenes', '1 image of the test data, 64x80'), ('nowhere', 'a random image')):
        config.write_text(CONFIG + DATA.format(root=str(tmp_path / root)))
        assert run_tool('reparameterize.py', config, run / 'iter_9.pth', tmp_path / f'{root}.pth') is None
        assert f'on {images}, float32' in capsys.readouterr().out
        assert torch.load(tmp_path / f'{root}.pth')['meta']['mmunireplknet']['images'] == images
