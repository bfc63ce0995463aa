"""Folding: exact in float64, within rounding in every other precision, and nothing but a change of form."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from mmunireplknet import UniRepLKNet, switch_to_deploy
from mmunireplknet.models.dilated_reparam import (
    PUBLISHED_BRANCHES,
    DilatedReparamBlock,
    check_branches,
    default_branches,
)
from mmunireplknet.models.reparam import fold_scale, norm_scale
from mmunireplknet.models.unireplknet import UniRepLKNetBlock
from mmunireplknet.ops import merge_branches

from ..procedural import image, randomise, relative_error
from ..test_ops.reparam_cases import PUBLISHED
from .tiny import TINY, classifier, detector, segmentor, tiny

# Relative L2 error of a folded block and backbone against the unfolded one of the same precision.
BLOCK = {torch.float32: 1e-6, torch.float64: 1e-12}
BACKBONE = {torch.float32: 1e-5, torch.float64: 1e-12}
KERNELS = range(3, 32, 2)

quick = settings(
    max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


def all_branches(kernel_size):
    """Every branch that fits."""
    sizes = range(1, kernel_size + 1, 2)
    return [(k, r) for k in sizes for r in range(1, kernel_size) if (k - 1) * r + 1 <= kernel_size]


@st.composite
def blocks(draw):
    """A randomised block in evaluation, float32, and images smaller and larger than its kernel."""
    kernel_size = draw(st.sampled_from(KERNELS))
    own = st.lists(st.sampled_from(all_branches(kernel_size)), max_size=4, unique=True)
    branches = draw(st.none() | own)
    dim = draw(st.sampled_from([4, 6, 12]))
    scale = draw(st.sampled_from([1e-6, None]))
    norm_cfg = draw(st.sampled_from([None, dict(type='BN', eps=1e-3), dict(type='SyncBN')]))
    block = UniRepLKNetBlock(dim, kernel_size, 0.0, scale, branches, norm_cfg)
    randomise(block).eval()
    with torch.no_grad():
        block.pwconv2[2].weight.mul_(20)  # the branch, of which the folding is, weighs as much as the residual
    size = (draw(st.sampled_from([3, 9, 21, 35])), draw(st.sampled_from([5, 13, 33])))
    return block, image((2, dim, *size), draw(st.integers(0, 9)))


@torch.no_grad()
def outputs(block, x):
    """Of the block as it is, and folded."""
    folded = copy.deepcopy(block)
    folded.switch_to_deploy()
    return block(x), folded(x)


@quick
@given(case=blocks(), dtype=st.sampled_from(list(BLOCK)))
def test_block(case, dtype):
    block, x = case
    before, after = outputs(block.to(dtype), x.to(dtype))
    assert after.dtype == dtype
    assert relative_error(after, before) < BLOCK[dtype]
    assert relative_error(x.to(dtype), before) > 0.2  # the branch counts


@quick
@given(case=blocks(), dtype=st.sampled_from([torch.float16, torch.bfloat16]))
def test_block_in_half_precision(case, dtype):
    """Against the float64 result of the same half-precision weights, as good as the unfolded block, times two."""
    block, x = case
    block, x = block.to(dtype), x.to(dtype)
    before, after = outputs(block, x)
    with torch.no_grad():
        exact = block.double()(x.double())
    assert after.dtype == dtype
    assert relative_error(after, exact) < 2 * relative_error(before, exact)


@pytest.mark.parametrize('kernel_size', KERNELS)
def test_default_branches(kernel_size):
    branches = default_branches(kernel_size)
    assert check_branches(kernel_size, branches) == branches
    assert all(k % 2 == 1 and k > 1 and r >= 1 and (k - 1) * r + 1 <= kernel_size for k, r in branches)
    assert bool(branches) == (kernel_size >= 7)
    block = randomise(nn.ModuleDict(dict(dwconv=DilatedReparamBlock(4, kernel_size))))['dwconv'].double().eval()
    x = image((1, 4, kernel_size + 4, kernel_size - 2)).double()
    with torch.no_grad():
        before = block(x)
        kernel, bias = block.merged()
        block.switch_to_deploy()
        after = block(x)
    assert kernel.shape == (4, 1, kernel_size, kernel_size)
    assert torch.equal(block.lk_origin.weight, kernel)
    assert torch.equal(block.lk_origin.bias, bias)
    assert relative_error(after, before) < 1e-13
    assert set(block.state_dict()) == {'lk_origin.weight', 'lk_origin.bias'}


def test_published_branches():
    """The table of the official code, and our rule for larger kernels, which continues it."""
    assert PUBLISHED_BRANCHES == PUBLISHED
    assert default_branches(31) == ((5, 1), (15, 2), (3, 7), (3, 10), (3, 14))
    for published in (13, 17):  # as the docstring says
        radius = published // 2
        rule = ((5, 1), (radius // 2 * 2 + 1, 2), (3, radius // 2), (3, 2 * radius // 3), (3, radius - 1))
        assert rule == PUBLISHED_BRANCHES[published]


@pytest.mark.parametrize('branch', [(4, 1), (9, 1), (3, 4), (5, 2), (0, 1), (3, 0), (-1, 1)])
def test_branches_that_do_not_fit(branch):
    with pytest.raises(ValueError, match=f'size {branch[0]}, dilation {branch[1]}.*does not fit a 7x7 kernel'):
        DilatedReparamBlock(4, 7, [(3, 1), branch])


@pytest.mark.parametrize('kernel_size', [4, 8])
def test_even_kernel(kernel_size):
    for build in (UniRepLKNetBlock, DilatedReparamBlock):
        with pytest.raises(ValueError, match=f'kernel_size={kernel_size} must be odd'):
            build(4, kernel_size)


def test_repeated_branch():
    with pytest.raises(ValueError, match='repeat one'):
        DilatedReparamBlock(4, 7, [(3, 1), (3, 1)])


@quick
@given(kernel_size=st.sampled_from([1, 3, 5, 7]), dilation=st.integers(1, 6))
def test_merge_branches_dilates(kernel_size, dilation):
    kernel = image((3, 1, kernel_size, kernel_size)).double()
    reach = (kernel_size - 1) * dilation // 2
    size = 2 * reach + 1
    merged = merge_branches([torch.zeros(3, 1, size, size).double(), kernel], [1, dilation], torch.ones(2, 3).double())
    x = image((2, 3, 17, 12)).double()
    expected = nn.functional.conv2d(x, kernel, padding=reach, dilation=dilation, groups=3)
    assert relative_error(nn.functional.conv2d(x, merged, padding=reach, groups=3), expected) < 1e-14
    assert int((merged != 0).sum()) == int((kernel != 0).sum())


def test_merge_branches_centres_and_scales():
    branches = [torch.zeros(1, 1, 7, 7), torch.ones(1, 1, 1, 1), torch.ones(1, 1, 3, 3)]
    merged = merge_branches(branches, [1, 1, 3], torch.tensor([[1.0], [1.0], [2.0]]))
    assert merged[0, 0, 3, 3] == 3
    assert merged.sum() == 19
    assert merged[0, 0, ::3, ::3].sum() == 19
    with pytest.raises(ValueError, match='size 7 does not fit into a 5x5 kernel'):
        merge_branches([torch.zeros(1, 1, 5, 5), torch.ones(1, 1, 3, 3)], [1, 3], torch.ones(2, 1))


@pytest.mark.parametrize('affine', [True, False])
def test_norm_scale_and_fold_scale(affine):
    norm = nn.BatchNorm2d(6, affine=affine)
    randomise(norm).double().eval()
    conv = nn.Conv2d(3, 6, 3).double()
    x = image((2, 3, 8, 9)).double()
    weight, bias = fold_scale(conv.weight, conv.bias, *norm_scale(norm))
    assert weight.dtype == bias.dtype == torch.float64
    with torch.no_grad():
        assert relative_error(nn.functional.conv2d(x, weight, bias), norm(conv(x))) < 1e-14


@pytest.mark.parametrize('dtype', BACKBONE)
@pytest.mark.parametrize('size', [(32, 48), (35, 61)])
@pytest.mark.parametrize('channels_last', [False, True])
def test_backbone(dtype, size, channels_last):
    model = tiny(channels_last=channels_last).to(dtype).eval()
    x = image((2, 3, *size)).to(dtype)
    folded = switch_to_deploy(copy.deepcopy(model))
    with torch.no_grad():
        for before, after in zip(model(x), folded(x), strict=True):
            assert after.dtype == dtype
            assert relative_error(after, before) < BACKBONE[dtype]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_backbone_in_half_precision(dtype):
    """Folding costs no more than the precision itself: against float64, at most twice the unfolded error."""
    exact = randomise(UniRepLKNet('a')).double().eval()
    half = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict({k: v.double() for k, v in half.state_dict().items()})  # the same numbers
    folded = switch_to_deploy(copy.deepcopy(half))
    x = image((1, 3, 96, 64)).to(dtype)
    with torch.no_grad():
        maps = zip(exact(x.double()), half(x), folded(x), strict=True)
    for reference, unfolded, ours in maps:
        assert relative_error(ours, reference) <= 2 * relative_error(unfolded, reference)


@pytest.mark.parametrize('options', [dict(layer_scale_init_value=None), dict(branches={13: [(3, 2)], 5: [(3, 1)]}),
                                     dict(norm_cfg=dict(type='SyncBN')), dict(drop_path_rate=0.5),
                                     dict(branches={7: []})], ids=str)  # fmt: skip
def test_backbone_with_options(options):
    model = tiny(**options).double().eval()
    x = image((1, 3, 48, 40)).double()
    with torch.no_grad():
        before = model(x)
        model.switch_to_deploy()
        after = model(x)
    for a, b in zip(after, before, strict=True):
        assert relative_error(a, b) < 1e-12
    built = UniRepLKNet(TINY, deploy=True, **options).double().eval()
    built.load_state_dict(model.state_dict())
    with torch.no_grad():
        for a, b in zip(built(x), after, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_deploy_state_dict(dtype):
    """Loads strictly into a model built in the deploy form, which then computes the same numbers, bit by bit."""
    model = tiny().to(dtype).eval()
    model.switch_to_deploy()
    built = UniRepLKNet(TINY, deploy=True).to(dtype).eval()
    outcome = built.load_state_dict(model.state_dict(), strict=True)
    assert not outcome.missing_keys
    assert not outcome.unexpected_keys
    x = image((1, 3, 33, 47)).to(dtype)
    with torch.no_grad():
        for a, b in zip(built(x), model(x), strict=True):
            assert torch.equal(a, b)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert {n for n, _ in model.named_modules()} - {n for n, _ in built.named_modules()} == set()


def test_idempotent():
    model = tiny().eval()
    switch_to_deploy(model)
    parameters = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in parameters.items()}
    for again in (switch_to_deploy, lambda m: m.switch_to_deploy(), lambda m: m.train().switch_to_deploy()):
        again(model)
        assert dict(model.named_parameters()).keys() == parameters.keys()
        for name, p in model.named_parameters():
            assert p is parameters[name]
            assert torch.equal(p, values[name])


def refused(model, switch, error, message):
    """Refused, and the model is as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        switch(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(getattr(m, 'deploy', False) for m in model.modules())


def test_training_mode():
    hint = r'training mode.*model\.eval\(\)'
    refused(tiny().train(), switch_to_deploy, RuntimeError, hint)
    refused(tiny().train(), UniRepLKNet.switch_to_deploy, RuntimeError, hint)
    refused(UniRepLKNetBlock(4, 7).train(), UniRepLKNetBlock.switch_to_deploy, RuntimeError, hint)
    refused(DilatedReparamBlock(4, 7).train(), DilatedReparamBlock.switch_to_deploy, RuntimeError, hint)
    refused(tiny(frozen_stages=4).train(), switch_to_deploy, RuntimeError, hint)


def test_one_part_in_training_mode():
    """The last block, or one BN of it: nothing before it may be folded."""
    model = tiny().eval()
    model.stages[3].train()
    refused(model, switch_to_deploy, RuntimeError, 'training mode')
    model = tiny().eval()
    model.stages[3][0].dwconv.branch(9, 2)[1].train()
    refused(model, switch_to_deploy, RuntimeError, 'training mode')
    pair = nn.ModuleList([tiny(), tiny()]).eval()
    pair[1].train()
    refused(pair, switch_to_deploy, RuntimeError, 'training mode')


@pytest.mark.parametrize('norm', [dict(type='GN', num_groups=2), dict(type='LN'), dict(type='IN')], ids=str)
def test_norms_that_depend_on_the_input(norm):
    name = dict(GN='GroupNorm', LN='LayerNorm2d', IN='InstanceNorm2d')[norm['type']]
    refused(tiny(norm_cfg=norm).eval(), switch_to_deploy, TypeError, f'{name} cannot be folded.*BN')
    with pytest.raises(ValueError, match=r'deploy=True with norm_cfg.*impossible for other norms'):
        UniRepLKNet(TINY, norm_cfg=norm, deploy=True)


def test_norm_without_running_statistics():
    model = tiny(norm_cfg=dict(type='BN', track_running_stats=False)).eval()
    refused(model, switch_to_deploy, RuntimeError, 'keeps no running statistics')


def test_nothing_to_fold():
    with pytest.raises(ValueError, match='Sequential holds no UniRepLKNet'):
        switch_to_deploy(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)).eval())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_properties_are_kept(dtype):
    model = tiny(frozen_stages=2).to(dtype).eval()
    model.stages[3][0].pwconv2[0].requires_grad_(False)
    model.stages[3][0].se.down.bias.requires_grad_(False)
    switch_to_deploy(model)
    for name, p in model.named_parameters():
        assert p.dtype == dtype, name
        assert p.device == torch.device('cpu')
        assert isinstance(p, nn.Parameter)
        frozen = name.startswith(('downsample_layers.0', 'downsample_layers.1', 'stages.0', 'stages.1'))
        frozen |= name.startswith('stages.3.0.pwconv2') or name == 'stages.3.0.se.down.bias'
        assert p.requires_grad != frozen, name
    assert not model.training


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_device_is_kept(dtype):
    model = tiny().to('cuda', dtype).eval()
    x = image((1, 3, 64, 64)).to('cuda', dtype)
    with torch.no_grad():
        before = model(x)
        after = switch_to_deploy(model)(x)
    assert {p.device.type for p in model.parameters()} == {'cuda'}
    for a, b in zip(after, before, strict=True):
        assert relative_error(a, b) < (1e-4 if dtype == torch.float32 else 1e-2)


def test_deepcopy_leaves_the_original():
    model = tiny().eval()
    x = image((1, 3, 40, 40))
    keys = list(model.state_dict())
    with torch.no_grad():
        before = model(x)
        folded = switch_to_deploy(copy.deepcopy(model))
        after = model(x)
    assert folded.deploy
    assert not model.deploy
    assert list(model.state_dict()) == keys
    assert len(folded.state_dict()) < len(keys)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_single_block_in_a_tree():
    tree = nn.Sequential(UniRepLKNetBlock(4, 7), nn.BatchNorm2d(4))
    randomise(tree).eval()
    x = image((1, 4, 9, 9))
    with torch.no_grad():
        before = tree(x)
        after = switch_to_deploy(tree)(x)
    assert tree[0].deploy
    assert isinstance(tree[1], nn.BatchNorm2d)
    assert relative_error(after, before) < 1e-5


def others(model):
    """Everything outside of the backbone."""
    return {name: value for name, value in model.state_dict().items() if not name.startswith('backbone.')}


def predictions(model, scope):
    x = image((2, 3, 64, 64))
    model.eval()
    with torch.no_grad():
        if scope == 'mmseg':
            return torch.stack([s.seg_logits.data for s in model.predict(x)])
        if scope == 'mmpretrain':
            return torch.stack([s.pred_score for s in model.predict(x)])
        from mmdet.structures import DetDataSample

        shape = dict(img_shape=(64, 64), ori_shape=(64, 64), batch_input_shape=(64, 64), scale_factor=(1, 1))
        found = [s.pred_instances for s in model.predict(x, [DetDataSample(metainfo=dict(shape)) for _ in range(2)])]
        return torch.cat([torch.cat([s.bboxes, s.scores[:, None], s.labels[:, None]], 1) for s in found])


@pytest.mark.parametrize(('scope', 'build'), [('mmseg', segmentor), ('mmdet', detector), ('mmpretrain', classifier)])
def test_whole_models(scope, build):
    model = build()
    before = predictions(model, scope)
    rest = others(model)
    kinds = {name: type(m) for name, m in model.named_modules() if not name.startswith('backbone.')}
    assert switch_to_deploy(model) is model
    after = predictions(model, scope)
    assert before.shape == after.shape
    assert before.numel() > 0
    assert relative_error(after, before) < 1e-4
    assert model.backbone.deploy
    assert {n: type(m) for n, m in model.named_modules() if not n.startswith('backbone.')} == kinds
    assert others(model).keys() == rest.keys()
    assert all(torch.equal(value, rest[name]) for name, value in others(model).items())
    if scope != 'mmpretrain':
        assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == (scope == 'mmseg')
