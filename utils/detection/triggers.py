"""The search for the smallest trigger of every class, a mask and a pattern: Neural Cleanse.

Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor
Attacks in Neural Networks", IEEE S&P 2019. The defense and the detector of that name share it.
"""

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from antidote_bench.utils import seeds
from antidote_bench.utils.charts import class_title, trigger_chart
from antidote_bench.utils.checkpoint import load, save
from antidote_bench.utils.data.loader import (
    Passes,
    batch_slices,
    batches,
    evaluation_batch,
    gradient_batch,
    halving,
    mixed_precision,
)
from antidote_bench.utils.detection.outliers import FARTHEST, LEAST_CLASSES, outlyingness

PATIENCE = 5  # epochs in a row above the goal, or below it, after which lambda changes
UP, DOWN = 2.0, 2.0**1.5  # factor and divisor of lambda
GAIN = 0.01  # share by which the smallest mask must shrink to count as a gain
STALE = 25  # epochs without a gain after which a search may end
# makes the median absolute deviation of normal numbers their standard deviation
CONSISTENT = 1.4826


def find(model, split, count, config, folder):
    """(masks K,1,S,S, patterns K,3,S,S, success K) of the triggers of all `count` classes.

    The success is the share of the images of `split` that a trigger leads to its class. `model` is
    in evaluation mode, and its weights need no gradient. `config` has the options `search_epochs`,
    `search_batch`, `search_lr`, `together`, `penalty` and `goal`, a `random_seed` and a
    `precision`. Checkpoints are in `folder`.
    """
    model.to(memory_format=torch.channels_last)
    classes = torch.arange(count, device=split.labels.device)
    parts = [
        search(model, split, group, config, folder) for group in classes.split(config.together)
    ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def search(model, split, classes, config, folder):
    """(masks K,1,S,S, patterns K,3,S,S, success K) of `classes`, each as if it were alone.

    All searches share the passes through the frozen `model`; one that has ended takes no part in
    the next ones. Where the goal was never reached, the trigger is the last one. The checkpoint is
    in `folder`.
    """
    state = Search(classes, split.images.shape[-1], config)
    optimizer = torch.optim.Adam(
        state.raw.parameters(), config.search_lr, betas=(0.5, 0.9), fused=True
    )

    def advance(rows, epoch):
        train_triggers(model, split, state, rows, optimizer, epoch, config)
        state.advance(success_rates(model, split, state, rows, config), config.goal)

    run_epochs(advance, state, optimizer, folder / "triggers", config)
    return *unit(state.best), state.success


def run_epochs(advance, state, optimizer, place, config, every=1):
    """advance(positions of the active searches, epoch) for config.search_epochs, or until none is.

    A checkpoint is saved after `every` epochs, in a file whose name begins with `place`.
    """
    first, last = state.classes[0], state.classes[-1]
    checkpoint = place.with_name(f"{place.name}_{first}_{last}.safetensors")
    done = load(checkpoint, state, optimizer)
    title = f"triggers from class {first}"
    for epoch in tqdm(range(done, config.search_epochs), desc=title, unit=" epochs", disable=None):
        rows = state.active.nonzero().flatten()  # waits for the device, once per epoch
        if not len(rows):
            break
        advance(rows, epoch)
        if (epoch + 1) % every == 0:
            save(checkpoint, state, optimizer, epoch + 1)


class Search(nn.Module):
    """The state of the searches for the triggers of some classes (int64 K); checkpoints hold it.

    `raw` has 4,S,S numbers for each class: mask and pattern are (1 + tanh)/2 of them. The buffers
    have length K. `penalty` is lambda, and `active` says which searches go on. `norm`, `best` and
    `success` belong to the smallest mask that has reached the goal. Before one has, the norm is
    infinite, and the others belong to the last mask.
    """

    def __init__(self, classes, size, config):
        super().__init__()
        start = [
            torch.rand(
                4, size, size, generator=seeds.generator("trigger", config.random_seed, label)
            )
            for label in classes.tolist()
        ]
        start = (2 * torch.stack(start).to(classes.device).clamp(0.01, 0.99) - 1).atanh()  # K,4,S,S
        self.raw = nn.ParameterList(start.unbind())
        zeros = torch.zeros(len(classes), device=classes.device)
        counts = torch.zeros_like(classes)
        buffers = {
            "classes": classes,
            "best": start,
            "success": zeros,
            "penalty": zeros + config.penalty,
            "norm": zeros + torch.inf,
            "last_gain": zeros + torch.inf,  # the norm at the last gain
            "above": counts,  # epochs in a row above the goal
            "below": counts,
            "stale": counts,  # epochs since the last gain
            "has_risen": counts.bool(),  # lambda has
            "has_fallen": counts.bool(),
            "active": ~counts.bool(),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value.clone())

    def triggers(self, rows):
        """(masks n,1,S,S, patterns n,3,S,S) of the classes at positions `rows`, a list."""
        return unit(torch.stack([self.raw[row] for row in rows]))

    @torch.no_grad()
    def advance(self, success, goal):
        """Update the state by the success of the triggers after an epoch, K shares.

        Keeps the smallest masks that work, changes lambda, and ends searches.
        """
        raw = torch.stack(list(self.raw))
        works, norm = self.active & (success >= goal), unit(raw)[0].sum((1, 2, 3))
        taken = torch.where(works, norm < self.norm, self.active & self.norm.isinf())
        self.best = torch.where(taken[:, None, None, None], raw, self.best)
        self.success = torch.where(taken, success, self.success)
        self.norm = torch.where(taken & works, norm, self.norm)
        self.schedule(works)

    def schedule(self, works):
        """Change lambda by which triggers (bool K) reach the goal, and end searches without gain.

        A search ends once its lambda has both risen and fallen.
        """
        self.above = torch.where(works, self.above + 1, 0)
        self.below = torch.where(works, 0, self.below + 1)
        up, down = self.above == PATIENCE, self.below == PATIENCE
        fallen = torch.where(down, self.penalty / DOWN, self.penalty)
        self.penalty = torch.where(up, self.penalty * UP, fallen)
        self.above, self.below = self.above.masked_fill(up, 0), self.below.masked_fill(down, 0)
        self.has_risen, self.has_fallen = self.has_risen | up, self.has_fallen | down
        gained = self.norm < (1 - GAIN) * self.last_gain
        self.last_gain = torch.where(gained, self.norm, self.last_gain)
        self.stale = torch.where(gained | self.norm.isinf(), 0, self.stale + 1)
        self.active = self.active & ~(self.has_risen & self.has_fallen & (self.stale >= STALE))


def train_triggers(model, split, state, rows, optimizer, epoch, config):
    """One epoch on the images for the triggers at positions `rows`."""
    device, positions = split.labels.device, rows.tolist()
    generator = seeds.generator("trigger batches", config.random_seed, epoch, device=device)
    most = (config.search_batch + 1) * len(positions)  # a last single image joins a batch
    passes = Passes(gradient_batch(model, split.images, most))
    for images, _, _ in batches(split, config.search_batch, generator=generator):

        def add_gradients(size, images=images):
            optimizer.zero_grad(set_to_none=True)  # Adam leaves alone what gets no gradient
            for some, part in pass_parts(len(positions), len(images), size):
                with mixed_precision(device, config.precision):
                    losses = search_loss(model, images[part], state, rows[some], positions[some])
                weight = (part.stop - part.start) / len(images)
                (losses.sum() if weight == 1 else weight * losses.sum()).backward()

        passes.run(add_gradients)
        optimizer.step()


def pass_parts(triggers, images, size):
    """[(slice of the triggers, slice of the images)] of passes of `size` triggered images.

    A pass has all images with as many triggers as fit, or a part of them with one.
    """
    return [
        (some, part)
        for some in batch_slices(triggers, max(1, size // images))
        for part in batch_slices(images, min(size, images))
    ]


def search_loss(model, images, state, rows, positions):
    """The losses k of the triggers at `rows`, the same as a list `positions`, on images n,3,S,S."""
    masks, patterns = state.triggers(positions)
    logits = outputs(model, images, masks, patterns).flatten(0, 1)
    targets = state.classes[rows].expand(len(images), -1)
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(0) + state.penalty[rows] * masks.sum((1, 2, 3))


@torch.no_grad()
def success_rates(model, split, state, rows, config):
    """Share K of all images that each trigger at positions `rows` leads to its class, else 0."""
    (masks, patterns), classes = state.triggers(rows.tolist()), state.classes[rows]

    def count_hits(size):
        hits = torch.zeros_like(classes)
        for images, _, _ in batches(split, config.search_batch):
            for some, part in pass_parts(len(classes), len(images), size):
                answers = outputs(model, images[part], masks[some], patterns[some]).argmax(2)
                hits[some] += (answers == classes[some]).sum(0)
        return hits

    most = (config.search_batch + 1) * len(classes)
    size = evaluation_batch(model, split.images, most)
    with mixed_precision(split.labels.device, config.precision):
        hits = halving(count_hits, size)
    shares = (hits / len(split)).to(state.success.dtype)
    return torch.zeros_like(state.success).index_copy(0, rows, shares)


def outputs(model, images, masks, patterns):
    """Logits n,K,classes of images n,3,S,S with each of K triggers."""
    return logits_of_each(model, add_trigger(images[:, None], masks, patterns))


def logits_of_each(model, triggered):
    """Logits n,K,classes of images n,K,3,S,S."""
    logits = model(triggered.flatten(0, 1).contiguous(memory_format=torch.channels_last))
    return logits.unflatten(0, triggered.shape[:2])


def judge(masks, success, config):
    """(norms float64 K, anomaly index K, flagged bool K) of the triggers of K classes.

    The masks are K,1,S,S. `config` has the options `goal` and `threshold`.
    """
    norms = masks.double().sum((1, 2, 3))
    return norms, *anomalies(norms, success >= config.goal, config.threshold)


def add_trigger(images, mask, pattern):
    """(1 - m) x + m pattern, for images, masks and patterns in [0, 1] that broadcast."""
    return images + mask * (pattern - images)


def unit(raw):
    """(mask n,1,S,S, pattern n,3,S,S) in [0, 1] of raw numbers n,4,S,S."""
    return (raw.tanh() / 2 + 0.5).split((1, 3), 1)


def anomalies(norms, works, threshold):
    """(anomaly index, flagged) of K classes by the sizes of their masks.

    The index is the distance from the median in units of the median absolute deviation. Where that
    is zero, the index of every class that is not at the median is infinite. Flagged is a trigger
    that `works`, that is, reached the goal, with an index above `threshold` and a size below the
    median.
    """
    norms = norms.double()
    away = norms - norms.quantile(0.5)
    index = away.abs() / (CONSISTENT * away.abs().quantile(0.5))
    index = index.nan_to_num(0.0, posinf=torch.inf)  # 0 / 0 is at the median
    return index, works & (index > threshold) & (away < 0)


def smallness(sizes, works):
    """How far each of K sizes lies below the others, float64 K.

    On a logarithmic scale, and among the classes whose triggers work (bool K). A class whose
    trigger does not is -FARTHEST, and the others are 0 where they are fewer than LEAST_CLASSES.
    """
    sizes, works = sizes.double().cpu(), works.cpu()
    found = torch.full_like(sizes, -FARTHEST)
    found[works] = 0
    if works.sum() >= LEAST_CLASSES:
        tiny = torch.finfo(torch.float64).tiny
        found[works] = outlyingness(-sizes[works].clamp(min=tiny).log())
    return found


def chart(masks, patterns, norms, flagged, names):
    """PNG bytes: the mask of every class, and its pattern on grey; red where `flagged` (bool K).

    `names` are those of the classes.
    """
    titles = [
        f"class {class_title(label, names, 16)}: norm {norm:.1f}"
        for label, norm in enumerate(norms.tolist())
    ]
    on_grey = add_trigger(torch.full_like(patterns, 0.5), masks, patterns)
    return trigger_chart(masks, on_grey, titles, flagged.tolist())
