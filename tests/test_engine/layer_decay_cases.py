"""The published rule of layer decay as a table that is written down here, and what the constructor makes of a model."""

import re

import pytest
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from mmunireplknet import UniRepLKNet

LR, WEIGHT_DECAY = 1e-4, 0.05
TINY = dict(depths=(1, 1, 7, 1), dims=(8, 16, 32, 64), kernel_sizes=(3, 5, 7, 3))

# The published rule for 12 layers, by group of parameters: (names behind the backbone's prefix, depth).
DEPTHS = (
    (r'downsample_layers\.0\..*', 0),
    (r'stages\.0\..*', 1),
    (r'(downsample_layers\.1|stages\.1)\..*', 2),
    (r'(downsample_layers\.2|stages\.2\.[012])\..*', 3),
    (r'stages\.2\.[345]\..*', 4),
    (r'stages\.2\.[678]\..*', 5),
    (r'stages\.2\.(9|10|11)\..*', 6),
    (r'stages\.2\.1[234]\..*', 7),
    (r'stages\.2\.1[567]\..*', 8),
    (r'stages\.2\.(18|19|20)\..*', 9),
    (r'stages\.2\.2[123]\..*', 10),
    (r'stages\.2\.2[456]\..*', 11),
    (r'(downsample_layers\.3|stages\.3)\..*', 12),
)


def published_depth(name, prefix):
    if name.startswith(prefix):
        for pattern, depth in DEPTHS:
            if re.fullmatch(pattern, name[len(prefix) :]):
                return depth
    return 13


def published(model, decay_rate, prefix='backbone.'):
    """(learning-rate scale, weight decay) of every parameter, from the table."""
    rule = {}
    for name, parameter in model.named_parameters():
        exempt = parameter.dim() == 1 or name.endswith('.bias')
        rule[name] = (decay_rate ** (13 - published_depth(name, prefix)), 0.0 if exempt else WEIGHT_DECAY)
    return rule


def construct(model, optimizer=None, **paramwise):
    optimizer = optimizer or dict(type='AdamW', lr=LR, betas=(0.9, 0.999), weight_decay=WEIGHT_DECAY)
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        dict(
            type='LayerDecayOptimWrapperConstructor',
            optim_wrapper_cfg=dict(type='OptimWrapper', optimizer=optimizer),
            paramwise_cfg=paramwise,
        )
    )
    return constructor(model)


def actual(model, wrapper, lr=LR):
    """(learning-rate scale, weight decay) of every parameter that the optimizer has."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rule = {}
    for group in wrapper.optimizer.param_groups:
        for parameter in group['params']:
            name = names[id(parameter)]
            assert name not in rule, f'{name} is in two groups'
            rule[name] = (group['lr'] / lr, group['weight_decay'])
    return rule


def assert_same(ours, expected):
    assert ours.keys() == expected.keys(), ours.keys() ^ expected.keys()
    wrong = {
        name: (ours[name], expected[name])
        for name in expected
        if ours[name][0] != pytest.approx(expected[name][0], rel=1e-9) or ours[name][1] != expected[name][1]
    }
    assert wrong == {}, wrong


def tiny(**kwargs):
    return UniRepLKNet(TINY, **kwargs)


class Model(nn.Module):
    """Backbone and head, as the tasks have them."""

    def __init__(self, backbone=None):
        super().__init__()
        self.backbone = backbone or tiny()
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(self.backbone(x)[-1].mean((2, 3)))
