"""Files: where they are looked for, how damaged ones are refused, and that none of them is ever executed."""

import argparse
import os
import pickle
import re
import shutil
import struct
from collections import OrderedDict
from pathlib import Path
from urllib.error import URLError

import mmengine
import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader

from mmunireplknet import CheckpointError, UniRepLKNet, load_checkpoint
from mmunireplknet.models import arch_zoo, checkpoint_file
from mmunireplknet.models.arch_zoo import CHECKPOINTS
from mmunireplknet.models.checkpoint_file import find_checkpoint, read_checkpoint

from .checkpoint_files import (
    FILE_PATHS,
    NORMS,
    Net,
    assert_loaded,
    blank,
    prefixed,
    published,
    runner,
    saved,
    training_file,
)  # fmt: skip
from .tiny import TINY, tiny


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, an empty working directory and an empty hub folder; the attempted downloads."""
    asked = []

    def download(url, dst, hash_prefix=None, progress=True):
        asked.append((url, dst, hash_prefix))
        raise URLError(OSError(-3, 'Temporary failure in name resolution'))

    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize('share', [0.0, 0.001, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize('zipped', [True, False])
def test_truncated_file(tmp_path, share, zipped):
    file = saved(tmp_path / 'x.pth', published(), _use_new_zipfile_serialization=zipped)
    size = int(share * file.stat().st_size)
    os.truncate(file, size)
    with pytest.raises(CheckpointError, match=rf'x\.pth.*({size:,} bytes|no checkpoint)'):
        load_checkpoint(tiny(), file)


def test_damaged_files(tmp_path):
    """Random bytes changed: read or refused as a checkpoint, never another error."""
    random = np.random.RandomState(0)
    outcomes = []
    for zipped in (True, False):
        file = saved(tmp_path / 'x.pth', dict(state_dict=dict(a=torch.ones(3)), meta=[1, 'x']),
                     _use_new_zipfile_serialization=zipped)  # fmt: skip
        data = file.read_bytes()
        for _ in range(100):
            damaged = bytearray(data)
            for position in random.randint(0, min(len(data), 600), 3):
                damaged[position] = random.randint(256)
            file.write_bytes(damaged)
            try:
                read_checkpoint(file)
                outcomes.append('read')
            except CheckpointError as error:
                outcomes.append('refused' if str(file) in str(error) else str(error))
    assert set(outcomes) == {'read', 'refused'}
    assert outcomes.count('refused') > 100


@pytest.mark.parametrize('content', [b'', b'hello', b'<!DOCTYPE html><html>Not found</html>', b'\x80\x02.', b'(lp0\n.'])
def test_not_a_checkpoint(tmp_path, content):
    file = tmp_path / 'x.pth'
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r'x\.pth'):
        load_checkpoint(tiny(), file)


def test_directory(tmp_path):
    with pytest.raises(CheckpointError, match='is a directory; expected a checkpoint file'):
        load_checkpoint(tiny(), tmp_path)


@pytest.mark.parametrize('data', [[1, 2], torch.ones(3), {}, dict(state_dict={}), dict(epoch=3), {3: 'x'}], ids=str)
def test_no_weights(tmp_path, data):
    with pytest.raises(CheckpointError, match=r'expected a dict of tensors|no tensors in the checkpoint'):
        load_checkpoint(tiny(), saved(tmp_path / 'x.pth', data))


# ------------------------------------------------------------------------------------------ names and downloads


def test_unknown_name(offline):
    with pytest.raises(FileNotFoundError) as caught:
        load_checkpoint(tiny(), 'nothing.pth')
    message = str(caught.value)
    assert 'There is no checkpoint nothing.pth' in message
    assert all(name in message for name in CHECKPOINTS)
    assert not offline


@pytest.mark.parametrize('name', ['unireplknet_t_in1k', 'unireplknet_t_in1k_224_acc83.21.pth',
                                  'somewhere/unireplknet_t_in1k_224_acc83.21.pth',
                                  CHECKPOINTS['unireplknet_t_in1k'].url])  # fmt: skip
def test_published_file_that_cannot_be_had(offline, name, tmp_path):
    """One sentence: the file, where it is from, where to put it, how to train without it."""
    file = 'unireplknet_t_in1k_224_acc83.21.pth'
    model = UniRepLKNet(TINY, init_cfg=dict(type='Pretrained', checkpoint=name))
    with pytest.raises(CheckpointError) as caught:
        model.init_weights()
    message = str(caught.value)
    for part in (
        file,
        'Temporary failure in name resolution',
        'https://huggingface.co/DingXiaoH/UniRepLKNet',
        f'put it at checkpoints/{file}',
        str(tmp_path / 'torch' / 'hub' / 'checkpoints' / file),
        '--cfg-options model.backbone.init_cfg=None',
    ):
        assert part in message
    assert not re.search(r'[.!?]\s', message)
    assert '\n' not in message
    assert offline == [(CHECKPOINTS['unireplknet_t_in1k'].url, str(tmp_path / 'torch/hub/checkpoints' / file), None)]


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_digest_is_passed_on(offline, name):
    entry = CHECKPOINTS[name]
    for given in (name, entry.file, entry.url):
        with pytest.raises(CheckpointError):
            find_checkpoint(given)
    assert [hash_prefix for _, _, hash_prefix in offline] == [entry.sha256 or None] * 3
    assert {url for url, _, _ in offline} == {entry.url}


@pytest.mark.parametrize('folder', ['checkpoints', 'torch/hub/checkpoints'])
def test_files_put_there_by_hand(offline, tmp_path, folder):
    entry = CHECKPOINTS['unireplknet_a_in1k']
    state = published()
    (tmp_path / folder).mkdir(parents=True)
    saved(tmp_path / folder / entry.file, state)
    for name in ('unireplknet_a_in1k', entry.file, f'elsewhere/{entry.file}', entry.url, Path(entry.file)):
        model = blank()
        load_checkpoint(model, name)
        assert_loaded(model, state, untouched=NORMS)
    model = Net()
    load_checkpoint(model.backbone, 'unireplknet_a_in1k')
    assert not offline


def test_local_file_wins(offline, tmp_path):
    """A file that is called like a published one is taken as it is."""
    saved(tmp_path / 'unireplknet_a_in1k', published())
    assert find_checkpoint('unireplknet_a_in1k') == Path('unireplknet_a_in1k')


def test_download(monkeypatch, tmp_path):
    """The real downloader, from a folder that stands in for the host: digests are checked, nothing half stays."""
    host = tmp_path / 'host'
    host.mkdir()
    monkeypatch.setattr(arch_zoo, 'HOST', host.as_uri() + '/')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.chdir(tmp_path)
    state = published()
    for name in ('unireplknet_a_in1k', 'unireplknet_f_in1k'):
        saved(host / CHECKPOINTS[name].file, state)
    model = blank()
    load_checkpoint(model, 'unireplknet_f_in1k')  # no digest is known
    assert_loaded(model, state, untouched=NORMS)
    with pytest.raises(CheckpointError, match=r'unireplknet_a_in1k.*invalid hash value .expected "a0ef11d8"'):
        load_checkpoint(model, 'unireplknet_a_in1k')
    with pytest.raises(CheckpointError, match=r'unireplknet_p_in1k.*could not be downloaded .*No such file'):
        load_checkpoint(model, 'unireplknet_p_in1k')
    folder = tmp_path / 'torch' / 'hub' / 'checkpoints'
    assert [p.name for p in folder.iterdir()] == [CHECKPOINTS['unireplknet_f_in1k'].file]


def test_other_addresses(offline, tmp_path):
    with pytest.raises(CheckpointError, match=r'not encrypted: download checkpoints over https'):
        load_checkpoint(tiny(), 'http://example.com/x.pth')
    assert not offline
    with pytest.raises(
        CheckpointError, match=r'^x\.pth is not here.*get https://example.com/a/x\.pth\?download=true by'
    ):
        load_checkpoint(tiny(), 'https://example.com/a/x.pth?download=true')
    assert offline == [
        ('https://example.com/a/x.pth?download=true', str(tmp_path / 'torch/hub/checkpoints/x.pth'), None)
    ]


def test_one_download_a_machine(offline, monkeypatch):
    """Other local processes wait for the first, and fail with it instead of waiting for ever."""
    monkeypatch.setenv('LOCAL_RANK', '1')
    waited = []
    monkeypatch.setattr(checkpoint_file, 'barrier', lambda: waited.append(1))
    with pytest.raises(CheckpointError, match=r'could not be downloaded \(see the first process\)'):
        find_checkpoint('unireplknet_a_in1k')
    assert not offline
    monkeypatch.setenv('LOCAL_RANK', '0')
    with pytest.raises(CheckpointError, match='Temporary failure'):
        find_checkpoint('unireplknet_a_in1k')
    assert len(offline) == 1
    assert len(waited) == 2


# ------------------------------------------------------------------------------------------ nothing is executed


class Mkdir:
    """A pickle of this makes a directory when it is loaded without care."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


class Evaluated(Mkdir):
    def __reduce__(self):
        return eval, (f'__import__("os").mkdir({self.marker!r})',)


class Attribute:
    """A pickled ``getattr`` of something other than HistoryBuffer's four statistics."""

    def __init__(self, *args):
        self.args = args

    def __reduce__(self):
        return getattr, self.args


def spliced(marker):
    """Opcodes of a pickle that takes an attribute and then calls ``os.mkdir``."""
    name = marker.encode()
    return b''.join([
        b'\x80\x02',
        b'c__builtin__\ngetattr\n', b'cargparse\nNamespace\n', b'X', struct.pack('<I', 8), b'__init__', b'\x86R',
        b'0', b'cos\nmkdir\n', b'X', struct.pack('<I', len(name)), name, b'\x85R.',
    ])  # fmt: skip


def whole_file(payload):
    return dict(
        state_dict=OrderedDict(prefixed(tiny().state_dict(), 'backbone.')), meta=dict(epoch=0, iter=1, x=payload)
    )


PAYLOADS = {
    'call': lambda marker: whole_file(Mkdir(marker)),
    'eval': lambda marker: whole_file(Evaluated(marker)),
    'whole file': Mkdir,
    'in place of a tensor': lambda marker: dict(state_dict={'backbone.stages.0.0.gamma': Mkdir(marker)}),
    'in an optimizer': lambda marker: dict(whole_file(None), optimizer=dict(state=[Mkdir(marker)])),
    'behind an allowed type': lambda marker: whole_file(argparse.Namespace(a=Mkdir(marker))),
}


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('payload', PAYLOADS.values(), ids=PAYLOADS)
def test_payloads(tmp_path, payload, zipped):
    """They are live: torch alone, told not to care, executes them. By load_checkpoint they are refused."""
    marker = tmp_path / 'executed'
    file = saved(tmp_path / 'x.pth', payload(marker), _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r'x\.pth was refused and nothing in it was executed.*(mkdir|eval)'):
        load_checkpoint(tiny(), file)
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.is_dir()


@pytest.mark.parametrize('through', FILE_PATHS)
@pytest.mark.parametrize('payload', ['call', 'eval'])
def test_payload_by_every_path(tmp_path, through, payload):
    marker = tmp_path / 'executed'
    file = saved(tmp_path / 'x.pth', PAYLOADS[payload](marker))
    with pytest.raises(CheckpointError, match='was refused and nothing in it was executed'):
        through(file, tmp_path / 'work', False)
    assert not marker.exists()


@pytest.mark.parametrize(
    'args',
    [
        (HistoryBuffer, 'register_statistics'),
        (HistoryBuffer, '__init__'),
        (HistoryBuffer, '__class__'),
        (argparse.Namespace, '__init__'),
        (dict, 'get'),
        ({}, 'get'),
        (Attribute(HistoryBuffer, 'mean'), '__globals__'),
        (HistoryBuffer([1.0], [1]), 'mean'),
        (torch.Size, 'numel'),
    ],
    ids=lambda args: f'{type(args[0]).__name__} {getattr(args[0], "__name__", "")} {args[1]}',
)
def test_getattr(tmp_path, args):
    file = saved(tmp_path / 'x.pth', whole_file(Attribute(*args)))
    torch.load(file, weights_only=False)  # it is well-formed
    with pytest.raises(CheckpointError, match='was refused and nothing in it was executed'):
        load_checkpoint(tiny(), file)
    with pytest.raises(CheckpointError):
        mmengine.runner.load_checkpoint(Net(), str(file))


@pytest.mark.parametrize('name', ['current', 'max', 'mean', 'min'])
def test_allowed_getattr(tmp_path, name):
    file = saved(tmp_path / 'x.pth', whole_file(Attribute(HistoryBuffer, name)))
    assert read_checkpoint(file)['meta']['x'] is getattr(HistoryBuffer, name)


def test_chain_of_getattr(tmp_path):
    marker = str(tmp_path / 'executed')
    file = tmp_path / 'x.pth'
    file.write_bytes(spliced(marker))
    with pytest.raises(CheckpointError, match='was refused'):
        load_checkpoint(tiny(), file)
    assert not os.path.exists(marker)
    pickle.loads(file.read_bytes())
    assert os.path.exists(marker)


def test_schemes_of_mmengine(tmp_path, monkeypatch):
    """Names that mmengine resolves on its own, to a local file or an address, end at the same door."""
    marker = tmp_path / 'executed'
    file = saved(tmp_path / 'evil.pth', whole_file(Mkdir(marker)))
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    addresses = {'local': 'evil.pth', 'remote': 'https://example.com/evil.pth'}
    mmengine.dump(addresses, tmp_path / 'open_mmlab.json')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda url, dst, **_: shutil.copy(file, dst))
    for name in ('openmmlab://local', 'open-mmlab://remote', 'https://example.com/evil.pth'):
        with pytest.raises((CheckpointError, pickle.UnpicklingError)):
            CheckpointLoader.load_checkpoint(name, 'cpu')
        with pytest.raises((CheckpointError, pickle.UnpicklingError)):
            mmengine.runner.load_checkpoint(Net(), name)
    assert not marker.exists()


def test_text_of_a_config_is_not_executed(tmp_path):
    """mmengine's resume runs the text of ``meta['config']`` as Python, plain data or not."""
    marker = tmp_path / 'executed'
    text = f'__import__("os").mkdir({str(marker)!r})\n'
    file = training_file(tmp_path / 'x.pth', meta=dict(epoch=0, iter=1, config=text))
    run = runner(tmp_path / 'work', load_from=str(file), resume=True)
    run.train()
    assert run.iter == 2
    assert not marker.exists()
    assert read_checkpoint(file)['meta']['config'] == text
    mmengine.Config.fromstring(text, file_format='.py')  # it is live
    assert marker.exists()
