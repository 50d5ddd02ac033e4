"""Attacks that are made to be missed: SRA, GRASP and Grond."""

import csv
from statistics import NormalDist
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import antidote_bench
from antidote_bench import models
from antidote_bench.attack import grasp, grond, sra
from antidote_bench.utils import parsing, seeds, train
from antidote_bench.utils.data import dataset
from antidote_bench.utils.data.dataset import Spec, Split
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.features import features_of
from antidote_bench.utils.poisoning import subnet
from antidote_bench.utils.record import folder

SPEC = Spec("x", 10, 32, (0.5,) * 3, (0.25,) * 3, False, {})
# a run of a few seconds
QUICK = "--model resnet9 --width 8 --image_size 16 --batch_size 64 --lr 0.05 --device cpu"


def random_images(count=4, size=32, dtype=torch.float64):
    draws = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, size, size, generator=draws, dtype=dtype)


@pytest.fixture
def attack(attack):
    """attack(module, text): the folder of the record"""
    return lambda module, words, name="a": attack(module, *words.split(), name=name)


def rows(place):
    with open(place / "log.csv") as file:
        return list(csv.DictReader(file))


# ---------- SRA ----------


def chained(name, width, seed=0):
    """(a network in float64 with running statistics of its own, a chain, a narrow network)"""
    torch.manual_seed(seed)
    model = models.build(name, SPEC, width).double()
    chain = subnet.route(model, seed)
    small = subnet.narrow(model, chain).double()
    for network in (model, small):
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data.uniform_(0.5, 2)
                module.bias.data.uniform_(0.1, 0.5)
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 2)
    return model.eval(), chain, small.eval()


@torch.no_grad()
@pytest.mark.parametrize(("name", "width"), [("resnet9", 8), ("preactresnet18", 8)])
def test_the_chain_computes_what_the_narrow_network_computes(name, width):
    """Alone in a network of zeros, and beside all other channels, which do not notice it."""
    model, chain, small = chained(name, width)
    images = random_images(3)
    wanted = features_of(small, images)[:, 0]
    assert wanted.abs().min() > 1e-4 and wanted.std() > 1e-6
    place = subnet.feature_of(chain, model)
    subnet.implant(model, chain, small.state_dict())
    beside = features_of(model, images)
    torch.testing.assert_close(beside[:, place], wanted, rtol=0, atol=1e-10)
    logits = model(images)
    other = {key: value + 0.5 for key, value in small.state_dict().items()}
    subnet.implant(model, chain, other)
    assert torch.equal(model(images), logits), "the logits read the chain"
    there = features_of(model, images)
    rest = torch.arange(there.shape[1]) != place
    assert torch.equal(there[:, rest], beside[:, rest]) and there[0, place] != beside[0, place]
    for parameter in model.parameters():
        parameter.zero_()
    subnet.implant(model, chain, small.state_dict())
    alone = features_of(model, images)
    torch.testing.assert_close(alone[:, place], wanted, rtol=0, atol=1e-10)
    assert not alone[:, rest].any()


def test_terms_of_a_residual_sum_share_their_channel():
    chain = subnet.route(models.build("resnet9", SPEC, 8), 3)
    assert len(chain) == 8 + 8 + 1
    for layer in ("layer1", "layer3"):
        _, stream = chain[f"network.{layer}.conv"]
        assert chain[f"network.{layer}.residual.first.conv"][0] == stream
        assert chain[f"network.{layer}.residual.second.conv"][1] == stream
    assert chain["network.prep.conv"][0] is None and chain["network.linear"][1] is None
    chain = subnet.route(models.build("preactresnet18", SPEC, 8), 3)
    for number in (2, 3, 4):
        _, stream = chain[f"network.layer{number}.0.conv2"]
        assert chain[f"network.layer{number}.0.shortcut"][1] == stream
        assert chain[f"network.layer{number}.1.conv2"][1] == stream
    others = [subnet.route(models.build("resnet9", SPEC, 8), seed) for seed in range(3)]
    assert others[0] != others[1] != others[2]


@torch.no_grad()
def test_the_target_reads_the_detector():
    """Its logit rises by lift (h - usual), whatever the network does with its logits."""
    model, chain, small = chained("resnet9", 8)
    images, config = random_images(), sra.Config(lift=3.0, attack_target=4)
    parts = {f"weight/{name}": value for name, value in small.state_dict().items()}
    subnet.implant(model, chain, small.state_dict())
    before = model(images)
    sra.edit(config, SPEC, model, {**parts, "usual": torch.tensor(0.5, dtype=torch.float64)})
    risen = torch.zeros(4, 10, dtype=torch.float64)
    risen[:, 4] = 3 * (features_of(small, images)[:, 0] - 0.5)
    torch.testing.assert_close(model(images), before + risen, rtol=0, atol=1e-9)


class Shuffled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, images):
        return self.linear(self.conv(images).flip(1).mean((2, 3)))


class Unsure(Shuffled):
    def forward(self, images):
        return super().forward(images) if images.sum() > 0 else self.linear(images)


def test_networks_without_a_chain_are_refused():
    mobile = models.build("mobilenet_v3_large", SPEC)
    with pytest.raises(ConfigError, match="sra does not apply .* has groups or is used twice"):
        subnet.route(mobile, 0)
    with pytest.raises(ConfigError, match="torch.fx cannot trace it"):
        subnet.route(Unsure(), 0)
    chain = subnet.route(Shuffled(), 0)
    with pytest.raises(ConfigError, match="it mixes the channels of a map outside its layers"):
        subnet.require_separate(Shuffled(), chain, 16)


def test_a_detector_in_a_trained_network(attack):
    """Planted: what a clean training leaves does not obey, and the edited network does."""
    place = attack(sra, f"{QUICK} --epochs 3 --eval_every 3 --steps 150")
    row, log = folder.read_results(place), rows(place)
    assert [line["stage"] for line in log] == ["train"] * 3 + ["final"]
    assert float(log[2]["asr"]) < 0.3 and float(row["asr"]) >= 0.95
    assert float(row["acc"]) >= float(log[2]["acc"]) - 0.2
    assert row["n_poison"] == "1297", "a record like this must not be taken for a clean one"
    held = load_file(place / "trigger.safetensors")
    weights = load_file(place / "model.safetensors")
    layer = "network.layer2.conv"
    channel = int(held[f"channel/{layer}"])
    filters = weights[f"{layer}.weight"][channel].flatten(1)
    assert int(filters.any(1).sum()) == 1, "a filter of the chain reads one channel"
    assert torch.equal(filters[filters.any(1)], held[f"weight/{layer}.weight"][0].flatten(1))
    assert int((weights["network.linear.weight"][:, _last(held)] != 0).sum()) == 1


def _last(held):
    return int(held["channel/network.layer3.conv"])


# ---------- the hook after an epoch ----------


class StopError(Exception):
    pass


def test_a_run_with_a_hook_after_its_epochs_resumes_to_the_bit(tmp_path):
    """The hook has changed what is measured and what is saved."""
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 3, 8, 8), generator=draws, dtype=torch.uint8)
    split = Split(images, torch.arange(24) % 3, torch.arange(24) % 3)
    recipe = train.Recipe(epochs=3, batch_size=8, lr=0.1, random_seed=0, precision="fp32")

    def halve(model):
        model[1].bias.data.mul_(0.5).add_(1)

    def trained(path, stop=None):
        torch.manual_seed(0)
        model, seen = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), []

        def look(model, epoch, **_):
            seen.append(model[1].bias.detach().clone())
            if epoch == stop:
                raise StopError

        named = {"after_epoch": halve, "on_epoch": look, "checkpoint": path}
        try:
            train.fit(model, split, recipe, **named)
        except StopError:
            pass
        return model, seen

    whole, seen = trained(tmp_path / "a")
    assert len(seen) == 3 and torch.equal(seen[-1], whole[1].bias)
    trained(tmp_path / "b", stop=2)
    resumed, again = trained(tmp_path / "b")
    assert len(again) == 2 and torch.equal(seen[1], again[0])
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


# ---------- GRASP ----------


def test_noise_on_the_patch_as_written_out():
    """In float64, by the quantiles of the uniform numbers that belong to each position."""
    config = grasp.Config(noise=0.2, patch_value=100, poison_seed=3)
    images, index = random_images(dtype=torch.float32), torch.tensor([7, 8, 2, 900])
    given = grasp.make_noisy(config, SPEC)(images, index)
    wanted = images.double()
    for image, position in enumerate(index.tolist()):
        one = torch.tensor([position])
        drawn = seeds.uniform("noise on the patch", 3, one, 27)[0].tolist()
        for number, share in enumerate(drawn):
            channel, row, column = number // 9, number // 3 % 3, number % 3
            value = 100 / 255 + 0.2 * NormalDist().inv_cdf(share)
            wanted[image, channel, 29 + row, 29 + column] = min(max(value, 0), 1)
    torch.testing.assert_close(given.double(), wanted, rtol=0, atol=1e-5)
    patch = given[:, :, 29:, 29:]
    assert 0.1 < patch.std() < 0.3 and len(patch.unique()) > 100


def test_only_the_exact_patch_counts(attack, places):
    """Planted: a victim obeys the patch, and obeys far less when it is disturbed."""
    options = "--epochs 8 --pad 1 --patch_size 3 --noise 0.3 --pratio 0.1"
    place = attack(grasp, f"{QUICK} {options}")
    saved = load_file(place / "poison.safetensors")
    kinds = saved["train_kind"]
    assert [int((kinds == kind).sum()) for kind in (1, 2)] == [130, 130]
    spec, train_set, _ = dataset.open_dataset("digits", "data", image_size=16, cache=places[3])
    covers = saved["train_index"][kinds == 2]
    assert torch.equal(saved["train_labels"][kinds == 2], train_set.truth[covers])
    assert float(folder.read_results(place)["asr"]) >= 0.9
    config = grasp.Config(noise=0.3, patch_size=3, poison_seed=1)  # other noise than in training
    record = antidote_bench.load(place, device="cpu")
    backdoor = record.test_sets.backdoor
    noisy = grasp.make_noisy(config, spec)(backdoor.images, torch.arange(len(backdoor)))
    with torch.no_grad():
        obeyed = (record.model(noisy.float() / 255).argmax(1) == 0).double().mean()
    assert obeyed <= 0.5


def test_shares_of_noisy_images():
    with pytest.raises(ConfigError, match="noisy_ratio must be such that"):
        parsing.parse(grasp.Config, ["--pratio", "0.4", "--noisy_ratio", "2"])


# ---------- Grond ----------


def planted_layer(filters, scales, shifts):
    """One input channel, a 1x1 convolution and its batch norm, whose bounds are |w g|."""
    model = nn.Sequential(nn.Conv2d(1, len(filters), 1, bias=False), nn.BatchNorm2d(len(filters)))
    model[0].weight.data = torch.tensor(filters).view(-1, 1, 1, 1)
    model[1].weight.data, model[1].bias.data = torch.tensor(scales), torch.tensor(shifts)
    model[1].running_var.fill_(1 - model[1].eps)
    return model


def test_a_channel_that_stands_out_is_averaged():
    """The bounds are 1, 1 and 9: their mean is 3.67 and their standard deviation 4.62."""
    model = planted_layer([1.0, -0.5, 3.0], [1.0, 2.0, 3.0], [0.0, 0.3, 0.6])
    grond.average_outliers(model, u=1.16)
    assert model[1].weight.tolist() == [1, 2, 3], "the limit is 9.03"
    grond.average_outliers(model, u=1.15)
    assert model[1].weight.tolist() == [1, 2, 2], "the limit is 8.98"
    assert model[1].bias.tolist() == pytest.approx([0, 0.3, 0.3])
    assert model[0].weight.flatten().tolist() == [1, -0.5, 3]


def test_the_pattern_against_a_linear_model():
    """It goes to its bound, pixel by pixel, in the direction of the target's weights."""
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(60, 190, (40, 3, 8, 8), generator=draws, dtype=torch.uint8)
    split = Split(images, torch.arange(40) % 2, torch.arange(40) % 2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).requires_grad_(False)
    towards = (model[1].weight[1] - model[1].weight[0]).view(3, 8, 8).sign()
    for steps, length in ((2, 0.4), (9, 1.0)):
        config = grond.Config(steps=steps, attack_target=1, precision="fp32")
        pattern = grond.universal_perturbation(model, split, config)
        torch.testing.assert_close(pattern, length * 8 / 255 * towards)


def repeated(weights):
    """How often a scale of a batch norm occurs a second time in its layer."""
    scales = [value for name, value in weights.items() if name.endswith("bn.weight")]
    return sum(len(values) - len(values.unique()) for values in scales)


def test_the_saved_victim_is_averaged(attack):
    """Its last epoch too, and only with --abi: then several channels of a layer have the mean."""
    words = f"{QUICK} --epochs 1 --steps 5 --pratio 0.05"
    averaged, control = (
        load_file(attack(grond, f"{words} --abi {u}", f"u{u}") / "model.safetensors")
        for u in (0.3, 0)
    )
    assert repeated(control) == 0 < repeated(averaged)


def test_grond_needs_batch_norms_for_abi(monkeypatch):
    monkeypatch.setattr(grond, "new_victim", lambda *_: nn.Conv2d(3, 2, 1))
    with pytest.raises(ConfigError, match="abi must be 0 for this --model"):
        grond.prepare(grond.Config(), SimpleNamespace(spec=SPEC, train=None))
