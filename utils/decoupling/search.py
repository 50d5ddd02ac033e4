"""The search of BTI-DBF: a mask of the features that clean images need, and a generator that
changes images so that only the other features move.

Xu, Huang, Li, Qin, Ren, "Towards Reliable and Efficient Backdoor Trigger Inversion via Decoupling
Benign Features", ICLR 2024. Features are the input of the last linear layer.
"""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from antidote_bench.utils import seeds
from antidote_bench.utils.checkpoint import load, save
from antidote_bench.utils.data.loader import batches
from antidote_bench.utils.decoupling import split_head
from antidote_bench.utils.decoupling.generator import UNet
from antidote_bench.utils.features import features_and_logits

KEPT = 0.01  # weight of the kept features' change


def learn_mask(model, split, config, *rounds):
    """The mask of the features that the images of `split` need: D values of [0, 1].

    `rounds` are numbers that the random start and order depend on, beside config.random_seed.
    """
    features, head = split_head.known_features(model, split, config)
    draws = seeds.generator("btidbf mask", config.random_seed, *rounds)
    raw = torch.randn(features.shape[1], generator=draws).to(features).requires_grad_()
    optimizer = torch.optim.Adam([raw], config.mask_lr)
    for _ in range(config.mask_epochs):
        order = torch.randperm(len(features), generator=draws).to(features.device)
        for rows in order.split(config.search_batch):
            mask = raw.tanh() / 2 + 0.5
            loss = split_head.mask_loss(head, features[rows], split.labels[rows], mask)
            (raw.grad,) = torch.autograd.grad(loss, raw)
            optimizer.step()
    return raw.detach().tanh() / 2 + 0.5


def new_generator(config, device):
    """(a generator of width config.generator_width, drawn by config.random_seed, its Adam)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.number("btidbf generator", config.random_seed))
        generator = UNet(config.generator_width).to(device)
    return generator, torch.optim.Adam(generator.parameters(), config.generator_lr)


def train_generator(generator, optimizer, split, loss, config, *, epochs, path, first=0):
    """Train `generator` in place so that `loss(images)` of batches n,3,S,S falls.

    There is a checkpoint in the file `path` after every epoch, and training goes on from it. Epochs
    are counted from `first`, and every one draws its own order.
    """
    done, device = load(path, generator, optimizer), split.labels.device
    for epoch in tqdm(range(done, epochs), unit=" epochs", disable=None):
        draws = seeds.generator("btidbf batches", config.random_seed, first + epoch, device=device)
        for images, _, _ in batches(split, config.search_batch, generator=draws):
            value = loss(images)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        save(path, generator, optimizer, epoch + 1)


def generator_loss(model, generator, images, mask, deviation, config, target=None):
    """Of a batch of images: minus the change of the features outside the mask, plus a little of
    the others'; or the change of the images, where a bound is passed.

    `deviation` 3,1,1 is the unit of the change of images. With a `target`, a class as a tensor, the
    cross-entropy of the changed images to it is added.
    """
    changed = generator(images)
    moved, logits, _ = change_of_features(model, images, changed)
    kept, other = (mask**2 * moved).mean(), ((1 - mask) ** 2 * moved).mean()
    distance = ((changed - images) / deviation).square().mean()
    outside = (distance > config.image_bound) | (kept > config.feature_bound)
    # a choice on the device, so that no step waits for it
    loss = torch.where(outside, distance, KEPT * kept - other)
    return loss if target is None else loss + F.cross_entropy(logits, target.expand(len(logits)))


def change_of_features(model, images, changed):
    """(squared changes n,D of the features, logits n,C of the changed images, of the others).

    Gradients reach `changed` alone. The unit is the mean square of the features of `images`.
    """
    with torch.no_grad():
        old, before = features_and_logits(model, images)
    new, after = features_and_logits(model, changed)
    scale = old.square().mean()  # is 0 only where all features are
    return (new - old).square() / scale.clamp(min=torch.finfo(old.dtype).tiny), after, before


@torch.no_grad()
def changed_images(generator, images, noise, draws):
    """What the generator makes of images n,3,S,S with noise of the standard deviation `noise`."""
    normal = torch.randn(images.shape, generator=draws).to(images.device)
    return generator((images + noise * normal).clamp(0, 1))
