"""Mixed precision: what --amp makes of every recipe, and what stays in float32 under bfloat16 on the CPU."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmunireplknet.engine import BF16OptimWrapper
from mmunireplknet.engine.launch import load_config, prepare_training

from ..procedural import relative_error
from ..test_models.tiny import tiny

CONFIGS = sorted((Path(__file__).parents[2] / 'configs').glob('*.py'))
BF16 = torch.bfloat16


@pytest.fixture(scope='module')
def backbone():
    return tiny()


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that torch sees, with or without bfloat16."""

    def pretend(bf16):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda: bf16)

    return pretend


def config(**wrapper):
    return ConfigDict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1), **wrapper))


@pytest.mark.slow
@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_has_a_bf16_variant(path, backbone):
    """It differs by the type of the wrapper alone, and trains the same groups of parameters."""
    cfg = load_config(str(path))
    before = copy.deepcopy(cfg.optim_wrapper.to_dict())
    scale = copy.deepcopy(cfg.auto_scale_lr)
    prepare_training(cfg, amp='bf16', auto_scale_lr=True)
    assert cfg.optim_wrapper.to_dict() == {**before, 'type': 'BF16OptimWrapper'}
    assert cfg.auto_scale_lr.base_batch_size == scale.base_batch_size / before.get('accumulative_counts', 1)
    model = nn.ModuleDict(dict(backbone=backbone, head=nn.Linear(2, 2)))
    amp, plain = (build_optim_wrapper(model, ConfigDict(wrapper)) for wrapper in (cfg.optim_wrapper.to_dict(), before))
    assert isinstance(amp, BF16OptimWrapper)
    assert not isinstance(plain, BF16OptimWrapper)
    assert amp._accumulative_counts == before.get('accumulative_counts', 1)
    assert amp.clip_grad_kwargs == plain.clip_grad_kwargs
    settings = [
        [(g['lr'], g['weight_decay'], len(g['params'])) for g in w.optimizer.param_groups] for w in (amp, plain)
    ]
    assert settings[0] == settings[1]


def test_the_kind_follows_the_device(gpu):
    cfg = config(type='AmpOptimWrapper', loss_scale=8.0, dtype='float16')
    prepare_training(cfg, amp='auto')
    assert cfg.optim_wrapper == dict(type='BF16OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    gpu(bf16=True)
    for amp, kind in dict(auto='AmpOptimWrapper', fp16='AmpOptimWrapper', bf16='BF16OptimWrapper').items():
        cfg = config()
        prepare_training(cfg, amp=amp)
        assert cfg.optim_wrapper.type == kind
        assert cfg.optim_wrapper.get('loss_scale') == ('dynamic' if kind == 'AmpOptimWrapper' else None)
    cfg = config(type='AmpOptimWrapper', loss_scale=8.0, dtype='bfloat16')
    prepare_training(cfg, amp='fp16')
    assert cfg.optim_wrapper == dict(type='AmpOptimWrapper', optimizer=dict(type='SGD', lr=0.1), loss_scale=8.0)


def test_what_the_device_cannot_do_is_one_sentence(gpu):
    with pytest.raises(ValueError, match=r'^--amp fp16 needs a GPU, and torch sees none: use --amp bf16'):
        prepare_training(config(), amp='fp16')
    with pytest.raises(ValueError, match=r'^--amp replaces OptimWrapper, but the config has ApexOptimWrapper\.$'):
        prepare_training(config(type='ApexOptimWrapper'), amp='bf16')
    gpu(bf16=False)
    with pytest.raises(ValueError, match=r'^--amp bf16: this GPU has no bfloat16; use --amp fp16'):
        prepare_training(config(), amp='bf16')


def wrapper_of(model):
    return BF16OptimWrapper(optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def boxes(count=200):
    """Overlapping boxes on an image of 1333 pixels, and scores, both such that bfloat16 holds them."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=generator) * 1000
    size = 20 + 200 * torch.rand(count, 2, generator=generator)
    scores = torch.rand(count, generator=generator)
    return torch.cat([corner, corner + size], 1).to(BF16).float(), scores.to(BF16).float()


def test_nms_of_bfloat16():
    ops = pytest.importorskip('mmcv.ops')
    wrapper_of(nn.Linear(1, 1))
    given, scores = boxes()
    kept = ops.nms(given, scores, 0.3)[1]
    assert 0 < len(kept) < len(given)
    assert torch.equal(ops.nms(given.to(BF16), scores.to(BF16), 0.3)[1], kept)
    kept = ops.soft_nms(given, scores, 0.3)[1]
    assert torch.equal(ops.soft_nms(given.to(BF16), scores.to(BF16), 0.3)[1], kept)


def roi_align(ops, x):
    rois = torch.tensor([[0, 1.0, 2, 9, 12], [1, 0, 3, 11, 5.5]])  # exact in bfloat16
    return ops.roi_align(x, rois.to(x.dtype), (3, 3), 1.0, 2)


def deform_conv(ops, x):
    generator = torch.Generator().manual_seed(1)
    offset = torch.randn(2, 18, 13, 12, generator=generator).to(BF16).to(x.dtype)
    weight = torch.randn(8, 4, 3, 3, generator=generator).to(BF16).to(x.dtype)
    return ops.deform_conv2d(x, offset, weight, 1, 1)


def modulated_deform_conv(ops, x):
    generator = torch.Generator().manual_seed(1)
    offset, mask, weight = (
        torch.randn(shape, generator=generator).to(BF16).to(x.dtype)
        for shape in ((2, 18, 13, 12), (2, 9, 13, 12), (8, 4, 3, 3))
    )
    return ops.modulated_deform_conv2d(x, offset, mask, weight, None, 1, 1)


@pytest.mark.parametrize('operator', [roi_align, deform_conv, modulated_deform_conv])
def test_operators_of_mmcv_take_bfloat16_as_float32(operator):
    """The same numbers as for the same map in float32, a bfloat16 gradient, and nothing changed for float32."""
    ops = pytest.importorskip('mmcv.ops')
    x = torch.randn(2, 4, 13, 12, generator=torch.Generator().manual_seed(2)).to(BF16)
    single = x.float().requires_grad_()
    before = operator(ops, single)
    for _ in range(2):  # the second time there is nothing to do
        wrapper_of(nn.Linear(1, 1))
    expected = operator(ops, single)
    assert torch.equal(expected, before)
    half = x.clone().requires_grad_()
    with torch.autocast('cpu', BF16):
        y = operator(ops, half)
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    y.backward(grad)
    expected.backward(grad)
    assert half.grad.dtype == BF16
    assert relative_error(half.grad, single.grad) < 4e-3


def test_boxes_stay_in_float32():
    """Anchors of 1333 pixels are exact, and RoIAlign gets float32 boxes; the convolutions compute in bfloat16."""
    pytest.importorskip('mmdet.models')
    with DefaultScope.overwrite_default_scope('mmdet'):
        rpn = MODELS.build(
            dict(
                type='RPNHead', in_channels=4, feat_channels=4,
                anchor_generator=dict(type='AnchorGenerator', scales=[8], ratios=[0.5], strides=[4, 8]),
                test_cfg=dict(nms_pre=100, max_per_img=100, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0),
            )
        )  # fmt: skip
        extractor = MODELS.build(
            dict(
                type='SingleRoIExtractor', out_channels=4, featmap_strides=[4, 8],
                roi_layer=dict(type='RoIAlign', output_size=3, sampling_ratio=0),
            )
        )  # fmt: skip
    rpn.test_cfg = ConfigDict(rpn.test_cfg)
    model = nn.ModuleDict(dict(conv=nn.Conv2d(4, 4, 1), rpn=rpn, extractor=extractor))
    seen = {}
    for name, module in {'conv': rpn.rpn_cls, 'align 0': extractor.roi_layers[0]}.items():
        module.register_forward_hook(lambda _, given, out, name=name: seen.update({name: (*given, out)}))
    make = rpn.prior_generator.grid_priors
    rpn.prior_generator.grid_priors = lambda *a, **k: seen.setdefault('anchors', make(*a, **k))
    rois = torch.tensor([[0, 1026.5, 3.25, 1081.0, 60.5]])
    with wrapper_of(model).optim_context(model):
        maps = [model.conv(torch.randn(1, 4, 8 // i, 334 // i)) for i in (1, 2)]
        meta = dict(img_shape=(32, 1336), scale_factor=(1.0, 1.0))
        proposals = rpn.predict_by_feat(*rpn(maps), batch_img_metas=[meta])[0]
        features = extractor(maps, rois)
    assert maps[0].dtype == seen['conv'][-1].dtype == BF16
    assert proposals.bboxes.dtype == features.dtype == torch.float32
    for anchors, expected in zip(seen['anchors'], make([(8, 334), (4, 167)], device='cpu'), strict=True):
        assert torch.equal(anchors, expected)
        assert not torch.equal(expected.to(BF16), expected), 'bfloat16 holds them all, so this test shows nothing'
    x, boxes, _ = seen['align 0']
    assert torch.equal(boxes, rois)
    assert x.is_contiguous()
    with torch.autocast('cpu', BF16):
        assert rpn(maps)[0][0].dtype == BF16, 'outside of the wrapper mmdet is as it was'


def test_statistics_and_gradients_are_float32(backbone):
    model = copy.deepcopy(backbone).train()
    wrapper = wrapper_of(model)
    with wrapper.optim_context(model):
        maps = model(torch.randn(2, 3, 64, 64))
        loss = sum(m.float().square().mean() for m in maps)
    wrapper.update_params(loss)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(v.isfinite().all() for v in model.state_dict().values())
