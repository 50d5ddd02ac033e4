"""FMP: prune the feature maps whose adversarial perturbation costs most accuracy, then fine-tune.

Huang, Bu, "Adversarial Feature Map Pruning for Backdoor", ICLR 2024 (arXiv 2307.11565). Every feature map of every
convolution in turn is pushed away from its clean values by one FGSM step on the input; the maps whose step makes the
model fail most are taken for the backdoor's.

    python defense/fmp.py --result_file badnet_cifar10                       # 5 % clean pictures, as every defense here
    python defense/fmp.py --result_file badnet_cifar10 --variant random      # a control: as many maps, but any
    python defense/fmp.py --result_file badnet_cifar10 --variant released    # with what the authors' code does otherwise

Where the paper and the released code are silent or differ, this is the plain reading: pixels in [0, 1] and normalised
once; raw convolution outputs; a layer is pruned by its own ranks; pruned filters stay zero; scored without
augmentation. The step size 1/255 and the 128 scored pictures are our choice: the authors published neither.

`--variant released` switches on, each with a flag of its own, what the authors' code does otherwise. One thing cannot
be had: after every epoch that code runs the test set through the network in training mode, so that its batch norms end
with the statistics of test pictures. A defense here never holds a test picture; figures made so cannot be repeated exactly.
`--variant fmt` is the authors' older method: two larger steps, and k-means on the two accuracies of a layer's maps.
"""

from dataclasses import dataclass
from typing import Literal

from utils.config import FineTuning, require
from utils.launch import launch

USUAL = {"alpha": 1 / 255, "epsilon": 1 / 255, "scored_images": 128}
FMT = {"alpha": 0.02, "epsilon": 0.06, "scored_images": 1024}  # as published for CIFAR-10


@dataclass(frozen=True, kw_only=True)
class Config(FineTuning):
    variant: Literal["released", "fmt", "random", "no_pruning"] | None = None
    """which maps go: released: ranked with the deviations below; fmt: by k-means; random: as many of each layer, but
    any; no_pruning: none, which leaves the fine-tuning"""
    epochs: int = 10
    """passes over the clean pictures after pruning"""
    batch_size: int = 256
    """images per step of fine-tuning"""
    lr_min: float = 1e-4
    """learning rate that the cosine falls to"""
    weight_decay: float = 0.0
    """L2 penalty on all weights while fine-tuning"""
    p: int = 64
    """prune floor(C / p) of a convolution's C maps"""
    min_prune: int = 0
    """prune at least so many maps of each convolution, but never all, where C / p is less"""
    prune_norm: bool = True
    """prune the batch norm behind a pruned filter too, where it normalises nothing else"""
    alpha: float | None = None
    """size of the random start, in [0, 1] pixels: 1/255, for fmt 0.02 (there the size of its steps, too)"""
    epsilon: float | None = None
    """size of the FGSM step, in [0, 1] pixels: 1/255, for fmt 0.06 (there the largest change)"""
    scored_images: int | None = None
    """clean pictures to score on: 128, for fmt 1024; never fewer than one per class, never more than there are"""
    score_batch: int = 1024
    """pictures per scoring pass, shared by several maps; changes speed and memory only"""
    double_norm: bool | None = None
    """released: normalise twice, and step and clamp to [0, 1] in the space between"""
    alias_sum: bool | None = None
    """released: where a convolution's output is summed with a shortcut, score the sum"""
    exec_order: bool | None = None
    """released: give the ranks collected in order of execution to the layers in order of definition"""
    argsort: bool | None = None
    """released: rank by accuracy alone with an unstable sort"""
    few_images: bool | None = None
    """released: score on 32 clean pictures of any class"""
    score_aug: bool | None = None
    """released: augment the scored pictures"""
    zero_init: bool | None = None
    """released: set filters to zero once, let them grow again, and leave biases"""
    bn_last_conv: bool | None = None
    """released: prune the scale of every batch norm by the list of the convolution defined before it"""

    def __post_init__(self):
        super().__post_init__()
        require(self.p >= 1 and self.min_prune >= 0, "p and min_prune", "1 or more, and 0 or more")
        require(0 <= self.setting("alpha") <= 1 and 0 <= self.setting("epsilon") <= 1, "alpha and epsilon", "0 to 1")
        require(self.setting("scored_images") >= 1 and self.score_batch >= 1, "scored_images and score_batch", "1 or more")

    def setting(self, name):
        """alpha, epsilon or scored_images, as given or as the variant has it."""
        given = getattr(self, name)
        return given if given is not None else (FMT if self.variant == "fmt" else USUAL)[name]

    def quirk(self, name):
        """Whether to copy a deviation of the released code."""
        return self.variant == "released" if getattr(self, name) is None else getattr(self, name)


if __name__ == "__main__":
    launch(Config)

import operator
import sys
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import nn
from tqdm import tqdm

from models import Normalize
from utils import run, seeds
from utils.batch import augmentation, to_unit
from utils.channels import convolutions, feature_maps, frozen, parameters_of, zeroing
from utils.data import balanced_subset
from utils.device import exact
from utils.errors import ConfigError
from utils.preview import score_chart
from utils.train import fit


def repair(model, record, config):
    doomed = choose_maps(model, record, config)
    entries = parameters_of(
        model, doomed, norms=config.prune_norm and not config.quirk("bn_last_conv"), biases=not config.quirk("zero_init")
    )
    if config.quirk("bn_last_conv"):
        entries += norms_by_last_convolution(model, doomed)
    prune = zeroing(entries)
    prune()
    record.report("pruned", model)
    return fit(model, record.clean, config, augment=augmentation(record.spec), after_step=None if config.quirk("zero_init") else prune,
               on_epoch=partial(record.report, "finetune"), checkpoint=record.state / "finetune.safetensors")  # fmt: skip


def choose_maps(model, record, config):
    """{convolution: channels to prune}; they, the scores behind them and a picture go to the defense's folder."""
    if config.variant == "no_pruning":
        return {}
    layers = {name: layer.out_channels for name, layer in convolutions(model).items()}
    if not layers:
        raise ConfigError("fmp does not apply: the model has no convolution")
    counts = {name: max(maps // config.p, min(config.min_prune, maps - 1)) for name, maps in layers.items()}
    if config.variant == "random":
        doomed, kept = any_maps(layers, counts, config.random_seed), {}
    else:
        doomed, kept = worst_maps(model, record, counts, config)
    pruned = {f"{name}/pruned": torch.tensor([channel in channels for channel in range(layers[name])]) for name, channels in doomed.items()}
    record.keep("scores.safetensors", {**kept, **pruned})
    spared = sum(maps for name, maps in layers.items() if not doomed.get(name))
    print(f"pruning {sum(map(len, doomed.values()))} of {sum(layers.values())} maps; {spared} are in convolutions that lose none",
          file=sys.stderr)  # fmt: skip
    return doomed


def any_maps(layers, counts, seed):
    """{convolution: sorted channels}: `counts` of every layer, drawn at random."""
    generator = seeds.generator("fmp random", seed)
    return {name: sorted(torch.randperm(layers[name], generator=generator)[:count].tolist()) for name, count in counts.items()}


def worst_maps(model, record, counts, config):
    """({convolution: sorted channels}, the scores that chose them as tensors by name)."""
    images, labels = scored_pictures(record, config)
    scores = score_maps(model, images, labels, alpha=config.setting("alpha"), epsilon=config.setting("epsilon"), seed=config.data_seed,
                        batch=config.score_batch, steps=fmt_steps if config.variant == "fmt" else fmp_step,
                        maps=block_sums if config.quirk("alias_sum") else feature_maps)  # fmt: skip
    kept = {f"{name}/{what}": torch.from_numpy(values) for name, pair in scores.items()
            for what, values in zip(("accuracy", "loss"), pair, strict=True)}  # fmt: skip
    if config.variant == "fmt":
        doomed = by_clusters(scores)
    else:
        orders = rankings(scores, config)
        kept |= {f"{name}/rank": torch.from_numpy(np.argsort(order)) for name, order in orders.items()}
        doomed = by_rank(orders, counts, config)
    record.keep("scores.png", score_chart({name: (scores[name][0].mean(0), channels) for name, channels in doomed.items()}))
    return doomed, kept


def scored_pictures(record, config):
    """(images n,3,S,S in [0, 1], labels) to score on: as many of every class, unless the released code is to be copied."""
    clean, device = record.clean, record.clean.labels.device
    if config.quirk("few_images"):
        index = torch.randperm(len(clean), generator=seeds.generator("fmp images", config.data_seed))[:32]
    else:
        index = balanced_subset(clean.truth, max(config.setting("scored_images"), record.spec.classes), config.data_seed)
    images, labels = clean.images[index.to(device)], clean.truth[index.to(device)]
    if config.quirk("score_aug"):
        images = augmentation(record.spec)(images, seeds.generator("fmp augmentation", config.data_seed, device=device))
    images = to_unit(images)
    return Normalize(record.spec.mean, record.spec.std).to(device)(images) if config.quirk("double_norm") else images, labels


def score_maps(model, images, labels, *, alpha, epsilon, seed, batch, steps, maps=feature_maps):
    """{convolution: (accuracy, cross-entropy)} on images N,3,S,S perturbed for one map at a time; float64 arrays J,C.

    J counts the pictures that `steps(images, start, sign, alpha, epsilon)` makes of each. The maps of a layer share
    passes: the images are copied once per map of a chunk, and since the copies do not influence each other in eval
    mode, one backward serves the whole chunk, and one forward each of its J steps. `maps(model, images)` says what a
    layer's maps are. Runs in the images' precision and leaves the model as it was.
    """
    signs = torch.randint(0, 2, images.shape, generator=seeds.generator("fmp start", seed)) * 2 - 1
    start = (images + alpha * signs.to(images)).clamp(0, 1)
    step = partial(steps, images, start.clone(), alpha=alpha, epsilon=epsilon)
    training, scores = model.training, {}
    model.eval()
    with exact(), frozen(model):
        with torch.no_grad():
            clean = maps(model, images)
        moved = maps(model, start.requires_grad_())
        with tqdm(total=sum(found.shape[1] for found in clean.values()), desc="scoring", unit=" maps", disable=None) as bar:
            for name, found in moved.items():
                away = 2 * (found.detach() - clean[name])  # of sum (f(z) - f(x))^2, at z = the start
                parts = []
                for chunk in torch.arange(found.shape[1], device=images.device).split(max(1, batch // len(images))):
                    parts.append(_score_chunk(model, found, away, chunk, start, labels, step))
                    bar.update(len(chunk))
                scores[name] = tuple(torch.cat(parts, 2).double().cpu().numpy())
    model.train(training)
    return scores


def _score_chunk(model, maps, away, chunk, start, labels, step):
    """Accuracy and cross-entropy, 2,J,k, after steps that move each of the k maps in `chunk` by itself."""
    count = len(chunk)
    cotangent = torch.zeros(count, *maps.shape, dtype=maps.dtype, device=maps.device)
    each = torch.arange(count, device=maps.device)
    cotangent[each, :, chunk] = away[:, chunk].transpose(0, 1)
    (gradient,) = torch.autograd.grad(maps, start, cotangent, retain_graph=True, is_grads_batched=True)
    truth, found = labels.repeat(count), []
    with torch.inference_mode():
        for attacked in step(gradient.sign()):  # k,N,3,S,S
            logits = model(attacked.flatten(0, 1).contiguous(memory_format=torch.channels_last))
            right = (logits.argmax(1) == truth).to(logits.dtype)
            found.append(torch.stack([right, F.cross_entropy(logits, truth, reduction="none")]).view(2, count, -1).mean(2))
        return torch.stack(found, 1)


def fmp_step(images, start, sign, *, alpha, epsilon):
    """One step from the start."""
    return [(start + epsilon * sign).clamp(0, 1)]


def fmt_steps(images, start, sign, *, alpha, epsilon):
    """Two steps of alpha in the same direction, both within epsilon of the picture."""
    return [(images + (start + number * alpha * sign - images).clamp(-epsilon, epsilon)).clamp(0, 1) for number in (1, 2)]


def rankings(scores, config):
    """{convolution: its channels in the order of pruning}, in the order in which the convolutions ran."""
    return {name: np.argsort(accuracy[0]) if config.quirk("argsort") else ranking(accuracy[0], loss[0])
            for name, (accuracy, loss) in scores.items()}  # fmt: skip


def by_rank(orders, counts, config):
    """{convolution: sorted channels}: the first `counts` of every layer's own order, which with exec_order is another's."""
    layers = [name for name in counts if name in orders]
    source = dict(zip(layers, orders if config.quirk("exec_order") else layers, strict=True))
    return {name: sorted(channel for channel in orders[source[name]][: counts[name]].tolist() if channel < len(orders[name]))
            for name in layers}  # fmt: skip


def ranking(accuracy, loss):
    """Channels in the order of pruning: lowest accuracy, then highest loss (to 1e-6), then lowest channel."""
    return np.lexsort((np.arange(len(accuracy)), -np.round(loss, 6), accuracy))


def by_clusters(scores):
    """{convolution: sorted channels}: the smaller of two k-means clusters of a layer's points (a1, a2); of two equally
    large ones that with the lower mean; none where all points are equal."""
    doomed = {}
    for name, (accuracy, _) in scores.items():
        points = accuracy.T
        if (points == points[0]).all():
            doomed[name] = []
            continue
        cluster = KMeans(2, n_init=10, random_state=0).fit_predict(points)
        smaller = min((0, 1), key=lambda number: ((cluster == number).sum(), points[cluster == number].mean()))
        doomed[name] = np.flatnonzero(cluster == smaller).tolist()
    return doomed


def block_sums(model, images):
    """feature_maps as the released code sees them: where an output is the first term of a sum, the sum.

    Its residual blocks add in place, into the very tensor that a hook has kept. ConfigError where torch.fx cannot trace the model.
    """
    try:
        traced = torch.fx.symbolic_trace(model)
    except Exception as error:  # tracing fails in whatever way the model's own code does
        raise ConfigError(f"alias_sum does not apply, torch.fx cannot trace the model: {error}; --alias_sum false leaves it out") from error
    modules, wanted, found = dict(model.named_modules()), {}, {}
    for node in traced.graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.Conv2d):
            sums = [user for user in node.users if user.target in (operator.add, operator.iadd, torch.add) and user.args[0] is node]
            wanted[sums[0] if sums else node] = node.target

    class Keeper(torch.fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            if node in wanted:
                found[wanted[node]] = value
            return value

    Keeper(traced).run(images)
    return found


def norms_by_last_convolution(model, doomed):
    """[(scale, channels)] of every batch norm, by the list of the convolution that is defined before it."""
    channels, entries = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            channels = doomed.get(name, [])
        elif isinstance(module, nn.BatchNorm2d):
            entries.append((module.weight, [channel for channel in channels if channel < module.num_features]))
    return entries


def main(config):
    run.defend(__name__, config, repair)
