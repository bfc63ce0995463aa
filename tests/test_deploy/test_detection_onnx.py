"""Detectors in ONNX: standard operators only, any size of image, and what mmdet finds in both runtimes."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('mmdet.models')
pytest.importorskip('torchvision')
pytest.importorskip('onnxslim')
pytest.importorskip('openvino')

from mmunireplknet.deploy.formats import open_exported
from mmunireplknet.deploy.onnx_file import write_onnx

from .detectors import DETECTORS, SIZES, exportable, found_by_mmdet, normalized, photograph
from .test_detection import changed, check_equal

pytestmark = pytest.mark.slow
RUNTIMES = ('onnxruntime', 'openvino')


def opened(file, runtime):
    """An ONNX file as a function of an image to tensors."""
    run = open_exported(file, format=dict(onnxruntime='onnx').get(runtime, runtime))
    return lambda image: [torch.from_numpy(np.array(out)) for out in run(image.numpy())]


@pytest.fixture(scope='module', params=DETECTORS)
def exported(request, tmp_path_factory):
    """A detector and its ONNX file, traced at the first size."""
    traceable, model = exportable(DETECTORS[request.param])
    file = tmp_path_factory.mktemp('onnx') / 'model.onnx'
    write_onnx(traceable, normalized(photograph(SIZES[0])), file)
    return traceable, model, file


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_it_finds_what_mmdet_finds(exported, runtime):
    _, model, file = exported
    run = opened(file, runtime)
    for size in SIZES:
        photo = photograph(size)
        check_equal(run(normalized(photo)), found_by_mmdet(model, photo), photo)


@pytest.mark.parametrize('exported', [name for name in DETECTORS if 'mask' in name], indirect=True)
def test_masks_are_those_of_torch(exported):
    """Every probability, not only on which side of the threshold it is."""
    traceable, _, file = exported
    for runtime in RUNTIMES:
        image = normalized(photograph(SIZES[2]))
        expected = traceable(image)[2]
        assert expected.std() > 0.01
        torch.testing.assert_close(opened(file, runtime)(image)[2], expected, atol=1e-4, rtol=0)


def test_the_graph_is_of_standard_operators(exported):
    import onnx

    traceable, _, file = exported
    graph = onnx.load(file)
    kinds = [node.op_type for node in graph.graph.node]
    assert {node.domain for node in graph.graph.node} == {''}
    assert {entry.domain: entry.version for entry in graph.opset_import} == {'': 18}
    assert kinds.count('NonMaxSuppression') == (1 if traceable.instances is None else 2)
    heads = [] if traceable.instances is None else traceable.instances.bbox_heads
    masks = 'masks' in traceable.output_names  # of a cascade they all look at the same boxes, and share one extraction
    assert kinds.count('RoiAlign') == 3 * (len(heads) + masks)
    modes = [a.s for n in graph.graph.node if n.op_type == 'RoiAlign' for a in n.attribute if 'transf' in a.name]
    assert set(modes) <= {b'half_pixel'}
    assert 'BatchNormalization' not in kinds
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.graph.input}
    assert shapes == {'input': [1, 3, 'H', 'W']}


@pytest.mark.parametrize('name', ['mask-rcnn', 'retinanet'])
def test_traced_where_nothing_is_found(name, tmp_path: Path):
    """The graph still finds something elsewhere, and gives empty outputs here."""
    place = 'test_cfg__score_thr' if name == 'retinanet' else 'test_cfg__rcnn__score_thr'
    photo, blank = photograph(SIZES[0]), torch.full((3, 64, 96), 127, dtype=torch.uint8)
    traceable, _ = exportable(changed(name, **{place: 0.0}))
    best = [float(traceable(normalized(x))[0][0, 0, 4]) for x in (blank, photo)]
    assert best[0] + 0.005 < best[1], best
    traceable, model = exportable(changed(name, **{place: (best[0] + best[1]) / 2}))
    assert traceable(normalized(blank))[0].shape == (1, 0, 5)
    write_onnx(traceable, normalized(blank), tmp_path / 'model.onnx')
    for runtime in RUNTIMES:
        run = opened(tmp_path / 'model.onnx', runtime)
        empty, found = run(normalized(blank)), run(normalized(photo))
        assert [out.shape[1] for out in empty] == [0] * len(empty)
        expected = found_by_mmdet(model, photo)
        assert found[0].shape[1] == len(expected[0]) > 0
        torch.testing.assert_close(found[0][0], expected[0], atol=1e-3, rtol=0)


def test_torchscript_file(tmp_path: Path):
    """A trace follows other sizes, and needs torchvision's operators to run, but not this package."""
    traceable, model = exportable(DETECTORS['mask-rcnn'])
    with torch.no_grad():
        traced = torch.jit.trace(traceable, (normalized(photograph(SIZES[0])),), check_trace=False)
    torch.jit.save(traced, tmp_path / 'model.pt')
    photo = photograph(SIZES[1])
    check_equal(torch.jit.load(tmp_path / 'model.pt')(normalized(photo)), found_by_mmdet(model, photo), photo)
    custom = {node.kind() for node in traced.inlined_graph.nodes() if not node.kind().startswith(('aten::', 'prim::'))}
    assert custom == {'torchvision::nms', 'torchvision::roi_align'}
