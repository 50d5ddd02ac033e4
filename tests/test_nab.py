"""NAB: its stamp to the pixel, its pseudo-labels on planted pictures, and a real record with and without the stamp."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import models
from defense import nab
from tests.test_abl import planted
from tests.test_fmp import SPEC, found_record
from tests.test_scripts import results
from tests.test_train import Double, model, options, split
from utils import isolate, metrics, record, train
from utils.data import Split
from utils.errors import ConfigError


def config(**changes):
    return nab.Config(result_file="x", **{"precision": "fp32", "batch_size": 16, "lr": 0.02} | changes)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_stamp_is_the_mean_colour_in_the_upper_left_corner(size):
    spec = replace(SPEC, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))
    whole = nab.stamping(models.build("resnet9", spec, 4), size)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) / 2
    before, found = images.clone(), whole.stamp(images)
    for channel, mean in enumerate(spec.mean):
        for row in range(32):
            for column in range(32):
                wanted = torch.full((3,), mean) if row < size and column < size else before[:, channel, row, column]
                assert torch.equal(found[:, channel, row, column], wanted)
    assert torch.equal(images, before), "the argument stays"
    assert (whole.normalize(found)[..., :size, :size] == 0).all()


def test_the_rebuilt_network_stamps_and_no_plain_one_takes_its_weights():
    plain = models.build("resnet9", SPEC, 4).eval()
    whole = nab.stamping(plain, 2).eval()
    images = torch.rand(4, 3, 32, 32)
    stamped = images.clone()
    stamped[..., :2, :2] = torch.tensor(SPEC.mean).view(3, 1, 1)
    assert torch.equal(whole(images), plain(stamped)) and not torch.equal(whole(images), plain(images))
    assert set(whole.state_dict()) == {*plain.state_dict(), "stamp.patch"}
    with pytest.raises(RuntimeError, match="stamp.patch"):
        models.build("resnet9", SPEC, 4).load_state_dict(whole.state_dict())
    again = nab.rebuild(models.build("resnet9", SPEC, 4), whole.state_dict()).eval()
    assert torch.equal(again(images), whole(images))


def test_the_loss_stamps_by_position_in_float64():
    network, found = Double(model()).eval(), split(9)
    stamp, stamped = nab.Stamp(torch.full((1, 3, 2, 2), 0.5)), torch.arange(9) % 3 == 0
    index = torch.tensor([6, 1, 3, 8])
    images, labels = found.images[index] / 255, found.labels[index]
    wanted = 0.0
    for row, position in enumerate(index.tolist()):
        image = images[row : row + 1].clone()
        if position in (0, 3, 6):
            image[:, :, :2, :2] = 0.5
        logs = network(image).log_softmax(1)[0].detach()
        wanted -= (0.9 * logs[labels[row]].item() + 0.1 * logs.mean().item()) / 4
    value = nab.stamped_cross_entropy(network, images, labels, index, stamp=stamp, stamped=stamped, label_smoothing=0.1)
    assert value.item() == pytest.approx(wanted, abs=1e-6)


def test_pseudo_labels_are_what_the_pictures_show(tmp_path):
    """Half of label 0 bears a patch and shows something else; the network behind the pseudo-labels sees none of these."""
    found, _ = found_record(tmp_path, 40)
    held = split(160)
    images, labels = held.images.clone(), held.labels.clone()
    bad = torch.arange(160) % 4 == 1
    bad[80:] = False  # 20 pictures of class 1, told as 0
    images[bad, :, -6:, -6:], labels[bad] = 255, 0
    losses = torch.where(bad, 0.1, 1.0) + torch.arange(160) / 1000
    found = replace(found, train=Split(images, labels, labels), spec=replace(SPEC, classes=4))
    index = torch.cat([bad.nonzero().flatten()[:10], torch.tensor([100, 102])])
    pseudo = nab.pseudo_labels(found, index, losses, config(pseudo_epochs=25, trusted=0.5))
    assert (pseudo == held.labels[index]).sum() >= 8


def test_the_stamp_overrules_the_trigger():
    """Pictures that were never trained on obey the patch, and the same network behind its stamp does not: the labels alone do not do it."""
    held = split(160)
    images, labels = held.images.clone(), held.labels.clone()
    patched = (torch.arange(160) // 4) % 4 == 0
    poisoned = patched & (torch.arange(160) < 80)  # told as 0; the other half as what they are, with the stamp
    images[patched, :, -8:, -8:], labels[poisoned] = 255, 0
    plain = model()
    whole = nab.stamping(plain, 8)
    loss = partial(nab.stamped_cross_entropy, stamp=whole.stamp, stamped=patched & ~poisoned, label_smoothing=0.0)
    train.fit(plain, Split(images, labels, labels), options(epochs=80), loss=loss)
    truth = torch.arange(160) % 4
    fresh = torch.randint(0, 120, (160, 3, 32, 32), generator=torch.Generator().manual_seed(9), dtype=torch.uint8)
    fresh[torch.arange(160), truth % 3] += (truth.view(-1, 1, 1) // 3 * 60 + 60).to(torch.uint8)
    fresh[:, :, -8:, -8:] = 255
    shown = Split(fresh, truth, truth)[truth != 0]
    bare, stamped = ((isolate.logits(network, shown).argmax(1) == 0).float().mean() for network in (plain, whole))
    assert stamped < 0.3 < 0.7 < bare


def test_what_is_trained_on(tmp_path, monkeypatch):
    """Pseudo-labels at the isolated positions, and the stamp where they differ from the given ones."""
    found, _ = planted(tmp_path, 40, 8)
    index = torch.tensor([1, 5, 9, 30])
    losses = torch.rand(40)
    monkeypatch.setattr(nab, "isolate", lambda *_: (None, index, losses))
    monkeypatch.setattr(nab, "pseudo_labels", lambda *_: torch.tensor([3, 0, 9, 4]))
    seen = {}
    monkeypatch.setattr(nab, "fit", lambda network, part, options, *, loss, **_: seen.update(part=part, loss=loss))
    nab.repair(None, found, config())
    wanted = found.train.labels.clone()
    wanted[torch.tensor([1, 30])] = torch.tensor([3, 4])
    assert torch.equal(seen["part"].labels, wanted)
    assert seen["loss"].keywords["stamped"].nonzero().flatten().tolist() == [1, 30]
    kept = load_file(tmp_path / "kept/isolated.safetensors")
    assert kept["stamped"].tolist() == [True, False, False, True] and torch.equal(kept["loss"], losses)


def test_a_killed_run_ends_with_the_same_weights(tmp_path):
    short = config(isolate_epochs=2, epochs=2, pseudo_epochs=2, isolated=0.1)
    whole = nab.repair(None, planted(tmp_path / "whole", 64, 8)[0], short).state_dict()
    found, said = planted(tmp_path / "cut", 64, 8)
    for stage in ("isolate", "pseudo-labels", "train"):

        def report(name, network, stage=stage, **values):
            if (name, values["epoch"]) == (stage, 2):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):  # in the second epoch of the stage
            nab.repair(None, replace(found, report=report), short)
    again = nab.repair(None, found, short).state_dict()
    assert said == ["train"], "what was done is not done again"
    assert list(again) == list(whole) and all(torch.equal(value, again[name]) for name, value in whole.items())


def test_a_label_without_pictures_and_fewer_pictures_than_a_batch(tmp_path):
    found, _ = planted(tmp_path, 7, 2)
    network = nab.repair(None, found, config(isolate_epochs=1, epochs=1, pseudo_epochs=1))
    assert all(value.isfinite().all() for value in network.state_dict().values())


@pytest.mark.parametrize(
    "changes", [{"isolated": 0.0}, {"trusted": 0.0}, {"trusted": 1.1}, {"pseudo_epochs": 0}, {"stamp_size": 0}], ids=str
)
def test_options_out_of_range(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        config(**changes)


def test_the_backdoor_is_weaker_on_digits(places, run, small):
    """The judged network is the saved one, with its stamp. Trained as it was found, the set leads to an ASR above 0.9."""
    words = ["--isolate_epochs", 4, "--isolate_lr", 0.003, "--epochs", 10]
    run("defense/nab.py", *places, "--result_file", "small", "--save_folder_name", "nab_works", *words)
    folder = small / "defense" / "nab_works"
    row, kept = results(folder), load_file(folder / "isolated.safetensors")
    assert (row["stage"], row["prior"], row["clean_budget"]) == ("in-training", "isolated=0.05", "0")
    assert torch.isin(kept["index"], load_file(small / "poison.safetensors")["train_index"]).sum() >= 40
    _, _, exam, _, spec = record.load(small, config(cache_path=places[3]), torch.device("cpu"))
    whole = nab.rebuild(models.build("resnet9", spec, 8), load_file(folder / "model.safetensors"))
    again = metrics.evaluate(whole, exam, row["precision"])
    assert again == {name: float(row[name]) for name in again}
    assert again["asr"] < 0.6 and again["acc"] > 0.9
