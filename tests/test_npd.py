"""The neural polarizer: where it goes, what it leaves, its search and loss against the equations, and what it does to a backdoor."""

import copy
import csv
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import models
from defense import npd
from tests.test_fmp import SPEC, found_record
from tests.test_sau import network, softmax
from tests.test_train import weights
from utils import data
from utils.errors import ConfigError
from utils.unlearn import Still

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
            norm.running_mean.normal_(0, 0.1), norm.running_var.uniform_(0.5, 2), norm.bias.data.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("name", PLACES)
def test_it_goes_before_the_first_convolution_of_the_last_pair_and_changes_no_answer(name):
    model, images = built(name).eval(), torch.rand(6, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        assert npd.place(model, images[:1]) == PLACES[name] and not model.training
        polarizer, norm = npd.insert(model, PLACES[name])
        npd.settle(norm, model, data.Split((images * 255).to(torch.uint8), torch.arange(6), torch.arange(6)))
        torch.testing.assert_close(model(images), before, rtol=0, atol=1e-4 * float(before.abs().max()))
    assert polarizer.weight.shape[2:] == (1, 1) and polarizer.bias is None
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_before_training_it_also_changes_nothing_where_its_norm_takes_the_batch():
    record, _ = found_record(None, 60)
    model = built().eval()
    images = record.clean.images / 255
    with torch.no_grad():
        before = model(images)
        _, norm = npd.insert(model, PLACES["resnet9"])
        npd.settle(norm, model, record.clean)
        found = Still(model, [norm]).train()(images)
    torch.testing.assert_close(found, before, rtol=0, atol=1e-3 * float(before.abs().max()))


def test_its_norm_has_the_statistics_of_all_clean_pictures(monkeypatch):
    monkeypatch.setattr(npd, "BATCH", 7)
    record, _ = found_record(None, 30)
    model, seen = built().double().eval(), []
    _, norm = npd.insert(model, PLACES["resnet9"])
    handle = norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(record.clean.images.double() / 255)
    handle.remove()
    images = data.Split(record.clean.images.double() / 255, record.clean.labels, record.clean.truth)
    npd.settle(norm, model, images)
    values = seen[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.running_mean, values.mean(1))
    torch.testing.assert_close(norm.running_var, values.var(1))
    torch.testing.assert_close(norm.bias.data, values.mean(1))
    torch.testing.assert_close(norm.weight.data, (values.var(1) + norm.eps).sqrt())


def test_it_cannot_be_folded_into_the_convolution():
    """One kernel and bias give the same values inside and others at the border, where the convolution sees zeros without the shift."""
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
    gap = model(images) - F.conv2d(images, folded, torch.einsum("oiyx,i->o", kernel, shift), padding=1)
    assert gap[:, :, 1:-1, 1:-1].abs().max() < 1e-12 and gap[:, :, 0].abs().min() > 1e-6


def test_a_place_can_be_named_and_a_wrong_one_is_refused():
    model, images = built(), torch.rand(1, 3, 32, 32)
    assert npd.place(model, images, "network.prep.conv") == "network.prep.conv"
    with pytest.raises(ConfigError, match="'network.linear' is not one: the last ones are .*layer3.residual.second.conv"):
        npd.place(model, images, "network.linear")
    with pytest.raises(ConfigError, match="has 1 convolution.s. larger than 1x1"):
        npd.place(nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.Conv2d(4, 4, 1)), images)


def test_the_length_is_cut_and_the_pictures_stay_pictures():
    images = torch.full((4, 3, 2, 2), 0.5, dtype=torch.float64)
    images[3] = 0.95
    change = torch.full_like(images, 0.1)
    change[1] = 0.3
    change[2] = 0
    change[3] = 0.3
    found = npd.within(change, images, 0.6)
    torch.testing.assert_close(found[0], change[0])  # its length is 0.35
    assert float(found[1].norm()) == pytest.approx(0.6) and float(found[1].std()) == pytest.approx(0)
    assert not found[2].any()
    torch.testing.assert_close(images[3] + found[3], torch.ones(3, 2, 2, dtype=torch.float64))
    assert not npd.within(change, images, 0.0).any()


def test_the_search_goes_towards_the_target_one_picture_at_a_time():
    model = network(0)
    images = torch.rand(9, 3, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets, config = torch.arange(9) % 4, options(radius=0.9, step_size=0.12, steps=3)
    found, lengths = npd.perturbation(model, images, targets, config), []
    for image, target, change in zip(images, targets.tolist(), found, strict=True):
        slow = torch.zeros_like(image)
        for _ in range(3):
            slope = torch.autograd.functional.jacobian(lambda d, x=image, t=target: -model((x + d)[None]).log_softmax(1)[0, t], slow)
            slow = slow - 0.12 * slope.sign()
            length = sum(float(value) ** 2 for value in slow.flatten()) ** 0.5
            lengths.append(length)
            if length > 0.9:
                slow = slow * (0.9 / length)
            slow = (
                torch.tensor([[[min(max(float(v), 0), 1) for v in row] for row in part] for part in image + slow], dtype=image.dtype)
                - image
            )
        torch.testing.assert_close(change, slow, rtol=0, atol=1e-7)
    assert max(lengths) > 0.9 and found.flatten(1).norm(dim=1).max() <= 0.9 + 1e-9
    with torch.no_grad():
        gain = F.cross_entropy(model(images), targets) - F.cross_entropy(model(images + found), targets)
    assert gain > 0 and all(weight.grad is None for weight in model.parameters())


def test_the_loss_equals_the_equations():
    generator = torch.Generator().manual_seed(0)
    clean, perturbed = 2 * torch.randn(2, 40, 4, generator=generator, dtype=torch.float64)
    labels, given, targets = (torch.randint(4, (40,), generator=generator) for _ in range(3))
    config, expected = options(lambda1=1.0, lambda2=0.3, lambda3=0.5, lambda4=0.7), 0.0
    for row in range(40):
        p, q, y = softmax(clean[row].tolist()), softmax(perturbed[row].tolist()), int(labels[row])
        k = max((j for j in range(4) if j != y), key=lambda j: q[j])
        terms = -math.log(p[y]), -math.log(q[int(given[row])]), -math.log(1 - q[k]), -math.log(1 - q[int(targets[row])])
        expected += sum(weight * term for weight, term in zip((1.0, 0.3, 0.5, 0.7), terms, strict=True)) / 40
    assert float(npd.purifying(clean, perturbed, labels, given, targets, config)) == pytest.approx(expected, rel=1e-9)
    sure = torch.tensor([[0.0, 200.0]], requires_grad=True)
    npd.purifying(sure, sure, *(torch.tensor([0]),) * 2, torch.tensor([1]), config).backward()
    assert sure.grad.isfinite().all() and sure.grad[0, 1] > 0


@pytest.mark.parametrize("given", [True, False])
def test_a_batch_is_the_search_and_the_loss_together(given, monkeypatch):
    """The targets and the changes are those of evaluation mode; the terms come from one pass over both sets, which moves the norm."""
    record, _ = found_record(None, 12)
    model = built().eval().requires_grad_(False)
    polarizer, norm = npd.insert(model, PLACES["resnet9"])
    npd.settle(norm, model, record.clean)
    images, labels, config = record.clean.images / 255, record.clean.labels, options()
    draws = npd.drawn(record, config) if given else None
    with torch.no_grad():
        logits = model(images)
    targets = draws if given else torch.tensor([max((k for k in range(10) if k != y), key=lambda k, r=r: float(logits[r, k]))
                                                for r, y in enumerate(labels.tolist())])  # fmt: skip
    changed = images + npd.perturbation(model, images, targets, config)
    twin, found = copy.deepcopy(model), Still(model, [polarizer, norm]).train()
    twin.get_submodule(PLACES["resnet9"]).norm.train()
    clean, perturbed = twin(torch.cat([images, changed])).chunk(2)
    expected = npd.purifying(clean, perturbed, labels, logits.argmax(1), targets, config)
    loss = npd.polarizing(found, images, labels, torch.arange(12), config=config, draws=draws)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert polarizer.weight.grad.any() and norm.weight.grad.any() and found.training and norm.training
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, twin.state_dict()[name])}
    assert not moved, "the statistics move once, and those of no other layer"
    assert int(norm.num_batches_tracked) == 1


def test_drawn_targets_are_other_classes_and_repeat_themselves():
    record, _ = found_record(None, 200)
    first, again, other = (npd.drawn(record, options(random_seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first != record.clean.labels).all() and first.min() == 0 and first.max() == 9
    assert len(((first - record.clean.labels) % 10).unique()) == 9


def test_only_the_polarizer_changes_and_an_interrupted_run_goes_on(tmp_path):
    record, said = found_record(tmp_path, 40)
    victim = built().train()
    before = {name: tensor.clone() for name, tensor in victim.state_dict().items()}
    config = options(epochs=2, warmup_epochs=1, batch_size=16)
    first, second, third = (copy.deepcopy(victim) for _ in range(3))
    assert npd.repair(first, record, config) is first and first.training and all(weight.requires_grad for weight in first.parameters())
    assert said == ["inserted", "warmup", "warm", "polarize", "polarize"]
    place = PLACES["resnet9"]
    state = {name.replace(f"{place}.conv.", f"{place}."): tensor for name, tensor in first.state_dict().items()}
    assert {name for name in state if name not in before} == {
        f"{place}.polarizer.weight", *(f"{place}.norm.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"))
    }  # fmt: skip
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items()), "the victim, byte for byte"
    layer = first.get_submodule(place)
    assert (layer.polarizer.weight.detach()[:, :, 0, 0] * (1 - torch.eye(64))).any(), "no longer a diagonal"
    assert int(layer.norm.num_batches_tracked) == 3 * 3, "one step moves it once, the search does not"
    again = npd.rebuild(models.build("resnet9", SPEC, 8), first.state_dict()).eval()
    images = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(again(images), first.eval()(images))
    (tmp_path / "polarize.safetensors").unlink()
    npd.repair(second, record, options(epochs=1, warmup_epochs=1, batch_size=16))
    npd.repair(third, record, config)
    assert torch.equal(weights(third), weights(first)) and not torch.equal(weights(second), weights(first))


@pytest.mark.parametrize(("flag", "value", "sentence"), [("--radius", -1, "0 or more"), ("--polarizer_lr", 0, "above 0"),
                                                         ("--momentum", 1, "below 1"), ("--layer", "network.linear", "not one")])  # fmt: skip
def test_options_out_of_range(flag, value, sentence, places, run, small):
    words = ["--result_file", "small", "--save_folder_name", f"npd_bad{flag.strip('-')}"]
    assert sentence in run("defense/npd.py", *places, *words, flag, value, code=2).first


def test_npd_removes_the_backdoor_where_no_shortcut_leads_around_it(places, run, victim):
    """Measured with 64 clean pictures: ACC 99.2, ASR 4.9; inside the residual branch, the usual place, 98.0 stay after 30 epochs."""
    words = ["--layer", "network.layer3.conv", "--polarizer_lr", 0.1, "--epochs", 20]
    run("defense/npd.py", *places, "--result_file", "victim", "--precision", "fp32", *words)
    folder = victim / "defense" / "npd"
    (row,) = csv.DictReader(open(folder / "results.csv"))
    assert float(row["asr_before"]) > 0.9 and float(row["asr"]) < 0.5 and float(row["acc"]) > 0.9
    before, after = (load_file(place / "model.safetensors") for place in (victim, folder))
    assert torch.equal(after.pop("network.layer3.conv.conv.weight"), before.pop("network.layer3.conv.weight"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "the victim, byte for byte"
