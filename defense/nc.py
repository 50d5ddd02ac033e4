"""Neural Cleanse: a class that an unusually small patch leads every picture to is the target; teach the network to ignore that patch.

Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural
Networks", IEEE S&P 2019. For every class a mask m of one channel and a pattern are sought, so that (1 - m) x + m pattern is
taken for that class: the cross-entropy plus lambda |m|_1 is minimised, and lambda rises while the goal is kept and falls while it
is not. A class whose mask is smaller than the median by more than --threshold median absolute deviations (times 1.4826) is flagged; its
trigger is put on a fifth of the clean pictures, which keep their labels, and the network trains on with all of them. Sees the clean pictures.

    python defense/nc.py --result_file badnet_cifar10
    python defense/nc.py --result_file badnet_cifar100 --together 50     # more classes at once where the memory allows

Where no class is flagged the model comes back as it was: a row equal to "no defense" means that nothing was found. The searches of --together classes
share their passes, and each ends on its own. Deviations: the goal is checked after every epoch, on all clean pictures, where the authors' code
takes the mean over the epoch's steps, in which the mask changes; lambda starts at --penalty and not at 0; a gain that ends the waiting is
1 % since the last one; only a trigger that reached the goal is flagged. The pictures with a trigger are added to the clean ones, for each flagged
class some of its own, and augmented like them. Not copied from a known port: a saved model that is not the trained one, and masks and
patterns that are stretched and rounded on their way through picture files.

On the digits (resnet9 of width 16, 64 clean pictures, fp32, seed 0, n = 1) the target of badnet is flagged with a norm of 1.3, the others having 56 to 141,
at an index of 2.3, close to the threshold: the norms of the others differ much. The ASR falls from 99.3 to 0.0 and the ACC from 99.6 to 99.2. With
--search_epochs 40 --search_batch 16, twice the steps per epoch, blended has its target flagged (norm 19.9, index 7.8) together with two harmless classes
(48.3 and 56.7; the others 76 to 89), and the ASR falls from 100.0 to 0.4 at an ACC of 98.8 after 99.8; of a clean model nothing is flagged
(54 to 130, largest index 1.8), and it stays as it is, at 100.0. Of 64 pictures one may fail the goal of 0.98, so that norms are rough there.
"""

from dataclasses import dataclass

from utils.config import FineTuning, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(FineTuning):
    batch_size: int = 256
    """images per step of the fine-tuning"""
    search_epochs: int = 80
    """passes over the clean pictures in which a class's trigger is sought, at most, 1 or more"""
    search_batch: int = 32
    """images per step of the search, 1 or more"""
    together: int = 10
    """classes whose triggers are sought at once, 1 or more; changes speed and memory only"""
    search_lr: float = 0.1
    """learning rate of the search, positive"""
    penalty: float = 1e-3
    """lambda, weight of the mask's size that the search begins with, positive"""
    goal: float = 0.98
    """share of the pictures that a trigger must lead to its class, above 0, up to 1"""
    threshold: float = 2.0
    """anomaly index above which a small trigger is flagged, 0 or more"""
    share: float = 0.2
    """share of the clean pictures that a flagged trigger is put on, above 0, up to 1"""

    def __post_init__(self):
        super().__post_init__()
        require(self.search_epochs >= 1, "search_epochs", "1 or more")
        require(min(self.search_batch, self.together) >= 1, "search_batch and together", "1 or more")
        require(min(self.search_lr, self.penalty) > 0, "search_lr and penalty", "positive")
        require(0 < self.goal <= 1 and 0 < self.share <= 1, "goal and share", "shares above 0, up to 1")
        require(self.threshold >= 0, "threshold", "0 or more")

    def work(self, clean, found):
        return (f"a trigger for every class in at most {self.search_epochs} epochs on {clean} pictures; where one is flagged, {self.epochs} "
                f"epochs on those and {self.stamps(clean)} more with that trigger")  # fmt: skip

    def stamps(self, clean):
        """How many of the clean pictures a flagged trigger is put on."""
        return max(1, round(self.share * clean))


if __name__ == "__main__":
    launch(Config)

import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from utils import files, run, seeds
from utils.batch import augmentation, batches, mixed_precision, to_unit
from utils.channels import frozen
from utils.data import Split
from utils.preview import trigger_chart
from utils.train import fit, load_state, save_state

PATIENCE = 5  # epochs in a row above the goal, or below it, after which lambda changes
UP, DOWN = 2.0, 2.0**1.5  # factor and divisor of lambda
GAIN, STALE = 0.01, 25  # after so many epochs in which the smallest mask has not become smaller by such a share, a search may end
CONSISTENT = 1.4826  # makes the median absolute deviation of normal numbers their standard deviation
COLUMNS = ["class", "norm", "index", "flagged", "success"]


def repair(model, record, config):
    masks, patterns, success = find(model, record, config)
    norms = masks.sum((1, 2, 3))
    index, flagged = anomalies(norms, success >= config.goal, config.threshold)
    keep(record, masks, patterns, norms, index, flagged, success)
    record.report("searched", model)
    targets = flagged.nonzero().flatten().tolist()
    if not targets:
        print("no class is flagged: the model stays as it is", file=sys.stderr)
        return model
    told = ", ".join(f"class {target} (norm {norms[target]:.1f}, index {index[target]:.1f})" for target in targets)
    print(f"flagged: {told}", file=sys.stderr)
    union = with_stamped(record.clean, masks, patterns, targets, config)
    return fit(model, union, config, augment=augmentation(record.spec),
               on_epoch=partial(record.report, "finetune"), checkpoint=record.state / "finetune.safetensors")  # fmt: skip


def find(model, record, config):
    """(masks K,1,S,S, patterns K,3,S,S, success K) of the triggers of all classes; leaves the model as it was.

    The success is the share of the clean pictures that a trigger leads to its class.
    """
    training = model.training
    model.to(memory_format=torch.channels_last).eval()
    groups = torch.arange(record.spec.classes, device=record.clean.labels.device).split(config.together)
    with frozen(model):
        done = [search(model, record.clean, classes, config, record.state) for classes in groups]
    model.train(training)
    return tuple(torch.cat(parts) for parts in zip(*done, strict=True))


class Search(nn.Module):
    """The triggers of some classes (int64 K) under way. A checkpoint keeps all of it.

    `raw` holds for each class 4,S,S numbers: mask and pattern are (1 + tanh)/2 of them. The buffers are of length K: `penalty`
    is lambda, `sought` says which searches go on; `norm`, `best` and `success` are those of the smallest mask that has reached the
    goal; before one has, the norm is infinite and the others are of the last mask.
    """

    def __init__(self, classes, size, config):
        super().__init__()
        start = [torch.rand(4, size, size, generator=seeds.generator("trigger", config.random_seed, label)) for label in classes.tolist()]
        start = (2 * torch.stack(start).to(classes.device).clamp(0.01, 0.99) - 1).atanh()  # K,4,S,S
        self.raw = nn.ParameterList(start.unbind())
        numbers, none = torch.zeros(len(classes), device=classes.device), torch.zeros_like(classes)
        buffers = {"classes": classes, "best": start, "success": numbers, "penalty": numbers + config.penalty, "norm": numbers + torch.inf,
                   "mark": numbers + torch.inf, "hits": none, "misses": none, "stale": none, "rose": none.bool(), "fell": none.bool(),
                   "sought": ~none.bool()}  # fmt: skip
        for name, value in buffers.items():
            self.register_buffer(name, value.clone())

    def triggers(self, rows):
        """(masks n,1,S,S, patterns n,3,S,S) of the classes at positions `rows`, a list."""
        return unit(torch.stack([self.raw[row] for row in rows]))

    @torch.no_grad()
    def advance(self, success, goal):
        """Take in the success of the triggers after an epoch, K shares: keep the smallest masks that work, change lambda, end searches."""
        raw = torch.stack(list(self.raw))
        works, norm = self.sought & (success >= goal), unit(raw)[0].sum((1, 2, 3))
        taken = torch.where(works, norm < self.norm, self.sought & self.norm.isinf())
        self.best = torch.where(taken[:, None, None, None], raw, self.best)
        self.success = torch.where(taken, success, self.success)
        self.norm = torch.where(taken & works, norm, self.norm)
        self.schedule(works)

    def schedule(self, works):
        """Change lambda and end searches by which triggers (bool K) have just reached the goal, and by the smallest norms."""
        self.hits, self.misses = torch.where(works, self.hits + 1, 0), torch.where(works, 0, self.misses + 1)
        up, down = self.hits == PATIENCE, self.misses == PATIENCE
        self.penalty = torch.where(up, self.penalty * UP, torch.where(down, self.penalty / DOWN, self.penalty))
        self.hits, self.misses = self.hits.masked_fill(up, 0), self.misses.masked_fill(down, 0)
        self.rose, self.fell = self.rose | up, self.fell | down
        gained = self.norm < (1 - GAIN) * self.mark
        self.mark = torch.where(gained, self.norm, self.mark)
        self.stale = torch.where(gained | self.norm.isinf(), 0, self.stale + 1)
        self.sought = self.sought & ~(self.rose & self.fell & (self.stale >= STALE))


def search(model, split, classes, config, folder):
    """(masks K,1,S,S, patterns K,3,S,S, success K) of `classes`, each as if it were alone.

    All searches share the passes through the frozen `model`; one that has ended takes no part in the next ones. Where the goal was
    never reached the trigger is the last one. A checkpoint stands in `folder`.
    """
    checkpoint = folder / f"triggers_{classes[0]}_{classes[-1]}.safetensors"
    state = Search(classes, split.images.shape[-1], config)
    optimizer = torch.optim.Adam(state.raw.parameters(), config.search_lr, betas=(0.5, 0.9), fused=True)
    done = load_state(checkpoint, state, optimizer)
    for epoch in tqdm(range(done, config.search_epochs), desc=f"triggers from class {classes[0]}", unit=" epochs", disable=None):
        rows = state.sought.nonzero().flatten()  # once per epoch
        if not len(rows):
            break
        descend(model, split, state, rows, optimizer, epoch, config)
        state.advance(reach(model, split, state, rows, config), config.goal)
        save_state(checkpoint, state, optimizer, epoch + 1)
    return *unit(state.best), state.success


def descend(model, split, state, rows, optimizer, epoch, config):
    """One pass over the pictures for the triggers at positions `rows`."""
    device, places, targets = split.labels.device, rows.tolist(), state.classes[rows]
    generator = seeds.generator("trigger batches", config.random_seed, epoch, device=device)
    for images, _, _ in batches(split, config.search_batch, generator=generator):
        masks, patterns = state.triggers(places)
        with mixed_precision(device, config.precision):
            logits = outputs(model, images, masks, patterns)
            told = targets.expand(len(images), -1)
            value = F.cross_entropy(logits.flatten(0, 1), told.flatten(), reduction="none").view(told.shape).mean(0)
        optimizer.zero_grad(set_to_none=True)  # Adam leaves alone what gets no gradient
        (value + state.penalty[rows] * masks.sum((1, 2, 3))).sum().backward()
        optimizer.step()


@torch.no_grad()
def reach(model, split, state, rows, config):
    """Share K of all pictures that each of the triggers at positions `rows` leads to its class, 0 for the others."""
    (masks, patterns), targets, hits = state.triggers(rows.tolist()), state.classes[rows], 0
    with mixed_precision(split.labels.device, config.precision):
        for images, _, _ in batches(split, config.search_batch):
            hits = hits + (outputs(model, images, masks, patterns).argmax(2) == targets).sum(0)
    return torch.zeros_like(state.success).index_copy(0, rows, (hits / len(split)).to(state.success.dtype))


def outputs(model, images, masks, patterns):
    """Logits n,K,classes of images n,3,S,S with each of K triggers."""
    shown = stamp(images[:, None], masks, patterns)  # n,K,3,S,S
    return model(shown.flatten(0, 1).contiguous(memory_format=torch.channels_last)).unflatten(0, shown.shape[:2])


def stamp(images, mask, pattern):
    """(1 - m) x + m pattern, for images, masks and patterns in [0, 1] that broadcast."""
    return images + mask * (pattern - images)


def unit(raw):
    """(mask n,1,S,S, pattern n,3,S,S) in [0, 1] of raw numbers n,4,S,S."""
    return (raw.tanh() / 2 + 0.5).split((1, 3), 1)


def anomalies(norms, works, threshold):
    """(anomaly index, flagged) of K classes by the sizes of their masks; `works` says which triggers reached the goal.

    The index is the distance from the median in units of the median absolute deviation; where that is zero, of what is not at the
    median infinite. Flagged is a working trigger with an index above `threshold` and a size below the median.
    """
    norms = norms.double()
    away = norms - norms.quantile(0.5)
    index = away.abs() / (CONSISTENT * away.abs().quantile(0.5))
    index = index.nan_to_num(0.0, posinf=torch.inf)  # 0 / 0 is at the median
    return index, works & (index > threshold) & (away < 0)


def keep(record, masks, patterns, norms, index, flagged, success):
    """Have what was found stand in the defense's folder: numbers, triggers, and a picture of them."""
    table = zip(norms.tolist(), index.tolist(), flagged.int().tolist(), success.tolist(), strict=True)
    rows = [{"class": number, "norm": f"{norm:.4f}", "index": f"{away:.4f}", "flagged": bad, "success": f"{share:.4f}"}
            for number, (norm, away, bad, share) in enumerate(table)]  # fmt: skip
    record.keep("triggers.csv", files.csv_text(rows, COLUMNS).encode())
    found = {"mask": masks, "pattern": patterns, "norm": norms, "index": index, "flagged": flagged, "success": success}
    record.keep("triggers.safetensors", found)
    titles = [f"class {row['class']}: norm {float(row['norm']):.1f}" for row in rows]
    record.keep("triggers.png", trigger_chart(masks, stamp(torch.full_like(patterns, 0.5), masks, patterns), titles, flagged.tolist()))


def with_stamped(clean, masks, patterns, targets, config):
    """The clean pictures, and for each of the classes `targets` a share of them once more with its trigger and their true label."""
    parts = [clean]
    for target in targets:
        generator = seeds.generator("stamped pictures", config.random_seed, target)
        part = clean[torch.randperm(len(clean), generator=generator)[: config.stamps(len(clean))].to(clean.labels.device)]
        images = (stamp(to_unit(part.images), masks[target], patterns[target]) * 255).round().to(torch.uint8)
        parts.append(Split(images, part.truth, part.truth))
    return Split(*(torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels", "truth")))


def main(config):
    run.defend(__name__, config, repair)
