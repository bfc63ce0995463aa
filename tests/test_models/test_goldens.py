"""The official implementation's own outputs, gradients and BN updates (tests/data), reproduced."""

import numpy as np
import pytest
import torch

from mmunireplknet import UniRepLKNet

from ..procedural import DATA, GOLDENS, fill, image, randomise, relative_error


def load(arch):
    return np.load(DATA / GOLDENS[arch], allow_pickle=False)


def input_of(arch):
    shape = tuple(map(int, GOLDENS[arch].removesuffix('.npz').split('_')[1].split('x')))
    return image(shape)


def sampled(golden, name, value, rel=1e-5):
    """The elements of a map that the golden file keeps, ours and its; its norm and size are compared here."""
    norm, size, step = golden[f'{name}_info']
    assert value.numel() == int(size)
    assert float(value.double().norm()) == pytest.approx(float(norm), rel=rel)
    expected = torch.from_numpy(golden[name]).flatten()
    return value.flatten()[:: int(step)][: expected.numel()], expected


def classifier(arch):
    """Trunk and published linear head."""
    trunk = randomise(UniRepLKNet(arch, out_indices=(3,), gap_before_final_norm=True))
    dim = trunk.arch.dims[-1]
    head = torch.nn.Linear(dim, 1000)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(fill('head.weight', (1000, dim))))
        head.bias.copy_(torch.from_numpy(fill('head.bias', (1000,))))
    return trunk, head


@pytest.mark.parametrize('arch', GOLDENS)
@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('channels_last', [False, True])
def test_maps(arch, deploy, channels_last):
    golden = load(arch)
    model = randomise(UniRepLKNet(arch, channels_last=channels_last)).eval()
    if deploy:
        model.switch_to_deploy()
    stages = {}
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda _, __, y, i=i: stages.update({i: y}))
    with torch.no_grad():
        outs = model(input_of(arch))
    for i in range(4):
        assert relative_error(*sampled(golden, f'stage{i}', stages[i])) < 1e-5
        assert relative_error(*sampled(golden, f'out{i}', outs[i])) < 1e-5


@pytest.mark.parametrize('arch', GOLDENS)
@pytest.mark.parametrize('deploy', [False, True])
def test_logits(arch, deploy):
    golden = load(arch)
    trunk, head = classifier(arch)
    trunk.eval()
    if deploy:
        trunk.switch_to_deploy()
    with torch.no_grad():
        logits = head(trunk(input_of(arch))[0])
    assert relative_error(logits, torch.from_numpy(golden['logits'])) < 1e-5


@pytest.mark.parametrize('arch', GOLDENS)
def test_deploy_state_dict(arch):
    golden = load(arch)
    model = randomise(UniRepLKNet(arch, out_indices=(3,), gap_before_final_norm=True)).eval()
    model.switch_to_deploy()
    keys = {k for k in map(str, golden['deploy_keys']) if not k.startswith('head.')}
    assert set(model.state_dict()) == keys
    head = model.arch.dims[-1] * 1000 + 1000
    assert sum(p.numel() for p in model.parameters()) + head == int(golden['deploy_params'])
    built = UniRepLKNet(arch, out_indices=(3,), gap_before_final_norm=True, deploy=True)
    built.load_state_dict(model.state_dict())


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('arch', GOLDENS)
def test_training_step(arch, with_cp):
    golden = load(arch)
    trunk, head = classifier(arch)
    trunk.train()
    for stage in trunk.stages:
        for block in stage:
            block.with_cp = with_cp
    logits = head(trunk(input_of(arch))[0])
    assert relative_error(logits.detach(), torch.from_numpy(golden['train_logits'])) < 1e-4
    loss = (logits * image(tuple(logits.shape), 1)).mean()
    assert float(loss.detach()) == pytest.approx(float(golden['train_loss']), rel=1e-3, abs=1e-6)
    loss.backward()
    names = dict(trunk.named_parameters()) | {f'head.{n}': p for n, p in head.named_parameters()}
    actual = torch.tensor([float(names[n].grad.double().norm()) for n in map(str, golden['grad_names'])])
    expected = torch.from_numpy(golden['grad_norms']).double()
    significant = expected > 1e-6 * expected.max()  # what cancels to zero in exact arithmetic is noise
    assert relative_error(actual, expected) < 1e-4
    assert ((actual - expected).abs() / expected)[significant].max() < 1e-4
    assert len(golden['grad_names']) == len(names)
    buffers = dict(trunk.named_buffers())
    means = torch.tensor([float(buffers[n].mean()) for n in map(str, golden['bn_names'])])
    assert relative_error(means, torch.from_numpy(golden['bn_var_mean'])) < 1e-4
    assert all(int(b) == 1 for n, b in buffers.items() if n.endswith('num_batches_tracked'))


def test_a_wrong_weight_is_seen():
    """The goldens are sensitive: one branch of one block, off by 5 %, moves the outputs beyond the tolerance."""
    golden = load('a')
    model = randomise(UniRepLKNet('a')).eval()
    with torch.no_grad():
        model.stages[1][0].dwconv.dil_conv_k3_5.weight.mul_(1.05)
        out = model(input_of('a'))[3]
    assert relative_error(*sampled(golden, 'out3', out, rel=0.1)) > 1e-4
