"""Triggers of ordered pairs of classes: their search, to which other pairs they transfer, and the
group of pairs between which they transfer best.

Xiang, Xiong, Li, "UMD: Unsupervised Model Detection for X2X Backdoor Attacks", ICML 2023 (arXiv
2305.18651).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from antidote_bench.utils.checkpoint import load, save
from antidote_bench.utils.data.loader import (
    Passes,
    batches,
    clipped,
    evaluation_batch,
    forward_all,
    gradient_batch,
    halving,
)
from antidote_bench.utils.detection import triggers

MOST_IN_PASS = 256  # images
SAVED = 10  # steps between checkpoints
STARTS = 5  # pairs of pairs that a group is grown from


class Pairs(NamedTuple):
    """P ordered pairs of different classes, each a source and a target; int64 P."""

    source: torch.Tensor
    target: torch.Tensor


class Shown(NamedTuple):
    """Images K,n,3,S,S in [0, 1] of K classes; those of weight 0 (K,n) fill up the rows."""

    images: torch.Tensor
    weight: torch.Tensor


def ordered(classes, device):
    """All `Pairs` of some number of classes, by source and then by target."""
    table = torch.ones(classes, classes, dtype=torch.bool, device=device).fill_diagonal_(False)
    return Pairs(*table.nonzero().unbind(1))


def right_images(model, split, classes, count, precision):
    """The `Shown` images: of every class the first `count` of `split` that `model` gets right."""
    answers = forward_all(model, split, lambda images, *_: model(images).argmax(1), precision)
    right = answers == split.labels
    rows = [(right & (split.labels == label)).nonzero().flatten() for label in range(classes)]
    width = max(1, min(count, max(map(len, rows))))
    index = torch.zeros(classes, width, dtype=torch.long, device=answers.device)
    weight = torch.zeros(classes, width, device=answers.device)
    for label, places in enumerate(rows):
        places = places[:width]
        index[label, : len(places)] = places
        weight[label, : len(places)] = 1
    images = torch.cat([part for part, _, _ in batches(split, MOST_IN_PASS, order=index.flatten())])
    return Shown(images.contiguous().unflatten(0, (classes, width)), weight)


# The search


def search_patches(model, shown, pairs, rows, config, folder):
    """(raw numbers k,4,S,S, sizes k, success k) of the smallest patches of the pairs `rows`.

    The search is that of triggers.py with one batch, all images of the source, per epoch.
    `triggers.unit` makes mask and pattern of the raw numbers, and the size is the sum of the mask.
    It is infinite, and the success 0 or that of the last patch, where the goal was not reached.
    `config` has the options `steps`, `search_lr`, `penalty` and `goal`.
    """
    path = folder / f"patches_{rows[0]}_{rows[-1]}.safetensors"
    state = triggers.Search(rows, shown.images.shape[-1], config)
    optimizer = torch.optim.Adam(state.raw.parameters(), config.search_lr, betas=(0.5, 0.9))
    done = load(path, state, optimizer)
    passes = passes_of(model, shown, len(rows))
    for step in steps_of(config, done, rows):
        active = state.active.nonzero().flatten()
        if not len(active):
            break
        places = active.tolist()

        def raw_of(some, places=places):
            return torch.stack([state.raw[place] for place in places[some]])

        def penalty(some, active=active):
            masks, _ = triggers.unit(raw_of(some))
            return (state.penalty[active[some]] * masks.sum((1, 2, 3))).sum()

        # Adam leaves alone what gets no gradient
        success = add_gradients(
            model, shown, pairs, rows[active], raw_of, passes, optimizer, penalty
        )
        state.advance(torch.zeros_like(state.success).index_copy(0, active, success), config.goal)
        optimizer.step()
        if (step + 1) % SAVED == 0:
            save(path, state, optimizer, step + 1)
    return state.best, state.norm, state.success


class Additive(nn.Module):
    """The state of the searches for k additive triggers; checkpoints hold it."""

    def __init__(self, count, size, device):
        super().__init__()
        self.added = nn.Parameter(torch.zeros(count, 3, size, size, device=device))
        self.register_buffer("success", torch.zeros(count, device=device))
        self.register_buffer("active", torch.ones(count, dtype=torch.bool, device=device))


def search_additive(model, shown, pairs, rows, config, folder):
    """(triggers k,3,S,S, sizes k, success k) of additive triggers of the pairs `rows`.

    From 0, a trigger goes `step_size` along its gradient with each step, until it reaches the goal.
    Its size is its Euclidean norm, infinite where it does not reach it. `config` has the options
    `steps`, `step_size` and `goal`.
    """
    path = folder / f"additive_{rows[0]}_{rows[-1]}.safetensors"
    state = Additive(len(rows), shown.images.shape[-1], rows.device)
    optimizer = torch.optim.SGD(state.parameters(), config.step_size)
    done = load(path, state, optimizer)
    passes = passes_of(model, shown, len(rows))
    for step in steps_of(config, done, rows):
        active = state.active.nonzero().flatten()
        if not len(active):
            break
        success = add_gradients(
            model,
            shown,
            pairs,
            rows[active],
            lambda some, active=active: state.added[active[some]],
            passes,
            optimizer,
        )
        state.success[active] = success
        state.active[active] = success < config.goal
        slope = state.added.grad * state.active[:, None, None, None]
        tiny = torch.finfo(slope.dtype).tiny
        state.added.grad = slope / slope.flatten(1).norm(dim=1).clamp(min=tiny)[:, None, None, None]
        optimizer.step()
        if (step + 1) % SAVED == 0:
            save(path, state, optimizer, step + 1)
    size = state.added.detach().flatten(1).norm(dim=1)
    return state.added.detach(), size.masked_fill(state.active, torch.inf), state.success


def steps_of(config, done, rows):
    title = f"triggers from pair {rows[0]}"
    return tqdm(range(done, config.steps), desc=title, unit=" steps", disable=None)


def passes_of(model, shown, count):
    """The `Passes` for the images of the sources of `count` pairs."""
    most = min(MOST_IN_PASS, count * shown.images.shape[1])
    return Passes(gradient_batch(model, shown.images[0], most))


def add_gradients(model, shown, pairs, rows, trigger_of, passes, optimizer, penalty=None):
    """Add the gradients of the losses of the triggers of the pairs `rows`; their success k.

    The loss is the cross-entropy of the target over the source's images, plus `penalty(some)` of
    a slice of them, if given. `trigger_of(some)` gives the triggers of a slice.
    """
    source, target = pairs.source[rows], pairs.target[rows]
    share = shown.weight / shown.weight.sum(1, keepdim=True).clamp(min=1)

    def work(size):
        optimizer.zero_grad(set_to_none=True)
        success = torch.zeros(len(rows), device=rows.device)
        for some, part in triggers.pass_parts(len(rows), shown.images.shape[1], size):
            weight = share[source[some]][:, part]
            logits = outputs(model, shown.images[source[some]][:, part], trigger_of(some))
            wanted = target[some, None].expand(weight.shape)
            losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
            (losses.view(weight.shape) * weight).sum().backward()
            success[some] += ((logits.argmax(2) == wanted) * weight).sum(1)
        if penalty:
            penalty(slice(0, len(rows))).backward()
        return success

    return passes.run(work)


def outputs(model, images, trigger):
    """Logits k,n,K of images k,n,3,S,S with k triggers: additive ones k,3,S,S, or the raw numbers
    k,4,S,S of patches."""
    if trigger.shape[1] == 4:
        mask, pattern = triggers.unit(trigger)
        changed = triggers.add_trigger(images, mask[:, None], pattern[:, None])
    else:
        changed = clipped(images + trigger[:, None])
    return model(changed.flatten(0, 1)).unflatten(0, changed.shape[:2])


# Transfers, and the group of pairs


@torch.no_grad()
def transfers(model, shown, pairs, trigger):
    """How well the trigger of pair i works for pair j: float64 P,P.

    It is the share of the images of j's source that it leads to j's target, and 0 where both have
    the same source.
    """
    classes, width = shown.weight.shape
    every = shown.images.flatten(0, 1)
    share = (shown.weight / shown.weight.sum(1, keepdim=True).clamp(min=1)).double()

    def answers(size):
        found = torch.zeros(len(trigger), classes * width, dtype=torch.long, device=every.device)
        for some, part in triggers.pass_parts(len(trigger), len(every), size):
            count = some.stop - some.start
            images = every[part].expand(count, *every[part].shape)
            found[some, part] = outputs(model, images, trigger[some]).argmax(2)
        return found

    said = halving(answers, evaluation_batch(model, shown.images[0], MOST_IN_PASS))
    said = F.one_hot(said.unflatten(1, (classes, width)), classes).double()  # P,K,n,K
    led = torch.einsum("pknc,kn->pkc", said, share)
    found = led[:, pairs.source, pairs.target]
    return found.masked_fill(pairs.source[:, None] == pairs.source, 0)


def best_core(transfer, source):
    """(positions of the pairs of the best group, its objective); ([], -inf) where there is none.

    `transfer` is A, float64 P,P, and `source` the classes P that the pairs start from. With
    M = (A + A') / 2, the objective of a group is

        min over i in it of the mean of M_ij over the others j in it
        - max over k outside of the mean of A_ik over i in it.

    From each of the STARTS best entries of M, a group of two, it grows by the pair that makes the
    objective largest, until every source has a pair. All groups on the way count. No two pairs of
    a group have one source.
    """
    both = (transfer + transfer.T) / 2
    apart = (source[:, None] != source).triu(1)
    order = both.masked_fill(~apart, -torch.inf).flatten().argsort(descending=True, stable=True)
    best, value = [], float("-inf")
    for place in order[: min(STARTS, int(apart.sum()))].tolist():
        for core, reached in growing(transfer, both, source, list(divmod(place, len(source)))):
            if reached > value:
                best, value = core, reached
    return sorted(best), value


def growing(transfer, both, source, core):
    """Yield (positions, objective) of a group of two, and of the groups that it grows to."""
    reached = float(objectives(transfer, both, core[:1], core[1:])[0])
    while True:
        yield core, reached
        free = (~torch.isin(source, source[core])).nonzero().flatten().tolist()
        if not free:
            return
        found = objectives(transfer, both, core, free)
        reached, core = float(found.max()), [*core, free[int(found.argmax())]]


def objectives(transfer, both, core, candidates):
    """The objectives, one for each candidate, of the group `core` with that candidate."""
    size = len(core)
    links = both[core][:, core].sum(1)[:, None] + both[core][:, candidates]  # core, candidates
    inner = torch.minimum(links.min(0).values, both[core][:, candidates].sum(0)) / size
    outside = transfer[core].sum(0) + transfer[candidates]  # candidates, P
    outside[:, core] = -torch.inf
    outside[torch.arange(len(candidates)), candidates] = -torch.inf
    return inner - outside.max(1).values / (size + 1)
