"""The neural polarizer: its place, its search and loss against the equations, and its effect."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from antidote_bench import models
from antidote_bench.defense import npd
from antidote_bench.utils.data import dataset, loader
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.repair.unlearning import EvaluationMode
from tests.test_fmp import SPEC, found_record
from tests.test_sau import network, softmax
from tests.test_scripts import results
from tests.test_train import weights

PLACES = {
    "preactresnet18": "network.layer4.1.conv1",
    "resnet18": "network.layer4.1.conv1",
    "resnet9": "network.layer3.residual.first.conv",
    "vgg19_bn": "network.stage5.conv3",
    "wrn16_1": "network.group3.1.conv1",
}


def options(**changes):
    return npd.Config(**{"result_file": "x", "precision": "fp32", **changes})


def built(name="resnet9"):
    """A network whose batch norms have statistics of their own."""
    torch.manual_seed(0)
    model = models.build(name, SPEC, 8 if name == "resnet9" else None)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
            norm.bias.data.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("name", PLACES)
def test_it_is_inserted_before_the_last_pair_and_changes_no_output(name):
    model, images = built(name).eval(), torch.rand(6, 3, 32, 32)
    labels = torch.arange(6)
    with torch.no_grad():
        before = model(images)
        assert npd.place(model, images[:1]) == PLACES[name] and not model.training
        polarizer, norm = npd.insert(model, PLACES[name])
        npd.settle(norm, model, dataset.Split((images * 255).to(torch.uint8), labels, labels))
        largest = 1e-4 * float(before.abs().max())
        torch.testing.assert_close(model(images), before, rtol=0, atol=largest)
    assert polarizer.weight.shape[2:] == (1, 1) and polarizer.bias is None
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_before_training_it_changes_nothing_in_training_mode_either():
    record, _ = found_record(None, 60)
    model = built().eval()
    images = record.clean.images / 255
    with torch.no_grad():
        before = model(images)
        _, norm = npd.insert(model, PLACES["resnet9"])
        npd.settle(norm, model, record.clean)
        logits = EvaluationMode(model, [norm]).train()(images)
    torch.testing.assert_close(logits, before, rtol=0, atol=1e-3 * float(before.abs().max()))


def test_its_norm_has_the_statistics_of_all_clean_images(monkeypatch):
    monkeypatch.setattr(loader, "EVALUATION_BATCH", 7)
    record, _ = found_record(None, 30)
    model, inputs = built().double().eval(), []
    _, norm = npd.insert(model, PLACES["resnet9"])
    handle = norm.register_forward_pre_hook(lambda _module, values: inputs.append(values[0]))
    images, labels = record.clean.images.double() / 255, record.clean.labels
    with torch.no_grad():
        model(images)
    handle.remove()
    npd.settle(norm, model, dataset.Split(images, labels, labels))
    values = inputs[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.running_mean, values.mean(1))
    torch.testing.assert_close(norm.running_var, values.var(1))
    torch.testing.assert_close(norm.bias.data, values.mean(1))
    torch.testing.assert_close(norm.weight.data, (values.var(1) + norm.eps).sqrt())


def test_it_cannot_be_folded_into_the_convolution():
    """One kernel and bias give other values at the border, where the padding lacks the shift."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False)).double().eval()
    kernel = model[0].weight.detach().clone()
    polarizer, norm = npd.insert(model, "0")
    for tensor in (polarizer.weight.data, norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.normal_()
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    folded = torch.einsum("oiyx,i,ic->ocyx", kernel, scale, polarizer.weight[:, :, 0, 0])
    images = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    bias = torch.einsum("oiyx,i->o", kernel, shift)
    gap = model(images) - F.conv2d(images, folded, bias, padding=1)
    assert gap[:, :, 1:-1, 1:-1].abs().max() < 1e-12 and gap[:, :, 0].abs().min() > 1e-6


def test_a_place_can_be_named_and_a_wrong_one_is_refused():
    model, images = built(), torch.rand(1, 3, 32, 32)
    assert npd.place(model, images, "network.prep.conv") == "network.prep.conv"
    words = "'network.linear' is not one: the last ones are .*layer3.residual.second.conv"
    with pytest.raises(ConfigError, match=words):
        npd.place(model, images, "network.linear")
    with pytest.raises(ConfigError, match="has 1 convolution.s. larger than 1x1"):
        npd.place(nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.Conv2d(4, 4, 1)), images)


def test_the_length_is_cut_and_the_images_stay_in_range():
    images = torch.full((4, 3, 2, 2), 0.5, dtype=torch.float64)
    images[3] = 0.95
    change = torch.full_like(images, 0.1)
    change[1] = 0.3
    change[2] = 0
    change[3] = 0.3
    cut = npd.within(change, images, 0.6)
    torch.testing.assert_close(cut[0], change[0])  # its length is 0.35
    assert float(cut[1].norm()) == pytest.approx(0.6)
    assert float(cut[1].std()) == pytest.approx(0)
    assert not cut[2].any()
    torch.testing.assert_close(images[3] + cut[3], torch.ones(3, 2, 2, dtype=torch.float64))
    assert not npd.within(change, images, 0.0).any()


def searched_alone(model, image, target, config):
    """(the change of one image, written out step by step, its lengths before they are cut)."""
    change, lengths = torch.zeros_like(image), []
    for _ in range(config.steps):
        slope = torch.autograd.functional.jacobian(
            lambda d: -model((image + d)[None]).log_softmax(1)[0, target], change
        )
        change = change - config.step_size * slope.sign()
        length = sum(float(value) ** 2 for value in change.flatten()) ** 0.5
        lengths.append(length)
        if length > config.radius:
            change = change * (config.radius / length)
        changed = [min(max(float(value), 0), 1) for value in (image + change).flatten()]
        change = torch.tensor(changed, dtype=image.dtype).view_as(image) - image
    return change, lengths


def test_the_search_goes_towards_the_target_one_image_at_a_time():
    model = network(0)
    images = torch.rand(9, 3, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets, config = torch.arange(9) % 4, options(radius=0.9, step_size=0.12, steps=3)
    changes, lengths = npd.perturbation(model, images, targets, config), []
    for image, target, change in zip(images, targets.tolist(), changes, strict=True):
        expected, more = searched_alone(model, image, target, config)
        torch.testing.assert_close(change, expected, rtol=0, atol=1e-7)
        lengths += more
    assert max(lengths) > 0.9 and changes.flatten(1).norm(dim=1).max() <= 0.9 + 1e-9
    with torch.no_grad():
        before, after = model(images), model(images + changes)
    assert F.cross_entropy(before, targets) > F.cross_entropy(after, targets)
    assert all(weight.grad is None for weight in model.parameters())


def test_the_loss_equals_the_equations():
    generator = torch.Generator().manual_seed(0)
    clean, perturbed = 2 * torch.randn(2, 40, 4, generator=generator, dtype=torch.float64)
    labels, given, targets = (torch.randint(4, (40,), generator=generator) for _ in range(3))
    weighting = (1.0, 0.3, 0.5, 0.7)
    config = options(**{f"lambda{number}": weight for number, weight in enumerate(weighting, 1)})
    expected = 0.0
    for row in range(40):
        p, q, y = softmax(clean[row].tolist()), softmax(perturbed[row].tolist()), int(labels[row])
        k = max((j for j in range(4) if j != y), key=lambda j: q[j])
        chances = p[y], q[int(given[row])], 1 - q[k], 1 - q[int(targets[row])]
        terms = zip(weighting, chances, strict=True)
        expected += sum(weight * -math.log(chance) for weight, chance in terms) / 40
    loss = npd.purifying(clean, perturbed, labels, given, targets, config)
    assert float(loss) == pytest.approx(expected, rel=1e-9)
    sure = torch.tensor([[0.0, 200.0]], requires_grad=True)
    npd.purifying(sure, sure, *(torch.tensor([0]),) * 2, torch.tensor([1]), config).backward()
    assert sure.grad.isfinite().all() and sure.grad[0, 1] > 0


@pytest.mark.parametrize("given", [True, False])
def test_a_batch_is_the_search_and_the_loss_together(given):
    """The targets and the changes are those of evaluation mode.

    The terms come from one pass over both sets, which moves the norm.
    """
    record, _ = found_record(None, 12)
    model = built().eval().requires_grad_(False)
    polarizer, norm = npd.insert(model, PLACES["resnet9"])
    npd.settle(norm, model, record.clean)
    images, labels, config = record.clean.images / 255, record.clean.labels, options()
    draws = npd.drawn(record, config) if given else None
    with torch.no_grad():
        logits = model(images)
    others = logits.clone()
    others[torch.arange(12), labels] = -torch.inf
    targets = draws if given else others.argmax(1)
    changed = images + npd.perturbation(model, images, targets, config)
    twin, wrapped = copy.deepcopy(model), EvaluationMode(model, [polarizer, norm]).train()
    twin.get_submodule(PLACES["resnet9"]).norm.train()
    clean, perturbed = twin(torch.cat([images, changed])).chunk(2)
    expected = npd.purifying(clean, perturbed, labels, logits.argmax(1), targets, config)
    loss = npd.polarizing(wrapped, images, labels, torch.arange(12), config=config, draws=draws)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert polarizer.weight.grad.any() and norm.weight.grad.any()
    assert wrapped.training and norm.training
    others = twin.state_dict()
    moved = [name for name, value in model.state_dict().items() if not value.equal(others[name])]
    assert not moved, "the statistics move once, and those of no other layer"
    assert int(norm.num_batches_tracked) == 1


def test_drawn_targets_are_other_classes_and_repeat_themselves():
    record, _ = found_record(None, 200)
    first, again, other = (npd.drawn(record, options(random_seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first != record.clean.labels).all() and first.min() == 0 and first.max() == 9
    assert len(((first - record.clean.labels) % 10).unique()) == 9


def test_only_the_polarizer_changes(tmp_path):
    record, stages = found_record(tmp_path, 40)
    victim = built().train()
    before = {name: tensor.clone() for name, tensor in victim.state_dict().items()}
    config = options(epochs=2, warmup_epochs=1, batch_size=16)
    assert npd.repair(victim, record, config) is victim
    assert victim.training and all(weight.requires_grad for weight in victim.parameters())
    assert stages == ["inserted", "warmup", "warm", "polarize", "polarize"]
    place, after = PLACES["resnet9"], victim.state_dict()
    state = {name.replace(f"{place}.conv.", f"{place}."): after[name] for name in after}
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    new = {f"{place}.polarizer.weight", *(f"{place}.norm.{part}" for part in statistics)}
    assert state.keys() - before.keys() == new
    for name, tensor in before.items():
        assert torch.equal(state[name], tensor), "the victim, byte for byte"
    layer = victim.get_submodule(place)
    kernel = layer.polarizer.weight.detach()[:, :, 0, 0]
    assert (kernel * (1 - torch.eye(64))).any(), "no longer a diagonal"
    assert int(layer.norm.num_batches_tracked) == 3 * 3, "once a step, and not in the search"
    again = npd.rebuild(models.build("resnet9", SPEC, 8), after).eval()
    images = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(again(images), victim.eval()(images))


def released_statistics(inputs, momentum=0.1):
    """(mean, variance) C after batches n,C,h,w, from 0 and 1, as a batch norm moves them."""
    mean, variance = 0.0, 1.0
    for values in inputs:
        columns = values.transpose(0, 1).flatten(1)
        mean = (1 - momentum) * mean + momentum * columns.mean(1)
        variance = (1 - momentum) * variance + momentum * columns.var(1)
    return mean, variance


def test_the_released_start_is_a_plain_batch_norm_that_then_keeps_its_statistics(tmp_path):
    record, stages = found_record(tmp_path, 40)
    victim, seen = built().train(), {"warmup": [], "polarize": []}
    original, images = copy.deepcopy(victim).eval(), record.clean.images / 255
    config = options(start="released", epochs=2, warmup_epochs=1, batch_size=16)
    found = {}

    def report(stage, model, **_):
        norm = victim.get_submodule(PLACES["resnet9"]).norm
        found[stage] = {name: value.clone() for name, value in norm.state_dict().items()}
        if stage == "inserted":  # the outputs are still the victim's, but for the small eps
            largest = float(original(images).detach().abs().max())
            torch.testing.assert_close(model(images), original(images), rtol=0, atol=1e-3 * largest)
            norm.register_forward_pre_hook(
                lambda module, values: (
                    seen["warmup"].append(values[0].detach()) if module.training else None
                )
            )

    npd.repair(victim, dataclasses.replace(record, report=report), config)
    start = found["inserted"]
    assert (start["weight"] == 1).all() and (start["running_var"] == 1).all()
    assert not start["bias"].any() and not start["running_mean"].any()
    mean, variance = released_statistics(seen["warmup"])
    assert len(seen["warmup"]) == 3, "40 images in batches of 16, and no search normalises by them"
    torch.testing.assert_close(found["warm"]["running_mean"], mean)
    torch.testing.assert_close(found["warm"]["running_var"], variance)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(found["polarize"][name], found["warm"][name]), "evaluation mode"
    for name in ("weight", "bias"):
        assert not torch.equal(found["polarize"][name], found["warm"][name]), "it still learns"


def test_an_interrupted_run_goes_on(tmp_path):
    record, _ = found_record(tmp_path, 40)
    config = options(epochs=2, warmup_epochs=1, batch_size=16)
    first, second, third = (built().train() for _ in range(3))
    npd.repair(first, record, config)
    (tmp_path / "polarize.safetensors").unlink()
    npd.repair(second, record, options(epochs=1, warmup_epochs=1, batch_size=16))
    npd.repair(third, record, config)
    assert torch.equal(weights(third), weights(first))
    assert not torch.equal(weights(second), weights(first))


@pytest.mark.parametrize(
    ("flag", "value", "sentence"),
    [
        ("--radius", -1, "0 or more"),
        ("--polarizer_lr", 0, "above 0"),
        ("--momentum", 1, "below 1"),
        ("--layer", "network.linear", "not one"),
    ],
)
def test_options_out_of_range(flag, value, sentence, places, run, small):
    words = ["--result_file", "small", "--save_folder_name", f"npd_bad{flag.strip('-')}"]
    assert sentence in run("defense/npd.py", *places, *words, flag, value, code=2).first


def test_npd_removes_the_backdoor_where_no_shortcut_leads_around_it(places, run, victim):
    """Measured on four victims with 64 clean images: ACC 98.0 to 98.8, ASR 0 to 15."""
    words = ["--layer", "network.layer3.conv", "--polarizer_lr", 0.1, "--epochs", 40]
    run("defense/npd.py", *places, "--result_file", "victim", "--precision", "fp32", *words)
    folder = victim / "defense" / "npd"
    row = results(folder)
    assert float(row["asr_before"]) > 0.9 and float(row["asr"]) < 0.5 and float(row["acc"]) > 0.9
    before, after = (load_file(place / "model.safetensors") for place in (victim, folder))
    inner = after.pop("network.layer3.conv.conv.weight")
    assert torch.equal(inner, before.pop("network.layer3.conv.weight"))
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), "the victim, byte for byte"
