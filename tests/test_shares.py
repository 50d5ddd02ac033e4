"""The share of poison that is used is the share that is asked for, in every phase of every attack.

The first part finds the attacks in attack/: a new one needs no edit here.
"""

import importlib

import pytest
import safetensors.torch
import torch

from antidote_bench import models
from antidote_bench.attack import blind, inputaware, lc, lira
from antidote_bench.utils import parsing, run, train
from antidote_bench.utils.data import dataset
from antidote_bench.utils.data.dataset import Dataset, Spec, Split
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.poisoning import poison
from antidote_bench.utils.poisoning.attacker import Attacker
from tests.helpers import ROOT, names

CLASSES, TRAIN, TEST, SIZE = 10, 1200, 40, 16
SPEC = Spec(
    "cifar10",
    CLASSES,
    SIZE,
    (0.5,) * 3,
    (0.25,) * 3,
    True,
    {"train": "0" * 64, "test": "0" * 64},
    class_names=tuple(map(str, range(CLASSES))),
)
# options that keep the preparation of a trigger short
SHORT = {
    "epochs": 1,
    "steps": 1,
    "mask_epochs": 1,
    "generator_epochs": 1,
    "expert_epochs": 1,
    "label_epochs": 1,
    "scenes": 20,
    "blend_size": SIZE,
    "model": "resnet9",
    "width": 4,
    "batch_size": 400,
    "device": "cpu",
}
# the share of images that are changed and keep their label, as the options ask for it
COVERS = {
    "wanet": lambda options: options.cross_ratio * options.pratio,
    "inputaware": lambda options: options.cross_ratio * options.pratio,
    "bpp": lambda options: options.negative_ratio,
    "adaptive_blend": lambda options: options.cover_ratio,
    "adaptive_patch": lambda options: options.cover_ratio,
    "tact": lambda options: options.cover_ratio,
}


def split_of(count):
    """Random images, whose classes take turns."""
    generator = torch.Generator().manual_seed(count)
    shape = count, 3, SIZE, SIZE
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    truth = torch.arange(count) % CLASSES
    return Split(images, truth, truth)


DATA = Dataset(SPEC, split_of(TRAIN), split_of(TEST))


def clean_model(*_):
    """An untrained network in the place of the clean model, and what is known about it."""
    torch.manual_seed(0)
    return models.build("resnet9", SPEC, 4).eval().requires_grad_(False), {}


def script_of(name, tmp_path, **options):
    """The module of an attack, and options with which it runs quickly."""
    script = importlib.import_module(f"antidote_bench.attack.{name}")
    known = script.Config.__dataclass_fields__
    short = {key: value for key, value in SHORT.items() if key in known}
    places = {"record_path": str(tmp_path), "save_folder_name": "a"}
    return script, script.Config(**{**short, **places, **options})


class Watched:
    """What an attack gave to `run.attack` and to `train.fit`, which trains nothing here."""

    def __init__(self, monkeypatch):
        self.cover = self.in_loop = self.split = self.loss = None
        attack = run.attack

        def watched_attack(*arguments, **named):
            self.cover = named.get("cover")
            self.in_loop = not {"make_loss", "edit"}.isdisjoint(named)
            return attack(*arguments, **named)

        def fit(model, split, recipe, *, loss, **_):
            self.split, self.loss = split, loss
            return model

        monkeypatch.setattr(run, "attack", watched_attack)
        monkeypatch.setattr(run, "clean_model", clean_model)
        monkeypatch.setattr(train, "fit", fit)
        monkeypatch.setattr(dataset, "load", lambda *_, **__: DATA)


def shares_of(name):
    """0, one image in a thousand, and the default; fewer for an attack that has one share only."""
    script = importlib.import_module(f"antidote_bench.attack.{name}")
    default = script.Config().pratio
    for share in (0.0, 0.001, default):
        try:
            script.Config(pratio=share)
        except ConfigError:
            continue
        yield share


CASES = [(name, share) for name in names("attack") for share in sorted(set(shares_of(name)))]


@pytest.mark.parametrize(("name", "share"), CASES)
def test_stored_shares(name, share, tmp_path, monkeypatch):
    """Of the images that the victim is trained on, and of those that the record holds."""
    watched = Watched(monkeypatch)
    script, options = script_of(name, tmp_path, pratio=share)
    script.main(options)
    asked = round(share * TRAIN)
    if options.clean_label:
        asked = min(asked, TRAIN // CLASSES)
    cover_share = watched.cover.ratio if watched.cover else 0
    assert cover_share == pytest.approx(COVERS.get(name, lambda _: cover_share)(options))
    covers = round(cover_share * TRAIN)

    stored = safetensors.torch.load_file(tmp_path / "a" / "poison.safetensors")
    kinds = torch.bincount(stored["train_kind"].long(), minlength=3).tolist()
    changed = (watched.split.images != DATA.train.images).flatten(1).any(1)
    if watched.in_loop:
        assert kinds == [0, 0, 0] and not changed.any(), "the loss poisons, and nothing is stored"
        return
    assert kinds == [0, asked, covers]
    relabelled = watched.split.labels != DATA.train.truth
    if hasattr(script, "make_labels"):
        assert int(relabelled.sum()) == asked and not changed.any(), "labels are poisoned alone"
        return
    # on random images no trigger is without effect
    assert changed.nonzero().flatten().tolist() == sorted(stored["train_index"].tolist())
    poisoned = stored["train_index"][stored["train_kind"] == 1]
    assert int(relabelled.sum()) == int((DATA.train.truth[poisoned] != 0).sum())


def in_loop(name):
    """Whether an attack poisons in the loss."""
    return "make_loss" in (ROOT / "attack" / f"{name}.py").read_text()


@pytest.mark.parametrize("name", [name for name in names("attack") if in_loop(name)])
def test_a_loss_shows_every_image_with_the_trigger(name, tmp_path, monkeypatch):
    """In every batch the share that was asked for."""
    watched = Watched(monkeypatch)
    script, options = script_of(name, tmp_path, batch_size=16)
    seen, told = [], []
    monkeypatch.setattr(poison, "relabelling", counting(poison.relabelling, told))
    monkeypatch.setattr(script, "make_trigger", counting(script.make_trigger, seen))
    script.main(options)
    model, images = clean_model()[0], DATA.train.images[:16] / 255
    seen.clear(), told.clear()
    watched.loss(model, images, DATA.train.labels[:16], torch.arange(16))
    assert sum(seen) == sum(told) == options.pratio * 16


def counting(make, counts):
    """`make`, whose function appends the number of images or labels that it is called with."""

    def made(*arguments, **named):
        function = make(*arguments, **named)

        def counted(batch, *rest):
            counts.append(len(batch))
            return function(batch, *rest)

        return counted

    return made


JOINT = Dataset(SPEC, split_of(330), split_of(TEST))  # ten batches of 32 an epoch


def joint_phase(monkeypatch, **options):
    """(poisoned, cross images) of every batch in which the networks of input-aware learn."""
    epochs, told, batches = 4, [], []
    stamp = inputaware.stamp

    def watched(pattern, mask, images, own, cross):
        changed, diversity = stamp(pattern, mask, images, own, cross)
        assert changed.shape == images.shape and torch.as_tensor(diversity).isfinite()
        differs = int((changed != images).flatten(1).any(1).sum())
        batches.append((told[-1], differs - told[-1]))
        return changed, diversity

    monkeypatch.setattr(poison, "relabelling", counting(poison.relabelling, told))
    monkeypatch.setattr(inputaware, "stamp", watched)
    short = {"batch_size": 32, "generator_epochs": epochs, "mask_epochs": 1, "density": 0.3}
    config = inputaware.Config(model="resnet9", width=4, **short, **options)
    attacker = Attacker(SPEC, JOINT.train, torch.arange(10), clean_model)
    inputaware.prepare(config, attacker)
    assert len(batches) == 10 * epochs
    return batches


@pytest.mark.parametrize(
    ("share", "cross_ratio"),
    [(0.0, 1.0), (0.001, 1.0), (0.003, 5.0), (0.1, 1.0), (0.25, 0.0), (0.3, 0.5), (0.6, 0.5)],
)
def test_inputaware_learns_with_the_share(share, cross_ratio, monkeypatch):
    """Exact over all batches, and to within an image in every one."""
    monkeypatch.setattr(inputaware, "_learn_masks", lambda *_: None)
    batches = joint_phase(monkeypatch, pratio=share, cross_ratio=cross_ratio)
    for column, part in ((0, share), (1, cross_ratio * share)):
        counts = [batch[column] for batch in batches]
        assert abs(sum(counts) - part * 32 * len(counts)) <= 0.5
        assert all(abs(count - part * 32) <= 1 for count in counts)


def test_inputaware_stamps_as_written_out():
    """Cross image i of a batch carries the trigger of image i; without poisoned images, that of the
    image before."""
    torch.manual_seed(0)
    pattern, mask = (
        inputaware.generator.Autoencoder(3, channels, inputaware.WIDTHS) for channels in (3, 1)
    )
    pattern.eval(), mask.eval()  # so that every image is treated by itself
    images = DATA.train.images[:8] / 255

    def carrying(image, other):
        ink, opacity = (
            inputaware.ink(pattern, other[None])[0],
            inputaware.opacity(mask, other[None]),
        )
        return image + (ink - image) * opacity[0]

    for own, cross in ((2, 2), (2, 3), (3, 0), (8, 0), (0, 1), (0, 8), (0, 0)):
        changed, _ = inputaware.stamp(pattern, mask, images, own, cross)
        expected = images.clone()
        for i in range(own):
            expected[i] = carrying(images[i], images[i])
        for i in range(cross):
            expected[own + i] = carrying(images[own + i], images[i if own else i - 1])
        torch.testing.assert_close(changed, expected, rtol=0, atol=1e-5)


def test_lira_learns_with_every_image(monkeypatch):
    counts, weighted = [], lira.weighted

    def watched(alpha, victim, images, labels, triggered_images, targets):
        counts.append((len(images), len(triggered_images), int((targets == 0).sum())))
        return weighted(alpha, victim, images, labels, triggered_images, targets)

    monkeypatch.setattr(lira, "weighted", watched)
    config = lira.Config(model="resnet9", width=4, batch_size=32, generator_epochs=2)
    lira.prepare(config, Attacker(SPEC, JOINT.train, torch.arange(330), clean_model))
    assert counts == [(32, 32, 32)] * 20


@pytest.mark.parametrize("count", [0, 1, 30])
def test_lc_perturbs_as_many_as_are_poisoned(count, monkeypatch):
    perturbed, perturbation = [], lc.perturbation

    def watched(model, images, *rest):
        perturbed.append(len(images))
        return perturbation(model, images, *rest)

    monkeypatch.setattr(lc, "perturbation", watched)
    index = torch.arange(count) * CLASSES
    parts = lc.prepare(lc.Config(steps=1), Attacker(SPEC, JOINT.train, index, clean_model)).parts
    assert sum(perturbed) == len(parts["perturbations"]) == count
    assert (parts["row"] >= 0).nonzero().flatten().tolist() == index.tolist()


def test_blind_says_that_it_never_began(monkeypatch, capsys):
    model, images = clean_model()[0], DATA.train.images[:4] / 255

    def attack(script, config, make_trigger, *, make_loss):
        trigger = make_trigger(config, SPEC, "train")
        loss = make_loss(config, trigger, poison.relabelling("all2one", 0, CLASSES))
        for _ in range(3):
            loss(model, images, DATA.train.labels[:4], torch.arange(4))

    monkeypatch.setattr(run, "attack", attack)
    blind.main(blind.Config(start_batches=3, start_loss=100.0))
    assert capsys.readouterr().err == ""
    blind.main(blind.Config(start_batches=4, start_loss=100.0))
    assert "the attack never began" in capsys.readouterr().err


@pytest.mark.parametrize("share", [0, 0.001, 0.07, 0.1, 1 / 3, 1])
def test_portions_follow_the_share(share):
    portions, taken = poison.Portions(share), 0
    for batch in range(1, 200):
        size = 1 + batch % 7
        taken += portions.take(size)
        assert taken == round(share * portions.seen)
    whole = poison.Portions(0.1)
    assert [whole.take(30) for _ in range(1000)] == [3] * 1000


def test_portions_that_do_not_fit_come_later():
    portions = poison.Portions(0.5)
    taken = [portions.take(4, at_most) for at_most in (0, 1, 4, 4)]
    assert taken == [0, 1, 4, 3] and sum(taken) == 0.5 * 16


@pytest.mark.parametrize("total", [1, 2, 7, 400, 999, 1200, 1297, 39209, 50000, 10**6, 1281167])
def test_the_smallest_share_is_the_smallest(total):
    text = poison.smallest_share(total)
    digits = len(text.partition(".")[2])
    assert round(float(text) * total) == 1
    assert round((float(text) - 10**-digits) * total) == 0


def test_a_share_that_is_no_image_is_refused():
    truth = torch.arange(TRAIN) % CLASSES
    assert len(poison.choose(truth, 0, 0)) == 0
    with pytest.raises(ConfigError, match="pratio must be 0 or at least 0.00042 for 1200 training"):
        poison.choose(truth, 0.0004, 0)
    assert len(poison.choose(truth, 0.00042, 0)) == 1
    with pytest.raises(ConfigError, match="keep their label must be 0 or at least 0.00042"):
        poison.choose(truth, 0.0004, 0, purpose="cover")
    with pytest.raises(ConfigError, match="none of the 1200 training images"):
        poison.choose(truth, 0.1, 0, among=truth == CLASSES)


@pytest.mark.parametrize("name", ["badnet", "sig", "inputaware", "adaptive_patch"])
def test_the_run_ends_where_a_share_is_no_image(name, tmp_path, monkeypatch):
    """As early as in the dry run, here on the 1,297 digits."""
    script = importlib.import_module(f"antidote_bench.attack.{name}")
    words = ["--dry_run", "--record_path", tmp_path, "--pratio"]
    for share in ("0.0003", "0.00039"):
        options = parsing.parse(script.Config, [*map(str, words), share])
        if share == "0.0003":
            with pytest.raises(ConfigError, match="pratio must be 0 or at least 0.00039"):
                script.main(options)
        else:
            script.main(options)
