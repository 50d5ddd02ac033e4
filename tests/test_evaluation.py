"""ACC, ASR, RA and DER on cases made by hand."""

import pytest
import torch
from torch import nn

from antidote_bench.utils import evaluation
from antidote_bench.utils.data import loader
from antidote_bench.utils.data.dataset import Split


class Reader(nn.Module):
    """Answers the class written in the first pixel's red value."""

    def forward(self, images):
        return torch.eye(10)[(images[:, 0, 0, 0] * 255).round().long()]


def shown(answers, labels, truth):
    images = torch.zeros(len(answers), 3, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(answers, dtype=torch.uint8)
    return Split(images, torch.tensor(labels), torch.tensor(truth))


def test_hand_made_case():
    # two to the target, two to the truth, one elsewhere
    test_sets = evaluation.TestSets(
        test=shown([1, 2, 3, 0], [1, 2, 3, 3], [1, 2, 3, 3]),  # three of four right
        backdoor=shown([0, 0, 2, 7, 5], [0] * 5, [1, 2, 2, 3, 5]),
    )
    found = evaluation.evaluate(Reader(), test_sets)
    assert found == {"acc": 0.75, "asr": 0.4, "ra": 0.4}
    assert evaluation.asr_of_all(found["asr"], Reader(), test_sets) is None
    target = shown([0, 0, 4], [0] * 3, [0] * 3)  # the model sees two of three as what they are
    assert evaluation.asr_of_all(
        found["asr"], Reader(), test_sets._replace(target=target)
    ) == pytest.approx((2 + 2) / (5 + 3))


def test_nothing_to_trigger():
    empty = Split(
        torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(0).long(), torch.zeros(0).long()
    )
    assert evaluation.evaluate(Reader(), evaluation.TestSets(shown([1], [1], [1]), empty)) == {
        "acc": 1.0,
        "asr": None,
        "ra": None,
    }


def test_asr_and_ra_share_their_images():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        answers, truth = (
            torch.randint(0, 10, (50,), generator=generator).tolist() for _ in range(2)
        )
        labels = [(value + 1) % 10 for value in truth]
        found = evaluation.evaluate(
            Reader(),
            evaluation.TestSets(shown(answers, truth, truth), shown(answers, labels, truth)),
        )
        assert found["asr"] + found["ra"] <= 1


def test_predict_is_in_order_and_leaves_the_mode(monkeypatch):
    monkeypatch.setattr(loader, "EVALUATION_BATCH", 3)
    model = Reader().train()
    answers = [4, 2, 9, 0, 1, 1, 7]
    assert evaluation.predict(model, shown(answers, answers, answers)).tolist() == answers
    assert model.training


def test_der_of_the_published_example():
    before, after = {"acc": 0.9132, "asr": 0.9503}, {"acc": 0.8996, "asr": 0.0148}
    assert evaluation.defense_effectiveness(before, after) == pytest.approx(0.961, abs=5e-4)
    assert evaluation.defense_effectiveness(before, before) == 0.5
    # gains do not count
    assert (
        evaluation.defense_effectiveness({"acc": 0.5, "asr": 0.0}, {"acc": 1.0, "asr": 0.5}) == 0.5
    )
    assert (
        evaluation.defense_effectiveness({"acc": 1.0, "asr": None}, {"acc": 1.0, "asr": None})
        is None
    )
