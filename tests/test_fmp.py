"""FMP against the plain reading of its equations: one map at a time, in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import models
from defense import fmp
from utils import channels, data, seeds
from utils.data import Spec
from utils.errors import ConfigError
from utils.record import Record

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


STEP = {"alpha": 16 / 255, "epsilon": 64 / 255, "seed": 3}


def score(model, images, labels, **changes):
    return fmp.score_maps(model, images, labels, **{**STEP, "batch": 64, "steps": fmp.fmp_step, **changes})


def options(**changes):
    return fmp.Config(result_file="x", **changes)


def images_and_labels(count=12):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(count) % 4


def one_map_at_a_time(model, images, labels, alpha, epsilon, seed, fmt=False):
    """The definition, without sharing anything between maps."""
    signs = torch.randint(0, 2, images.shape, generator=seeds.generator("fmp start", seed)) * 2 - 1
    start = (images + alpha * signs.double()).clamp(0, 1)
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
            attacks = [(start + epsilon * gradient.sign()).clamp(0, 1)]
            if fmt:
                attacks = [
                    (images + torch.clamp(start + j * alpha * gradient.sign() - images, -epsilon, epsilon)).clamp(0, 1) for j in (1, 2)
                ]
            found = [model(attacked).detach() for attacked in attacks]
            rows.append([[(logits.argmax(1) == labels).double().mean(), F.cross_entropy(logits, labels)] for logits in found])
        scores[name] = torch.tensor(rows).permute(2, 1, 0).numpy()  # 2,J,C
    return scores


@pytest.mark.parametrize("score_batch", [1, 36, 10_000])
@pytest.mark.parametrize("pre", [False, True], ids=["plain", "preactivation"])
@pytest.mark.parametrize("project", [False, True], ids=["identity", "projection"])
def test_shared_passes_equal_one_map_at_a_time(pre, project, score_batch):
    model, (images, _) = network(pre, project), images_and_labels()
    labels = model(images).argmax(1)  # some maps then cost accuracy and others do not
    labels[:3] = (labels[:3] + 1) % 4
    for fmt in (False, True):
        found = score(model, images, labels, batch=score_batch, steps=fmp.fmt_steps if fmt else fmp.fmp_step)
        expected = one_map_at_a_time(model, images, labels, **STEP, fmt=fmt)
        assert set(found) == set(expected)
        assert fmt or len({accuracy.tobytes() for accuracy, _ in expected.values()}) > 1, "the reference must tell maps apart"
        for name, (accuracy, loss) in found.items():
            assert accuracy.shape == (1 + fmt, len(model.get_submodule(name).weight))
            np.testing.assert_array_equal(accuracy, expected[name][0])
            np.testing.assert_allclose(loss, expected[name][1], rtol=0, atol=1e-12)
            assert fmp.ranking(accuracy[0], loss[0]).tolist() == fmp.ranking(*expected[name][:, 0]).tolist()


def test_no_random_start_gives_no_gradient():
    model, (images, labels) = network(True, True), images_and_labels()
    clean = (model(images).argmax(1) == labels).double().mean().item()
    for accuracy, _ in score(model, images, labels, alpha=0.0).values():
        assert (accuracy == clean).all()


def test_scoring_leaves_the_model_as_it_was():
    model, (images, labels) = network(True, True).train(), images_and_labels()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score(model, images, labels)
    score(model, images, labels, maps=fmp.block_sums)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_captured_map_is_the_raw_convolution():
    model, (images, _) = network(True, True), images_and_labels()
    block = model[3]
    maps = channels.feature_maps(model, images)
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
    inside = score(model, images, labels)
    by_hand = score(ByHand(model.network), images, labels)
    assert list(inside) == list(by_hand)
    for name in inside:
        np.testing.assert_allclose(inside[name], by_hand[name], atol=1e-9)


def test_ties_go_by_loss_then_by_channel():
    accuracy = np.array([0.5, 0.25, 0.5, 0.25, 0.25])
    loss = np.array([1.0, 2.0, 9.0, 2.0 + 4e-7, 3.0])
    # the higher loss of the three least accurate first; losses equal to 1e-6: the lower channel
    assert fmp.ranking(accuracy, loss).tolist() == [4, 1, 3, 2, 0]


def test_preactresnet18_prunes_75_of_4800_and_pairs_8():
    model = models.build("preactresnet18", SPEC)
    maps = {name: layer.out_channels for name, layer in channels.convolutions(model).items()}
    assert len(maps) == 20 and sum(maps.values()) == 4800 and sum(count // 64 for count in maps.values()) == 75
    pairs = channels.paired_norms(model)
    assert len(pairs) == 8 and sum(maps[name] // 64 for name in pairs) == 30
    assert all(conv.endswith("conv1") and norm.endswith("bn2") for conv, norm in pairs.items())


@pytest.mark.parametrize("name", ["resnet9", "vgg19_bn", "resnet18"])
def test_every_convolution_is_paired_where_a_norm_follows(name):
    model = models.build(name, SPEC)
    assert set(channels.paired_norms(model)) == {key for key, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def test_pruned_filters_are_zero_and_stay_zero():
    model = models.build("resnet9", SPEC, 8)
    doomed = {name: [1, 3] for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    prune = channels.zeroing(channels.parameters_of(model, doomed))
    prune()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.rand(4, 3, 32, 32)), torch.arange(4)).backward()
        optimizer.step()
        prune()
    modules, pairs = dict(model.named_modules()), channels.paired_norms(model)
    for name, gone in doomed.items():
        norm = modules[pairs[name]]
        for parameter in (modules[name].weight, norm.weight, norm.bias):
            zero = parameter.detach().flatten(1).abs().sum(1) == 0 if parameter.ndim > 1 else parameter == 0
            assert zero.nonzero().flatten().tolist() == gone
    assert all((output[:, [1, 3]] == 0).all() for output in channels.feature_maps(model.eval(), torch.rand(2, 3, 32, 32)).values())


def test_a_norm_of_a_residual_sum_is_never_paired():
    model = network(True, True)
    assert channels.paired_norms(model) == {"0": "1", "3.conv1": "3.bn2"}


def test_where_the_norm_is_left_alone():
    model = network(True, True)
    doomed = {name: [0] for name in channels.convolutions(model)}
    assert len(channels.parameters_of(model, doomed)) == 4 + 3 + 2 * 2  # filters, biases, scale and shift of the two pairs
    assert len(channels.parameters_of(model, doomed, norms=False)) == 7 and len(channels.parameters_of(model, doomed, biases=False)) == 8


def planted(maps, count=2):
    """Scores of layers in order of execution: map c of a layer has accuracy (c * 7 % maps) / maps."""
    return {name: (np.stack([(np.arange(size) * 7 % size) / size] * count), np.zeros((count, size))) for name, size in maps.items()}


def test_every_layer_is_pruned_by_its_own_ranks():
    """The block's shortcut runs first and is registered last: the released code then gives the lists to other layers."""
    model = network(True, True)
    registered, executed = list(channels.convolutions(model)), list(channels.feature_maps(model, torch.rand(1, 3, 8, 8).double()))
    assert registered != executed and set(registered) == set(executed)
    scores = {name: (np.linspace(0, 1, 8)[None], np.zeros((1, 8))) for name in executed}
    scores[executed[1]] = (np.linspace(1, 0, 8)[None], np.zeros((1, 8)))
    counts = dict.fromkeys(registered, 2)
    own = fmp.by_rank(fmp.rankings(scores, options()), counts, options())
    assert [own[name] for name in executed] == [[0, 1], [6, 7], [0, 1], [0, 1]]
    other = fmp.by_rank(fmp.rankings(scores, options()), counts, options(exec_order=True))
    assert other[registered[1]] == [6, 7] and registered[1] != executed[1] and other[executed[1]] == [0, 1]


def test_small_layers_and_the_released_sort():
    scores = {"a": (np.array([[0.5, 0.2, 0.2]]), np.array([[0.0, 1.0, 2.0]]))}
    own, other = fmp.rankings(scores, options()), fmp.rankings(scores, options(argsort=True))
    assert own["a"].tolist() == [2, 1, 0] and sorted(other["a"].tolist()[:2]) == [1, 2]
    assert fmp.by_rank(own, {"a": 1}, options()) == {"a": [2]} and fmp.by_rank(own, {"a": 0}, options()) == {"a": []}


def test_the_smaller_cluster_is_pruned():
    def points(*pairs):
        return {"layer": (np.array(pairs).T, None)}

    low, high = (0.1, 0.0), (0.9, 0.8)
    assert fmp.by_clusters(points(low, high, high, low, high)) == {"layer": [0, 3]}
    assert fmp.by_clusters(points(high, low, low)) == {"layer": [0]}, "whatever its mean"
    assert fmp.by_clusters(points(high, low, high, low)) == {"layer": [1, 3]}, "the lower of two equal ones"
    assert fmp.by_clusters(points(high, high, high)) == {"layer": []}
    assert all(channel < 12 for channel in fmp.by_clusters(planted({"a": 12}))["a"])


def test_the_alias_quirk_scores_the_sums_of_blocks():
    """As the released hooks see an in-place sum: on PreActResNet18 8 of 20 layers, 1,920 of 4,800 maps."""
    model = models.build("preactresnet18", SPEC).double().eval()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    plain, sums = channels.feature_maps(model, images), fmp.block_sums(model, images)
    assert list(plain) == list(sums)
    other = [name for name in plain if not torch.equal(plain[name], sums[name])]
    assert len(other) == 8 and all(name.endswith("conv2") for name in other) and sum(plain[name].shape[1] for name in other) == 1920
    torch.testing.assert_close(sums["network.layer1.0.conv2"], model.network.layer1[0](plain["network.conv1"]))


def test_the_alias_quirk_says_where_it_cannot_be_had():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ConfigError, match="--alias_sum false"):
        fmp.block_sums(Branching(), torch.rand(1, 3, 4, 4))


def test_the_norm_quirk_takes_the_list_of_the_convolution_before():
    model = network(True, True)
    entries = fmp.norms_by_last_convolution(model, {"0": [5], "3.conv1": [1], "3.conv2": [7], "3.shortcut": []})
    found = [(next(name for name, other in model.named_parameters() if other is scale), gone) for scale, gone in entries]
    assert found == [("1.weight", [5]), ("3.bn1.weight", [5]), ("3.bn2.weight", [5])], "in the order of definition, shifts stay"


def found_record(tmp_path, count=300):
    generator = torch.Generator().manual_seed(2)
    images, labels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.arange(count) % 10
    said = []
    clean = data.Split(images, labels, labels)
    return Record(
        SPEC, clean, clean, torch.arange(count), "resnet9", 8, tmp_path, tmp_path, lambda stage, model, **_: said.append(stage)
    ), said


def test_scored_pictures(tmp_path):
    record, _ = found_record(tmp_path)
    images, labels = fmp.scored_pictures(record, options())
    assert len(images) == 128 and labels.bincount().max() - labels.bincount().min() == 1 and 0 <= images.min() and images.max() == 1
    assert torch.equal(images, fmp.scored_pictures(record, options())[0])
    assert len(fmp.scored_pictures(record, options(variant="fmt"))[0]) == 300, "never more than there are"
    few, its = fmp.scored_pictures(record, options(few_images=True))
    assert len(few) == 32 and its.bincount(minlength=10).max() - its.bincount(minlength=10).min() > 1
    twice, _ = fmp.scored_pictures(record, options(double_norm=True))
    torch.testing.assert_close(twice, (images - 0.3) / 0.35)
    assert not torch.equal(images, fmp.scored_pictures(record, options(score_aug=True))[0])


@pytest.mark.parametrize("variant", [None, "released", "fmt", "random", "no_pruning"])
def test_every_variant_on_one_set(variant, tmp_path):
    """The controls fine-tune on the same pictures; random prunes as many maps of every layer, and they stay pruned."""
    record, said = found_record(tmp_path)
    torch.manual_seed(0)
    model = models.build("resnet9", SPEC, 8)
    for name in channels.paired_norms(model).values():
        model.get_submodule(name).bias.data.fill_(0.1)  # as after training: what is behind the ReLU gets a gradient
    norms = {"bn_last_conv": False, "prune_norm": False} if variant == "released" else {}  # dead scales would keep filters dead
    config = options(variant=variant, p=8, epochs=1, precision="fp32", scored_images=20, lr=0.1, **norms)
    fmp.repair(model, record, config)
    assert said == ["pruned", "finetune"]
    if variant == "no_pruning":
        return
    kept = load_file(tmp_path / "kept" / "scores.safetensors")
    layers = channels.convolutions(model)
    assert {f"{name}/pruned" for name in layers} <= set(kept)
    zero = {name: layer.weight.detach().flatten(1).abs().sum(1) == 0 for name, layer in layers.items()}
    if variant == "released":
        assert not all(zero[name][kept[f"{name}/pruned"]].all() for name in layers), "without a mask they grow again"
    else:
        assert all(torch.equal(zero[name], kept[f"{name}/pruned"]) for name in layers)
    if variant != "fmt":
        assert all(int(kept[f"{name}/pruned"].sum()) == layer.out_channels // 8 for name, layer in layers.items())
    assert (tmp_path / "kept" / "scores.png").is_file() == (variant != "random")
    if variant != "random":
        assert variant == "fmt" or all(
            sorted(kept[f"{name}/rank"].tolist()) == list(range(layer.out_channels)) for name, layer in layers.items()
        )
        if variant is None:  # by its own ranks, the worst first
            assert all(
                torch.equal(kept[f"{name}/rank"] < layer.out_channels // 8, kept[f"{name}/pruned"]) for name, layer in layers.items()
            )
        assert all(kept[f"{name}/accuracy"].shape == (1 + (variant == "fmt"), layer.out_channels) for name, layer in layers.items())


def test_at_least_so_many_of_a_small_layer(tmp_path):
    record, _ = found_record(tmp_path)
    model = models.build("resnet9", SPEC, 8)
    config = options(variant="random", min_prune=3, epochs=0, precision="fp32")
    counts = {name: len(gone) for name, gone in fmp.choose_maps(model, record, config).items()}
    assert set(counts.values()) == {3} and counts.keys() == channels.convolutions(model).keys()
    with pytest.raises(ConfigError, match="no convolution"):
        fmp.choose_maps(nn.Linear(2, 2), record, config)
