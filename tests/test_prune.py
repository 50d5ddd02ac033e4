"""Pruning defenses, and how a setting is chosen.

Against slow, written-out references, on planted backdoors, and on real digits.
"""

import copy
import csv
import dataclasses
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from antidote_bench import models
from antidote_bench.defense import anp, fp, rnp
from antidote_bench.utils import parsing
from antidote_bench.utils import run as protocol
from antidote_bench.utils.data import dataset
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.evaluation import Evaluator, TestSets, predict
from antidote_bench.utils.features import last_features, last_linear
from antidote_bench.utils.repair import masks, selection
from antidote_bench.utils.repair.layers import batch_norms
from tests.test_fmp import SPEC, found_record

SCRIPTS = [fp, anp, rnp]


def options(script, **changes):
    return script.Config(**{"result_file": "x", "precision": "fp32", **changes})


def settled(name, record):
    """A network with the batch statistics of the record's images, which tells them apart.

    Its predictions become their true classes.
    """
    torch.manual_seed(0)
    model = models.build(name, SPEC, 8 if name == "resnet9" else None).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.bias.data.normal_(0, 0.5)
    with torch.no_grad():
        model(record.clean.images / 255)
        model.eval()
        last = last_linear(model)
        last.weight.normal_()
        last.bias.copy_(-last.weight @ last_features(model, record.clean).mean(0))
    record.clean.truth[:] = predict(model, record.clean)
    assert len(record.clean.truth.unique()) > 3
    return model


def results(folder):
    (row,) = csv.DictReader(open(folder / "results.csv"))
    return row


@pytest.mark.parametrize("count", [20, 64, 300])
def test_a_fifth_is_held_out_with_every_class(count, tmp_path):
    clean = found_record(tmp_path, count)[0].clean
    work, held_out = selection.hold_out(clean, options(fp))
    assert len(work) + len(held_out) == count and len(held_out) == max(10, round(count / 5))
    assert (
        held_out.truth.bincount().max() - held_out.truth.bincount().min() <= 1
        and len(work.truth.unique()) == 10
    )
    images = torch.cat([work.images, held_out.images]).flatten(1)
    assert len(images.unique(dim=0)) == count, "every image is on one side"
    again, other = (selection.hold_out(clean, options(fp, data_seed=seed))[1] for seed in (0, 1))
    assert torch.equal(again.images, held_out.images) and not torch.equal(
        other.images, held_out.images
    )
    assert selection.hold_out(clean, options(fp, selection="oracle")) == (clean, None)


def test_too_few_images_to_hold_some_out(tmp_path):
    with pytest.raises(ConfigError, match="--clean_count 20"):
        selection.hold_out(found_record(tmp_path, 10)[0].clean, options(fp))


def spy(seen):
    def repair(model, record, _config):
        seen.append(record)
        assert record.report("looked", model) is None
        return model

    return repair


@pytest.mark.parametrize("selection", ["none", "fixed", "val", "oracle"])
def test_only_a_marked_run_can_use_the_test_sets(selection, small, places, run, tmp_path):
    """The word that opens the test sets stands in the results, and every table marks it."""
    seen, folder = (
        [],
        shutil.copytree(small, tmp_path / "v", ignore=shutil.ignore_patterns("defense")),
    )
    given = parsing.parse(
        fp.Config, [*places, "--result_file", str(folder), "--save_folder_name", "spy"]
    )
    object.__setattr__(given, "selection", selection)
    protocol.defend("defense.spy", given, spy(seen))
    row, (record,) = results(folder / "defense/spy"), seen
    assert row["selection"] == selection and (record.measure is None) == (selection != "oracle")
    assert not any(isinstance(value, TestSets | Evaluator) for value in vars(record).values())
    table = run("compare.py", tmp_path).stdout
    assert ("chosen with test data" in table) == (selection == "oracle")
    if record.measure:
        model = models.build("resnet9", record.spec, 8)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        assert {key: str(value) for key, value in record.measure(model).items()} == {
            key: row[key] for key in ("acc", "asr", "ra")
        }


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_option_alone_opens_the_test_sets(script, monkeypatch):
    selections = []
    monkeypatch.setattr(
        protocol, "defend", lambda _, config, repair, check: selections.append(config.selection)
    )
    for chosen in ("val", "oracle"):
        script.main(options(script, selection=chosen))
    assert options(script).selection == "val" and selections == ["val", "oracle"]


def planted(tmp_path, measure=None):
    """(a network that takes a white corner for class 0, a Defender, the stages that it reported).

    The 300 images have no white corner, and the network classifies them right. Unit 3 of 40 fires
    on the corner alone; 30 others fire for the class that the second row of the image shows.
    """
    record, reported = found_record(tmp_path)
    record.clean.images[:] = record.clean.images // 4
    for image, label in zip(record.clean.images, record.clean.truth.tolist(), strict=True):
        image[0, 1, label] = 255
    first, last = nn.Linear(3 * 32 * 32, 40), nn.Linear(40, 10)
    for layer in (first, last):
        layer.weight.data.zero_(), layer.bias.data.zero_()
    for unit in range(10, 40):
        first.weight.data[unit, 32 + unit % 10], first.bias.data[unit] = 1, -0.5
        last.weight.data[unit % 10, unit] = 1
    first.weight.data[3, 0], first.bias.data[3], last.weight.data[0, 3] = 1, -0.5, 9
    return (
        nn.Sequential(nn.Flatten(), first, nn.ReLU(), last),
        dataclasses.replace(record, measure=measure),
        reported,
    )


def with_corner(images):
    images = images.clone()
    images[:, :, 0, 0] = 255
    return images


def by_hand(model, order, counts, held_out):
    """Every step by a forward pass of the whole network, with its weights set to zero."""
    accuracies = []
    for count in counts:
        pruned = copy.deepcopy(model)
        last = [module for module in pruned.modules() if isinstance(module, nn.Linear)][-1]
        for unit in order[:count].tolist():
            last.weight.data[:, unit] = 0
        accuracies.append((predict(pruned, held_out) == held_out.truth).double().mean().item())
    return accuracies


@pytest.mark.parametrize("name", ["resnet9", "wrn16_1", "mobilenet_v3_large", "convnext_tiny"])
def test_fp_needs_no_forward_pass_for_a_step(name, tmp_path):
    record, _ = found_record(tmp_path, 40)
    model = settled(name, record)
    order = torch.randperm(
        last_linear(model).in_features, generator=torch.Generator().manual_seed(0)
    )
    counts = [0, 1, 7, len(order) // 2, len(order) - 2, len(order)]
    features = last_features(model, record.clean)
    accuracies = fp.pruned_accuracies(
        last_linear(model), features, record.clean.truth, order, counts
    )
    assert (
        accuracies == by_hand(model, order, counts, record.clean)
        and accuracies[0] == 1
        and len(set(accuracies)) > 3
    )


@pytest.mark.parametrize("tolerance", [0.0, 0.35, 1.0])
def test_fp_takes_the_last_step_that_is_allowed(tolerance, tmp_path):
    record, reported = found_record(tmp_path, 100)
    model, config = settled("resnet9", record), options(fp, tolerance=tolerance, epochs=1)
    victim, (work, held_out) = copy.deepcopy(model), selection.hold_out(record.clean, config)
    fp.repair(model, record, config)
    kept, units = load_file(tmp_path / "kept/activations.safetensors"), 64
    sums = torch.zeros(units, dtype=torch.float64)
    for image in work.images:
        sums += victim.network[:-2](victim.normalize(image[None] / 255)).double().flatten().detach()
    torch.testing.assert_close(kept["mean"].double(), sums / len(work), rtol=1e-5, atol=1e-5)
    counts = sorted({step * units // 100 for step in range(101)})
    accuracies = by_hand(victim, kept["mean"].argsort(stable=True), counts, held_out)
    bad = [
        count
        for count, value in zip(counts, accuracies, strict=True)
        if value < (1 - tolerance) * accuracies[0] - 1e-9
    ]
    count = max(number for number in counts if number < min([*bad, units + 1]))
    zero = (model.network.linear.weight == 0).all(0)
    assert int(zero.sum()) == count and torch.equal(zero, kept["pruned"]), (
        "it stays at zero while it is trained on"
    )
    assert (count == units) == (tolerance == 1.0) and reported == ["pruned", "finetune"]
    assert model.state_dict().keys() == victim.state_dict().keys()
    rows = list(csv.DictReader(open(tmp_path / "kept/choice.csv")))
    assert [row["setting"] for row in rows if row["chosen"] == "1"] == [str(count)]


def test_fp_finds_a_planted_unit(tmp_path):
    model, record, _ = planted(tmp_path)
    assert (predict(model, record.clean) == record.clean.truth).all()
    stamped = dataset.Split(
        with_corner(record.clean.images), record.clean.labels, record.clean.truth
    )
    assert (predict(model, stamped) <= 1).all()
    fp.repair(model, record, options(fp, epochs=0, tolerance=0.05))
    assert (predict(model, record.clean) == record.clean.truth).all() and (
        predict(model, stamped) == record.clean.truth
    ).all()


def test_fp_as_published_uses_the_test_set(tmp_path):
    answers = iter([1.0, 0.99, 0.5, 0.99])
    model, record, _ = planted(tmp_path, lambda twin: {"acc": next(answers), "asr": 1.0, "ra": 0.0})
    fp.repair(model, record, options(fp, epochs=0, selection="oracle"))
    assert int(load_file(tmp_path / "kept/activations.safetensors")["pruned"].sum()) == 1 and list(
        answers
    ) == [0.99]
    with pytest.raises(ConfigError, match="no linear layer"):
        fp.repair(nn.Conv2d(3, 3, 1), record, options(fp))


def float_network():
    """Two batch norms behind convolutions, one of them followed by dropout; float64."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 10),
    ).double()
    for layer in (model[1], model[4]):
        for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model


def plainly(model, images, scales, shifts):
    """The same network with every batch normalised by hand."""
    layers = iter(zip(scales, shifts, strict=True))
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            scale, shift = next(layers)
            centred = images - images.mean((0, 2, 3), keepdim=True)
            images = centred / (centred.square().mean((0, 2, 3), keepdim=True) + layer.eps).sqrt()
            images = images * scale[:, None, None] + shift[:, None, None]
        elif not isinstance(layer, nn.Dropout):
            images = layer(images)
    return images


@pytest.mark.parametrize(
    "changes",
    [{}, {"ascents": 3, "project": True, "alpha": 0.7, "epsilon": 0.3}, {"ascents": 0}],
    ids=str,
)
def test_anp_equals_the_written_steps(changes):
    """Four steps of the mask with the same random starts.

    Momentum, gradients and clipping are written out.
    """
    config, model, generator = (
        options(anp, **changes),
        float_network(),
        torch.Generator().manual_seed(1),
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, labels = (
        torch.rand(4, 16, 3, 32, 32, generator=generator, dtype=torch.float64),
        torch.arange(16) % 10,
    )
    mask = masks.Mask(model, batch_norms(model))
    optimizer = torch.optim.SGD([mask.factors], 0.2, momentum=0.9)
    torch.manual_seed(5)
    with masks.normalised_by_batches(model):
        for batch in images:
            optimizer.zero_grad()
            anp.loss(mask, batch, labels, None, config=config).backward()
            optimizer.step()
            mask.clamp()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (
        all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
        and model[1].training
    )

    torch.manual_seed(5)
    layers, sizes = (model[1], model[4]), (4, 5)
    m, velocity = [torch.ones(size, dtype=torch.float64) for size in sizes], [0, 0]
    for batch in images:
        starts = (2 * torch.rand(2, 9) - 1) * config.epsilon
        d, x = (list(row.double().split(sizes)) for row in starts)

        def value(m, d, x, batch=batch):
            scales = [
                layer.weight.detach() * (a + b) for layer, a, b in zip(layers, m, d, strict=True)
            ]
            shifts = [layer.bias.detach() * (1 + c) for layer, c in zip(layers, x, strict=True)]
            return F.cross_entropy(plainly(model, batch, scales, shifts), labels)

        for _ in range(config.ascents):
            d, x = ([part.requires_grad_() for part in row] for row in (d, x))
            slopes = torch.autograd.grad(value(m, d, x), [*d, *x])
            moved = [
                part.detach() + config.epsilon / config.ascents * slope.sign()
                for part, slope in zip([*d, *x], slopes, strict=True)
            ]
            if config.project:
                moved = [part.clamp(-config.epsilon, config.epsilon) for part in moved]
            d, x = moved[:2], moved[2:]
        m = [part.detach().requires_grad_() for part in m]
        nothing = [torch.zeros_like(part) for part in m]
        total = config.alpha * value(m, nothing, nothing) + (1 - config.alpha) * value(m, d, x)
        slopes = torch.autograd.grad(total, m)
        velocity = [0.9 * old + slope for old, slope in zip(velocity, slopes, strict=True)]
        m = [
            (part.detach() - 0.2 * speed).clamp(0, 1)
            for part, speed in zip(m, velocity, strict=True)
        ]
    expected = torch.cat(m)
    torch.testing.assert_close(mask.factors.detach().double(), expected, rtol=0, atol=1e-6)
    assert expected.min() < 0.9, "the factors must have moved"


def test_thresholds_by_clean_images_fixed_and_by_the_test_sets(tmp_path):
    """Channels 0 to 9 each carry a class, 10 and 11 carry the backdoor; the factors are given."""
    record, _ = found_record(tmp_path, 200)
    record.clean.images[:] = 0
    for image, label in zip(record.clean.images, record.clean.truth.tolist(), strict=True):
        image[0, 1, label] = 255
    first, norm, last = nn.Conv2d(3, 12, 32), nn.BatchNorm2d(12), nn.Linear(12, 10)
    (
        first.weight.data.zero_(),
        first.bias.data.zero_(),
        last.weight.data.zero_(),
        last.bias.data.zero_(),
        norm.bias.data.fill_(0.01),
    )
    for unit in range(12):
        first.weight.data[unit, 0, int(unit < 10), unit % 10 if unit < 10 else 0] = 1
        last.weight.data[unit % 10, unit] = 1 if unit < 10 else 9
    model = nn.Sequential(first, norm, nn.ReLU(), nn.Flatten(), last).eval()
    stamped = dataset.Split(
        with_corner(record.clean.images), record.clean.labels, record.clean.truth
    )
    factors = {"1": torch.tensor([*[1.0] * 4, 0.46, 0.52, 0.58, 0.66, *[1.0] * 2, 0.0, 0.31])}

    def pruned(record, **changes):
        twin = copy.deepcopy(model)
        config = options(anp, **changes)
        masks.prune(
            twin,
            factors,
            selection.hold_out(record.clean, config)[1],
            record,
            config,
            shifts=changes.pop("prune_shift", False),
        )
        channels = twin[1].weight == 0
        assert torch.equal(load_file(tmp_path / "kept/mask.safetensors")["1/pruned"], channels)
        return twin, channels.nonzero().flatten().tolist()

    twin, channels = pruned(record)
    assert channels == [4, 10, 11], "one class of ten may go, two may not"
    assert (predict(twin, stamped) == record.clean.truth)[record.clean.truth != 4].all() and (
        predict(model, stamped) <= 1
    ).all()
    assert (
        torch.equal(twin[1].bias, norm.bias)
        and (pruned(record, prune_shift=True)[0][1].bias == 0).nonzero().flatten().tolist()
        == channels
    )
    assert pruned(record, tolerance=0.25)[1] == [4, 5, 10, 11] and pruned(record, tolerance=0.05)[
        1
    ] == [10, 11]
    assert pruned(record, selection="fixed")[1] == [10] and pruned(
        record, selection="fixed", threshold=0.31
    )[1] == [10, 11]
    asked = []

    def measure(candidate):
        asked.append(int((candidate[1].weight == 0).sum()))
        return {
            "acc": 1 - 0.04 * max(0, asked[-1] - 2),
            "asr": {0: 1.0, 1: 0.8, 2: 0.1}.get(asked[-1], 0.0),
            "ra": 0.0,
        }

    twin, channels = pruned(dataclasses.replace(record, measure=measure), selection="oracle")
    assert asked == [0, 1, 2, 3, 4, 5, 6] and channels == [4, 10, 11], (
        "the least ASR within the tolerance; of equals the weakest setting"
    )
    factors["1"][:] = 0
    twin, channels = pruned(record)
    assert not channels and all(
        torch.equal(value, model.state_dict()[name]) for name, value in twin.state_dict().items()
    )


@pytest.mark.parametrize(
    ("script", "name", "work", "stages"),
    [
        (anp, "resnet9", {"steps": 2}, ["mask"]),
        (anp, "mobilenet_v3_large", {"steps": 2}, ["mask"]),
        (
            rnp,
            "resnet9",
            {"epochs": 2, "mask_epochs": 2, "mask_lr": 20.0},
            ["forgotten", "mask", "mask"],
        ),
    ],
    ids=["anp resnet9", "anp mobilenet", "rnp resnet9"],
)
def test_only_scales_of_pruned_channels_change(script, name, work, stages, tmp_path):
    record, reported = found_record(tmp_path, 40)
    config = options(script, batch_size=20, tolerance=1.0, **work)
    twins = [settled(name, record).train() for _ in range(2)]
    before = {key: value.clone() for key, value in twins[0].state_dict().items()}
    for model in twins:
        script.repair(model, record, config)
        (record.state / "mask.safetensors").unlink()
    kept = load_file(tmp_path / "kept/mask.safetensors")
    for key, value in twins[0].state_dict().items():
        layer, _, kind = key.rpartition(".")
        pruned = kept.get(f"{layer}/pruned") if kind == "weight" else None
        assert torch.equal(
            value, before[key] if pruned is None else before[key].masked_fill(pruned, 0)
        ), key
        assert torch.equal(value, twins[1].state_dict()[key]), "same seed, same result"
    assert reported == [*stages, "pruned"] * 2 and all(
        module.training for module in twins[0].modules()
    )
    assert any(part.any() for key, part in kept.items() if key.endswith("pruned")) and any(
        part.min() < 1 for part in kept.values()
    )


@pytest.mark.parametrize("script", [anp, rnp])
def test_networks_without_batch_norm_are_refused(script, tmp_path):
    record, _ = found_record(tmp_path, 40)
    with pytest.raises(
        ConfigError, match="does not apply: the model has no batch norm.*fp and ft need none"
    ):
        script.repair(nn.Conv2d(3, 10, 32), record, options(script))


@pytest.mark.parametrize("clip", [1e9, 0.5])
def test_rnp_forgets_by_the_written_steps(clip):
    """Steps up the gradient of the cross-entropy, whose joint norm is clipped.

    With weight decay, momentum, and a tenth of the rate from half way on.
    """
    generator = torch.Generator().manual_seed(1)
    split = dataset.Split(
        torch.rand(24, 3, 32, 32, generator=generator, dtype=torch.float64),
        torch.arange(24) % 10,
        torch.arange(24) % 10,
    )
    config = options(rnp, epochs=4, forgotten=0.0, batch_size=32, clip=clip, lr=0.1)
    model = float_network()
    model[6].p = 0.0
    expected, speeds = copy.deepcopy(model), {}
    rnp.forget(model, split, None, config)
    for epoch in range(4):
        value = F.cross_entropy(expected.train()(split.images), split.labels)
        slopes = dict(
            zip(
                dict(expected.named_parameters()),
                torch.autograd.grad(value, list(expected.parameters())),
                strict=True,
            )
        )
        norm = sum(float(slope.square().sum()) for slope in slopes.values()) ** 0.5
        for name, parameter in expected.named_parameters():
            climb = -slopes[name] * min(1.0, clip / norm) + 5e-4 * parameter.detach()
            speeds[name] = 0.9 * speeds.get(name, 0) + climb
            parameter.data -= (0.1, 0.1, 0.01, 0.01)[epoch] * speeds[name]
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(
            model.get_parameter(name), parameter, rtol=0, atol=1e-6 if clip < 1 else 1e-9
        )


def test_rnp_stops_when_it_has_forgotten():
    split = dataset.Split(
        torch.rand(20, 3, 32, 32, dtype=torch.float64), torch.arange(20) % 10, torch.arange(20) % 10
    )
    for forgotten, epochs_run in ((1.0, 1), (0.0, 3)):
        model, seen = float_network(), []
        model[-1].bias.data[0] = 9  # always class 0: two of twenty are right
        model.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        rnp.forget(model, split, None, options(rnp, epochs=3, forgotten=forgotten, lr=1e-12))
        assert len(seen) == epochs_run


def test_rnp_weighs_the_clean_loss_alone():
    model, images, labels = (
        float_network(),
        torch.rand(8, 3, 32, 32, dtype=torch.float64),
        torch.arange(8),
    )
    mask = masks.Mask(model, batch_norms(model))
    mask.factors.data.uniform_()
    with masks.normalised_by_batches(model):
        value = rnp.loss(mask, images, labels, None, alpha=0.3)
    layers, parts = (model[1], model[4]), mask.factors.detach().split((4, 5))
    scales = [layer.weight.detach() * part for layer, part in zip(layers, parts, strict=True)]
    expected = F.cross_entropy(
        plainly(model, images, scales, [layer.bias.detach() for layer in layers]), labels
    )
    torch.testing.assert_close(value, 0.3 * expected)


def test_an_interrupted_mask_goes_on_to_the_same_end(tmp_path):
    ends = []
    for stop in (None, 3):
        record, _ = found_record(tmp_path / str(stop), 40)
        model = settled("resnet9", record)
        if stop:

            def report(stage, model, epoch=None, **_):
                if epoch == 3:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                anp.repair(
                    copy.deepcopy(model),
                    dataclasses.replace(record, report=report),
                    options(anp, steps=5),
                )
        anp.repair(model, record, options(anp, steps=5))
        ends.append(load_file(tmp_path / str(stop) / "kept/mask.safetensors"))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    ("script", "changes", "bounds"),
    [
        (anp, {"threshold": 1.5}, "from 0 to 1"),
        (anp, {"steps": -1}, "0 or more"),
        (anp, {"batch_size": 0}, "1 or more images"),
        (anp, {"mask_lr": 0.0}, "above 0"),
        (anp, {"alpha": -0.1}, "from 0 to 1"),
        (anp, {"epsilon": -0.1}, "0 or more"),
        (anp, {"ascents": -1}, "0 or more"),
        (rnp, {"threshold": -0.1}, "from 0 to 1"),
        (rnp, {"epochs": -1}, "0 or more"),
        (rnp, {"forgotten": 1.1}, "from 0 to 1"),
        (rnp, {"lr": 0.0}, "above 0"),
        (rnp, {"clip": 0.0}, "above 0"),
        (rnp, {"mask_epochs": -1}, "0 or more"),
        (rnp, {"mask_lr": 0.0}, "above 0"),
        (rnp, {"alpha": 0.0}, "above 0"),
        (rnp, {"batch_size": 0}, "1 or more images"),
        (fp, {"batch_size": 0}, "1 or more images"),
        (fp, {"tolerance": 1.1}, "from 0 to 1"),
    ],
    ids=str,
)
def test_options_out_of_range(script, changes, bounds):
    with pytest.raises(ConfigError, match=f"{next(iter(changes))} must be {bounds}"):
        options(script, **changes)


BOUNDS = {"fp": (0.96, 0.85), "anp": (0.65, 0.3), "rnp": (0.7, 0.3)}  # ACC, ASR
QUICK = {"fp": ["--epochs", 40], "anp": ["--steps", 25], "rnp": []}


@pytest.mark.parametrize("script", SCRIPTS)
def test_on_real_digits(script, places, run, large_victim):
    """FP removes a part of the backdoor, and the masks remove most of it."""
    name = script.__name__.rpartition(".")[2]
    run(
        f"defense/{name}.py",
        *places,
        *QUICK[name],
        "--result_file",
        "large_victim",
        "--save_folder_name",
        f"{name}_real",
    )
    row = results(large_victim / "defense" / f"{name}_real")
    least, most = BOUNDS[name]
    assert float(row["asr_before"]) > 0.9 and float(row["acc"]) > least and float(row["asr"]) < most
    assert row["selection"] == "val" and row["stage"] == "repair"
