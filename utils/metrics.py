"""ACC, ASR and RA, as fractions, and DER, which joins them."""

from typing import NamedTuple

from utils.batch import look
from utils.data import Split


class Exam(NamedTuple):
    """What a model is judged on: the clean test set, and the triggered one with the attacker's labels."""

    test: Split
    backdoor: Split
    target: Split | None = None  # the pictures of the target class with the trigger: in no ASR but that of some papers


def predict(model, split, precision="fp32"):
    """Predicted classes (int64 N) of every image of `split`, in order; leaves the model as it was."""
    if not len(split):
        return split.labels
    return look(model, split, lambda images, *_: model(images).argmax(1), precision)


def evaluate(model, exam, precision="fp32"):
    """{acc, asr, ra}: shares of clean images classified right, and of triggered images given the attacker's label and
    their true one. asr and ra are None where no test image can be triggered."""
    clean, triggered = predict(model, exam.test, precision), predict(model, exam.backdoor, precision)
    return {
        "acc": _share(clean == exam.test.truth),
        "asr": _share(triggered == exam.backdoor.labels),
        "ra": _share(triggered == exam.backdoor.truth),
    }


def asr_of_all(asr, model, exam, precision="fp32"):
    """The ASR over all triggered test pictures, those of the target class included, as some papers count it (AWM's for one).

    `asr` is the ordinary one of the same model, which need not be measured again; None where the record keeps no such pictures.
    """
    if asr is None or exam.target is None:
        return None
    hits = int((predict(model, exam.target, precision) == exam.target.labels).sum())
    return (asr * len(exam.backdoor) + hits) / (len(exam.backdoor) + len(exam.target))


def defense_effectiveness(before, after):
    """DER in [0, 1]: 0.5 where nothing changed, 1 where ASR fell from 1 to 0 at no cost in ACC; None without an ASR.

    Zhu et al., "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization", ICCV 2023.
    """
    if before["asr"] is None or after["asr"] is None:
        return None
    return (max(0, before["asr"] - after["asr"]) - max(0, before["acc"] - after["acc"]) + 1) / 2


def _share(hits):
    return hits.double().mean().item() if len(hits) else None
