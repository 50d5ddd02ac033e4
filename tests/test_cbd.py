"""CBD: its weights and its loss in float64, what is trained on, resuming, and a real record."""

import math
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from antidote_bench.defense import cbd
from antidote_bench.utils import parsing
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.repair import isolation
from tests.test_abl import planted
from tests.test_fmp import found_record
from tests.test_scripts import results


def config(**changes):
    return cbd.Config(
        result_file="x", **{"precision": "fp32", "batch_size": 16, "lr": 0.02} | changes
    )


def test_the_weights_of_two_images():
    first, second = torch.tensor([0.1, 2.0]).double(), torch.ones(2).double()
    weights = cbd.first_share(first, second)
    assert weights.tolist() == pytest.approx([0.1 / 1.1, 2 / 3], abs=1e-7)
    assert (weights / weights.mean()).tolist() == pytest.approx([0.24, 1.76], abs=1e-7)
    assert cbd.first_share(torch.zeros(1), torch.zeros(1)).item() == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_and_its_gradient_in_loops(smoothing):
    """The networks are the identity and a mirror of the columns; weights have no gradient."""
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(6, 4, generator=generator)).requires_grad_()
    labels = torch.arange(6) % 4
    value = cbd.weighted_cross_entropy(
        lambda images: images,
        logits,
        labels,
        None,
        confounder=lambda images: images.flip(1),
        label_smoothing=smoothing,
    )
    value.backward()
    rows = logits.detach().double().tolist()
    shares, losses, slopes = [], [], []
    for row, label in zip(rows, labels.tolist(), strict=True):
        total = sum(math.exp(each) for each in row)
        p = [math.exp(each) / total for each in row]
        first, second = -math.log(p[3 - label]), -math.log(p[label])  # the sum is the same
        shares.append(first / (first + second))
        q = [smoothing / 4 + (1 - smoothing) * (k == label) for k in range(4)]
        losses.append(-sum(q[k] * math.log(p[k]) for k in range(4)))
        slopes.append([p[k] - q[k] for k in range(4)])
    weights = [6 * share / sum(shares) for share in shares]
    wanted = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / 6
    assert value.item() == pytest.approx(wanted, abs=1e-5)
    slopes = [[w * each / 6 for each in row] for w, row in zip(weights, slopes, strict=True)]
    torch.testing.assert_close(logits.grad, torch.tensor(slopes), rtol=0, atol=1e-6)


def test_a_batch_that_the_first_network_knows_has_no_loss():
    logits, labels = 200 * torch.eye(4), torch.arange(4)
    value = cbd.weighted_cross_entropy(
        lambda images: 0 * images,
        logits,
        labels,
        None,
        confounder=lambda images: images,
        label_smoothing=0.0,
    )
    assert value.item() == 0, "and is no division by zero"


def test_the_first_network_stays_as_it_is_while_the_second_one_is_trained(tmp_path, monkeypatch):
    record, stages = planted(tmp_path, 40, 8)
    seen, train = {}, cbd.train_confounder

    def keep(*arguments):
        network = seen["network"] = train(*arguments)
        seen["before"] = {name: value.clone() for name, value in network.state_dict().items()}
        return network

    monkeypatch.setattr(cbd, "train_confounder", keep)
    model = cbd.repair(None, record, config(confounder_epochs=2, epochs=1))
    after = seen["network"].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in seen["before"].items())
    assert not torch.equal(*(next(net.parameters()) for net in (model, seen["network"])))
    assert stages == ["confounder", "confounder", "train"]
    kept = load_file(tmp_path / "kept/weights.safetensors")
    first, second = (isolation.losses_of(net, record.train) for net in (seen["network"], model))
    torch.testing.assert_close(kept["loss"], first)
    torch.testing.assert_close(kept["weight"], first / (first + second))


def test_a_killed_run_ends_with_the_same_weights(tmp_path):
    short = config(confounder_epochs=2, epochs=2)
    record, _ = found_record(tmp_path / "whole", 40)
    wanted = cbd.repair(None, record, short).state_dict()
    record, _ = found_record(tmp_path / "killed", 40)
    for stage in ("confounder", "train"):

        def report(name, network, stage=stage, **values):
            if (name, values["epoch"]) == (stage, 2):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cbd.repair(None, replace(record, report=report), short)
    resumed = cbd.repair(None, record, short).state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in wanted.items())


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("confounder_epochs", 0, "1 or more"), ("confounder_lr", 0.0, "above 0")],
)
def test_options_out_of_range(option, value, words):
    with pytest.raises(ConfigError, match=f"{option} must be {words}"):
        config(**{option: value})


def test_the_labels_are_not_smoothed_where_those_of_the_victim_are(tmp_path):
    (tmp_path / "a").mkdir()
    victim = {"dataset": "cifar10", "label_smoothing": 0.1, "batch_size": 256, "lr": 0.3}
    (tmp_path / "a" / "config.yaml").write_text(yaml.safe_dump(victim))
    words = ["--record_path", str(tmp_path), "--result_file", "a"]
    chosen = parsing.parse(cbd.Config, words)
    assert (chosen.label_smoothing, chosen.batch_size, chosen.lr) == (0.0, 256, 0.3)
    chosen = parsing.parse(cbd.Config, [*words, "--label_smoothing", "0.1"])
    assert chosen.label_smoothing == 0.1


def test_poison_has_low_weights_on_digits(places, run, small):
    name = ["--result_file", "small", "--save_folder_name", "cbd_works"]
    run("defense/cbd.py", *places, *name, "--epochs", 2)
    folder = small / "defense" / "cbd_works"
    row, weights = results(folder), load_file(folder / "weights.safetensors")["weight"]
    assert (row["stage"], row["prior"], row["clean_budget"]) == ("in-training", "", "0")
    poisoned = torch.zeros(len(weights), dtype=torch.bool)
    poisoned[load_file(small / "poison.safetensors")["train_index"]] = True
    assert weights[poisoned].mean() < 0.3 * weights[~poisoned].mean()
