"""Batches, augmentation and the training loop."""

import re
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from antidote_bench import models
from antidote_bench.utils import launch, seeds, train
from antidote_bench.utils.data import loader
from antidote_bench.utils.data.dataset import Spec, Split
from antidote_bench.utils.data.memmap import MemmapImages, replaced
from antidote_bench.utils.errors import RefusedError, UserError
from antidote_bench.utils.poisoning import poison

SPEC = Spec("x", 4, 32, (0.5,) * 3, (0.25,) * 3, True, {})


def split(count=40):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    images = torch.randint(0, 120, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    images[torch.arange(count), labels % 3] += (labels.view(-1, 1, 1) // 3 * 60 + 60).to(
        torch.uint8
    )
    return Split(images, labels, labels)


def options(**changes):
    recipe = {
        "epochs": 4,
        "batch_size": 16,
        "lr": 0.05,
        "lr_min": 0.0,
        "momentum": 0.9,
        "weight_decay": 5e-4,
    }
    usual = {"muon_lr": 0.1, "random_seed": 0, "precision": "fp32"}
    return train.Recipe(**recipe | usual | changes)


def model():
    torch.manual_seed(0)
    return models.build("resnet9", SPEC, 4)


def weights(network):
    return torch.cat([tensor.flatten().double() for tensor in network.state_dict().values()])


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    ("count", "size"), [(0, 4), (3, 4), (4, 4), (5, 4), (8, 4), (9, 4), (10, 4), (1, 4), (7, 1)]
)
def test_every_image_once(count, size, drop_last):
    data = Split(
        torch.zeros(count, 3, 4, 4, dtype=torch.uint8), torch.arange(count), torch.arange(count)
    )
    parts = [
        labels.tolist()
        for _, labels, _ in loader.batches(
            data, size, generator=torch.Generator().manual_seed(1), drop_last=drop_last
        )
    ]
    seen = [label for part in parts for label in part]
    assert [len(part) for part in parts] == loader.batch_sizes(count, size, drop_last=drop_last)
    assert len(set(seen)) == len(seen) and (
        len(seen) == count or (drop_last and len(seen) == count - count % size)
    )
    assert size == 1 or count < 2 or 1 not in map(len, parts), (
        "batch normalisation cannot train on one image"
    )


def test_an_order_says_which_images_come_and_when():
    data, order = split(), torch.tensor([7, 7, 0, 5, 5, 7, 1, 2])
    for generator in (None, torch.Generator().manual_seed(1)):
        found = list(loader.batches(data, 4, generator=generator, order=order))
        assert torch.equal(torch.cat([index for _, _, index in found]), order)
        assert torch.equal(torch.cat([images for images, _, _ in found]), data.images[order] / 255)
    shown, asked = [], []

    def loss(network, images, labels, index):
        shown.append(index)
        return F.cross_entropy(network(images), labels)

    def ask(network, generator):
        asked.append(torch.randint(0, 40, (12,), generator=generator))
        return asked[-1]

    train.fit(model(), data, options(epochs=2, batch_size=4, epoch_steps=3), loss=loss, order=ask)
    assert (
        torch.equal(torch.cat(shown), torch.cat(asked))
        and len(shown) == 6
        and not torch.equal(*asked)
    )


def test_order_is_shuffled_by_the_generator_alone():
    def order(seed):
        return torch.cat(
            [
                index
                for _, _, index in loader.batches(
                    split(), 8, generator=torch.Generator().manual_seed(seed)
                )
            ]
        ).tolist()

    assert order(1) == order(1) != order(2)
    assert torch.cat([index for _, _, index in loader.batches(split(), 8)]).tolist() == list(
        range(40)
    )


def test_augmentation_is_a_padded_crop_and_a_mirror_of_each_image():
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    before = images.clone()
    found = loader.augmentation(SPEC, pad=2)(images, torch.Generator().manual_seed(0))
    assert torch.equal(images, before) and found.dtype == torch.uint8
    seen = set()
    for image, result in zip(images, found, strict=True):
        padded = F.pad(image, (2, 2, 2, 2))
        crops = {
            (top, left, flip): padded[:, top : top + 8, left : left + 8].flip(-1)
            if flip
            else padded[:, top : top + 8, left : left + 8]
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
        }
        matching = [key for key, crop in crops.items() if torch.equal(crop, result)]
        assert matching, "the result is no crop of its own image"
        seen.add(matching[0])
    assert len(seen) > 20 and {flip for *_, flip in seen} == {False, True}


def test_reflected_borders_are_those_of_torch():
    images = torch.randint(0, 256, (3, 3, 8, 10), dtype=torch.uint8)
    assert torch.equal(
        loader.reflect_pad(images, 2), F.pad(images.float(), (2,) * 4, "reflect").to(torch.uint8)
    )
    assert torch.equal(loader.reflect_pad(images, 0), images)


def test_alternating_flips_mirror_every_image_in_every_other_epoch():
    config = SimpleNamespace(
        flip="alternating",
        crop="shift",
        pad=0,
        padding="zeros",
        crop_area=0.08,
        mirror=None,
        random_seed=0,
    )
    data = split()
    augment = train.augmentation_of(config, SPEC, data)
    index = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:30]
    mirrored = []
    for epoch in range(4):
        found = augment(
            data.images[index], torch.Generator().manual_seed(epoch), index=index, epoch=epoch
        )
        own = (found == data.images[index]).flatten(1).all(1)
        assert torch.equal(~own, (found == data.images[index].flip(-1)).flatten(1).all(1))
        mirrored.append(~own)
    assert (
        torch.equal(mirrored[0], mirrored[2])
        and torch.equal(mirrored[1], ~mirrored[0])
        and torch.equal(mirrored[1], mirrored[3])
    )
    assert 5 < int(mirrored[0].sum()) < 25, "half of the images begin mirrored"
    seen = []

    def watch(images, generator, index, epoch):
        seen.append((epoch, index))
        return images

    train.fit(model(), data, options(epochs=2), augment=watch)
    assert [epoch for epoch, _ in seen] == [0, 0, 0, 1, 1, 1] and all(
        len(index) in (8, 16) for _, index in seen
    )


def test_no_mirror_where_it_would_change_the_class():
    upright = Spec("x", 4, 32, (0.5,) * 3, (0.25,) * 3, False, {})
    images = torch.arange(8, dtype=torch.uint8).expand(32, 3, 8, 8).contiguous()
    found = loader.augmentation(upright, pad=0)(images, torch.Generator().manual_seed(0))
    assert torch.equal(found, images)


class Double(nn.Module):
    """Any network, in float64 from the pixels on."""

    def __init__(self, network):
        super().__init__()
        self.network = network.double()

    def forward(self, images):
        return self.network(images.double())


def test_fit_equals_plain_sgd_in_float64():
    data, config = split(), options()
    fast = train.fit(Double(model()), data, config, augment=loader.augmentation(SPEC))
    slow = Double(model())
    optimizer = torch.optim.SGD(slow.parameters(), config.lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    slow.train()
    for epoch in range(config.epochs):
        generator = seeds.generator("epoch", 0, epoch)
        order = torch.randperm(40, generator=generator)
        for index in order.split(16):
            images = loader.augmentation(SPEC)(data.images[index], generator).float() / 255
            optimizer.zero_grad()
            F.cross_entropy(slow(images), data.labels[index]).backward()
            optimizer.step()
        schedule.step()
    torch.testing.assert_close(weights(fast), weights(slow), rtol=0, atol=1e-7)
    assert (weights(fast) - weights(model())).abs().max() > 0.01


def test_one_cycle_with_nesterov_and_smoothing_equals_plain_steps_in_float64():
    data, config = split(), options(schedule="one_cycle", warmup=0.3, lr_min=0.001, nesterov=True)
    fast = train.fit(
        Double(model()), data, config, loss=partial(train.cross_entropy, label_smoothing=0.2)
    )
    slow = Double(model()).train()
    speed, step = [torch.zeros_like(parameter) for parameter in slow.parameters()], 0
    for epoch in range(config.epochs):
        for index in torch.randperm(40, generator=seeds.generator("epoch", 0, epoch)).split(16):
            done = step / (3 * config.epochs)  # 40 images in 3 batches
            rate = 0.001 + (0.05 - 0.001) * (done / 0.3 if done < 0.3 else (1 - done) / 0.7)
            logits = slow(data.images[index].float() / 255).log_softmax(1)
            told = F.one_hot(data.labels[index], 4) * 0.8 + 0.2 / 4
            gradients = torch.autograd.grad(-(told * logits).sum(1).mean(), list(slow.parameters()))
            with torch.no_grad():
                for parameter, gradient, v in zip(slow.parameters(), gradients, speed, strict=True):
                    slope = gradient + config.weight_decay * parameter
                    v.copy_(slope if step == 0 else 0.9 * v + slope)
                    parameter -= rate * (slope + 0.9 * v)
            step += 1
    torch.testing.assert_close(weights(fast), weights(slow), rtol=0, atol=1e-6)
    assert (weights(fast) - weights(model())).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore")  # torch reads attributes of every module that is loaded
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_training_ends_with_the_same_weights():
    """Every layer costs seconds of the compiler: the network has few."""

    def network():
        torch.manual_seed(0)
        convolution = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU()
        return nn.Sequential(*convolution, nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(16, 4))

    plain, compiled = (
        train.fit(network(), split(), options(epochs=2, compile=mode), drop_last=True)
        for mode in ("none", "default")
    )
    assert (weights(plain) - weights(network())).abs().max() > 0.01
    torch.testing.assert_close(weights(compiled), weights(plain), rtol=0, atol=1e-3)
    assert plain.state_dict().keys() == compiled.state_dict().keys()


def test_a_compiler_that_is_missing_is_named():
    from torch._inductor import config  # only here: loading it takes seconds
    from torch._inductor.exc import InvalidCxxCompiler

    with config.patch({"cpp.cxx": (None, "/bin/false")}):
        text, code = launch._explain(InvalidCxxCompiler())
    assert code == 1 and re.fullmatch(
        r"torch.compile failed and needs .*/bin/false.*; --compile none avoids it", text
    )


def test_stored_images_train_to_the_same_weights():
    data, config = split(), options()
    kept = Split(MemmapImages(data.images, "cpu"), data.labels, data.truth)
    one, other = (
        train.fit(model(), part, config, augment=loader.augmentation(SPEC)) for part in (data, kept)
    )
    assert torch.equal(weights(one), weights(other))


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("stop", "precision", "optimizer"),
    [(1, "fp32", "sgd"), (3, "bf16", "sgd"), (1, "bf16", "muon"), (3, "fp32", "muon")],
)
def test_resumed_run_ends_with_the_same_weights(tmp_path, stop, precision, optimizer):
    data, file = split(), tmp_path / "fit.safetensors"
    config = options(
        precision=precision, optimizer=optimizer, bias_lr_scale=1.0 if optimizer == "sgd" else 4.0
    )
    whole = train.fit(model(), data, config, augment=loader.augmentation(SPEC))

    def kill(model, epoch, **_):
        if epoch == stop + 1:
            raise Killed

    with pytest.raises(Killed):
        train.fit(
            model(), data, config, augment=loader.augmentation(SPEC), on_epoch=kill, checkpoint=file
        )
    torch.manual_seed(99)  # whatever state the new process is in
    epochs = []
    resumed = train.fit(
        models.build("resnet9", SPEC, 4),
        data,
        config,
        augment=loader.augmentation(SPEC),
        checkpoint=file,
        on_epoch=lambda model, epoch, **_: epochs.append(epoch),
    )
    assert epochs == list(range(stop + 1, 5))
    assert torch.equal(weights(whole), weights(resumed))


def test_damaged_checkpoint(tmp_path):
    file = tmp_path / "fit.safetensors"
    train.fit(model(), split(), options(epochs=1), checkpoint=file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RefusedError, match="delete the folder"):
        train.fit(model(), split(), options(), checkpoint=file)


def test_no_draw_is_correlated_with_another():
    """With plain seeds the poisoned images would be the first ones of the first epoch."""
    count = 20_000
    for seed in (0, 1):
        poisoned = set(poison.choose(torch.zeros(count).long(), 0.1, seed).tolist())
        first = torch.randperm(count, generator=seeds.generator("epoch", seed, 0))[:2000].tolist()
        assert 140 < len(poisoned & set(first)) < 260, "200 expected by chance"
    drawn = [
        torch.rand(1, generator=seeds.generator(*key)).item()
        for key in (("a", 0), ("b", 0), ("a", 1), ("a", 0, 0), ("a", 1, 0), ("a", 0, 1))
    ]
    assert (
        len(set(drawn)) == len(drawn)
        and drawn[0] == torch.rand(1, generator=seeds.generator("a", 0)).item()
    )


def test_after_step_and_mode():
    steps, network = [], model().eval()
    train.fit(
        network, split(), options(epochs=2), after_step=lambda: steps.append(network.training)
    )
    assert steps == [True] * 6 and not network.training


def test_zero_epochs_change_nothing():
    assert torch.equal(weights(train.fit(model(), split(), options(epochs=0))), weights(model()))


def test_a_loss_that_is_no_number_stops_the_run():
    with pytest.raises(UserError, match="epoch 1.*--lr"):
        train.fit(model(), split(), options(lr=1e30))


def test_the_rate_falls_along_a_cosine():
    config = options(epochs=10, lr=0.2, lr_min=0.01)
    rates = [train.cosine(epoch, 0.5, config) for epoch in range(10)]
    assert (
        rates[0] == 0.2
        and rates[5] == pytest.approx(0.105)
        and rates == sorted(rates, reverse=True)
        and rates[-1] > 0.01
    )


def test_stored_images_are_those_of_the_tensor():
    images = split(30).images
    stored, plain, generator = MemmapImages(images, "cpu"), images, torch.Generator().manual_seed(0)
    for count in (30, 20, 7):  # views of views, with images replaced in between
        order = torch.randperm(len(plain), generator=generator)[:count]
        stored, plain = stored.view(order), plain[order]
        index = torch.randperm(count, generator=generator)[:5]
        new = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=generator)
        before = stored
        stored, plain = replaced(stored, index, new), replaced(plain, index, new)
        assert torch.equal(stored[:], plain) and not torch.equal(before[:], plain), (
            "the argument is left alone"
        )
        assert (
            stored.shape == plain.shape
            and len(stored) == len(plain)
            and torch.equal(stored[2:5], plain[2:5])
        )
        assert torch.equal(stored[plain[:, 0, 0, 0] > 99], plain[plain[:, 0, 0, 0] > 99])
        parts = torch.randperm(count, generator=generator).split(3)
        assert all(
            torch.equal(got, plain[part])
            for got, part in zip(stored.ahead(parts), parts, strict=True)
        )
    assert torch.equal(images, split(30).images)


def test_a_reader_that_fails_says_so():
    with pytest.raises(IndexError):
        list(MemmapImages(split(4).images, "cpu").ahead([torch.tensor([0]), torch.tensor([9])]))
