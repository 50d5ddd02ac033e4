"""Why a model from elsewhere may do badly here: other constants before it, or another order of
classes."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from antidote_bench.models.normalize import Normalize
from antidote_bench.utils.evaluation import predict

# (mean, std) that networks are often trained with, in pixels of [0, 1]
USUAL = (
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet
    ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),  # CIFAR-10
    ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201)),  # CIFAR-10, per image and then averaged
    ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),  # pixels of 0 to 255
)
SAMPLE = 200  # test images that other constants are tried on
LOW_ASR = 0.2
GAIN = 0.1  # by which the ACC must rise
CHANCES = 3  # an ACC below so many times chance is near it, with few classes half way to 1
MATCHED = 0.5  # ACC under the best order of classes that speaks for another order
SHOWN = 5  # classes in a message


def hints(model, data, measured, precision, benign):
    """Sentences for the user of a `model` that reaches `measured`, {acc, asr, ra}, on `data`; none
    where nothing is odd.

    The model is normalize and network in a row. It is asked again behind the usual constants, and
    its answers are held against the labels in the order that fits them best.
    """
    found = _about_accuracy(model, data, measured["acc"], precision)
    if not benign and measured["asr"] is not None and measured["asr"] < LOW_ASR:
        found += [
            f"the ASR is {100 * measured['asr']:.1f} %: this may not be the trigger or the target "
            "that the model has learned; what an attack draws at random is drawn anew here"
        ]
    return found


def _about_accuracy(model, data, acc, precision):
    spec, test = data.spec, data.test
    few = test[torch.arange(0, len(test), max(len(test) // SAMPLE, 1), device=test.labels.device)]
    own = _share(predict(model, few, precision), few)
    tried = [(_with(model, few, *constants, precision), constants) for constants in USUAL]
    best, (mean, std) = max(tried, key=lambda pair: pair[0])
    chance = 1 / spec.classes
    is_low = acc < min(CHANCES * chance, (1 + chance) / 2)
    matched, order = _other_order(model, test, spec, precision) if is_low else (0, "")
    names = ", ".join(spec.class_names[:SHOWN]) + ", ..." * (spec.classes > SHOWN)
    if matched >= max(MATCHED, 2 * acc, best):
        return [
            f"the ACC is {100 * acc:.1f} %, and would be {100 * matched:.1f} % if {order}: the "
            f"model numbers the classes in another order than {names}, which is the one here"
        ]
    if best > own + GAIN:
        mean, std = (",".join(f"{value:.6g}" for value in values) for values in (mean, std))
        return [
            f"other constants fit this model better: on {len(few)} test images it reaches "
            f"{100 * best:.0f} % with --mean {mean} --std {std}, and {100 * own:.0f} % as it was "
            "imported"
        ]
    if not is_low:
        return []
    return [
        f"the ACC of {100 * acc:.1f} % is near chance: the model may expect other constants "
        "(--mean, --std), another order of the classes (here "
        f"{names}), another size of images (here {spec.size} pixels), or be another network than "
        "--model says"
    ]


def _with(model, split, mean, std, precision):
    """ACC of the network behind other constants."""
    other = nn.Sequential(Normalize(mean, std).to(split.labels.device), model.network)
    return _share(predict(other, split, precision), split)


def _share(predicted, split):
    return (predicted == split.truth).double().mean().item()


def _other_order(model, test, spec, precision):
    """(ACC in the order of classes that fits the model best, words for that order)"""
    predicted = predict(model, test, precision)
    counts = torch.bincount(test.truth * spec.classes + predicted, minlength=spec.classes**2)
    counts = counts.view(spec.classes, spec.classes)
    truth, answer = linear_sum_assignment(-counts.cpu().numpy())
    matched = counts[truth, answer].sum().item() / len(test)
    pairs = sorted((its, here) for here, its in zip(truth, answer, strict=True) if its != here)
    words = [f"its {its} is the {here} ({spec.class_names[here]}) here" for its, here in pairs]
    return matched, ", ".join(words[:3]) + ", ..." * (len(words) > 3)
