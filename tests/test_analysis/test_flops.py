"""Multiply-adds against the published figures, and what cannot be counted."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from torch.utils.flop_counter import FlopCounterMode

from mmunireplknet import UniRepLKNet
from mmunireplknet.analysis import flops
from mmunireplknet.models.arch_zoo import ARCHS

from ..test_configs import published_coco
from ..test_configs.comparing import load
from ..test_tools.test_command_line import run_tool

ROOT = Path(__file__).parents[2]
TOOL = 'analysis/get_flops.py'
DOCS = (ROOT / 'docs' / 'detection.md').read_text()

# README, table "UperNet on ADE20K": 10^9 multiply-adds at 512 x 2048 and 640 x 2560.
ADE20K = {
    'upernet_unireplknet_t_ade20k': 946,
    'upernet_unireplknet_s_ade20k': 1036,
    'upernet_unireplknet_s-in22k_ade20k-640': 1618,
    'upernet_unireplknet_b-in22k_ade20k-640': 1850,
    'upernet_unireplknet_l-in22k_ade20k-640': 2507,
    'upernet_unireplknet_xl-in22k_ade20k-640': 3420,
}

# README, ImageNet tables, as printed, and parameters: 10^9 at 224 for A to S, at 384 for the fine-tuned ones.
CLASSIFICATION = {
    ('a', 224): ('0.6', '4.4'), ('f', 224): ('0.9', '6.2'), ('p', 224): ('1.6', '10.7'), ('n', 224): ('2.8', '18.3'),
    ('t', 224): ('4.9', '31'), ('s', 224): ('9.1', '56'), ('s', 384): ('26.7', '56'), ('b', 384): ('47.2', '98'),
    ('l', 384): ('105.4', '218'), ('xl', 384): ('187', '386'),
}  # fmt: skip


def classifier(arch):
    backbone = dict(type='UniRepLKNet', arch=arch, out_indices=(3,), gap_before_final_norm=True)
    head = dict(type='LinearClsHead', num_classes=1000, in_channels=ARCHS[arch].dims[3])
    return Config(dict(default_scope='mmpretrain', model=dict(type='ImageClassifier', backbone=backbone, head=head)))


def documented(name, result):
    """Whether docs/detection.md says of this config what is counted."""
    cells = next(line for line in DOCS.splitlines() if line.startswith(f'| {name} |')).strip('| ').split(' | ')
    params = f'{result.train_params / 1e6:.2f} / {result.deploy_params / 1e6:.2f}'
    return params in cells and cells[-1] == f'{result.total / 1e9:.2f}'


@pytest.mark.slow
@pytest.mark.parametrize('name', published_coco.RECIPES)
def test_detection(name):
    pytest.importorskip('mmdet.models')
    result = flops.complexity(load(name))
    assert documented(name, result)
    assert result.shape == (800, 1280)
    assert result.total / 1e9 == pytest.approx(published_coco.RECIPES[name].flops, rel=0.02)
    assert list(result.multiply_adds) == ['backbone', 'neck', 'rpn_head', 'roi_head.bbox_head', 'roi_head.mask_head']
    assert result.deploy_params < result.train_params


@pytest.mark.slow
@pytest.mark.parametrize('name', ADE20K)
def test_segmentation(name):
    pytest.importorskip('mmseg.models')
    result = flops.complexity(load(name))
    size = 640 if name.endswith('640') else 512
    assert result.shape == (size, 4 * size)
    assert result.total / 1e9 == pytest.approx(ADE20K[name], rel=0.02)
    assert list(result.multiply_adds) == ['backbone', 'decode_head']
    assert result.auxiliary_params > 0


@pytest.mark.parametrize(('arch', 'size'), CLASSIFICATION)
def test_classification(arch, size):
    """The published figures, to the digit that they are printed with."""
    pytest.importorskip('mmpretrain.models')
    result = flops.complexity(classifier(arch), (size, size))
    for value, printed in zip(
        (result.total / 1e9, result.deploy_params / 1e6), CLASSIFICATION[arch, size], strict=True
    ):
        digits = len(printed.partition('.')[2])
        assert value == pytest.approx(float(printed), abs=0.55 * 10**-digits)  # XL: 386.53 M is printed as 386M
        if value >= 2:
            assert value == pytest.approx(float(printed), rel=0.02)


@pytest.mark.parametrize('name', [f'mask-rcnn_unireplknet_{arch}_coco' for arch in 'afpn'])
def test_boxes_follow_the_convention(name):
    """A box head of mmdet's Mask R-CNN is two linear layers and two small ones: counted by hand."""
    pytest.importorskip('mmdet.models')
    result = flops.complexity(load(name))
    assert documented(name, result)
    parts = result.multiply_adds
    assert parts['roi_head.bbox_head'] == 1000 * (256 * 49 * 1024 + 1024 * 1024 + 1024 * (81 + 320))
    convolution = 256 * 256 * 9 * 14 * 14
    assert parts['roi_head.mask_head'] == 100 * (4 * convolution + 256 * 256 * 4 * 14 * 14 + 256 * 80 * 28 * 28)


def test_both_forms_and_other_backbones():
    pytest.importorskip('mmseg.models')
    ours = flops.complexity(load('demo_upernet_unireplknet_a_digit-scenes'))
    assert ours.shape == (128, 128)
    other = flops.complexity(load('demo_upernet_resnet18_digit-scenes'))
    assert other.train_params == other.deploy_params
    assert other.multiply_adds['backbone'] > 0


def test_model_in_memory_counts_the_same():
    """On real tensors as on meta ones, whatever kernels compute it."""
    pytest.importorskip('mmpretrain.models')
    expected = flops.complexity(classifier('a'), (64, 96)).multiply_adds['backbone']
    model = UniRepLKNet('a', deploy=True).eval()
    image = torch.zeros(1, 3, 64, 96)
    with torch.no_grad():
        model(image)  # the first call tries the compiled kernels out, with convolutions of its own
        with FlopCounterMode(display=False) as counter:
            model(image)
    assert counter.get_total_flops() == 2 * expected


@pytest.mark.parametrize(
    ('name', 'reason'),
    [
        ('htc/htc_r50_fpn_1x_coco.py', 'HybridTaskCascadeRoIHead: only StandardRoIHead and CascadeRoIHead'),
        ('sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py', 'rpn_head, a EmbeddingRPNHead, cannot be counted'),
        ('dino/dino-4scale_r50_8xb2-12e_coco.py', 'bbox_head, a DINOHead, cannot be counted'),
        ('solov2/solov2_r50_fpn_1x_coco.py', 'parts that this count does not know: mask_head'),
    ],
)
def test_what_cannot_be_counted_is_said(name, reason):
    pytest.importorskip('mmdet.models')
    with pytest.raises(ValueError, match=reason):
        flops.multiply_adds(flops.build_on_meta(get_config(f'mmdet::{name}'), deploy=False), (64, 64))


def test_one_stage_detector():
    pytest.importorskip('mmdet.models')
    result = flops.complexity(get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'))
    assert result.shape == (800, 1280)
    pixels = 100 * 160 + 50 * 80 + 25 * 40 + 13 * 20 + 7 * 10
    assert result.multiply_adds['bbox_head'] == pixels * 9 * 256 * (8 * 256 + 9 * 80 + 9 * 4)
    assert list(result.multiply_adds) == ['backbone', 'neck', 'bbox_head']


def test_tool(capsys):
    pytest.importorskip('mmdet.models')
    file = ROOT / 'configs' / 'cascade-mask-rcnn_unireplknet_t_coco.py'
    assert run_tool(TOOL, file, '--shape', 800, 1280) is None
    out = capsys.readouterr().out
    figures = {line[:32].strip(): line[32:].split() for line in out.splitlines() if line[-1] in 'MG'}
    assert figures['parameters, train form'] == ['89.10', 'M']
    assert figures['parameters, deploy form'] == ['88.45', 'M']
    assert figures['multiply-adds, deploy form'][1] == 'G'
    assert float(figures['multiply-adds, deploy form'][0]) == pytest.approx(749, rel=0.02)
    assert 'FlopCounterMode' in out
    assert '1000 pass each box stage and 100 each mask stage' in out


def test_tool_says_what_is_wrong(tmp_path):
    file = ROOT / 'configs' / 'cascade-mask-rcnn_unireplknet_t_coco.py'
    assert 'divides it by 32' in run_tool(TOOL, file, '--shape', 16, 64)
    (tmp_path / 'no_model.py').write_text('value = 1\n')
    assert 'no model.backbone' in run_tool(TOOL, tmp_path / 'no_model.py')
    assert 'There is no config' in run_tool(TOOL, tmp_path / 'missing.py')
    backbone = "dict(type='UniRepLKNet', arch='a')"
    text = f"model = dict(type='ImageClassifier', backbone={backbone})\ndefault_scope = 'mmpretrain'\n"
    (tmp_path / 'no_size.py').write_text(text)
    assert '--shape H W' in run_tool(TOOL, tmp_path / 'no_size.py')
