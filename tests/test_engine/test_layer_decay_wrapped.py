"""Layer decay of wrapped models, and of models whose backbone has no rule or one of its own."""

import pytest
import torch
from torch import nn

from .layer_decay_cases import LR, Model, actual, assert_same, construct, published


class Nested(Model):
    """What MMSeparateDistributedDataParallel makes of a model: the wrapper is around the backbone."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.parallel.DataParallel(self.backbone)


def test_wrapped_models():
    model = Model()
    wrapped = nn.parallel.DataParallel(model)
    assert_same(actual(model, construct(wrapped, decay_rate=0.9)), published(model, 0.9))
    model = Nested()
    rule = actual(model, construct(model, decay_rate=0.9))
    assert_same(rule, published(model, 0.9, prefix='backbone.module.'))
    assert len({scale for scale, _ in rule.values()}) > 5


def test_distributed_data_parallel(process_group):
    from mmengine.model import MMDistributedDataParallel

    model = Model()
    wrapped = MMDistributedDataParallel(model)
    assert_same(actual(model, construct(wrapped, decay_rate=0.9)), published(model, 0.9))


def _check_fsdp(rank, store):
    from mmengine.model import MMFullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    from mmunireplknet.models import UniRepLKNetBlock

    torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Model()
    expected = published(model, 0.9)
    policy = ModuleWrapPolicy({UniRepLKNetBlock})
    cpu = torch.device('cpu')
    wrapped = MMFullyShardedDataParallel(model, use_orig_params=True, auto_wrap_policy=policy, device_id=cpu)
    assert {parameter.dim() for parameter in wrapped.parameters()} == {1}  # so that the shape says nothing
    wrapper = construct(wrapped, decay_rate=0.9)
    names = {id(parameter): name for name, parameter in wrapped.module.named_parameters()}
    rule = {
        names[id(parameter)].replace('_fsdp_wrapped_module.', ''): (group['lr'] / LR, group['weight_decay'])
        for group in wrapper.optimizer.param_groups
        for parameter in group['params']
    }
    assert_same(rule, expected)
    flat = MMFullyShardedDataParallel(Model(), use_orig_params=False, device_id=cpu)
    with pytest.raises(ValueError, match='use_orig_params=True'):
        construct(flat, decay_rate=0.9)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_fully_sharded_data_parallel(tmp_path):
    torch.multiprocessing.spawn(_check_fsdp, (str(tmp_path / 'store'),), nprocs=2)


def test_model_without_layer_depth():
    with pytest.raises(TypeError, match=r'The backbone of Model is a Conv2d, .*get_layer_depth.*DefaultOptimWrapper'):
        construct(Model(nn.Conv2d(3, 64, 1)), decay_rate=0.9)
    with pytest.raises(TypeError, match='The model is a Linear'):
        construct(nn.Linear(2, 2), decay_rate=0.9)


class OwnRule(nn.Linear):
    """A backbone that counts its layers by itself, as those of mmpretrain do."""

    def get_layer_depth(self, param_name, prefix=''):
        return (1 if param_name == prefix + 'weight' else 3), 4


def test_backbones_with_a_rule_of_their_own():
    model = Model(OwnRule(4, 64))
    rule = actual(model, construct(model, decay_rate=0.5))
    assert {name: scale for name, (scale, _) in rule.items()} == pytest.approx(
        {'backbone.weight': 0.25, 'backbone.bias': 1.0, 'head.weight': 1.0, 'head.bias': 1.0}
    )
    construct(model, decay_rate=0.5, num_layers=2)
    with pytest.raises(ValueError, match='OwnRule always counts 2 layers: leave num_layers out'):
        construct(model, decay_rate=0.5, num_layers=12)
