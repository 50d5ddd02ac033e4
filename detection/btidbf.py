"""BTI-DBF: decouple the benign features, and train a generator that changes only the others.

Xu, Huang, Li, Qin, Ren, "Towards Reliable and Efficient Backdoor Trigger Inversion via Decoupling
Benign Features", ICLR 2024. A mask keeps the features that clean images need. A generator then
changes images so that the kept features stay and the others move. The score is the share of the
clean images of other classes that the changed images add to the most frequent answer.

    python detection/btidbf.py --result_file badnet_cifar10

Deviates in the generator and in units, and the score is our own; see docs/detection/btidbf.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import ModelOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    adds: ClassVar[dict[str, str]] = {
        "evidence.safetensors": "of every class the `share` of the images of other classes that it "
        "takes after the change, and `clean_share` before; the `entropy` of the answers after it, "
        "in nats, and the `mask` of the features (D)",
        "triggers.png": "some clean images, and what the generator makes of them",
    }

    mask_epochs: int = option(20, at_least=1)
    """epochs on the clean images in which the mask is learned"""
    mask_lr: float = option(0.01, above=0)
    """learning rate of the mask"""
    generator_epochs: int = option(30, at_least=1)
    """epochs on the clean images in which the generator is trained"""
    generator_lr: float = option(1e-3, above=0)
    """learning rate of the generator"""
    generator_width: int = option(16, at_least=1, unit="channels")
    """channels of the generator's first level"""
    search_batch: int = option(128, at_least=1, unit="images")
    """images per step of both"""
    image_bound: float = option(0.3, above=0)
    """mean squared change of the images, in units of their standard deviation, above which only it
    is made smaller"""
    feature_bound: float = option(5.0, above=0)
    """mean squared change of the kept features, in units of their mean square, above which only
    the change of the images is made smaller"""
    noise: float = option(0.03, at_least=0)
    """standard deviation of the noise on the images that the generator changes in the end"""


if __name__ == "__main__":
    launch(Config)

import torch

from antidote_bench.utils import run, seeds
from antidote_bench.utils.charts import preview
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.data.loader import batches, to_unit
from antidote_bench.utils.decoupling import search, split_head
from antidote_bench.utils.detection import soundness
from antidote_bench.utils.detection.inspector import Finding

SHOWN = 8  # images in triggers.png


def score(model, record, config):
    why = soundness.reason(model, record, config, least=2)
    if why:
        return soundness.abstained(record, why)
    split, classes = record.reference, record.spec.classes
    mask = search.learn_mask(model, split, config)
    generator = trained_generator(model, mask, record, config)
    changed, before, after = answers(model, generator, split, config)
    save_images(record, split, changed, before, after)
    share, clean_share = (
        split_head.shares_of_others(said, split.labels, classes) for said in (after, before)
    )
    all_shares = after.bincount(minlength=classes).double() / len(after)
    evidence = {
        "share": share,
        "clean_share": clean_share,
        "entropy": torch.special.entr(all_shares).sum(),
        "mask": mask,
    }
    per_class = share - clean_share
    return Finding(float(per_class.max()), per_class, evidence=evidence)


def trained_generator(model, mask, record, config):
    """The generator that moves the features outside the mask and little else."""
    split, device = record.reference, record.reference.labels.device
    generator, optimizer = search.new_generator(config, device)
    deviation = torch.tensor(record.spec.std, device=device).view(3, 1, 1)

    def loss(images):
        return search.generator_loss(model, generator, images, mask, deviation, config)

    path = record.state / "generator.safetensors"
    search.train_generator(
        generator, optimizer, split, loss, config, epochs=config.generator_epochs, path=path
    )
    return generator.eval()


@torch.no_grad()
def answers(model, generator, split, config):
    """(some changed images, the first ones, classes n of the images and of the changed ones)."""
    draws = seeds.generator("btidbf noise", config.random_seed)
    parts = []
    for images, _, _ in batches(split, config.search_batch):
        changed = search.changed_images(generator, images, config.noise, draws)
        parts.append((changed[:SHOWN], model(images).argmax(1), model(changed).argmax(1)))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def save_images(record, split, changed, before, after):
    shown = slice(min(SHOWN, len(split)))
    new = (changed[shown] * 255).round().to(torch.uint8)
    old = (to_unit(split.images[shown]) * 255).round().to(torch.uint8)
    pair = (
        Split(old, before[shown], split.truth[shown]),
        Split(new, after[shown], split.truth[shown]),
    )
    record.keep("triggers.png", preview(*pair, ("clean", "changed"), record.spec.class_names))


def main(config):
    run.detect(__name__, config, score)
