"""Rounds of a generator that reverses a trigger, and of unlearning what it makes.

The search is BTI-DBF's (utils/decoupling/search.py); `config` are ReversalOptions.
"""

import dataclasses
from functools import partial

import torch
import torch.nn.functional as F

from antidote_bench.utils import seeds
from antidote_bench.utils.charts import preview
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.data.loader import augmentation, batches, evaluating, to_unit
from antidote_bench.utils.decoupling import search
from antidote_bench.utils.repair.layers import frozen
from antidote_bench.utils.train import Recipe, fit

SHOWN = 8  # images in triggers.png
# weights of the change of images while the generator learns to change nothing
FAR, FAR_WEIGHT, NEAR_WEIGHT = 0.1, 100.0, 0.01


def rounds(model, record, config):
    """Yield, config.rounds times, the generator that has been trained against `model` as it is.

    The caller trains `model` in place in between. From the second round on the generator leads the
    images to the class of most of what it made in the first one. The record gets mask.safetensors
    and triggers.png in the end.
    """
    device, classes = record.clean.labels.device, record.spec.classes
    generator, optimizer = search.new_generator(config, device)
    deviation = torch.tensor(record.spec.std, device=device).view(3, 1, 1)
    train = partial(search.train_generator, generator, optimizer, record.clean, config=config)
    target, masks, shares = None, [], []
    for number in range(config.rounds):
        with evaluating(model), frozen(model):
            if number == 0:
                train(
                    partial(identity_loss, model, generator, deviation=deviation),
                    epochs=config.identity_epochs,
                    path=record.state / "identity.safetensors",
                )
            mask = search.learn_mask(model, record.clean, config, number)
            train(
                lambda images, mask=mask, target=target: search.generator_loss(
                    model, generator, images, mask, deviation, config, target
                ),
                epochs=config.generator_epochs,
                path=record.state / f"generator_{number}.safetensors",
                first=config.identity_epochs + number * config.generator_epochs,
            )
            said = answers(model, generator, record.clean, config, number)
        shares.append(said.bincount(minlength=classes).double() / len(said))
        masks.append(mask)
        if number == 0:
            target = shares[0].argmax()
            save_images(record, generator, said)
        yield generator
    if masks:
        tensors = {"mask": torch.stack(masks), "shares": torch.stack(shares), "target": target}
        record.keep("mask.safetensors", tensors)


def identity_loss(model, generator, images, *, deviation):
    """Low where `generator` changes nothing that images n,3,S,S or the features and answers of
    `model` show."""
    changed = generator(images)
    moved, after, before = search.change_of_features(model, images, changed)
    logs = [logits.log_softmax(1) for logits in (after, before)]
    answer = F.kl_div(*logs, reduction="batchmean", log_target=True)
    distance = ((changed - images) / deviation).square().mean()
    weight = torch.where(distance > FAR, FAR_WEIGHT, NEAR_WEIGHT)
    return answer + moved.mean() + weight * distance


@torch.no_grad()
def answers(model, generator, split, config, number):
    """The classes n that `model` takes the changed images of `split` for."""
    draws = seeds.generator("btidbf noise", config.random_seed, number)
    return torch.cat(
        [
            model(search.changed_images(generator, images, config.noise, draws)).argmax(1)
            for images, _, _ in batches(split, config.search_batch)
        ]
    )


@torch.no_grad()
def save_images(record, generator, said):
    """Save some clean images, and what the generator makes of them, beside the repair.

    Above the second is the class n of `said`.
    """
    some = record.clean[: min(SHOWN, len(record.clean))]
    changed = (generator(to_unit(some.images)) * 255).round().to(torch.uint8)
    pair = some, Split(changed, said[: len(some)], some.truth)
    record.keep("triggers.png", preview(*pair, ("clean", "changed"), record.spec.class_names))


def unlearn(model, record, config, recipe, *, loss, optimizer, number):
    """Train `model` in place through round `number`, counted from 0, and return it.

    `loss` is that of `fit`, and `optimizer` one that all rounds share. Every round draws its own
    batches.
    """
    seed = seeds.number("unlearning", config.random_seed, number)

    def on_epoch(model, *, epoch, **values):
        record.report("unlearn", model, epoch=number * recipe.epochs + epoch, **values)

    return fit(
        model,
        record.clean,
        dataclasses.replace(recipe, random_seed=seed),
        loss=loss,
        optimizer=lambda *_: optimizer,
        augment=augmentation(record.spec),
        on_epoch=on_epoch,
        checkpoint=record.state / f"unlearn_{number}.safetensors",
    )


def constant(config, rate, **changes):
    """The recipe of a round: config.epochs at one learning rate, without weight decay."""
    return Recipe.stage(
        config,
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=rate,
        lr_min=rate,
        weight_decay=0.0,
        **changes,
    )


@torch.no_grad()
def with_changed(images, generator, share):
    """Images n,3,S,S, of which the `share`, rounded down, and one more are those of `generator`.

    torch's global generator draws which ones; `fit` seeds it.
    """
    count = min(int(share * len(images)) + 1, len(images))
    chosen = torch.randperm(len(images), device=images.device)[:count]
    return images.index_copy(0, chosen, generator(images[chosen]).to(images.dtype))
