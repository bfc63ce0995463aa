"""Checkpoint files of small models, made on the fly, and every way by which such a file gets into a model."""

import os
import shutil
from collections import OrderedDict

import mmengine
import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseModel, BaseModule
from mmengine.runner import Runner
from mmengine.runner.checkpoint import _load_checkpoint_with_prefix
from torch import nn

from mmunireplknet import UniRepLKNet, load_checkpoint, switch_to_deploy

from ..procedural import image, randomise
from .tiny import CLASSES, TINY, tiny

NORMS = [f'norm{i}.{part}' for i in range(4) for part in ('weight', 'bias')]


def published(classes=CLASSES, arch=TINY, **options):
    """State dict of a classification file: the trunk, its norm and a linear head."""
    trunk = randomise(UniRepLKNet(arch, out_indices=(3,), gap_before_final_norm=True, **options))
    state = trunk.state_dict()
    dim = trunk.arch.dims[-1]
    # Views of one number: they have the shape of a head of any size, and save as nothing.
    state['head.weight'] = torch.full((1,), 0.5).expand(classes, dim)
    state['head.bias'] = torch.zeros(1).expand(classes)
    return state


def saved(path, data, **options):
    torch.save(data, path, **options)
    return path


def blank(**options):
    """A backbone whose weights are all 7, so that what was not loaded shows."""
    model = UniRepLKNet(TINY, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7)
    return model


def assert_loaded(model, state, prefix='', untouched=()):
    """Every entry of the model equals the file's; ``untouched`` ones are as ``blank`` left them."""
    for name, value in model.state_dict().items():
        if name in untouched:
            assert (value == 7).all(), name
        else:
            assert torch.equal(value, state[prefix + name]), name


def prefixed(state, prefix):
    return OrderedDict((prefix + name, value) for name, value in state.items())


def deployed():
    return switch_to_deploy(tiny().eval())


class Net(BaseModel):
    """A backbone and a linear head that mmengine's Runner can train."""

    def __init__(self, init_cfg=None, backbone_init=None, **backbone):
        super().__init__(init_cfg=init_cfg)
        self.backbone = UniRepLKNet(TINY, init_cfg=backbone_init, **backbone)
        self.head = nn.Linear(TINY['dims'][3], 2)

    def forward(self, inputs, labels=None, mode='tensor'):
        y = self.head(self.backbone(torch.stack(inputs))[3].mean((2, 3)))
        return dict(loss=y.square().mean()) if mode == 'loss' else y


class Pictures(torch.utils.data.Dataset):
    metainfo = dict(classes=('a', 'b'), palette=np.arange(6).reshape(2, 3))

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dict(inputs=image((3, 32, 32), index))


def runner(work_dir, model=None, max_iters=2, **options):
    return Runner(
        model=Net() if model is None else model,
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=Pictures(), batch_size=2, sampler=dict(type='InfiniteSampler', shuffle=False),
            collate_fn=pseudo_collate,
        ),
        train_cfg=dict(by_epoch=False, max_iters=max_iters),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2)),
        experiment_name=f'tiny{os.urandom(4).hex()}',
        log_level='ERROR',
        **options,
    )  # fmt: skip


def through_load_checkpoint(file, work_dir, deploy):
    load_checkpoint(Net(deploy=deploy), file)


def through_backbone_init_cfg(file, work_dir, deploy):
    Net(backbone_init=dict(type='Pretrained', checkpoint=str(file)), deploy=deploy).init_weights()


def through_model_init_cfg(file, work_dir, deploy):
    Net(init_cfg=dict(type='Pretrained', checkpoint=str(file)), deploy=deploy).init_weights()


def through_list_of_init_cfgs(file, work_dir, deploy):
    model = BaseModule()
    model.backbone = UniRepLKNet(TINY, deploy=deploy, init_cfg=[
        dict(type='Constant', layer='Conv2d', val=1), dict(type='Pretrained', checkpoint=str(file), prefix='backbone.')
    ])  # fmt: skip
    model.init_weights()


def through_load_from(file, work_dir, deploy):
    runner(work_dir, Net(deploy=deploy), load_from=str(file)).train()


def through_resume(file, work_dir, deploy):
    runner(work_dir, Net(deploy=deploy), load_from=str(file), resume=True).train()


def through_auto_resume(file, work_dir, deploy):
    work_dir.mkdir(exist_ok=True)
    shutil.copy(file, work_dir / 'iter_1.pth')
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'iter_1.pth'))
    runner(work_dir, Net(deploy=deploy), resume=True).train()


def through_mmengine(file, work_dir, deploy):
    mmengine.runner.load_checkpoint(Net(deploy=deploy), str(file), strict=False)


def through_mmengine_with_prefix(file, work_dir, deploy):
    UniRepLKNet(TINY, deploy=deploy).load_state_dict(_load_checkpoint_with_prefix('backbone', str(file)), strict=False)


FILE_PATHS = [
    through_load_checkpoint, through_backbone_init_cfg, through_model_init_cfg, through_list_of_init_cfgs,
    through_load_from, through_resume, through_auto_resume, through_mmengine, through_mmengine_with_prefix,
]  # fmt: skip


def training_file(path, deploy=False, **more):
    model = Net()
    randomise(model).eval()
    if deploy:
        switch_to_deploy(model)
    hub = dict(log_scalars={}, runtime_info=dict(iter=1), resumed_keys=dict(iter=True))
    data = dict(meta=dict(epoch=0, iter=1), state_dict=model.state_dict(), message_hub=hub)
    return saved(path, {**data, **more})
