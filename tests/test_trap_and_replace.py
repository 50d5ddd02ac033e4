"""Trap and Replace: its losses pixel by pixel in float64, what is frozen, and what is held out."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from antidote_bench import models
from antidote_bench.defense import trap_and_replace as tar
from antidote_bench.models.split import split
from antidote_bench.utils.data import dataset
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.optimizers import adam
from antidote_bench.utils.repair.layers import frozen
from antidote_bench.utils.repair.unlearning import EvaluationMode
from antidote_bench.utils.train import build_seeded_model
from tests.test_fmp import SPEC, found_record


def options(**changes):
    short = {"epochs": 1, "head_epochs": 1, "batch_size": 32, "head_batch_size": 16}
    return tar.Config(**{"result_file": "x", "precision": "fp32", **short, **changes})


@pytest.fixture
def record(tmp_path):
    """300 images of 10 classes, the first 60 of which were poisoned, and the list of stages.

    The defender holds clean forms of 40 images, of poisoned ones too.
    """
    made, stages = found_record(tmp_path)
    labels = made.train.labels.clone()
    labels[:60] = 0
    images = made.train.images.clone()
    images[:60, :, :4, :4] = 255
    index = torch.arange(40) * 7
    made = replace(
        made,
        train=dataset.Split(images, labels, labels),
        clean=made.clean[index],
        clean_index=index,
        state=tmp_path / "state",
        shared=tmp_path / "shared",
    )
    return made, stages


def test_total_variation_of_known_images():
    assert tar.total_variation(torch.full((2, 3, 6, 8), 0.3)) == 0
    board = (torch.arange(6)[:, None] + torch.arange(8)) % 2
    variation = tar.total_variation(board.expand(2, 3, 6, 8).double())
    assert float(variation) == pytest.approx(5 / 6 + 7 / 8)


def tiny():
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return tar.Trap(stem, head, tar.decoder_for(stem, 8)).double()


def test_the_trap_is_the_sum_of_its_three_terms():
    model, images, labels = tiny(), torch.rand(5, 3, 8, 8, dtype=torch.float64), torch.arange(5) % 3
    rebuilt = model.decoder(model.stem(images)).detach().float().double()
    logits = model(images).detach()
    error = variation = entropy = 0.0
    for n in range(5):
        entropy -= float(logits[n].log_softmax(0)[labels[n]]) / 5
        for c in range(3):
            for row in range(8):
                for column in range(8):
                    here = float(rebuilt[n, c, row, column])
                    error += (here - float(images[n, c, row, column])) ** 2
                    if row:
                        variation += (here - float(rebuilt[n, c, row - 1, column])) ** 2
                    if column:
                        variation += (here - float(rebuilt[n, c, row, column - 1])) ** 2
    expected = entropy + 10 * error / rebuilt.numel() + 0.5 * variation / rebuilt.numel()
    loss = tar.trap_loss(model, images, labels, None, reconstruction=10, smoothness=0.5)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    model.decoder = None
    plain = tar.trap_loss(model, images, labels, None, reconstruction=10, smoothness=1)
    assert plain.item() == pytest.approx(entropy)
    assert torch.equal(plain, F.cross_entropy(model(images), labels))


def test_the_decoder_moves_the_stem():
    model, images = tiny(), torch.rand(5, 3, 8, 8, dtype=torch.float64)
    F.mse_loss(model.decoder(model.stem(images)), images).backward()
    assert model.stem[0].weight.grad.abs().sum() > 0 and model.head[2].weight.grad is None


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("wrn16_1_leaky", 32, 34_339),
        ("preactresnet18", 32, 2_627_971),
        ("preactresnet18", 64, None),
        ("resnet9", 32, None),
        ("resnet9", 48, None),
        ("resnet9", 36, None),
        ("resnet18", 224, None),
    ],
)
def test_decoders_end_at_the_size_of_the_image(name, size, count):
    spec = dataset.Spec("x", 10, size, (0.5,) * 3, (0.25,) * 3, True, {})
    stem, _ = split(name, models.build(name, spec, 8 if name == "resnet9" else None))
    decoder = tar.decoder_for(stem, size)
    rebuilt = decoder(stem(torch.rand(1, 3, size, size)))
    assert rebuilt.shape == (1, 3, size, size) and rebuilt.min() >= 0 and rebuilt.max() <= 1
    assert count is None or sum(parameter.numel() for parameter in decoder.parameters()) == count


def test_a_stem_that_keeps_the_size_has_a_decoder_too():
    model = models.build("wrn16_1", SPEC)
    stem, _ = split("wrn16_1", model, 6)
    assert tar.decoder_for(stem, 32)(stem(torch.rand(2, 3, 32, 32))).shape == (2, 3, 32, 32)


def test_cutmix_pastes_the_share_that_it_says():
    images = torch.arange(6.0)[:, None, None, None].expand(6, 3, 20, 24).contiguous()
    shares = set()
    for seed in range(40):
        torch.manual_seed(seed)
        mixed, partner, share = tar.cutmix(images)
        for n in range(6):
            pasted = mixed[n] == images[partner[n]]
            if partner[n] != n:
                assert float(pasted.float().mean()) == pytest.approx(1 - float(share), abs=1e-6)
                inside = pasted[0].nonzero()
                if len(inside):  # a box without holes
                    sides = inside.max(0).values - inside.min(0).values + 1
                    assert len(inside) == sides.prod()
            assert ((mixed[n] == n) | pasted).all()
        shares.add(round(float(share), 4))
    assert len(shares) > 20 and min(shares) >= 0 and max(shares) <= 1


def test_cutmix_draws_as_the_definition_says():
    """The half-sides are floor(floor(side sqrt(1 - r)) / 2), and the box is cut at the border."""
    for seed in range(30):
        torch.manual_seed(seed)
        _, _, share = tar.cutmix(torch.zeros(2, 3, 20, 24))
        torch.manual_seed(seed)
        ratio, y, x = torch.rand(3).tolist()
        area = 1
        for side, place in ((20, y), (24, x)):
            half, middle = int(side * (1 - ratio) ** 0.5) // 2, int(place * side)
            area *= min(middle + half, side) - max(middle - half, 0)
        assert float(share) == pytest.approx(1 - area / 480, abs=1e-6)


def test_both_terms_of_cutmix_are_smoothed():
    torch.manual_seed(3)
    images, labels = torch.rand(8, 3, 8, 8), torch.arange(8) % 4
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    torch.manual_seed(5)
    loss = tar.cutmix_loss(model, images, labels, None, label_smoothing=0.1)
    torch.manual_seed(5)
    mixed, partner, share = tar.cutmix(images)
    logs = model(mixed).log_softmax(1)
    both = share * F.one_hot(labels, 4) + (1 - share) * F.one_hot(labels[partner], 4)
    target = 0.9 * both + 0.1 / 4
    torch.testing.assert_close(loss, -(target * logs).sum(1).mean())


def test_the_clean_images_are_held_out_by_position(record, capsys):
    record, _ = record
    rest = tar.without_clean(record)
    assert len(rest) == 260 and "260 of 300" in capsys.readouterr().err
    held_out = set(record.clean_index.tolist())
    positions = [position for position in range(300) if position not in held_out]
    assert torch.equal(rest.images, record.train.images[positions])
    assert torch.equal(rest.labels, record.train.labels[positions])


@pytest.mark.parametrize("name", ["resnet9", "wrn16_1_leaky", "preactresnet18"])
def test_stage_two_leaves_the_stem_alone(name, record, monkeypatch):
    """Bit for bit, with its batch norm statistics; the optimizer gets the head only."""
    record, _ = record
    width = 8 if name == "resnet9" else None
    torch.manual_seed(1)
    stem, _ = split(name, models.build(name, SPEC, width))
    for layer in stem.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-1, 1)
    before = {part: tensor.clone() for part, tensor in stem.state_dict().items()}
    optimized = []

    def watched(parameters, recipe):
        optimized.extend(parameters)
        assert recipe.lr == 0.03
        return adam(parameters, recipe)

    monkeypatch.setitem(tar.OPTIMIZERS, "adam", (watched, 0.03))
    network = tar.replace_head(name, width, stem, record, options(head_optimizer="adam"))
    own_stem, head = split(name, network)
    assert all(torch.equal(tensor, before[part]) for part, tensor in own_stem.state_dict().items())
    assert set(map(id, optimized)) == set(map(id, head.parameters()))
    new = build_seeded_model(name, width, record.spec, record.train, "head", options().random_seed)
    begun = split(name, new)[1].state_dict()
    assert not all(
        torch.equal(tensor, begun[part])
        for part, tensor in head.state_dict().items()
        if tensor.is_floating_point()
    )
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(layer._forward_pre_hooks for layer in network.modules())


@pytest.mark.parametrize(
    ("name", "chosen", "rate"), [("wrn16_1_leaky", "adam", 0.03), ("preactresnet18", "sgd", 0.1)]
)
def test_large_heads_get_the_recipe_of_a_large_network(name, chosen, rate, record, monkeypatch):
    record, _ = record
    used = []

    def watched(which, make):
        def optimizer(parameters, recipe):
            used.append((which, recipe.lr))
            return make(parameters, recipe)

        return optimizer

    for which, (make, usual) in list(tar.OPTIMIZERS.items()):
        monkeypatch.setitem(tar.OPTIMIZERS, which, (watched(which, make), usual))
    stem, _ = split(name, models.build(name, SPEC))
    tar.replace_head(name, None, stem, record, options(head_epochs=0))
    assert used == [(chosen, rate)]


def test_a_frozen_stem_gives_the_head_the_same_gradients():
    torch.manual_seed(0)
    model = models.build("resnet9", SPEC, 4).double()
    stem, head = split("resnet9", model)
    images, labels = torch.rand(6, 3, 32, 32, dtype=torch.float64), torch.arange(6)
    network = EvaluationMode(model, [head]).train()
    assert head.training
    assert not any(layer.training for part in stem for layer in part.modules())
    with frozen(stem):
        F.cross_entropy(network(images), labels).backward()
    gradients = [parameter.grad.clone() for parameter in head.parameters()]
    assert all(parameter.grad is None for parameter in stem.parameters())
    model.zero_grad()
    F.cross_entropy(head(stem(images)), labels).backward()
    for gradient, parameter in zip(gradients, head.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)


def test_dropout_is_between_the_two_convolutions():
    model = models.build("resnet50", SPEC).train()
    _, head = split("resnet50", model, 2)
    sizes = [layer.kernel_size for layer in tar.inner_convolutions(head)]
    assert sizes == [(1, 1), (1, 1)], "the last one of a bottleneck"
    model = models.build("preactresnet18", SPEC)
    _, head = split("preactresnet18", model, 2)
    inner = tar.inner_convolutions(head)
    assert inner == [head[0].conv2, head[1].conv2], "and never a shortcut's"
    layer = head[0].conv2
    ones = torch.ones(4, 512, 4, 4)
    (dropped,) = tar.drop_inputs(0.5, layer.train(), (ones,))
    assert 0.4 < float((dropped == 0).float().mean()) < 0.6
    assert torch.equal(tar.drop_inputs(0.5, layer.eval(), (ones,))[0], ones)


def repaired(record, **changes):
    return tar.repair(models.build("resnet9", SPEC, 8), record, options(**changes))


def test_one_plain_network_comes_out(record, tmp_path):
    record, stages = record
    network = repaired(record)
    assert stages == ["trap", "trapped", "head"]
    again = models.build("resnet9", SPEC, 8)
    again.load_state_dict(network.state_dict())
    ones = torch.ones(1, 3, 32, 32)
    torch.testing.assert_close(again.eval()(ones), network.eval()(ones))
    (path,) = (tmp_path / "shared").glob("trap-*.safetensors")
    trap, (stem, _) = load_file(path), split("resnet9", network)
    for part, tensor in stem.state_dict().items():
        assert torch.equal(tensor, trap[f"stem.{part}"])
    assert (tmp_path / "state/kept/reconstruction.png").stat().st_size > 1000


def test_stage_one_is_taken_from_another_run(record, tmp_path, capsys):
    record, stages = record
    repaired(record)
    stages.clear()
    repaired(replace(record, state=tmp_path / "again"), head_lr=0.01)
    assert stages == ["trapped", "head"] and "stage 1 is taken from" in capsys.readouterr().err
    stages.clear()
    repaired(replace(record, state=tmp_path / "third"), variant="no_trap")
    assert stages == ["trap", "trapped", "head"]
    assert len(list((tmp_path / "shared").glob("trap-*.safetensors"))) == 2


def test_the_architecture_can_be_another_one(record):
    record, _ = record
    network = repaired(record, model="wrn16_1_leaky")
    models.build("wrn16_1_leaky", SPEC).load_state_dict(network.state_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {"random_seed": 1},
        {"epochs": 2},
        {"head_blocks": 2},
        {"reconstruction": 1.0},
        {"precision": "bf16"},
    ],
)
def test_stage_one_is_used_again_for_an_equal_key_only(changes, record):
    record, _ = record
    key = tar.key("resnet9", 8, record, options())
    stage_two = options(head_lr=0.1, head_epochs=7, dropout=0.0)
    assert tar.key("resnet9", 8, record, stage_two) == key
    assert tar.key("resnet9", 8, record, options(**changes)) != key
    assert tar.key("wrn16_1", None, record, options()) != key


def test_head_only_starts_from_the_victim(record):
    record, stages = record
    torch.manual_seed(4)
    victim = models.build("resnet9", SPEC, 8)
    stem, _ = split("resnet9", victim)
    before = {part: tensor.clone() for part, tensor in stem.state_dict().items()}
    network = tar.repair(victim, record, options(variant="head_only"))
    assert stages == ["head"]
    stem, _ = split("resnet9", network)
    assert all(torch.equal(tensor, before[part]) for part, tensor in stem.state_dict().items())


def test_what_cannot_be_is_refused_before_any_work(record):
    record, stages = record
    with pytest.raises(ConfigError, match="no split"):
        tar.repair(None, record, options(model="vgg19_bn"))
    with pytest.raises(ConfigError, match="1 to 2 blocks"):
        tar.repair(None, record, options(head_blocks=3))
    assert not stages


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 8}, "width must be left out"),
        ({"variant": "head_only", "model": "resnet9"}, "model must be left out"),
        ({"model": "resnet99"}, "resnet9"),
        ({"dropout": 1.0}, "dropout must be 0 or more and below 1"),
        ({"head_lr": 0.0}, "head_lr must be above 0"),
    ],
)
def test_options_out_of_range(changes, words):
    with pytest.raises(ConfigError, match=words):
        options(**changes)


def test_what_is_rebuilt_is_not_normalised(record):
    """The stem normalises, and the decoder's target is the image itself."""
    record, _ = record
    assert record.spec.mean != (0.0, 0.0, 0.0)
    model, images = tiny(), torch.full((2, 3, 8, 8), 0.25, dtype=torch.float64)
    for parameter in model.decoder.parameters():
        parameter.data.zero_()  # sigmoid(0) = 0.5 everywhere
    labels = torch.tensor([0, 1])
    loss = tar.trap_loss(model, images, labels, None, reconstruction=1, smoothness=1)
    error = loss - F.cross_entropy(model(images), labels)
    assert error.item() == pytest.approx(0.0625)
