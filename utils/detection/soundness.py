"""Why a detector of models cannot judge a model: it would find nonsense, and should say so."""

import torch

from antidote_bench.utils import seeds
from antidote_bench.utils.data.loader import forward_all
from antidote_bench.utils.detection.inspector import Finding
from antidote_bench.utils.detection.outliers import LEAST_CLASSES

RANDOM = 64  # images that a method without data looks at


def reason(model, record, config, *, least=LEAST_CLASSES):
    """A sentence that says why `model` cannot be judged, or "".

    It has fewer than `least` classes, or its logits of the clean images are not finite, or the same
    for all of them. A record without clean images is looked at with random ones.
    """
    classes = record.spec.classes
    if classes < least:
        return f"{classes} classes are too few: the method compares at least {least}"
    if len(record.reference) == 1:
        return "one clean image is too few"
    logits = _logits(model, record, config)
    if not logits.isfinite().all():
        return "the logits are not finite numbers"
    if not (logits.std(0) > 0).any():
        return "the logits are the same for every image"
    return ""


def _logits(model, record, config):
    if len(record.reference):
        return forward_all(
            model, record.reference, lambda images, *_: model(images).double(), config.precision
        )
    size, device = record.spec.size, next(model.parameters()).device
    images = torch.rand(RANDOM, 3, size, size, generator=seeds.generator("random images", 0))
    with torch.no_grad():
        return model(images.to(device)).double()


def abstained(record, why):
    """The `Finding` of a method that does not judge the model."""
    return Finding(None, torch.zeros(record.spec.classes, dtype=torch.float64), abstained=why)
