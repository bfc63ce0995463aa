import json
import subprocess
import sys
from functools import partial

import pytest
import torch

from mmunireplknet.analysis.benchmark import measure
from mmunireplknet.analysis.formats import exported_folders, format_row, peer_forms, unireplknet_forms
from mmunireplknet.deploy.exportable import ExportError

from ..procedural import image
from ..test_deploy.cases import build, checkpoint, classifier_config, segmentor_config
from ..test_tools.test_command_line import run_tool


def forms(cfg, file, folder, **options):
    return unireplknet_forms(cfg, file, image((1, 3, 64, 64)), folder, 1, ('torchscript',), compiled=False, **options)


def test_every_form_of_a_model_is_timed(tmp_path):
    cfg = segmentor_config()
    build(cfg)  # registers the modules
    file = str(checkpoint(cfg, tmp_path / 'm.pth'))
    peer = partial(peer_forms, cfg, image((1, 3, 64, 64)), tmp_path / 'peer', 1, ('torchscript',), False)
    row = format_row('m', lambda: forms(cfg, file, tmp_path) | peer(), ('torchscript',), peer=True, compiled=False)
    result = measure(row, rounds=1)
    assert not result.void
    own = ['published form', 'training form', 'deploy form', 'torchscript']
    assert list(result.timings) == [*own, 'peer: eager', 'peer: torchscript']


def test_exported_folders_are_timed_by_name(tmp_path):
    (folder := tmp_path / 'mine').mkdir()
    torch.jit.save(torch.jit.trace(torch.nn.Identity(), image((1, 3, 8, 8))), folder / 'model.torchscript.pt')
    (folder / 'meta.json').write_text('{"file": "model.torchscript.pt"}')
    found = exported_folders([folder], image((1, 3, 8, 8)), 1)
    row = format_row('m', lambda: {'published form': found['mine'], **found}, ['mine'], peer=True, compiled=False)
    assert {check.ours for check in row.checks} == {'deploy form', 'mine'}
    assert found['mine'].run()[0].shape == (3, 8, 8)


def test_backbones_return_maps(tmp_path):
    cfg = classifier_config()
    build(cfg)
    maps = forms(cfg, None, tmp_path, backbone_only=True)['deploy form'].run()
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]


def test_a_form_that_computes_something_else_is_not_timed(tmp_path, monkeypatch):
    from mmunireplknet.analysis import formats

    def wrong(model):
        with torch.no_grad():
            next(model.parameters()).mul_(1.1)
        return switch(model)

    switch = formats.switch_to_deploy
    monkeypatch.setattr(formats, 'switch_to_deploy', wrong)
    cfg = segmentor_config()
    build(cfg)
    with pytest.raises(ExportError, match=r'logits of deploy form differs from that of the published form by \d'):
        forms(cfg, None, tmp_path)


@pytest.mark.slow
def test_a_command_that_times_nothing_fails(tmp_path, monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'onnx'", name='onnx')

    monkeypatch.setattr('mmunireplknet.analysis.formats.check_packages', fail)
    args = ['configs/unireplknet_a_in1k.py', '--backbone-only', '--shape', 1, 64, 64, '--no-compile', '--threads', 1]
    said = run_tool('analysis/benchmark_formats.py', *args, '--rounds', 1, '--out', tmp_path)
    assert said == 'nothing was timed: onnx is not installed'


@pytest.mark.slow
def test_the_command(tmp_path):
    pytest.importorskip('onnxruntime')
    subprocess.run(
        [sys.executable, 'tools/analysis/benchmark_formats.py', 'configs/unireplknet_a_in1k.py', '--backbone-only',
         '--shape', '1', '64', '64', '--formats', 'onnx', '--no-compile', '--threads', '1', '--rounds', '1', '--out',
         str(tmp_path)], check=True, timeout=300,
    )  # fmt: skip
    result = json.loads((tmp_path / 'benchmark.json').read_text())['results'][0]
    assert {'published form', 'deploy form', 'onnx'} <= result['timings'].keys()
    assert '| unireplknet_a_in1k, backbone, 1x3x64x64 |' in (tmp_path / 'benchmark.md').read_text()
    assert (tmp_path / 'benchmark.png').exists()
