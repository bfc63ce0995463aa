"""The backbone in training: norms, freezing, recomputation, and the memory layout of its maps."""

import re

import pytest
import torch
import torchvision
from mmcv.ops import roi_align
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmunireplknet.models.layers import LayerNorm2d, NCHWtoNHWC, NHWCtoNCHW
from mmunireplknet.models.norms import SyncBatchNorm
from mmunireplknet.ops import backends

from ..procedural import image, relative_error
from .tiny import blocks, step, tiny

NORMS = [
    dict(type='BN'),
    dict(type='SyncBN'),
    dict(type='GN', num_groups=2),
    dict(type='LN'),
    dict(type='LN', eps=1e-3, requires_grad=False),
    dict(type='BN', requires_grad=False),
    dict(type='BN', momentum=0.01, eps=1e-3),
]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------ norms and freezing


@pytest.mark.parametrize('norm_cfg', NORMS, ids=str)
@pytest.mark.parametrize('with_cp', [False, True])
def test_norm_cfg(norm_cfg, with_cp):
    """One optimizer step changes every parameter that trains."""
    model = tiny(norm_cfg=norm_cfg, with_cp=with_cp).train()
    kind = dict(BN=nn.BatchNorm2d, SyncBN=SyncBatchNorm, GN=nn.GroupNorm, LN=LayerNorm2d)[norm_cfg['type']]
    assert type(model.stages[0][0].norm) is kind
    assert type(model.stages[3][0].dwconv.origin_bn) is kind
    assert type(model.stages[3][0].dwconv.branch(5, 1)[1]) is kind
    assert type(model.stages[3][0].pwconv2[2]) is kind
    assert model.stages[3][0].norm.eps == norm_cfg.get('eps', 1e-6 if norm_cfg['type'] == 'LN' else 1e-5)
    assert getattr(model.stages[3][0].norm, 'momentum', None) == (
        norm_cfg.get('momentum', 0.1) if 'BN' in norm_cfg['type'] else None
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    outs = step(model, image((2, 3, 64, 64)))
    optimizer.step()
    assert all(out.isfinite().all() for out in outs)
    for name, p in model.named_parameters():
        of_a_norm = re.search(r'\.(norm|origin_bn|dil_bn_k\d+_\d+|pwconv2\.2)\.(weight|bias)$', name)
        frozen = not norm_cfg.get('requires_grad', True) and bool(of_a_norm)
        assert p.requires_grad != frozen, name
        assert torch.equal(p, before[name]) == frozen, name


def test_unknown_entry_of_a_norm():
    for norm_cfg in (dict(type='LN', momentum=0.1), dict(type='BN', groups=2), dict(type='LN', epsilon=1e-3)):
        with pytest.raises(TypeError, match='unexpected keyword argument'):
            tiny(norm_cfg=norm_cfg)


def is_frozen(name, stages):
    """Of ``frozen_stages=stages``: the stem, and as many stages with the downsampling in front of them."""
    part, index = name.split('.')[:2]
    if part == 'downsample_layers':
        return int(index) < max(stages, 1) and stages >= 0
    return part == 'stages' and int(index) < stages


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 3, 4])
@pytest.mark.parametrize('norm_eval', [False, True])
def test_freezing(frozen_stages, norm_eval):
    model = tiny(frozen_stages=frozen_stages, norm_eval=norm_eval, drop_path_rate=0.3)
    for mode in (True, False, True):
        assert model.train(mode) is model
        assert model.training == mode
        for name, module in model.named_modules():
            if not list(module.children()) and '.' in name:
                frozen = is_frozen(name, frozen_stages)
                still = frozen or (norm_eval and isinstance(module, _BatchNorm))
                assert module.training == (mode and not still), name
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    step(model, image((2, 3, 64, 64)))
    for name, p in model.named_parameters():
        assert p.requires_grad != is_frozen(name, frozen_stages), name
        assert (p.grad is None) == is_frozen(name, frozen_stages), name
    for name, b in model.named_buffers():
        assert torch.equal(b, buffers[name]) == (norm_eval or is_frozen(name, frozen_stages)), name
    assert {n for n, p in model.named_parameters() if p.requires_grad} >= {f'norm{i}.weight' for i in range(4)}


# ------------------------------------------------------------------------------------------ with_cp


@pytest.mark.parametrize('norm_cfg', [dict(type='BN'), dict(type='BN', momentum=None), dict(type='SyncBN')], ids=str)
@pytest.mark.parametrize('drop_path_rate', [0.0, 0.5])
def test_with_cp(norm_cfg, drop_path_rate):
    """Same outputs, gradients and BN updates as without, over two steps, with the same random drops."""
    plain = tiny(norm_cfg=norm_cfg, drop_path_rate=drop_path_rate).train()
    checked = tiny(norm_cfg=norm_cfg, drop_path_rate=drop_path_rate, with_cp=True).train()
    for seed in range(2):
        x = image((4, 3, 64, 64), seed)
        expected, outs = step(plain, x, seed), step(checked, x, seed)
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
    reference = gradients(plain)
    assert reference.keys() == gradients(checked).keys()
    for name, grad in gradients(checked).items():
        assert torch.equal(grad, reference[name]) or relative_error(grad, reference[name]) < 1e-5, name
    buffers = dict(plain.named_buffers())
    for name, b in checked.named_buffers():
        assert torch.equal(b, buffers[name]), name
        assert not name.endswith('num_batches_tracked') or int(b) == 2
    assert {m.momentum for m in checked.modules() if isinstance(m, _BatchNorm)} == {norm_cfg.get('momentum', 0.1)}


def test_with_cp_recomputes():
    """It does save: every block runs again in the backward pass."""
    model = tiny(with_cp=True).train()
    calls = []
    for block in blocks(model):
        block.dwconv.register_forward_hook(lambda m, *_: calls.append(m))
    outs = model(image((2, 3, 64, 64)))
    assert len(calls) == 6
    sum(out.mean() for out in outs).backward()
    assert len(calls) == 12


def test_with_cp_backward_twice():
    plain, checked = tiny().train(), tiny(with_cp=True).train()
    x = image((2, 3, 64, 64))
    grads = []
    for model in (plain, checked):
        loss = sum((out * image(tuple(out.shape))).mean() for out in model(x))
        loss.backward(retain_graph=True)
        loss.backward()
        grads.append(gradients(model))
        assert all(int(b) == 1 for n, b in model.named_buffers() if n.endswith('num_batches_tracked'))
    single = tiny().train()
    sum((out * image(tuple(out.shape))).mean() for out in single(x)).backward()
    for name, grad in grads[1].items():
        assert relative_error(grad, grads[0][name]) < 1e-5 or grads[0][name].norm() < 1e-6, name
    total = torch.cat([g.flatten() for g in grads[1].values()])
    once = torch.cat([g.flatten() for g in gradients(single).values()])
    assert relative_error(total, 2 * once) < 1e-5


def test_with_cp_in_evaluation():
    x = image((1, 3, 40, 40))
    plain, checked = tiny().eval(), tiny(with_cp=True).eval()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(checked(x), plain(x), strict=True))
    outs = step(checked, x)
    expected = step(plain, x)
    assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
    assert all(torch.equal(b, dict(plain.named_buffers())[n]) for n, b in checked.named_buffers())


# ------------------------------------------------------------------------------------------ memory layout


def layouts(model, x):
    """Whether every map into and out of a block is contiguous and channels_last, and copies made by the permutes."""
    seen, copies, handles = [], [], []

    def block_hook(_, args, y):
        for value in (args[0], y):
            seen.append((value.is_contiguous(), value.is_contiguous(memory_format=torch.channels_last)))

    def permute_hook(module, args, y):
        assert y.data_ptr() == args[0].data_ptr()
        # What linear layers and BN would copy: not contiguous behind the permute.
        if isinstance(module, NCHWtoNHWC):
            copies.append(not y.is_contiguous())
        else:
            copies.append(not y.is_contiguous(memory_format=torch.channels_last))

    for block in blocks(model):
        handles.append(block.register_forward_hook(block_hook))
    for module in model.modules():
        if isinstance(module, (NCHWtoNHWC, NHWCtoNCHW)):
            handles.append(module.register_forward_hook(permute_hook))
    outs = model(x)
    for handle in handles:
        handle.remove()
    return seen, copies, outs


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('given', [torch.contiguous_format, torch.channels_last])
def test_channels_last(deploy, training, given):
    """Equal to NCHW, channels_last from the first map to the last, not one copy in a permute, and out as it came in."""
    plain, model = tiny(deploy=deploy), tiny(deploy=deploy, channels_last=True)
    x = image((2, 3, 96, 64))
    expected = plain.train(training)(x)
    seen, copies, outs = layouts(model.train(training), x.contiguous(memory_format=given))
    assert len(seen) == 12
    assert all(last for _, last in seen)
    assert len(copies) == 12
    assert not any(copies)
    for out, other in zip(outs, expected, strict=True):
        assert out.is_contiguous(memory_format=given)
        assert relative_error(out.detach(), other.detach()) < 1e-5


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('training', [False, True])
def test_layout_of_the_input_is_kept(deploy, training):
    """With ``channels_last=False`` NCHW stays NCHW behind every block, and channels_last stays channels_last."""
    model = tiny(deploy=deploy, channels_last=False).train(training)
    x = image((2, 3, 96, 64))
    seen, _, outs = layouts(model, x)
    assert all(contiguous for contiguous, _ in seen)
    assert all(out.is_contiguous() for out in outs)
    seen, copies, outs = layouts(model, x.contiguous(memory_format=torch.channels_last))
    assert all(last for _, last in seen)
    assert not any(copies)
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in outs)


@pytest.mark.parametrize('options', [{}, dict(fused=False)])
def test_layout_by_default(options):
    """By itself it computes in the layout that its kernels want, or in the input's where there are none."""
    seen, _, outs = layouts(tiny(**options).eval(), image((2, 3, 96, 64)))
    converts = not options and not backends.why_not('cpp')
    assert all(last == converts for _, last in seen)
    assert all(out.is_contiguous() for out in outs)


@pytest.mark.parametrize('channels_last', [None, False, True])
@pytest.mark.parametrize('deploy', [False, True])
def test_operators_that_take_maps_for_contiguous(channels_last, deploy):
    """mmcv's RoIAlign reads a channels_last map as if it were contiguous, and says nothing (mmcv issue 2203)."""
    out = tiny(deploy=deploy, channels_last=channels_last).eval()(image((2, 3, 96, 64)))[0].detach()
    rois = out.new_tensor([[0, 2, 3, 40, 50], [1, 5, 5, 30, 70]])
    features = roi_align(out, rois, (7, 7), 1 / 4)
    expected = torchvision.ops.roi_align(out, rois, (7, 7), 1 / 4, aligned=True)
    assert relative_error(features, expected) < 1e-5


def test_gradients_in_channels_last():
    plain, model = tiny().train(), tiny(channels_last=True).train()
    x = image((2, 3, 64, 64))
    step(plain, x)
    step(model, x)
    reference = torch.cat([g.flatten() for g in gradients(plain).values()])
    assert relative_error(torch.cat([g.flatten() for g in gradients(model).values()]), reference) < 1e-4
