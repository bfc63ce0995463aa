"""Published files through the command line: evaluated as they are, and converted."""

import hashlib
import json
import pickle

import cv2
import numpy as np
import pytest
import torch

from mmunireplknet.datasets.digit_scenes import generate
from mmunireplknet.models.checkpoint_file import read_checkpoint

from ..procedural import relative_error
from ..test_models import published_files
from ..test_models.checkpoint_files import published, saved
from ..test_models.published_files import file_of
from ..test_models.test_published_files import SMALL, config
from .test_command_line import CONFIG, run_tool


def coco(folder):
    """Two images with two boxes each, in COCO's format; the path of the annotations."""
    folder.mkdir()
    images, annotations = [], []
    for i in range(2):
        picture = np.random.RandomState(i).randint(0, 255, (48, 64, 3), np.uint8)
        cv2.imwrite(str(folder / f'{i}.png'), picture)
        images.append(dict(id=i, file_name=f'{i}.png', width=64, height=48))
        for j, (x, y, w, h) in enumerate([(4, 4, 20, 20), (30, 10, 24, 30)]):
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                dict(id=2 * i + j, image_id=i, category_id=j + 1, bbox=[x, y, w, h], area=w * h, iscrowd=0,
                     segmentation=[polygon])
            )  # fmt: skip
    categories = [dict(id=i + 1, name=name) for i, name in enumerate('abc')]
    (folder / 'x.json').write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    return str(folder / 'x.json')


def detection_config(tmp_path):
    """A config file that tests on ``coco``; every box counts, so that there are predictions."""
    cfg = config('cascade')
    cfg.test_evaluator.ann_file = coco(tmp_path / 'coco')
    dataset = cfg.test_dataloader.dataset
    dataset.update(data_root='', ann_file=cfg.test_evaluator.ann_file, data_prefix=dict(img=f'{tmp_path}/coco/'))
    dataset.metainfo = dict(classes=('a', 'b', 'c'))
    dataset.pipeline[1].scale = (64, 64)
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.model.test_cfg.rcnn.score_thr = 0.0
    cfg.model.test_cfg.rcnn.max_per_img = 5
    cfg.dump(tmp_path / 'detector.py')
    return tmp_path / 'detector.py'


def segmentation_config(tmp_path):
    """The demo's data with the model of the ADE20K config, in small."""
    generate(tmp_path / 'scenes', dict(train=1, val=2), size=(64, 64))
    cfg = config('upernet')
    demo = type(cfg).fromfile(CONFIG)
    classes = demo.model.decode_head.num_classes
    shapes = dict(SMALL['upernet'], classes=classes)
    cfg.model.decode_head.num_classes = cfg.model.auxiliary_head.num_classes = classes
    cfg.update(test_dataloader=demo.test_dataloader, test_evaluator=demo.test_evaluator)
    cfg.test_dataloader.dataset.data_root = str(tmp_path / 'scenes')
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.dump(tmp_path / 'segmentor.py')
    return tmp_path / 'segmentor.py', shapes


def values_of(dump):
    """Scores or logits of all images in what --out wrote."""
    samples = pickle.loads(dump.read_bytes())
    pick = {'seg_logits': lambda s: s['seg_logits']['data'], 'pred_instances': lambda s: s['pred_instances']['scores']}
    return torch.cat([pick[name](sample).flatten() for sample in samples for name in pick if name in sample])


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['cascade', 'upernet'])
def test_evaluate(kind, tmp_path):
    """A published file in both forms, and converted, predicts the same; the wrong file gives one sentence."""
    if kind == 'cascade':
        file_config, shapes = detection_config(tmp_path), published_files.cascade_mask_rcnn('a', **SMALL['cascade'])
    else:
        file_config, small = segmentation_config(tmp_path)
        shapes = published_files.upernet('a', **small)
    file_of(tmp_path / 'x.pth', shapes, ema=True)
    assert run_tool('convert_checkpoint.py', file_config, tmp_path / 'x.pth', tmp_path / 'small.pth') is None
    assert (tmp_path / 'small.pth').stat().st_size < 0.6 * (tmp_path / 'x.pth').stat().st_size
    predictions = []
    for i, (name, flags) in enumerate([('x.pth', []), ('x.pth', ['--deploy']), ('small.pth', [])]):
        out = tmp_path / f'{i}.pkl'
        args = [file_config, tmp_path / name, '--work-dir', tmp_path / 'run', '--out', out, *flags]
        assert run_tool('test.py', *args, '--cfg-options', f'visualizer.name={kind}{i}') is None
        predictions.append(values_of(out))
    assert len(predictions[0]) > 0
    assert torch.equal(predictions[0], predictions[2])
    assert relative_error(predictions[1], predictions[0]) < 1e-4
    other = (
        published_files.upernet('a', **SMALL['upernet']) if kind == 'cascade' else published_files.classifier('a', 5)
    )
    file_of(tmp_path / 'other.pth', other)
    message = run_tool('test.py', file_config, tmp_path / 'other.pth', '--work-dir', tmp_path / 'run',
                       '--cfg-options', f'visualizer.name={kind}other')  # fmt: skip
    assert message.startswith(f'CheckpointError: {tmp_path / "other.pth"}: the checkpoint is of another task: ')
    assert '\n' not in message


def test_convert(tmp_path, capsys):
    source = saved(tmp_path / 'x.pth', published())
    args = [source, tmp_path / 'y.pth', '--dtype', 'bf16']
    assert run_tool('convert_checkpoint.py', *args) is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f'sha256 {hashlib.sha256((tmp_path / "y.pth").read_bytes()).hexdigest()}'
    assert 'in training form, classification, ' in lines[-2]
    assert 'left out: none' in lines[-2]
    assert 'head.fc.weight' in read_checkpoint(tmp_path / 'y.pth')['state_dict']
    assert run_tool('convert_checkpoint.py', *args).startswith('FileExistsError: ')
    assert run_tool('convert_checkpoint.py', *args, '--overwrite', '--to', 'published') is None
    assert 'head.weight' in read_checkpoint(tmp_path / 'y.pth')
    assert run_tool('convert_checkpoint.py', source, 'x.bin').startswith('ValueError: x.bin: the suffix must be ')
    assert run_tool('convert_checkpoint.py', 'nothing', 'z.pth').startswith('FileNotFoundError: There is no checkpoint')
