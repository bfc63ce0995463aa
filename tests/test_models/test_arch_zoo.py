"""The published variants and weight files, against figures written down here independently of the package."""

import re
from collections.abc import Mapping

import pytest
import torch

from mmunireplknet import UniRepLKNet
from mmunireplknet.models.arch_zoo import ARCHS, CHECKPOINTS, HOST, Arch, get_arch, identify_arch

# Parameters and state-dict entries, training and deploy form, of the official code with a head of 1,000 classes.
FIGURES = {
    'a': (4_649_060, 4_437_300, 626, 156),
    'f': (6_489_328, 6_235_216, 626, 156),
    'p': (11_080_520, 10_741_704, 626, 156),
    'n': (18_818_880, 18_318_560, 738, 178),
    't': (31_693_420, 31_037_980, 1116, 321),
    's': (56_456_704, 55_645_984, 1305, 420),
    'b': (99_089_416, 98_008_456, 1305, 420),
    'l': (220_076_056, 218_454_616, 1305, 420),
    'xl': (388_690_984, 386_529_064, 1305, 420),
}

STAGE_3 = {
    'a': [13] * 6, 'f': [13] * 6, 'p': [13] * 6, 'n': [13] * 8, 't': [13, 3] * 9,
    's': [13, 3, 3] * 9, 'b': [13, 3, 3] * 9, 'l': [13, 3, 3] * 9, 'xl': [13, 3, 3] * 9,
}  # fmt: skip

WIDTHS = {'a': 40, 'f': 48, 'p': 64, 'n': 80, 't': 80, 's': 96, 'b': 128, 'l': 192, 'xl': 256}

# What one block of width d holds in the training form, as in the official code's state dict.
BN = {'weight': 'd', 'bias': 'd', 'running_mean': 'd', 'running_var': 'd', 'num_batches_tracked': ''}
BLOCK = {
    'gamma': 'd',
    **{f'norm.{name}': shape for name, shape in BN.items()},
    'se.down.weight': 'd//4 d 1 1',
    'se.down.bias': 'd//4',
    'se.up.weight': 'd d//4 1 1',
    'se.up.bias': 'd',
    'pwconv1.1.weight': '4*d d',
    'pwconv1.1.bias': '4*d',
    'act.1.gamma': '1 1 1 4*d',
    'act.1.beta': '1 1 1 4*d',
    'pwconv2.0.weight': 'd 4*d',
    **{f'pwconv2.2.{name}': shape for name, shape in BN.items()},
}
SMALL = {'dwconv.weight': 'd 1 3 3'}
LARGE = {
    'dwconv.lk_origin.weight': 'd 1 13 13',
    **{f'dwconv.origin_bn.{name}': shape for name, shape in BN.items()},
    'dwconv.dil_conv_k5_1.weight': 'd 1 5 5',
    **{f'dwconv.dil_bn_k5_1.{name}': shape for name, shape in BN.items()},
    'dwconv.dil_conv_k7_2.weight': 'd 1 7 7',
    **{f'dwconv.dil_bn_k7_2.{name}': shape for name, shape in BN.items()},
    'dwconv.dil_conv_k3_3.weight': 'd 1 3 3',
    **{f'dwconv.dil_bn_k3_3.{name}': shape for name, shape in BN.items()},
    'dwconv.dil_conv_k3_4.weight': 'd 1 3 3',
    **{f'dwconv.dil_bn_k3_4.{name}': shape for name, shape in BN.items()},
    'dwconv.dil_conv_k3_5.weight': 'd 1 3 3',
    **{f'dwconv.dil_bn_k3_5.{name}': shape for name, shape in BN.items()},
}
DEPLOY_BLOCK = {
    'se.down.weight': 'd//4 d 1 1',
    'se.down.bias': 'd//4',
    'se.up.weight': 'd d//4 1 1',
    'se.up.bias': 'd',
    'pwconv1.1.weight': '4*d d',
    'pwconv1.1.bias': '4*d',
    'act.1.gamma': '1 1 1 4*d',
    'pwconv2.0.weight': 'd 4*d',
    'pwconv2.0.bias': 'd',
}
DEPLOY_SMALL = {'dwconv.weight': 'd 1 3 3', 'dwconv.bias': 'd'}
DEPLOY_LARGE = {'dwconv.lk_origin.weight': 'd 1 13 13', 'dwconv.lk_origin.bias': 'd'}
A_STEM = {
    'downsample_layers.0.0.weight': (20, 3, 3, 3),
    'downsample_layers.0.0.bias': (20,),
    'downsample_layers.0.1.weight': (20,),
    'downsample_layers.0.1.bias': (20,),
    'downsample_layers.0.3.weight': (40, 20, 3, 3),
    'downsample_layers.0.3.bias': (40,),
    'downsample_layers.0.4.weight': (40,),
    'downsample_layers.0.4.bias': (40,),
    'downsample_layers.1.0.weight': (80, 40, 3, 3),
    'downsample_layers.1.0.bias': (80,),
    'downsample_layers.1.1.weight': (80,),
    'downsample_layers.1.1.bias': (80,),
    'downsample_layers.2.0.weight': (160, 80, 3, 3),
    'downsample_layers.2.0.bias': (160,),
    'downsample_layers.2.1.weight': (160,),
    'downsample_layers.2.1.bias': (160,),
    'downsample_layers.3.0.weight': (320, 160, 3, 3),
    'downsample_layers.3.0.bias': (320,),
    'downsample_layers.3.1.weight': (320,),
    'downsample_layers.3.1.bias': (320,),
}
A_NORMS = {f'norm{i}.{name}': (d,) for i, d in enumerate((40, 80, 160, 320)) for name in ('weight', 'bias')}
A_FINAL_NORM = {'norm.weight': (320,), 'norm.bias': (320,)}

# Name of the file -> first digits of its SHA-256 at its host, where they are known.
FILES = {
    'unireplknet_a_in1k_224_acc77.03.pth': 'a0ef11d8',
    'unireplknet_f_in1k_224_acc78.58.pth': '',
    'unireplknet_p_in1k_224_acc80.23.pth': '36363a5d',
    'unireplknet_n_in1k_224_acc81.64.pth': '',
    'unireplknet_t_in1k_224_acc83.21.pth': '',
    'unireplknet_s_in1k_224_acc83.91.pth': '',
    'unireplknet_s_in22k_pretrain.pth': '0ce55607',
    'unireplknet_s_in22k_to_in1k_384_acc86.44.pth': '120fd52a',
    'unireplknet_b_in22k_pretrain.pth': '',
    'unireplknet_b_in22k_to_in1k_384_acc87.40.pth': '',
    'unireplknet_l_in22k_pretrain.pth': '',
    'unireplknet_l_in22k_to_in1k_384_acc87.88.pth': '',
    'unireplknet_xl_in22k_pretrain.pth': '',
    'unireplknet_xl_in22k_to_in1k_384_acc87.96.pth': 'a5fb3d98',
    'casc_mask_rcnn_unireplknet_t_in1k_3x_coco_ap51.75.pth': '6dabd709',
    'casc_mask_rcnn_unireplknet_s_in1k_3x_coco_ap52.95.pth': '364fe729',
    'casc_mask_rcnn_unireplknet_s_in22k_3x_coco_ap54.27.pth': 'ea589d98',
    'casc_mask_rcnn_unireplknet_b_in22k_3x_coco_ap54.78.pth': '38568b8d',
    'casc_mask_rcnn_unireplknet_l_in22k_3x_coco_ap55.82.pth': '97078954',
    'casc_mask_rcnn_unireplknet_xl_in22k_3x_coco_ap56.39.pth': 'dca404c4',
    'upernet_unireplknet_t_512_160k_ade20k_miou48.56.pth': '',
    'upernet_unireplknet_s_512_160k_ade20k_miou50.46.pth': 'f1be06da',
    'upernet_unireplknet_s_in22k_512_160k_ade20k_miou51.86.pth': '67efb249',
    'upernet_unireplknet_s_in22k_640_160k_ade20k_miou52.28.pth': '93486eca',
    'upernet_unireplknet_b_in22k_640_160k_ade20k_miou53.52.pth': 'fbcc4644',
    'upernet_unireplknet_l_in22k_640_160k_ade20k_miou54.70.pth': 'bc945a46',
    'upernet_unireplknet_xl_in22k_640_160k_ade20k_miou55.18.pth': 'c69d8f97',
}


def shape(text, d):
    widths = {'d': d, '4*d': 4 * d, 'd//4': d // 4}
    return tuple(widths.get(size) or int(size) for size in text.split())


def entries_of_a(common, small, large):
    """Stage 1 holds small kernels, stages 2 to 4 large ones."""
    entries = {}
    for stage, (d, depth) in enumerate(zip((40, 80, 160, 320), (2, 2, 6, 2), strict=True)):
        for block in range(depth):
            for name, text in {**common, **(large if stage else small)}.items():
                entries[f'stages.{stage}.{block}.{name}'] = shape(text, d)
    return entries


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize('arch', FIGURES)
def test_parameters_and_entries(arch):
    train_params, deploy_params, train_entries, deploy_entries = FIGURES[arch]
    for deploy, params, entries in ((False, train_params, train_entries), (True, deploy_params, deploy_entries)):
        with torch.device('meta'):
            trunk = UniRepLKNet(arch, out_indices=(3,), gap_before_final_norm=True, deploy=deploy)
            head = torch.nn.Linear(trunk.arch.dims[-1], 1000)
        assert sum(p.numel() for module in (trunk, head) for p in module.parameters()) == params
        assert len(trunk.state_dict()) + len(head.state_dict()) == entries


def test_there_are_nine():
    assert list(ARCHS) == list(FIGURES)


@pytest.mark.parametrize('arch', ARCHS)
def test_kernels_and_widths(arch):
    known = ARCHS[arch]
    width = WIDTHS[arch]
    assert known.dims == (width, 2 * width, 4 * width, 8 * width)
    few = len(STAGE_3[arch]) <= 8
    ends = 2 if few else 3
    assert known.kernel_sizes == ((3,) * ends, (13,) * ends, tuple(STAGE_3[arch]), (13,) * ends)
    assert known.depths == tuple(map(len, known.kernel_sizes))
    with torch.device('meta'):
        model = UniRepLKNet(arch)
    for stage, sizes in zip(model.stages, known.kernel_sizes, strict=True):
        for block, size in zip(stage, sizes, strict=True):
            conv = block.dwconv if size == 3 else block.dwconv.lk_origin
            assert conv.kernel_size == (size, size)
            assert conv.groups == conv.in_channels == conv.out_channels


@pytest.mark.parametrize('gap', [False, True])
def test_state_dict_of_a(gap):
    with torch.device('meta'):
        model = UniRepLKNet('a', out_indices=(3,) if gap else (0, 1, 2, 3), gap_before_final_norm=gap)
        deploy = UniRepLKNet('a', out_indices=(3,) if gap else (0, 1, 2, 3), gap_before_final_norm=gap, deploy=True)
    outer = {**A_STEM, **(A_FINAL_NORM if gap else A_NORMS)}
    assert shapes(model) == {**outer, **entries_of_a(BLOCK, SMALL, LARGE)}
    assert shapes(deploy) == {**outer, **entries_of_a(DEPLOY_BLOCK, DEPLOY_SMALL, DEPLOY_LARGE)}


@pytest.mark.parametrize('name', ['A', 'Xl', 's'])
def test_names_in_any_case(name):
    assert get_arch(name) is not None
    assert get_arch(name) == ARCHS[name.lower()]


OWN = dict(depths=(1, 2, 3, 1), dims=(8, 16, 32, 64))


@pytest.mark.parametrize(
    ('sizes', 'expected'),
    [
        (7, ((7,), (7, 7), (7, 7, 7), (7,))),
        ((3, 5, 13, 31), ((3,), (5, 5), (13, 13, 13), (31,))),
        ([[3], [5, 7], [13, 3, 3], 9], ((3,), (5, 7), (13, 3, 3), (9,))),
    ],
)
def test_kernel_sizes(sizes, expected):
    assert get_arch(OWN, sizes).kernel_sizes == expected
    assert get_arch(dict(OWN, kernel_sizes=sizes)).kernel_sizes == expected
    assert get_arch(dict(OWN, kernel_sizes=3), sizes).kernel_sizes == expected  # the argument wins
    assert get_arch(dict(OWN, depths=[1, 2, 3, 1]), sizes) == Arch(OWN['depths'], OWN['dims'], expected)


@pytest.mark.parametrize(
    ('arch', 'sizes', 'error', 'message'),
    [
        ('z', None, ValueError, "arch='z' is not a published variant.*a, f, p, n, t, s, b, l, xl"),
        (7, None, TypeError, 'name or a dict, not int'),
        (None, None, TypeError, 'not NoneType'),
        (OWN, None, ValueError, 'kernel_sizes is missing'),
        (dict(depths=(1, 1, 1, 1)), 3, ValueError, r"missing \['dims'\]"),
        (dict(OWN, kernels=3), 3, ValueError, r"unknown \['kernels'\]"),
        (dict(OWN, depths=(1, 2, 3)), 3, ValueError, 'four depths and four dims'),
        (dict(OWN, dims=(8, 16, 32, 64, 128)), 3, ValueError, 'four depths and four dims'),
        (dict(OWN, depths=(1, 0, 3, 1)), 3, ValueError, 'depths must be positive'),
        (dict(OWN, dims=(8, 16, 33, 64)), 3, ValueError, 'dims even and at least 4'),
        (dict(OWN, dims=(2, 16, 32, 64)), 3, ValueError, 'dims even and at least 4'),
        (OWN, (3, 3, 3), ValueError, 'has 3 entries.*4 entries'),
        (OWN, (3, (3, 3, 3), 3, 3), ValueError, '3 sizes for a stage of 2 blocks'),
        (OWN, 4, ValueError, 'kernel size 4 is not supported: it must be odd, from 3 to 31'),
        (OWN, 1, ValueError, 'kernel size 1 is not supported'),
        (OWN, 33, ValueError, 'kernel size 33 is not supported'),
        (OWN, (3, 3, 3, 7.0), ValueError, 'kernel size 7.0 is not supported'),
        (OWN, 7.0, ValueError, 'kernel size 7.0 is not supported'),
        (OWN, '7', ValueError, 'kernel size .7. is not supported'),
        ('a', (3, 3, 3, 0), ValueError, 'kernel size 0'),
    ],
)
def test_errors(arch, sizes, error, message):
    with pytest.raises(error, match=message):
        get_arch(arch, sizes)


def test_identify():
    for name, arch in ARCHS.items():
        assert identify_arch(arch) == f'UniRepLKNet-{name.upper()}'
    own = identify_arch(get_arch(OWN, (3, 7, (13, 3, 3), 5)))
    assert own == ('a custom UniRepLKNet with depths (1, 2, 3, 1), dims (8, 16, 32, 64), kernels 3/7/3,13/5 by stage')


def test_data_cannot_be_changed():
    assert isinstance(ARCHS, Mapping)
    with pytest.raises(TypeError):
        ARCHS['a'] = ARCHS['s']
    with pytest.raises(TypeError):
        CHECKPOINTS['a'] = None
    with pytest.raises(AttributeError):
        ARCHS['a'].dims = (1, 2, 3, 4)


def test_files():
    assert {entry.file: entry.sha256 for entry in CHECKPOINTS.values()} == FILES
    assert len(CHECKPOINTS) == len(FILES)


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_entry(name):
    entry = CHECKPOINTS[name]
    assert entry.arch == re.search(r'unireplknet_(a|f|p|n|t|s|b|l|xl)_', entry.file)[1]
    assert re.search(rf'unireplknet_{entry.arch}(_|-|$)', name)
    tasks = {'unireplknet': 'classification', 'upernet': 'segmentation', 'casc': 'detection'}
    assert entry.task == tasks[entry.file.partition('_')[0]]
    figure = re.search(r'(?:acc|miou|ap)([\d.]+)\.pth', entry.file)
    assert figure is None or figure[1] in entry.figure
    assert ('in22k' in entry.file) == ('in22k' in name)
    assert entry.url == HOST + entry.file
    assert entry.url.startswith('https://huggingface.co/DingXiaoH/UniRepLKNet/resolve/main/')
    assert re.fullmatch(r'[0-9a-f]{8}|', entry.sha256)
