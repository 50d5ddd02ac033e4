"""What is equal to the codes that the authors released stays equal.

Held against them on the same weights, images and draws in float64, these differed by less than 1e-9
or made the same choices. Here or where the list says, each is tested against a slow reference that
is written from the paper's equations; it makes its own numbers.

    ft, training loop           here; test_train.py (SGD, one cycle)
    ft, augmentation            here; test_train.py
    fmp, default and released   here; test_fmp.py (scores, ranks, single deviations)
    awm, masks                  test_awm.py: test_fast_equals_the_written_algorithm
    clp                         test_stats.py: test_bounds_equal_a_decomposition_of_every_filter
    bnp                         test_stats.py: test_divergences_equal_those_of_torch
    clp, bnp, choice            test_stats.py: test_outliers_are_those_of_plain_numpy
    fp                          test_prune.py: test_fp_takes_the_last_step_that_is_allowed
    anp                         test_prune.py: test_anp_equals_the_written_steps
    i_bau                       test_tune.py: test_rounds_equal_the_algorithm_with_dense_jacobians
    nad                         test_tune.py: test_the_student_equals_a_distillation_written_out
    ft_sam, step                test_tune.py: test_sharpness_aware_steps_equal_the_equations_...
    ft_sam, label smoothing     test_tune.py: test_the_label_smoothing_is_the_published_one
    spectral                    test_detect.py: test_spectral_scores_are_those_of_the_singular_...
    nc, index                   test_nc.py: test_the_outlier_rule_by_hand
    preactresnet18              here
    trap_and_replace, stage 1   here; test_trap_and_replace.py (the loss)
    trap_and_replace, CutMix    here; test_trap_and_replace.py (the labels)
"""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from antidote_bench import models
from antidote_bench.defense import fmp, ft
from antidote_bench.defense import trap_and_replace as tar
from antidote_bench.utils import seeds
from antidote_bench.utils.data.dataset import Spec, Split, balanced_subset
from tests.test_fmp import found_record
from tests.test_train import weights

SIDE = 8
# of test_preactresnet18_on_numbers_of_a_formula
LOGITS = [-0.0029624839234743, -0.5642146712193907, 0.9200578630775144, -0.985140311605316]
SPEC = Spec("x", 4, SIDE, (0.4, 0.5, 0.6), (0.3, 0.25, 0.2), True, {})


def victim(width=2):
    """A preactresnet18 in float64 whose batch norms are those of a trained network."""
    torch.manual_seed(0)
    model = models.build("preactresnet18", SPEC, width).double()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        for tensor in (norm.running_mean, norm.bias.data):
            tensor.normal_(0, 0.3)
        for tensor in (norm.running_var, norm.weight.data):
            tensor.uniform_(0.5, 2)
    return model


def held(tmp_path, count=40):
    """A record of random float64 images, all of them clean."""
    record, _ = found_record(tmp_path, 1)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    labels = torch.arange(count) % 4
    clean, index = Split(images, labels, labels), torch.arange(count)
    return dataclasses.replace(record, spec=SPEC, train=clean, clean=clean, clean_index=index)


# preactresnet18


def convolved(x, kernel, stride=1):
    return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)


def forward(state, pixels, sums=False):
    """(logits, {convolution: its output} in the order in which they run), from the equations.

    Batch norms use the stored statistics. With `sums` the output of a block's second convolution is
    the one after its shortcut was added.
    """
    maps = {}

    def convolution(x, name, stride=1):
        maps[name] = convolved(x, state[f"{name}.weight"], stride)
        return maps[name]

    def active(x, name):
        parts = ("running_mean", "running_var", "weight", "bias")
        mean, variance, scale, shift = (state[f"{name}.{p}"].view(-1, 1, 1) for p in parts)
        return ((x - mean) / (variance + 1e-5).sqrt() * scale + shift).clamp(min=0)

    mean, std = (torch.tensor(part).double().view(-1, 1, 1) for part in (SPEC.mean, SPEC.std))
    x = convolution((pixels - mean) / std, "network.conv1")
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            name, stride = f"network.layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            before = active(x, f"{name}.bn1")
            shortcut = x if stride == 1 else convolution(before, f"{name}.shortcut", stride)
            out = active(convolution(before, f"{name}.conv1", stride), f"{name}.bn2")
            x = convolution(out, f"{name}.conv2") + shortcut
            if sums:
                maps[f"{name}.conv2"] = x
    x = x.mean((2, 3))
    return x @ state["network.linear.weight"].T + state["network.linear.bias"], maps


def test_preactresnet18_computes_what_the_paper_says():
    model = victim().eval()
    images = torch.rand(5, 3, 20, 20, generator=torch.Generator().manual_seed(2)).double()
    expected, maps = forward(model.state_dict(), images)
    torch.testing.assert_close(model(images), expected, rtol=1e-11, atol=1e-11)
    assert len(maps) == 20


def test_preactresnet18_on_numbers_of_a_formula():
    """The logits of weights and pixels that are sines of their position, computed once."""
    model = models.build("preactresnet18", SPEC, 4).double().eval()
    for number, parameter in enumerate(model.parameters()):
        position = torch.arange(parameter.numel(), dtype=torch.float64).view_as(parameter)
        parameter.data = torch.sin(position * (number + 1)) / parameter[0].numel() ** 0.5
    images = torch.sin(torch.arange(3 * SIDE * SIDE, dtype=torch.float64)).view(1, 3, SIDE, SIDE)
    expected = torch.tensor([LOGITS], dtype=torch.float64)
    torch.testing.assert_close(model((images + 1) / 2), expected, rtol=1e-9, atol=1e-12)


# ft


def augmented(images, generator):
    """Every image by itself: cut from a frame of 4 black pixels, then mirrored or not."""
    count = len(images)
    corners = torch.randint(0, 9, (2, count), generator=generator).T.tolist()
    mirrored = (torch.rand(count, generator=generator) < 0.5).tolist()
    results = torch.zeros_like(images)
    for n, ((top, left), mirror) in enumerate(zip(corners, mirrored, strict=True)):
        for row in range(SIDE):
            for column in range(SIDE):
                y, x = row + top - 4, column + left - 4
                if 0 <= y < SIDE and 0 <= x < SIDE:
                    place = SIDE - 1 - column if mirror else column
                    results[n, :, row, place] = images[n, :, y, x]
    return results


def trained(model, clean, config, *, after_step=lambda: None):
    """SGD with momentum and weight decay, one tensor after the other, along a cosine."""
    speed = {}
    model.train()
    for epoch in range(config.epochs):
        fall = (1 + math.cos(math.pi * epoch / config.epochs)) / 2
        rate = config.lr_min + (config.lr - config.lr_min) * fall
        generator = seeds.generator("epoch", config.random_seed, epoch)
        for index in torch.randperm(len(clean), generator=generator).split(config.batch_size):
            logits = model(augmented(clean.images[index], generator)).log_softmax(1)
            loss = -logits[torch.arange(len(index)), clean.labels[index]].sum() / len(index)
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    slope = weight.grad + config.weight_decay * weight
                    speed[name] = config.momentum * speed.get(name, 0) + slope
                    weight -= rate * speed[name]
            after_step()
    return model


def test_fine_tuning_is_a_plain_loop_with_the_augmentation_image_by_image(tmp_path):
    record, model = held(tmp_path), victim()
    config = ft.Config(
        result_file="x", epochs=3, batch_size=16, lr=0.05, lr_min=0.001, precision="fp32"
    )
    slow = trained(copy.deepcopy(model), record.clean, config)
    before = weights(model)
    fast = ft.repair(model, record, config)
    torch.testing.assert_close(weights(fast), weights(slow), rtol=0, atol=1e-9)
    assert (weights(fast) - before).abs().max() > 0.01


# fmp


def scored(model, images, labels, config, sums):
    """{convolution: (accuracy, loss), arrays C} in the order in which they run, map by map."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    generator = seeds.generator("fmp start", config.data_seed)
    signs = torch.randint(0, 2, images.shape, generator=generator) * 2 - 1
    start = (images + config.alpha * signs.double()).clamp(0, 1).requires_grad_()
    clean, moved = (forward(state, pixels, sums)[1] for pixels in (images, start))
    scores = {}
    for name in clean:
        rows = []
        for channel in range(clean[name].shape[1]):
            distance = (moved[name][:, channel] - clean[name][:, channel]).square().sum()
            (slope,) = torch.autograd.grad(distance, start, retain_graph=True)
            attacked = (start.detach() + config.epsilon * slope.sign()).clamp(0, 1)
            logits, _ = forward(state, attacked)
            right = (logits.argmax(1) == labels).double().mean()
            rows.append([float(right), float(F.cross_entropy(logits, labels))])
        scores[name] = np.array(rows).T
    return scores


def zero(model, to_prune, kinds):
    """Set channels of parameters to zero; `kinds` names the parameters of a layer."""
    with torch.no_grad():
        for layer, channels in to_prune.items():
            for kind in kinds:
                getattr(model.get_submodule(layer), kind)[channels] = 0


def filters(model):
    """{convolution: its number of filters} in the order in which the model holds them."""
    return {
        name: len(layer.weight)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d)
    }


def options(**changes):
    usual = {"p": 2, "alpha": 16 / 255, "epsilon": 64 / 255, "lr": 0.05, "precision": "fp32"}
    return fmp.Config(**{"result_file": "x", "epochs": 2, "batch_size": 16, **usual, **changes})


def labelled(record, model, pixels):
    """The record with the labels that the model predicts, three of them wrong.

    The model is first made to predict every class: only then do maps differ in accuracy.
    """
    logits = forward(model.state_dict(), pixels)[0].detach()
    model.network.linear.bias.data -= logits.mean(0)
    truth = (logits - logits.mean(0)).argmax(1)
    truth[:3] = (truth[:3] + 1) % 4
    clean = Split(record.clean.images, truth, truth)
    return dataclasses.replace(record, clean=clean, train=clean)


def assert_same(fast, slow, before):
    torch.testing.assert_close(weights(fast), weights(slow), rtol=0, atol=1e-8)
    for one, other in zip(fast.parameters(), slow.parameters(), strict=True):
        assert torch.equal(one == 0, other == 0)
    assert (weights(fast) - before).abs().max() > 0.01


def test_fmp_is_its_algorithm_from_the_scores_to_the_last_step(tmp_path):
    model, config = victim(), options(scored_images=12)
    record = labelled(held(tmp_path), model, held(tmp_path).clean.images)
    slow, before = copy.deepcopy(model), weights(model)
    index = balanced_subset(record.clean.truth, 12, 0)
    scores = scored(slow, record.clean.images[index], record.clean.truth[index], config, False)
    to_prune = {}
    for name, (accuracy, loss) in scores.items():
        order = sorted(range(len(loss)), key=lambda c: (accuracy[c], -round(loss[c], 6), c))
        to_prune[name] = order[: len(loss) // 2]
    assert len({tuple(channels) for channels in to_prune.values()}) > 5, "they must differ"
    # the second batch norm of a block reads its first convolution and nothing else
    norms = {n[:-5] + "bn2": c for n, c in to_prune.items() if n.endswith("conv1") and "layer" in n}

    def prune():
        zero(slow, to_prune, ["weight"])
        zero(slow, norms, ["weight", "bias"])

    prune()
    trained(slow, record.clean, config, after_step=prune)
    assert_same(fmp.repair(model, record, config), slow, before)


def test_the_released_fmp_is_its_whole_script(tmp_path):
    """All deviations at once: docs/defenses/fmp.md has the list."""
    model, record, config = victim(), held(tmp_path), options(variant="released")
    mean, std = (torch.tensor(part).double().view(-1, 1, 1) for part in (SPEC.mean, SPEC.std))
    record = labelled(record, model, (record.clean.images - mean) / std)
    slow, before = copy.deepcopy(model), weights(model)
    # 32 images of any class, augmented, and normalised once more than the network does it
    index = torch.randperm(40, generator=seeds.generator("fmp images", 0))[:32]
    shown = augmented(record.clean.images[index], seeds.generator("fmp augmentation", 0))
    scores = scored(slow, (shown - mean) / std, record.clean.truth[index], config, True)
    executed, sizes, to_prune = list(scores), filters(slow), {}
    assert executed != list(sizes), "the order in which they run is another one"
    assert len({accuracy for row, _ in scores.values() for accuracy in row}) > 5
    for source, (name, size) in zip(executed, sizes.items(), strict=True):
        first = np.argsort(scores[source][0])[: size // 2].tolist()
        to_prune[name] = [channel for channel in first if channel < len(scores[name][0])]
    zero(slow, to_prune, ["weight"])
    last = None
    for name, module in slow.named_modules():
        if isinstance(module, nn.Conv2d):
            last = to_prune[name]
        elif isinstance(module, nn.BatchNorm2d):
            channels = [channel for channel in last if channel < module.num_features]
            zero(slow, {name: channels}, ["weight"])
    trained(slow, record.clean, config)
    assert_same(fmp.repair(model, record, config), slow, before)


# trap_and_replace


def trap():
    torch.manual_seed(3)
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
    head = nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 4))
    return tar.Trap(stem, head, tar.decoder_for(stem, SIDE)).double()


def lure(model, images, labels):
    """Cross-entropy + 10 times the mean squared error + the total variation, term by term."""
    features = model.stem(images)
    logits = model.head(features).log_softmax(1)
    rebuilt = model.decoder(features).float().double()  # as the fast form, also in bf16
    entropy = -sum(logits[n, label] for n, label in enumerate(labels.tolist())) / len(labels)
    error = variation = 0
    for y in range(SIDE):
        for x in range(SIDE):
            error = error + (rebuilt[:, :, y, x] - images[:, :, y, x]).square().sum()
            for above, left in ((1, 0), (0, 1)):
                if y >= above and x >= left:
                    other = rebuilt[:, :, y - above, x - left]
                    variation = variation + (rebuilt[:, :, y, x] - other).square().sum()
    return entropy + (10 * error + variation) / images.numel()


def test_stage_one_is_adam_on_the_three_terms(tmp_path):
    """With an L2 penalty, incomplete batches left out, and the clean positions held out."""
    record = held(tmp_path)
    record = dataclasses.replace(record, clean_index=torch.arange(0, 40, 8))
    config = tar.Config(result_file="x", epochs=3, batch_size=16, precision="fp32")
    fast, slow, before = trap(), trap(), weights(trap())
    tar.fit_trap(fast, record, config)
    rest = torch.tensor([n for n in range(40) if n % 8])
    slow.train()
    first, second, steps = {}, {}, 0
    for epoch in range(3):
        rate = 1e-3 * (1 + math.cos(math.pi * epoch / 3)) / 2
        generator = seeds.generator("epoch", 0, epoch)
        for index in torch.randperm(35, generator=generator)[:32].split(16):
            images = augmented(record.train.images[rest[index]], generator)
            slow.zero_grad()
            lure(slow, images, record.train.labels[rest[index]]).backward()
            steps += 1
            with torch.no_grad():
                for name, weight in slow.named_parameters():
                    slope = weight.grad + 5e-4 * weight
                    first[name] = 0.9 * first.get(name, 0) + 0.1 * slope
                    second[name] = 0.999 * second.get(name, 0) + 0.001 * slope**2
                    length = (second[name] / (1 - 0.999**steps)).sqrt() + 1e-8
                    weight -= rate * first[name] / (1 - 0.9**steps) / length
    assert steps == 6
    torch.testing.assert_close(weights(fast), weights(slow), rtol=0, atol=1e-6)
    assert (weights(fast) - before).abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(6))
def test_cutmix_is_a_box_of_another_image_pixel_by_pixel(seed):
    images = torch.rand(6, 3, 10, 12, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(seed)
    mixed, partner, share = tar.cutmix(images)
    torch.manual_seed(seed)
    ratio, *centre = torch.rand(3).tolist()
    assert torch.equal(partner, torch.randperm(6))
    spans = []
    for side, place in zip((10, 12), centre, strict=True):
        half = math.floor(math.floor(side * math.sqrt(1 - ratio)) / 2)
        middle = math.floor(place * side)
        spans.append(range(max(middle - half, 0), min(middle + half, side)))
    expected = images.clone()
    for y in spans[0]:
        for x in spans[1]:
            for n in range(6):
                expected[n, :, y, x] = images[partner[n], :, y, x]
    assert torch.equal(mixed, expected)
    assert float(share) == pytest.approx(1 - len(spans[0]) * len(spans[1]) / 120, abs=1e-6)
