"""The program in the exported folder, in an environment that has numpy, onnxruntime and pillow, and nothing of ours."""

import importlib.metadata
import json
import os
import subprocess
import venv

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

from .tiny_onnx import NAMES, classifier, detector, segmentor

pytestmark = pytest.mark.slow
ALLOWED = ('numpy', 'onnxruntime', 'pillow')
FOREIGN = ('torch', 'mmengine', 'mmcv', 'cv2', 'onnx', 'mmunireplknet')
SIZE = (60, 90)  # height, width


def with_dependencies(names):
    """Names of distributions and of all that they require without extras."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({'extra': ''}):
                waiting.append(requirement.name)
    return found


@pytest.fixture(scope='module')
def python(tmp_path_factory):
    """A Python whose site-packages hold links to what is allowed."""
    root = tmp_path_factory.mktemp('alone')
    venv.create(root, symlinks=True)
    (packages,) = root.glob('lib/python*/site-packages')
    for name in with_dependencies(ALLOWED):
        for file in importlib.metadata.files(name):
            top = file.parts[0]
            if top not in ('..', '__pycache__') and not (packages / top).exists():
                (packages / top).symlink_to(importlib.metadata.distribution(name).locate_file(top))
    return root / 'bin' / 'python'


@pytest.fixture(scope='module')
def picture(tmp_path_factory):
    """Red on the left, green on the right."""
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[:, :30, 0] = pixels[:, 30:, 1] = 250
    file = tmp_path_factory.mktemp('images') / 'flag.png'
    Image.fromarray(pixels).save(file)
    return file


def start(python, *args):
    env = {name: value for name, value in os.environ.items() if not name.startswith('PYTHON')}
    arguments = [python, *map(str, args)]
    return subprocess.run(arguments, env=env, cwd=python.parent, capture_output=True, text=True, timeout=60)


def results(python, folder, picture, out, *args):
    done = start(python, folder / 'run.py', picture, '--out-dir', out, *args)
    assert (done.returncode, done.stderr) == (0, '')
    found = json.loads((out / f'{picture.stem}.json').read_text())
    assert found['size'] == [SIZE[1], SIZE[0]]
    with Image.open(out / f'{picture.stem}_overlay.png') as overlay:
        assert overlay.size == (SIZE[1], SIZE[0])
        assert overlay.tobytes() != Image.open(picture).tobytes()
    return found['found']


def labels(out, picture):
    return np.asarray(Image.open(out / f'{picture.stem}_labels.png'))


def test_nothing_else_is_there(python):
    code = f'import importlib.util as u; print([n for n in {FOREIGN + ALLOWED[:2]!r} if u.find_spec(n)])'
    assert start(python, '-c', code).stdout.strip() == "['numpy', 'onnxruntime']"
    assert 'No module named' in start(python, '-c', 'import torch').stderr


def test_segmentation(python, picture, tmp_path):
    found = results(python, segmentor(tmp_path / 'model'), picture, tmp_path)
    assert [(entry['class'], entry['label']) for entry in found] == [(NAMES[0], 0), (NAMES[1], 1)]
    assert [entry['pixels'] for entry in found] == [30 * 60, 60 * 60]
    expected = np.zeros(SIZE)
    expected[:, 30:] = 1
    assert np.array_equal(labels(tmp_path, picture), expected)


def test_classification(python, picture, tmp_path):
    found = results(python, classifier(tmp_path / 'model'), picture, tmp_path)
    assert [entry['class'] for entry in found] == [NAMES[1], NAMES[0], NAMES[2]]
    assert sum(entry['score'] for entry in found) == pytest.approx(1, abs=1e-3)
    assert not (tmp_path / 'flag_labels.png').exists()


def test_detection(python, picture, tmp_path):
    resize = dict(mode='exact', scale=[180, 120])  # twice the image
    found = results(python, detector(tmp_path / 'model', masks=False, resize=resize), picture, tmp_path)
    assert [(entry['class'], entry['score'], entry['box']) for entry in found] == [
        (NAMES[1], 0.9, [5, 4, 17, 20]),
        (NAMES[2], 0.5, [20, 10, 50, 30]),
    ]
    assert not (tmp_path / 'flag_labels.png').exists()
    assert len(results(python, tmp_path / 'model', picture, tmp_path / 'more', '--score', 0.05)) == 3


def test_instance_segmentation(python, picture, tmp_path):
    found = results(python, detector(tmp_path / 'model'), picture, tmp_path)
    assert [entry['label'] for entry in found] == [1, 2]
    assert [entry['pixels'] for entry in found] == [12 * 32, 25 * 40]  # the left halves; one is cut by the image
    expected = np.zeros(SIZE)
    expected[20:60, 40:65] = 2
    expected[8:40, 10:22] = 1
    assert np.array_equal(labels(tmp_path, picture), expected)


def test_photographs_turned_by_their_camera(python, picture, tmp_path):
    turned = Image.open(picture).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right
    turned.save(tmp_path / 'flag.jpg', exif=exif)
    out = tmp_path / 'out'
    results(python, segmentor(tmp_path / 'model'), tmp_path / 'flag.jpg', out)
    assert labels(out, picture).shape == SIZE


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda path, image: image.unlink(), 'No such file'),
        (lambda path, image: image.write_text('no image'), 'cannot identify image'),
        (lambda path, image: image.write_bytes(image.read_bytes()[:-90]), 'truncated'),
        (lambda path, image: (path / 'meta.json').unlink(), 'meta.json: FileNotFoundError'),
        (lambda path, image: (path / 'meta.json').write_text('{'), 'meta.json: JSONDecodeError'),
        (lambda path, image: (path / 'meta.json').write_text('{}'), "says nothing usable about 'file'"),
        (lambda path, image: (path / 'model.onnx').unlink(), 'model.onnx'),
        (lambda path, image: (path / 'model.onnx').write_text('no model'), 'model.onnx'),
    ],
)
def test_errors_are_one_line(python, picture, tmp_path, change, message):
    model, image = segmentor(tmp_path / 'model'), tmp_path / 'copy.png'
    image.write_bytes(picture.read_bytes())
    change(model, image)
    done = start(python, model / 'run.py', image, '--out-dir', tmp_path / 'out')
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count('\n') == 1
