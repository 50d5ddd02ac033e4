"""MM-BD: a class that can be driven to an unusually large margin is the target of a backdoor.

Wang, Xiang, Miller, Kesidis, "MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary
Backdoor Pattern Types Using a Maximum Margin Statistic", IEEE S&P 2024 (arXiv 2205.06900). From
random images, the margin of every class over the others is maximised. It takes no data at all. The
statistic of a class is the largest margin; the score is by how much the largest one stands out.

    python detection/mm_bd.py --result_file badnet_cifar10

Deviates in the scale of the logits, which does not matter here; see docs/detection/mm_bd.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import ModelOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    holds_clean: ClassVar[bool] = False
    adds: ClassVar[dict[str, str]] = {
        "evidence.safetensors": "of every class the largest `margin`, and the `p_value` of the "
        "largest of them all"
    }

    starts: int = option(30, at_least=1, unit="images")
    """random images per class from which the margin is maximised"""
    steps: int = option(300, at_least=1)
    """most steps of the ascent"""
    step_size: float = option(0.01, above=0)
    """length of a step, for logits of standard deviation 1 on the random images"""
    settled: float = option(1e-5, at_least=0)
    """relative change of a class's summed margins below which its ascent ends"""
    significance: float = option(0.05, above=0, below=1)
    """p-value up to which the paper's own rule takes the model for backdoored"""


if __name__ == "__main__":
    launch(Config)

from functools import partial

import torch
from scipy import stats

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data.loader import Passes, batch_slices, clipped, gradient_batch
from antidote_bench.utils.detection.inspector import Finding
from antidote_bench.utils.detection.outliers import LEAST_CLASSES, outlyingness

TOGETHER = 10  # classes whose images are moved at once: bounds the memory


def score(model, record, config):
    classes, size = record.spec.classes, record.spec.size
    device = next(model.parameters()).device
    nothing = torch.zeros(classes, dtype=torch.float64)
    if classes < LEAST_CLASSES:
        return Finding(None, nothing, abstained=f"{classes} classes are too few for an outlier")
    generator = seeds.generator("mm_bd", config.random_seed)
    start = torch.rand(config.starts, 3, size, size, generator=generator).to(device)
    with torch.no_grad():
        scale = float(model(start).double().std())
    if not 0 < scale < float("inf"):
        return Finding(None, nothing, abstained="the logits of random images do not vary")
    largest = torch.cat(
        [
            largest_margins(model, part, start, scale, config)
            for part in torch.arange(classes, device=device).split(TOGETHER)
        ]
    )
    per_class = outlyingness(largest)
    top = int(largest.argmax())
    p_value = gamma_p_value(largest)
    evidence = {"margin": largest, "p_value": torch.tensor(p_value, dtype=torch.float64)}
    significant = p_value <= config.significance
    suspects = [top] if significant else []
    return Finding(
        float(per_class[top]), per_class, suspects, published=significant, evidence=evidence
    )


def largest_margins(model, labels, start, scale, config):
    """The largest margin that is reached for each of some `labels`, float64 k.

    A margin is the logit of the label over the largest other one, in units of `scale`. The images
    move freely, and the network sees them cut to [0, 1]. The ascent of a label ends when the sum of
    its margins settles.
    """
    images = start.repeat(len(labels), 1, 1, 1)  # k starts,3,S,S
    own = labels.repeat_interleave(len(start))
    moving = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    passes = Passes(gradient_batch(model, images, len(images)))
    before = None
    for _ in range(config.steps):
        value, slope = passes.run(partial(margins, model, images, own, scale))
        total = value.double().view(len(labels), -1).sum(1)
        if before is not None:
            moving &= (total - before).abs() > config.settled * before.abs()
        before = total
        if not moving.any():
            break
        step = config.step_size * moving.repeat_interleave(len(start)).view(-1, 1, 1, 1)
        images = images + step * slope
    reached, _ = passes.run(partial(margins, model, images, own, scale))
    return reached.double().view(len(labels), -1).max(1).values


def margins(model, images, labels, scale, size):
    """(margin n of each image, its gradient n,3,S,S), by passes of `size` images."""
    parts = []
    for part in batch_slices(len(images), size):
        shown = images[part].detach().requires_grad_()
        value = margin(model, shown, labels[part], scale)
        parts.append((value.detach(), *torch.autograd.grad(value.sum(), shown)))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def margin(model, images, labels, scale):
    """The logit of each image's label over its largest other logit, over `scale`; float n."""
    logits = model(clipped(images)) / scale
    own = logits.gather(1, labels[:, None]).squeeze(1)
    other = logits.scatter(1, labels[:, None], float("-inf")).max(1).values
    return own - other


def gamma_p_value(margins):
    """The probability that the largest of K margins is as large as it is, were it one of the rest.

    A gamma distribution is fitted to all but the largest; K - 1 further draws of it would have a
    maximum as large with this probability.
    """
    values = margins.cpu().sort().values.numpy()
    shape, place, width = stats.gamma.fit(values[:-1])
    below = stats.gamma.cdf(values[-1], shape, place, width)
    return float(1 - below ** (len(values) - 1))


def main(config):
    run.detect(__name__, config, score)
