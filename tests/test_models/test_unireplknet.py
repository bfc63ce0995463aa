"""The contract of the backbone: what comes out, which arguments there are, how it is built and copied."""

import copy
import itertools

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmunireplknet import UniRepLKNet
from mmunireplknet.models.arch_zoo import ARCHS
from mmunireplknet.models.norms import SyncBatchNorm
from mmunireplknet.models.unireplknet import UniRepLKNetBlock

from ..procedural import image, randomise, relative_error
from .tiny import TINY, blocks, classifier, detector, segmentor, step, tiny

DIMS = TINY['dims']
SUBSETS = [s for n in range(1, 5) for s in itertools.combinations(range(4), n)]


def ceil_div(size, stride):
    return -(-size // stride)


# ------------------------------------------------------------------------------------------ outputs


@pytest.mark.parametrize('size', [(64, 64), (65, 63), (97, 33), (31, 127), (1, 1), (5, 200)])
@pytest.mark.parametrize('deploy', [False, True])
def test_shapes(size, deploy):
    model = tiny(deploy=deploy).eval()
    with torch.no_grad():
        outs = model(image((2, 3, *size)))
    assert isinstance(outs, tuple)
    for i, out in enumerate(outs):
        assert out.shape == (2, DIMS[i], *(ceil_div(s, 2 ** (i + 2)) for s in size))
        assert out.dtype == torch.float32
        assert out.isfinite().all()
        assert out.std() > 0


@pytest.mark.parametrize('out_indices', SUBSETS, ids=str)
def test_out_indices(out_indices):
    """A subset returns the same maps, owns only their norms, and trains only what leads to them."""
    whole = tiny().eval()
    model = tiny(out_indices=out_indices).eval()
    x = image((1, 3, 45, 38))
    with torch.no_grad():
        expected = whole(x)
        outs = model(x)
    assert len(outs) == len(out_indices)
    assert all(torch.equal(out, expected[i]) for i, out in zip(out_indices, outs, strict=True))
    norms = {name.partition('.')[0] for name, _ in model.named_parameters() if name.startswith('norm')}
    assert norms == {f'norm{i}' for i in out_indices}
    own = {k for k in model.state_dict() if not k.startswith('norm')}
    assert own == {k for k in whole.state_dict() if not k.startswith('norm')}
    last = out_indices[-1]
    step(model.train(), image((2, 3, 64, 64)))
    for name, p in model.named_parameters():
        part, index = name.split('.')[:2]
        behind = part in ('stages', 'downsample_layers') and int(index) > last
        assert p.requires_grad != behind, name
        assert (p.grad is None) == behind, name


def test_defaults_are_variant_s():
    with torch.device('meta'):
        model = UniRepLKNet()
    assert model.arch == ARCHS['s']
    assert model.out_indices == (0, 1, 2, 3)
    assert not model.deploy
    assert not any(isinstance(m, SyncBatchNorm) for m in model.modules())
    assert all(isinstance(b.drop_path, nn.Identity) for b in blocks(model))


@pytest.mark.parametrize('out_indices', [(3,), (2,), (0,)])
def test_pooled_feature(out_indices):
    last = out_indices[0]
    model = tiny(out_indices=out_indices, gap_before_final_norm=True).eval()
    maps = {}
    model.stages[last].register_forward_hook(lambda _, __, y: maps.update(y=y))
    with torch.no_grad():
        outs = model(image((2, 3, 65, 63)))
        pooled = maps['y'].double().mean((2, 3))
        expected = nn.functional.layer_norm(
            pooled, (DIMS[last],), model.norm.weight.double(), model.norm.bias.double(), 1e-6
        )
    assert isinstance(outs, tuple)
    assert len(outs) == 1
    assert outs[0].shape == (2, DIMS[last])
    assert relative_error(outs[0], expected) < 1e-5
    assert {n.partition('.')[0] for n, _ in model.named_parameters()} == {'downsample_layers', 'stages', 'norm'}
    assert type(model.norm) is nn.LayerNorm
    assert model.norm.eps == 1e-6


# ------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize('name', ['attempt_use_lk_impl', 'pretrained', 'num_classes', 'drop_rate', 'in_chans'])
def test_unknown_argument(name):
    with pytest.raises(TypeError, match=f'unexpected keyword argument .{name}.'):
        UniRepLKNet(TINY, **{name: None})
    with pytest.raises(TypeError, match=name):
        MODELS.build(dict(type='UniRepLKNet', arch=TINY, **{name: None}))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(out_indices=()), r'out_indices=\(\) must be ascending stages out of 0, 1, 2, 3'),
        (dict(out_indices=(1, 0)), 'must be ascending'),
        (dict(out_indices=(1, 1)), 'must be ascending'),
        (dict(out_indices=(4,)), 'out of 0, 1, 2, 3'),
        (dict(out_indices=(-1,)), 'out of 0, 1, 2, 3'),
        (dict(out_indices=3), 'out_indices=3 must be ascending stages'),
        (dict(frozen_stages=5), r'frozen_stages=5 must be from -1 \(none\) to 4 \(all\)'),
        (dict(frozen_stages=-2), 'frozen_stages=-2'),
        (dict(in_channels=0), 'in_channels=0 must be at least 1'),
        (dict(drop_path_rate=1.0), 'drop_path_rate=1.0 must be at least 0 and below 1'),
        (dict(drop_path_rate=-0.1), 'drop_path_rate=-0.1'),
        (dict(gap_before_final_norm=True), 'returns one feature'),
        (dict(branches={15: [(3, 1)]}), r'kernel sizes \[15\].*\[3, 5, 7, 13, 19\]'),
        (dict(branches={'13': [(3, 1)]}), r"kernel sizes \['13'\].*\(ints\)"),
        (dict(branches={13: [(13, 2)]}), 'does not fit a 13x13 kernel'),
        (dict(kernel_sizes=4), 'must be odd'),
        (dict(arch='x'), 'not a published variant'),
    ],
    ids=str,
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        UniRepLKNet(**{'arch': TINY, **options})


def test_defaults_are_not_shared():
    """Neither the caller's dicts nor the module's constants change when a model is built and initialised."""
    norm_cfg, arch = dict(type='SyncBN', requires_grad=True), copy.deepcopy(TINY)
    branches = {13: [(3, 1)]}
    UniRepLKNet(arch, norm_cfg=norm_cfg, branches=branches).init_weights()
    assert norm_cfg == dict(type='SyncBN', requires_grad=True)
    assert arch == TINY
    assert branches == {13: [(3, 1)]}


@pytest.mark.parametrize('in_channels', [1, 2, 4, 6])
def test_in_channels(in_channels):
    model = tiny(in_channels=in_channels).eval()
    x = image((1, in_channels, 32, 32))
    with torch.no_grad():
        assert model(x)[3].shape == (1, DIMS[3], 1, 1)
        changed = x.clone()
        changed[:, -1] += 1
        assert not torch.equal(model(x)[0], model(changed)[0])
    with pytest.raises(RuntimeError, match=f'{in_channels} channels'):
        model(image((1, 3, 32, 32)))


@pytest.mark.parametrize(
    ('kernel_sizes', 'expected'),
    [
        (5, [5, 5, 5, 5, 5, 5]),
        ((3, 5, 9, 31), [3, 5, 5, 9, 9, 31]),
        ([[3], [7, 5], [13, 3], 21], [3, 7, 5, 13, 3, 21]),
    ],
    ids=str,
)
def test_kernel_sizes(kernel_sizes, expected):
    model = tiny(kernel_sizes=kernel_sizes).eval()
    found = [b.dwconv.weight.shape[-1] if size < 7 else b.dwconv.lk_origin.weight.shape[-1]
             for b, size in zip(blocks(model), expected, strict=True)]  # fmt: skip
    assert found == expected
    with torch.no_grad():
        assert model(image((1, 3, 33, 20)))[3].shape == (1, DIMS[3], 2, 1)


def test_branches():
    model = tiny(branches={13: [(3, 6), (11, 1)], 5: [(3, 2)], 7: []})
    names = [[n for n, _ in b.dwconv.named_children() if 'conv' in n] for b in blocks(model)]
    default = ['dil_conv_k5_1', 'dil_conv_k9_2', 'dil_conv_k3_4', 'dil_conv_k3_6', 'dil_conv_k3_8']
    assert names == [[], [], ['dil_conv_k3_2'], ['dil_conv_k3_6', 'dil_conv_k11_1'], [], default]
    large = model.stages[2][0].dwconv
    assert large.branches == ((3, 6), (11, 1))
    x = image((2, DIMS[2], 15, 15))
    large.double().eval()
    conv, norm = large.branch(3, 6)
    with torch.no_grad():
        expected = large.origin_bn(large.lk_origin(x.double()))
        expected += norm(nn.functional.conv2d(x.double(), conv.weight, padding=6, dilation=6, groups=DIMS[2]))
        conv, norm = large.branch(11, 1)
        expected += norm(nn.functional.conv2d(x.double(), conv.weight, padding=5, groups=DIMS[2]))
        assert relative_error(large(x.double()), expected) < 1e-13


@pytest.mark.parametrize('value', [None, 0, 0.0, 0.3, 1])
def test_layer_scale(value):
    model = UniRepLKNet(TINY, layer_scale_init_value=value)
    for block in blocks(model):
        if value:
            assert torch.equal(block.gamma, torch.full_like(block.gamma, value))
            assert block.gamma.dtype == torch.float32
            assert block.gamma.requires_grad
        else:
            assert block.gamma is None


@pytest.mark.parametrize('arch', ['a', 't', 's'])
@pytest.mark.parametrize('rate', [0.3, 0.5])
def test_drop_path(arch, rate):
    """Linear over all blocks in order, the first never dropped: rate * i / (N - 1)."""
    with torch.device('meta'):
        model = UniRepLKNet(arch, drop_path_rate=rate)
    found = [getattr(b.drop_path, 'drop_prob', 0.0) for b in blocks(model)]
    assert len(found) == {'a': 12, 't': 27, 's': 36}[arch]
    assert found == pytest.approx([rate * i / (len(found) - 1) for i in range(len(found))], rel=1e-6)
    assert isinstance(blocks(model)[0].drop_path, nn.Identity)


def test_drop_path_drops_samples():
    block = randomise(UniRepLKNetBlock(4, 3, drop_path_rate=0.5)).train()
    for norm in block.modules():
        if isinstance(norm, _BatchNorm):
            norm.eval()
    x = image((32, 4, 5, 5))
    torch.manual_seed(0)
    with torch.no_grad():
        y = block(x) - x
        branch = block.eval()(x) - x
    dropped = y.flatten(1).norm(dim=1) == 0
    assert 8 <= int(dropped.sum()) <= 24
    assert relative_error(y[~dropped], 2 * branch[~dropped]) < 1e-4


# ------------------------------------------------------------------------------------------ building


def trunc_normal_like(weight):
    """Standard deviation 0.02, nothing like torch's uniform default."""
    weight = weight.detach()
    return abs(float(weight.std()) / 0.02 - 1) < 0.15 and abs(float(weight.mean())) < 0.003


def test_initialisation():
    """As published. Trunks of classifiers: truncated normal of 0.02, zero biases. Dense backbones: torch's default."""
    torch.manual_seed(0)
    trunk = UniRepLKNet('a', out_indices=(3,), gap_before_final_norm=True)
    trunk.init_weights()
    torch.manual_seed(0)
    dense = UniRepLKNet('a')
    torch.manual_seed(0)
    untouched = UniRepLKNet('a')
    dense.init_weights()
    for name, module in trunk.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            if module.weight.numel() > 1000:
                assert trunc_normal_like(module.weight), name
            assert module.weight.abs().max() < 0.2, name
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, (_BatchNorm, nn.LayerNorm)):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name
    for block in blocks(trunk):
        assert not block.act[1].gamma.any()
        assert not block.act[1].beta.any()
        assert (block.gamma == 1e-6).all()
    state = untouched.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())
    for name, module in dense.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            assert module.weight.abs().max() <= fan_in**-0.5, name
    stem = dense.downsample_layers[0][0].weight
    assert float(stem.detach().std()) == pytest.approx(27**-0.5 / 3**0.5, rel=0.1)  # 0.111, as the official code's


def test_own_initialisation_wins():
    cfg = dict(type='Constant', layer=['Conv2d'], val=0.5, bias=0.25)
    model = UniRepLKNet(TINY, out_indices=(3,), gap_before_final_norm=True, init_cfg=cfg)
    model.init_weights()
    assert (model.downsample_layers[0][0].weight == 0.5).all()
    assert (model.stages[0][0].dwconv.weight == 0.5).all()
    assert not (model.stages[0][0].pwconv1[1].weight == 0.5).any()


@pytest.mark.parametrize('scope', [None, 'mmengine', 'mmdet', 'mmseg', 'mmpretrain'])
def test_registry(scope):
    """Found in mmengine's root registry, whatever the default scope."""
    cfg = dict(type='UniRepLKNet', arch=dict(TINY), out_indices=(0, 2), norm_cfg=dict(type='SyncBN'))
    if scope in (None, 'mmengine'):
        model = MODELS.build(cfg if scope is None else dict(cfg, type='mmengine.UniRepLKNet'))
    else:
        from mmengine.registry import DefaultScope

        module = pytest.importorskip(f'{scope}.registry')
        with DefaultScope.overwrite_default_scope(scope):
            model = module.MODELS.build(cfg)
            assert type(MODELS.build(cfg)) is UniRepLKNet
    assert type(model) is UniRepLKNet
    assert model.out_indices == (0, 2)
    assert type(model.stages[0][0].norm) is SyncBatchNorm


@pytest.mark.parametrize('build', [segmentor, detector, classifier])
def test_inside_of_models(build):
    model = build()
    assert type(model.backbone) is UniRepLKNet
    outs = model.extract_feat(image((1, 3, 64, 64)))
    assert all(out.isfinite().all() for out in outs)


def test_get_layer_depth():
    expected = {
        'downsample_layers.0.0.weight': 0,
        'stages.0.2.gamma': 1,
        'downsample_layers.1.1.bias': 2,
        'stages.1.0.dwconv.lk_origin.weight': 2,
        'downsample_layers.2.0.weight': 3,
        'stages.2.0.norm.weight': 3,
        'stages.2.2.norm.weight': 3,
        'stages.2.3.norm.weight': 4,
        'stages.2.17.norm.weight': 8,
        'stages.2.26.norm.weight': 11,
        'downsample_layers.3.0.weight': 12,
        'stages.3.0.gamma': 12,
        'norm0.weight': 13,
        'norm3.bias': 13,
        'norm.weight': 13,
    }
    with torch.device('meta'):
        model = UniRepLKNet('s')
        trunk = UniRepLKNet('s', out_indices=(3,), gap_before_final_norm=True)
    names = {n for m in (model, trunk) for n, _ in m.named_parameters()}
    assert set(expected) <= names
    for name, depth in expected.items():
        assert model.get_layer_depth(name) == (depth, 14)
        assert model.get_layer_depth(f'backbone.{name}', prefix='backbone.') == (depth, 14)
    assert model.get_layer_depth('head.fc.weight', prefix='backbone.') == (13, 14)
    assert {model.get_layer_depth(n)[0] for n, _ in model.named_parameters()} == set(range(14))
    counts = {n: len({model.get_layer_depth(f'{n}.{p}') for p, _ in m.named_parameters()})
              for n, m in model.named_children()}  # fmt: skip
    assert counts == dict(downsample_layers=4, stages=12, norm0=1, norm1=1, norm2=1, norm3=1)
