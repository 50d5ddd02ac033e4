"""FMP against the plain reading of its equations: one map at a time, in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from defense import fmp
from utils import seeds
from utils.data import Spec

SPEC = Spec("digits", 10, 32, (0.3, 0.3, 0.3), (0.35, 0.35, 0.35), False, {})


class Block(nn.Module):
    """Post- or pre-activation residual block; its shortcut runs first but is registered last."""

    def __init__(self, inputs, outputs, pre, project):
        super().__init__()
        self.pre = pre
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs if pre else outputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, groups=2, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if project else nn.Identity()

    def forward(self, x):
        shortcut = self.shortcut(x)
        if self.pre:
            out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        else:
            out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        out += shortcut  # in place, over the stored output of conv2 in the pre-activation form
        return out


def network(pre, project):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), Block(6, 8 if project else 6, pre, project),
        nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear((8 if project else 6) * 16, 4),
    ).double()  # fmt: skip
    for module in net.modules():  # statistics and scales as after training, not the identity
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return net.eval()


def options(**changes):
    return SimpleNamespace(**{"alpha": 16 / 255, "epsilon": 64 / 255, "data_seed": 3, "score_batch": 64, "p": 4} | changes)


def images_and_labels(count=12):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(count) % 4


def one_map_at_a_time(model, images, labels, config):
    """The definition, without sharing anything between maps."""
    signs = torch.randint(0, 2, images.shape, generator=seeds.generator("fmp start", config.data_seed)) * 2 - 1
    start = (images + config.alpha * signs.double()).clamp(0, 1)
    scores = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv2d):
            continue

        def own_output(pixels, layer=layer):
            kept = []
            handle = layer.register_forward_hook(lambda module, inputs, output: kept.append(output.clone()))
            logits = model(pixels)
            handle.remove()
            return kept[0], logits

        clean = own_output(images)[0].detach()
        rows = []
        for channel in range(layer.out_channels):
            leaf = start.clone().requires_grad_()
            loss = (own_output(leaf)[0][:, channel] - clean[:, channel]).square().sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
            attacked = (start + config.epsilon * gradient.sign()).clamp(0, 1)
            logits = model(attacked).detach()
            rows.append(((logits.argmax(1) == labels).double().mean(), F.cross_entropy(logits, labels)))
        scores[name] = torch.tensor(rows).T.numpy()
    return scores


@pytest.mark.parametrize("score_batch", [1, 36, 10_000])
@pytest.mark.parametrize("pre", [False, True], ids=["plain", "preactivation"])
@pytest.mark.parametrize("project", [False, True], ids=["identity", "projection"])
def test_shared_passes_equal_one_map_at_a_time(pre, project, score_batch):
    model, (images, _) = network(pre, project), images_and_labels()
    labels = model(images).argmax(1)  # some maps then cost accuracy and others do not
    labels[:3] = (labels[:3] + 1) % 4
    found = fmp.score_maps(model, images, labels, options(score_batch=score_batch))
    expected = one_map_at_a_time(model, images, labels, options())
    assert set(found) == set(expected)
    assert len({tuple(accuracy) for accuracy, _ in expected.values()}) > 1, "the reference must tell maps apart"
    for name, (accuracy, loss) in found.items():
        np.testing.assert_array_equal(accuracy, expected[name][0])
        np.testing.assert_allclose(loss, expected[name][1], rtol=0, atol=1e-12)
        assert fmp.worst(accuracy, loss, 3) == fmp.worst(*expected[name], 3)


def test_no_random_start_gives_no_gradient():
    model, (images, labels) = network(True, True), images_and_labels()
    clean = (model(images).argmax(1) == labels).double().mean().item()
    for accuracy, _ in fmp.score_maps(model, images, labels, options(alpha=0.0)).values():
        assert (accuracy == clean).all()


def test_scoring_leaves_the_model_as_it_was():
    model, (images, labels) = network(True, True).train(), images_and_labels()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fmp.score_maps(model, images, labels, options())
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_captured_map_is_the_raw_convolution():
    model, (images, _) = network(True, True), images_and_labels()
    block = model[3]
    maps = fmp.feature_maps(model, images)
    hidden = block.conv1(F.relu(block.bn1(model[:3](images))))
    torch.testing.assert_close(maps["3.conv2"], block.conv2(F.relu(block.bn2(hidden))))


class ByHand(nn.Module):
    """The bare network behind a normalisation written out."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, pixels):
        return self.network((pixels - 0.3) / 0.35)


def test_pixels_are_normalised_once():
    torch.manual_seed(0)
    model = models.build("resnet9", SPEC, 4).double().eval()
    images, labels = images_and_labels()
    images = F.interpolate(images, 32)
    inside = fmp.score_maps(model, images, labels, options())
    by_hand = fmp.score_maps(ByHand(model.network), images, labels, options())
    assert list(inside) == list(by_hand)
    for name in inside:
        np.testing.assert_allclose(inside[name], by_hand[name], atol=1e-9)


def test_ties_go_by_loss_then_by_channel():
    accuracy = np.array([0.5, 0.25, 0.5, 0.25, 0.25])
    loss = np.array([1.0, 2.0, 9.0, 2.0 + 4e-7, 3.0])
    assert fmp.worst(accuracy, loss, 1) == [4]  # the higher loss of the three least accurate
    assert fmp.worst(accuracy, loss, 2) == [1, 4]  # losses equal to 1e-6: the lower channel
    assert fmp.worst(accuracy, loss, 4) == [1, 2, 3, 4]
    assert fmp.worst(accuracy, loss, 0) == []


def test_preactresnet18_prunes_75_of_4800_and_pairs_8():
    model = models.build("preactresnet18", SPEC)
    channels = {name: module.out_channels for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert sum(channels.values()) == 4800 and sum(count // 64 for count in channels.values()) == 75
    pairs = fmp.paired_norms(model)
    assert len(pairs) == 8 and sum(channels[name] // 64 for name in pairs) == 30
    assert all(conv.endswith("conv1") and norm.endswith("bn2") for conv, norm in pairs.items())


@pytest.mark.parametrize("name", ["resnet9", "vgg19_bn", "resnet18"])
def test_every_convolution_is_paired_where_a_norm_follows(name):
    model = models.build(name, SPEC)
    assert set(fmp.paired_norms(model)) == {key for key, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def test_pruned_filters_are_zero_and_stay_zero():
    model = models.build("resnet9", SPEC, 8)
    doomed = {name: [1, 3] for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    prune = fmp.pruning(model, doomed)
    prune()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.rand(4, 3, 32, 32)), torch.arange(4)).backward()
        optimizer.step()
        prune()
    modules, pairs = dict(model.named_modules()), fmp.paired_norms(model)
    for name, channels in doomed.items():
        norm = modules[pairs[name]]
        for parameter in (modules[name].weight, norm.weight, norm.bias):
            zero = parameter.detach().flatten(1).abs().sum(1) == 0 if parameter.ndim > 1 else parameter == 0
            assert zero.nonzero().flatten().tolist() == channels
    assert all((output[:, [1, 3]] == 0).all() for output in fmp.feature_maps(model.eval(), torch.rand(2, 3, 32, 32)).values())


def test_a_norm_of_a_residual_sum_is_never_paired():
    model = network(True, True)
    assert fmp.paired_norms(model) == {"0": "1", "3.conv1": "3.bn2"}
