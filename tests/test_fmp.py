"""FMP against the plain reading of its equations: one map at a time, in float64."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from antidote_bench import models
from antidote_bench.defense import fmp
from antidote_bench.utils import seeds
from antidote_bench.utils.data import dataset
from antidote_bench.utils.data.dataset import Spec
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.repair import fmp_released as released
from antidote_bench.utils.repair import layers
from antidote_bench.utils.repair.defender import Defender

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
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        Block(6, 8 if project else 6, pre, project),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear((8 if project else 6) * 16, 4),
    ).double()
    for module in net.modules():  # statistics and scales as after training, not the identity
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (
                module.running_mean,
                module.running_var,
                module.weight.data,
                module.bias.data,
            ):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return net.eval()


STEP = {"alpha": 16 / 255, "epsilon": 64 / 255, "seed": 3}


def score(model, images, labels, **changes):
    return fmp.score_maps(
        model, images, labels, **{**STEP, "batch": 64, "steps": fmp.fmp_step, **changes}
    )


def options(**changes):
    return fmp.Config(result_file="x", **changes)


def images_and_labels(count=12):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(
        count
    ) % 4


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
            handle = layer.register_forward_hook(
                lambda module, inputs, output: kept.append(output.clone())
            )
            logits = model(pixels)
            handle.remove()
            return kept[0], logits

        clean = own_output(images)[0].detach()
        rows = []
        for channel in range(layer.out_channels):
            leaf = start.clone().requires_grad_()
            loss = (own_output(leaf)[0][:, channel] - clean[:, channel]).square().sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
            sign = gradient.sign()
            attacks = [(start + epsilon * sign).clamp(0, 1)]
            if fmt:
                changes = [start + j * alpha * sign - images for j in (1, 2)]
                attacks = [
                    (images + change.clamp(-epsilon, epsilon)).clamp(0, 1) for change in changes
                ]
            outputs = [model(attacked).detach() for attacked in attacks]
            rows.append(
                [
                    [(logits.argmax(1) == labels).double().mean(), F.cross_entropy(logits, labels)]
                    for logits in outputs
                ]
            )
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
        steps = fmp.fmt_steps if fmt else fmp.fmp_step
        scores = score(model, images, labels, batch=score_batch, steps=steps)
        expected = one_map_at_a_time(model, images, labels, **STEP, fmt=fmt)
        assert set(scores) == set(expected)
        kinds = {accuracy.tobytes() for accuracy, _ in expected.values()}
        assert fmt or len(kinds) > 1, "the reference must tell maps apart"
        for name, (accuracy, loss) in scores.items():
            assert accuracy.shape == (1 + fmt, len(model.get_submodule(name).weight))
            np.testing.assert_array_equal(accuracy, expected[name][0])
            np.testing.assert_allclose(loss, expected[name][1], rtol=0, atol=1e-12)
            order = fmp.ranking(accuracy[0], loss[0])
            assert order.tolist() == fmp.ranking(*expected[name][:, 0]).tolist()


def test_no_random_start_gives_no_gradient():
    model, (images, labels) = network(True, True), images_and_labels()
    clean = (model(images).argmax(1) == labels).double().mean().item()
    for accuracy, _ in score(model, images, labels, alpha=0.0).values():
        assert (accuracy == clean).all()


def test_scoring_leaves_the_model_as_it_was():
    model, (images, labels) = network(True, True).train(), images_and_labels()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score(model, images, labels)
    score(model, images, labels, read_maps=released.block_sums)
    assert model.training
    assert all(
        parameter.requires_grad and parameter.grad is None for parameter in model.parameters()
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_map_is_the_raw_output_of_its_convolution():
    model, (images, _) = network(True, True), images_and_labels()
    block = model[3]
    maps = layers.feature_maps(model, images)
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
    maps = {name: layer.out_channels for name, layer in layers.convolutions(model).items()}
    assert (
        len(maps) == 20
        and sum(maps.values()) == 4800
        and sum(count // 64 for count in maps.values()) == 75
    )
    pairs = layers.paired_norms(model)
    assert len(pairs) == 8 and sum(maps[name] // 64 for name in pairs) == 30
    assert all(conv.endswith("conv1") and norm.endswith("bn2") for conv, norm in pairs.items())


@pytest.mark.parametrize("name", ["resnet9", "vgg19_bn", "resnet18"])
def test_every_convolution_is_paired_where_a_norm_follows(name):
    model = models.build(name, SPEC)
    assert set(layers.paired_norms(model)) == {
        key for key, module in model.named_modules() if isinstance(module, nn.Conv2d)
    }


def test_pruned_filters_are_zero_and_stay_zero():
    model = models.build("resnet9", SPEC, 8)
    to_prune = {name: [1, 3] for name in layers.convolutions(model)}
    prune = layers.make_pruner(layers.parameters_of(model, to_prune))
    prune()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.rand(4, 3, 32, 32)), torch.arange(4)).backward()
        optimizer.step()
        prune()
    modules, pairs = dict(model.named_modules()), layers.paired_norms(model)
    for name, channels in to_prune.items():
        norm = modules[pairs[name]]
        for parameter in (modules[name].weight, norm.weight, norm.bias):
            size = parameter.detach().abs().reshape(len(parameter), -1).sum(1)
            assert (size == 0).nonzero().flatten().tolist() == channels
    maps = layers.feature_maps(model.eval(), torch.rand(2, 3, 32, 32))
    assert all((output[:, [1, 3]] == 0).all() for output in maps.values())


def test_a_norm_of_a_residual_sum_is_never_paired():
    model = network(True, True)
    assert layers.paired_norms(model) == {"0": "1", "3.conv1": "3.bn2"}


def test_norms_and_biases_can_be_left_alone():
    model = network(True, True)
    to_prune = {name: [0] for name in layers.convolutions(model)}
    # filters, biases, scale and shift of the two pairs
    assert len(layers.parameters_of(model, to_prune)) == 4 + 3 + 2 * 2
    assert len(layers.parameters_of(model, to_prune, norms=False)) == 7
    assert len(layers.parameters_of(model, to_prune, biases=False)) == 8


def planted(maps, count=2):
    """Scores of layers in order of execution: map c has accuracy (c * 7 % maps) / maps."""
    return {
        name: (np.stack([(np.arange(size) * 7 % size) / size] * count), np.zeros((count, size)))
        for name, size in maps.items()
    }


def test_every_layer_is_pruned_by_its_own_ranks():
    """The block's shortcut runs first and is defined last: exec_order mixes up the ranks."""
    model = network(True, True)
    defined = list(layers.convolutions(model))
    executed = list(layers.feature_maps(model, torch.rand(1, 3, 8, 8).double()))
    assert defined != executed and set(defined) == set(executed)
    orders = {name: np.arange(8) for name in executed}
    orders[executed[1]] = np.arange(8)[::-1]
    counts = dict.fromkeys(defined, 2)
    own = fmp.by_rank(orders, counts)
    assert [own[name] for name in executed] == [[0, 1], [6, 7], [0, 1], [0, 1]]
    other = released.by_misplaced_ranks(orders, counts)
    assert other[defined[1]] == [6, 7] and other[executed[1]] == [0, 1]
    assert defined[1] != executed[1]


def test_small_layers_and_the_released_sort():
    accuracy, loss = np.array([0.5, 0.2, 0.2]), np.array([0.0, 1.0, 2.0])
    order = fmp.ranking(accuracy, loss)
    assert order.tolist() == [2, 1, 0]
    assert sorted(released.by_accuracy_alone(accuracy, loss).tolist()[:2]) == [1, 2]
    assert fmp.by_rank({"a": order}, {"a": 1}) == {"a": [2]}
    assert fmp.by_rank({"a": order}, {"a": 0}) == {"a": []}


def test_the_smaller_cluster_is_pruned():
    def points(*pairs):
        return {"layer": (np.array(pairs).T, None)}

    low, high = (0.1, 0.0), (0.9, 0.8)
    assert fmp.by_clusters(points(low, high, high, low, high)) == {"layer": [0, 3]}
    assert fmp.by_clusters(points(high, low, low)) == {"layer": [0]}, "whatever its mean"
    assert fmp.by_clusters(points(high, low, high, low)) == {"layer": [1, 3]}, (
        "the lower of two equal ones"
    )
    assert fmp.by_clusters(points(high, high, high)) == {"layer": []}
    assert all(channel < 12 for channel in fmp.by_clusters(planted({"a": 12}))["a"])


def test_alias_sum_scores_the_sums_of_blocks():
    """On PreActResNet18 these are 8 of 20 layers, 1,920 of 4,800 maps."""
    model = models.build("preactresnet18", SPEC).double().eval()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    plain, sums = layers.feature_maps(model, images), released.block_sums(model, images)
    assert list(plain) == list(sums)
    other = [name for name in plain if not torch.equal(plain[name], sums[name])]
    assert len(other) == 8 and all(name.endswith("conv2") for name in other)
    assert sum(plain[name].shape[1] for name in other) == 1920
    torch.testing.assert_close(
        sums["network.layer1.0.conv2"], model.network.layer1[0](plain["network.conv1"])
    )


def test_alias_sum_is_refused_where_the_model_cannot_be_traced():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ConfigError, match="--alias_sum false"):
        released.block_sums(Branching(), torch.rand(1, 3, 4, 4))


def test_bn_last_conv_takes_the_list_of_the_convolution_before():
    model = network(True, True)
    to_prune = {"0": [5], "3.conv1": [1], "3.conv2": [7], "3.shortcut": []}
    names = {parameter: name for name, parameter in model.named_parameters()}
    entries = released.scales_by_last_convolution(model, to_prune)
    entries = [(names[scale], channels) for scale, channels in entries]
    expected = [("1.weight", [5]), ("3.bn1.weight", [5]), ("3.bn2.weight", [5])]
    assert entries == expected, "in the order of definition, and without shifts"


def found_record(tmp_path, count=300):
    """(a record of random images, all of them clean, the list of stages that were reported)."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels, stages = torch.arange(count) % 10, []
    clean = dataset.Split(images, labels, labels)
    record = Defender(
        SPEC,
        clean,
        clean,
        torch.arange(count),
        "resnet9",
        8,
        tmp_path,
        tmp_path,
        lambda stage, model, **_: stages.append(stage),
    )
    return record, stages


def test_the_images_to_score(tmp_path):
    record, _ = found_record(tmp_path)
    images, labels = fmp.images_to_score(record, options())
    counts = labels.bincount()
    assert len(images) == 128 and counts.max() - counts.min() == 1
    assert images.min() >= 0 and images.max() == 1
    assert torch.equal(images, fmp.images_to_score(record, options())[0])
    every, _ = fmp.images_to_score(record, options(variant="fmt"))
    assert len(every) == 300, "never more than there are"
    few, its_labels = fmp.images_to_score(record, options(few_images=True))
    counts = its_labels.bincount(minlength=10)
    assert len(few) == 32 and counts.max() - counts.min() > 1
    twice, _ = fmp.images_to_score(record, options(double_norm=True))
    torch.testing.assert_close(twice, (images - 0.3) / 0.35)
    augmented, _ = fmp.images_to_score(record, options(score_aug=True))
    assert not torch.equal(images, augmented)


def repaired(variant, record):
    """A network that a variant has repaired."""
    torch.manual_seed(0)
    model = models.build("resnet9", SPEC, 8)
    for name in layers.paired_norms(model).values():
        # as after training: what is behind the ReLU gets a gradient
        model.get_submodule(name).bias.data.fill_(0.1)
    changes = {"p": 8, "epochs": 1, "precision": "fp32", "scored_images": 20, "lr": 0.1}
    if variant == "released":  # a scale of zero would keep its filter at zero
        changes |= {"bn_last_conv": False, "prune_norm": False}
    return fmp.repair(model, record, options(variant=variant, **changes))


def zero_filters(layer):
    """Which filters of a convolution are zero, a bool each."""
    return layer.weight.detach().flatten(1).abs().sum(1) == 0


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    """through(variant): (the model that a variant has repaired, the stages that it reported, the
    folder of what it kept), made once."""

    @functools.cache
    def through(variant):
        place = tmp_path_factory.mktemp("fmp")
        record, stages = found_record(place)
        return repaired(variant, record), stages, place / "kept"

    return through


@pytest.mark.parametrize("variant", [None, "fmt", "random"])
def test_pruned_filters_stay_zero_while_fine_tuning(variant, through):
    model, stages, kept = through(variant)
    assert stages == ["pruned", "finetune"]
    tensors = load_file(kept / "scores.safetensors")
    for name, layer in layers.convolutions(model).items():
        assert torch.equal(zero_filters(layer), tensors[f"{name}/pruned"])


def test_with_zero_init_pruned_filters_grow_again(through):
    model, stages, kept = through("released")
    assert stages == ["pruned", "finetune"]
    tensors = load_file(kept / "scores.safetensors")
    assert not all(
        zero_filters(layer)[tensors[f"{name}/pruned"]].all()
        for name, layer in layers.convolutions(model).items()
    )


def test_no_pruning_fine_tunes_only(tmp_path):
    record, stages = found_record(tmp_path)
    model = repaired("no_pruning", record)
    assert stages == ["pruned", "finetune"] and not (tmp_path / "kept").exists()
    assert not any(zero_filters(layer).any() for layer in layers.convolutions(model).values())


@pytest.mark.parametrize("variant", [None, "released", "fmt", "random"])
def test_scores_are_kept(variant, through):
    """Random pruning has no scores, and takes as many maps of every layer."""
    model, _, kept = through(variant)
    convolutions = layers.convolutions(model)
    tensors = load_file(kept / "scores.safetensors")
    assert (kept / "scores.png").is_file() == (variant != "random")
    for name, layer in convolutions.items():
        count = layer.out_channels
        pruned = tensors[f"{name}/pruned"]
        assert variant == "fmt" or int(pruned.sum()) == count // 8
        if variant == "random":
            assert f"{name}/accuracy" not in tensors
            continue
        assert tensors[f"{name}/accuracy"].shape == (1 + (variant == "fmt"), count)
        if variant != "fmt":
            rank = tensors[f"{name}/rank"]
            assert sorted(rank.tolist()) == list(range(count))
            if variant is None:
                assert torch.equal(rank < count // 8, pruned), "the worst of its own ranks"


def test_min_prune_is_for_small_layers(tmp_path):
    record, _ = found_record(tmp_path)
    model = models.build("resnet9", SPEC, 8)
    config = options(variant="random", min_prune=3, epochs=0, precision="fp32")
    to_prune = fmp.choose_maps(model, record, config)
    assert {len(channels) for channels in to_prune.values()} == {3}
    assert to_prune.keys() == layers.convolutions(model).keys()
    with pytest.raises(ConfigError, match="no convolution"):
        fmp.choose_maps(nn.Linear(2, 2), record, config)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("p", 0, "p must be 1 or more"),
        ("min_prune", -1, "min_prune must be 0 or more"),
        ("alpha", 1.5, "alpha must be from 0 to 1"),
        ("scored_images", 0, "scored_images must be 1 or more images"),
    ],
)
def test_options_out_of_range(name, value, words):
    with pytest.raises(ConfigError, match=words):
        options(**{name: value})
