"""FMP: prune the feature maps whose adversarial perturbation costs most accuracy, then fine-tune.

Huang, Bu, "Adversarial Feature Map Pruning for Backdoor", ICLR 2024 (arXiv 2307.11565). Each
feature map of each convolution is perturbed by one FGSM step on the input. The maps whose
perturbation costs the network most accuracy are taken for the backdoor's and are pruned.

    python defense/fmp.py --result_file badnet_cifar10

Follows the paper where the released code deviates (`--variant released`): see docs/defenses/fmp.md.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import FineTuningOptions

USUAL = {"alpha": 1 / 255, "epsilon": 1 / 255, "scored_images": 128}
FMT = {"alpha": 0.02, "epsilon": 0.06, "scored_images": 1024}  # as published for CIFAR-10


@dataclass(frozen=True, kw_only=True)
class Config(FineTuningOptions):
    adds: ClassVar[dict[str, str]] = {
        "scores.safetensors": "by convolution `accuracy` and `loss` (steps, maps), `rank` (maps; 0 "
        "is pruned first) and `pruned` (maps); with `--variant random` only `pruned`, with "
        "`no_pruning` no file",
        "scores.png": "an image of the scores, pruned maps in red",
    }

    variant: Literal["released", "fmt", "random", "no_pruning"] | None = None
    """which maps are pruned: released: as the released code does it, with all deviations below;
    fmt: by k-means; random: as many of each convolution, but drawn at random; no_pruning: none,
    which leaves the fine-tuning"""
    epochs: int = 10
    """epochs of fine-tuning on the clean images after pruning"""
    batch_size: int = 256
    """images per step of fine-tuning"""
    lr_min: float = 1e-4
    """learning rate that the cosine falls to"""
    weight_decay: float = 0.0
    """L2 penalty on all weights while fine-tuning"""
    p: int = option(64, at_least=1)
    """prune floor(C / p) of a convolution's C maps"""
    min_prune: int = option(0, at_least=0)
    """prune at least so many maps of each convolution, but never all, where C / p is less"""
    prune_norm: bool = True
    """prune the batch norm behind a pruned filter too, where it normalises nothing else"""
    alpha: float | None = option(None, at_least=0, at_most=1)
    """size of the random start, in [0, 1] pixels: 1/255, for fmt 0.02 (there the size of its steps,
    too)"""
    epsilon: float | None = option(None, at_least=0, at_most=1)
    """size of the FGSM step, in [0, 1] pixels: 1/255, for fmt 0.06 (there the largest change)"""
    scored_images: int | None = option(None, at_least=1, unit="images")
    """clean images to score on: 128, for fmt 1024; never fewer than one per class, never more than
    there are"""
    score_batch: int = option(1024, identity=False, at_least=1, unit="images")
    """images per scoring pass, shared by several maps, and fewer of them where images are large;
    changes speed and memory only"""
    double_norm: bool | None = None
    """released: normalise twice, and step and clamp to [0, 1] in the space between"""
    alias_sum: bool | None = None
    """released: where a convolution's output is summed with a shortcut, score the sum"""
    exec_order: bool | None = None
    """released: give the ranks collected in order of execution to the layers in order of
    definition"""
    argsort: bool | None = None
    """released: rank by accuracy alone with an unstable sort"""
    few_images: bool | None = None
    """released: score on 32 clean images of any class"""
    score_aug: bool | None = None
    """released: augment the scored images"""
    zero_init: bool | None = None
    """released: set filters to zero once, let them grow again, and leave biases"""
    bn_last_conv: bool | None = None
    """released: prune the scale of every batch norm by the list of the convolution defined before
    it"""

    def setting(self, name):
        """The value of alpha, epsilon or scored_images: the given one, or the variant's."""
        given = getattr(self, name)
        return given if given is not None else (FMT if self.variant == "fmt" else USUAL)[name]

    def as_released(self, name):
        """Whether the run copies the deviation `name` of the released code."""
        given = getattr(self, name)
        return given if given is not None else self.variant == "released"


if __name__ == "__main__":
    launch(Config)

import sys
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from tqdm import tqdm

from antidote_bench.utils import run, seeds
from antidote_bench.utils.charts import score_chart
from antidote_bench.utils.data.dataset import balanced_subset
from antidote_bench.utils.data.loader import (
    augmentation,
    batch_slices,
    evaluating,
    gradient_batch,
    halving,
    to_unit,
)
from antidote_bench.utils.device import exact
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.repair import fmp_released as released
from antidote_bench.utils.repair.layers import (
    convolutions,
    feature_maps,
    frozen,
    make_pruner,
    parameters_of,
    require_convolutions,
)
from antidote_bench.utils.train import Recipe, fit


def check(model, record, config):
    if config.variant != "no_pruning":
        require_convolutions(model, record, config)
        if config.as_released("alias_sum") and config.variant != "random":
            released.block_sums(model, to_unit(record.clean.images[:1]))


def repair(model, record, config):
    to_prune = choose_maps(model, record, config)
    prune = make_pruner(parameters_to_prune(model, to_prune, config))
    prune()
    record.report("pruned", model)
    return fit(
        model,
        record.clean,
        Recipe.of(config),
        augment=augmentation(record.spec),
        after_step=None if config.as_released("zero_init") else prune,  # pruned maps stay pruned
        on_epoch=partial(record.report, "finetune"),
        checkpoint=record.state / "finetune.safetensors",
    )


def choose_maps(model, record, config):
    """{convolution: channels to prune}; the choice and its reasons are saved beside the repair."""
    if config.variant == "no_pruning":
        return {}
    sizes = {name: layer.out_channels for name, layer in convolutions(model).items()}
    if not sizes:
        raise ConfigError("fmp does not apply: the model has no convolution; ft needs none")
    counts = {
        name: max(size // config.p, min(config.min_prune, size - 1)) for name, size in sizes.items()
    }
    if config.variant == "random":
        to_prune, scores = random_maps(sizes, counts, config.random_seed), {}
    else:
        to_prune, scores = worst_maps(model, record, counts, config)
    save_choice(record, sizes, to_prune, scores)
    return to_prune


def random_maps(sizes, counts, seed):
    """{convolution: sorted channels}: `counts` of the channels of every convolution, at random."""
    generator = seeds.generator("fmp random", seed)
    return {
        name: sorted(torch.randperm(sizes[name], generator=generator)[:count].tolist())
        for name, count in counts.items()
    }


def worst_maps(model, record, counts, config):
    """({convolution: sorted channels}, the scores that chose them: tensors by name)."""
    images, labels = images_to_score(record, config)
    scores = score_maps(
        model,
        images,
        labels,
        alpha=config.setting("alpha"),
        epsilon=config.setting("epsilon"),
        seed=config.data_seed,
        batch=config.score_batch,
        steps=fmt_steps if config.variant == "fmt" else fmp_step,
        read_maps=released.block_sums if config.as_released("alias_sum") else feature_maps,
    )
    tensors = {}
    for name, (accuracy, loss) in scores.items():
        tensors[f"{name}/accuracy"] = torch.from_numpy(accuracy)
        tensors[f"{name}/loss"] = torch.from_numpy(loss)
    if config.variant == "fmt":
        to_prune = by_clusters(scores)
    else:
        rank = released.by_accuracy_alone if config.as_released("argsort") else ranking
        orders = {name: rank(accuracy[0], loss[0]) for name, (accuracy, loss) in scores.items()}
        for name, order in orders.items():
            tensors[f"{name}/rank"] = torch.from_numpy(np.argsort(order))
        choose = released.by_misplaced_ranks if config.as_released("exec_order") else by_rank
        to_prune = choose(orders, counts)
    means = {name: (scores[name][0].mean(0), channels) for name, channels in to_prune.items()}
    record.keep("scores.png", score_chart(means))
    return to_prune, tensors


def images_to_score(record, config):
    """(images n,3,S,S in [0, 1], labels n): clean images, as many of every class."""
    clean, spec, seed = record.clean, record.spec, config.data_seed
    if config.as_released("few_images"):
        index = released.any_images(len(clean), seed)
    else:
        count = max(config.setting("scored_images"), spec.classes)
        index = balanced_subset(clean.truth, count, seed)
    index = index.to(clean.labels.device)
    images, labels = clean.images[index], clean.truth[index]
    if config.as_released("score_aug"):
        images = released.augmented(images, spec, seed)
    images = to_unit(images)
    if config.as_released("double_norm"):
        images = released.normalised(images, spec)
    return images, labels


def score_maps(
    model, images, labels, *, alpha, epsilon, seed, batch, steps, read_maps=feature_maps
):
    """{convolution: (accuracy, cross-entropy)} on images perturbed for one map; float64 arrays J,C.

    The images N,3,S,S start at a random point, alpha away from them in every pixel. J counts the
    images that `steps(images, start, sign, alpha, epsilon)` makes of each. `read_maps(model,
    images)` says what the maps of a convolution are. Runs in the images' precision and leaves the
    model as it was.

    The maps of a convolution share passes: the images are copied once for each map of a chunk.
    Copies do not influence each other in evaluation mode, so that one backward pass serves the
    whole chunk, and one forward pass each of its J steps. Large images are scored part by part.
    """
    signs = torch.randint(0, 2, images.shape, generator=seeds.generator("fmp start", seed)) * 2 - 1
    start = (images + alpha * signs.to(images)).clamp(0, 1)
    together, at_once = pass_sizes(model, images, batch)

    def score_all(size):
        total, parts = {}, batch_slices(len(images), min(together, size))
        for number, part in enumerate(parts, start=1):
            step = partial(steps, images[part], start[part].clone(), alpha=alpha, epsilon=epsilon)
            title = f"scoring, part {number} of {len(parts)}" if len(parts) > 1 else "scoring"
            given = images[part], start[part], labels[part]
            for name, sums in score_part(model, *given, step, read_maps, size, title).items():
                total[name] = total.get(name, 0) + sums
        return total

    with evaluating(model), exact(), frozen(model):
        total = halving(score_all, at_once)
        return {
            name: tuple((sums / len(images)).double().cpu().numpy()) for name, sums in total.items()
        }


def pass_sizes(model, images, batch):
    """(images that are scored together, images in a scoring pass, copies included).

    The feature maps of the first are in memory twice, once with all that their gradient needs.
    Small images are scored all together, in passes of `batch`.
    """
    together = max(1, gradient_batch(model, images, 2 * len(images)) // 2)
    return together, batch if together == len(images) else gradient_batch(model, images, batch)


def score_part(model, images, start, labels, step, read_maps, at_once, title):
    """{convolution: hits and cross-entropy, 2,J,C, summed over the images}.

    A pass has `at_once` images, copies included, or all images once.
    """
    scores, start = {}, start.detach().clone()
    with torch.no_grad():
        clean = read_maps(model, images)
    perturbed = read_maps(model, start.requires_grad_())
    total = sum(maps.shape[1] for maps in clean.values())
    with tqdm(total=total, desc=title, unit=" maps", disable=None) as bar:
        for name, maps in perturbed.items():
            # the gradient of sum (f(z) - f(x))^2 by the maps f(z), at z = the start
            slope = 2 * (maps.detach() - clean[name])
            channels, parts = torch.arange(maps.shape[1], device=images.device), []
            for chunk in channels.split(max(1, at_once // len(images))):
                parts.append(score_chunk(model, maps, slope, chunk, start, labels, step))
                bar.update(len(chunk))
            scores[name] = torch.cat(parts, 2)
    return scores


def score_chunk(model, maps, slope, chunk, start, labels, step):
    """Hits and cross-entropy, 2,J,k, summed over the images after steps that move each of the k
    maps by itself.

    `slope` is the gradient of the maps' distance by the maps N,C,h,w, `chunk` the k channels.
    """
    count = len(chunk)
    cotangent = torch.zeros(count, *maps.shape, dtype=maps.dtype, device=maps.device)
    each = torch.arange(count, device=maps.device)
    cotangent[each, :, chunk] = slope[:, chunk].transpose(0, 1)
    (gradient,) = torch.autograd.grad(
        maps, start, cotangent, retain_graph=True, is_grads_batched=True
    )
    targets, scores = labels.repeat(count), []
    with torch.inference_mode():
        for attacked in step(gradient.sign()):  # k,N,3,S,S
            logits = model(attacked.flatten(0, 1).contiguous(memory_format=torch.channels_last))
            correct = (logits.argmax(1) == targets).to(logits.dtype)
            losses = F.cross_entropy(logits, targets, reduction="none")
            scores.append(torch.stack([correct, losses]).view(2, count, -1).sum(2))
        return torch.stack(scores, 1)


def fmp_step(images, start, sign, *, alpha, epsilon):
    """One step from the start."""
    return [(start + epsilon * sign).clamp(0, 1)]


def ranking(accuracy, loss):
    """Channels in the order of pruning: lowest accuracy, then highest loss (to 1e-6), then lowest
    channel."""
    return np.lexsort((np.arange(len(accuracy)), -np.round(loss, 6), accuracy))


def by_rank(orders, counts):
    """{convolution: sorted channels}: the first `counts` channels of each convolution's order."""
    return {
        name: sorted(orders[name][:count].tolist())
        for name, count in counts.items()
        if name in orders
    }


def save_choice(record, sizes, to_prune, scores):
    """Save the scores and the pruned channels, and print how many there are."""
    pruned = {
        f"{name}/pruned": torch.tensor([channel in channels for channel in range(sizes[name])])
        for name, channels in to_prune.items()
    }
    record.keep("scores.safetensors", {**scores, **pruned})
    spared = sum(size for name, size in sizes.items() if not to_prune.get(name))
    print(
        f"pruning {sum(map(len, to_prune.values()))} of {sum(sizes.values())} maps; {spared} are "
        "in convolutions that lose none",
        file=sys.stderr,
    )


def parameters_to_prune(model, to_prune, config):
    """[(parameter, channels)]: filters, biases and, where it is asked for, batch norms."""
    by_last_convolution = config.as_released("bn_last_conv")
    parameters = parameters_of(
        model,
        to_prune,
        norms=config.prune_norm and not by_last_convolution,
        biases=not config.as_released("zero_init"),
    )
    if by_last_convolution:
        parameters += released.scales_by_last_convolution(model, to_prune)
    return parameters


# The authors' older method, FMT


def fmt_steps(images, start, sign, *, alpha, epsilon):
    """Two steps of alpha in the same direction, both within epsilon of the image."""
    return [
        (images + (start + number * alpha * sign - images).clamp(-epsilon, epsilon)).clamp(0, 1)
        for number in (1, 2)
    ]


def by_clusters(scores):
    """{convolution: sorted channels}: the smaller of two k-means clusters of its points (a1, a2).

    Of two equally large clusters it is the one with the lower mean. No channel of a convolution is
    taken where all its points are equal.
    """
    to_prune = {}
    for name, (accuracy, _) in scores.items():
        points = accuracy.T
        if (points == points[0]).all():
            to_prune[name] = []
            continue
        cluster = KMeans(2, n_init=10, random_state=0).fit_predict(points)
        sizes = [((cluster == number).sum(), points[cluster == number].mean()) for number in (0, 1)]
        to_prune[name] = np.flatnonzero(cluster == sizes.index(min(sizes))).tolist()
    return to_prune


def main(config):
    run.defend(__name__, config, repair, check=check)
