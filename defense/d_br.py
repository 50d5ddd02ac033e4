"""D-BR: pictures whose features change most when they are turned and shifted are unlearned, those whose features stay are learned again, in turns.

Chen, Wu, Wang, "Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples", NeurIPS 2022
(https://proceedings.neurips.cc/paper_files/paper/2022/hash/3f9bbf77fbd858e5b6e39d39fe84ed2e-Abstract-Conference.html). The
defender sees the attacked model and the poisoned training set, of which no picture is known to be clean. A network like
the victim's learns the set for two epochs and then, for ten, drives the mean features of the labels in a batch apart; what a random turn
and shift does to its features says how sensitive a picture is. The 5 % most sensitive are taken for poisoned, the 20 % least for clean; the
victim then climbs the loss of the ones for an epoch and descends that of the others for the next.

    python defense/d_br.py --result_file badnet_cifar10
    python defense/d_br.py --result_file badnet_cifar10 --alpha_p 0.02     # where little poison is expected

Both shares are declared priors (column `prior`), never the true ones. Turn and shift are drawn once for every picture; a known port
draws them again to assign what it has found thresholds for, and normalises pictures in another way than the model that it repairs.
The released code keeps the epoch of the best test ACC less test ASR; here the last one counts. A picture whose loss reaches twice
that of a blind guess is unlearned and gives no gradient, where the paper climbs without end. Batch norms learn along in both passes.

On the digits (resnet9 of width 16, bf16, seed 0, n = 1, with the rates of config/dataset/digits.yaml) all 64 pictures taken for poisoned are
so, for badnet and for blended, and of 259 taken for clean none and 2. The ASR of badnet falls from 99.3 to 0.0 % and the ACC from 99.6 to 99.4; that of
blended only from 100 to 53.6 at an ACC of 99.2. A clean model, of which 64 pictures are unlearned all the same, goes from an ACC of 100
to 96.8. The published rates are too low for 1,297 pictures: with --feature_lr 0.01 none of the 64 is poisoned, with --repair_lr 0.0001 the ASR of badnet stays at 99.1.
The rate of 0.004 for the digits is the published one for 39 times fewer pictures; 0.001 to 0.01 did as well.
With batch norms in evaluation mode in the passes uphill, blended falls to an ASR of 0 and an ACC of 33.6; so they are not.
"""

from dataclasses import dataclass

from utils.config import Distinguishing, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Distinguishing):
    epochs: int = 20
    """rounds of a pass uphill over the pictures taken for poisoned and one downhill over those taken for clean"""
    repair_lr: float = 1e-4
    """learning rate of both, above 0"""
    bound: float = 2.0
    """loss from which on a picture counts as unlearned and gives no gradient, as a multiple of a blind guess's, ln(classes); above 0"""

    def __post_init__(self):
        super().__post_init__()
        require(self.epochs >= 0, "epochs", "0 or more")
        require(self.repair_lr > 0, "repair_lr", "positive")
        require(self.bound > 0, "bound", "positive")

    def work(self, clean, found):
        shares = f"{self.alpha_p:.0%} uphill and {self.alpha_c:.0%} downhill"
        return f"{super().work(clean, found)}, then the victim in {self.epochs} rounds on {shares}"


if __name__ == "__main__":
    launch(Config)

import math
from functools import partial

import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils import run, seeds
from utils.batch import augmentation, batches, lengths
from utils.errors import UserError
from utils.optimizers import sgd
from utils.sensitivity import CLEAN, POISONED, bounded, distinguish
from utils.train import cross_entropy, load_state, one_pass, save_state, stage


def repair(model, record, config):
    kinds = distinguish(record, config)
    losses = {POISONED: partial(unlearning, bound=config.bound), CLEAN: cross_entropy}
    parts = [(record.train.view((kinds == kind).nonzero().flatten()), loss) for kind, loss in losses.items()]
    return alternate(model, [(split, loss) for split, loss in parts if len(split) > 1], record, config)  # batch norms need two


def unlearning(model, images, labels, index, *, bound):
    """Minus the cross-entropy, whose gradient ends for a picture where its loss reaches the bound."""
    logits = model(images)
    return -bounded(F.cross_entropy(logits, labels, reduction="none"), bound, logits.shape[1]).mean()


def alternate(model, parts, record, config):
    """Train `model` in place: in every round one pass over each of `parts`, [(split, loss)]. The state after every round is kept."""
    training, device = model.training, record.train.labels.device
    model.to(memory_format=torch.channels_last)
    optimizer = sgd(model.parameters(), stage(config, lr=config.repair_lr))
    path, augment = record.state / "repair.safetensors", augmentation(record.spec)
    done = load_state(path, model, optimizer)
    steps = [len(lengths(len(split), config.batch_size)) for split, _ in parts]
    with tqdm(total=config.epochs * sum(steps), initial=done * sum(steps), desc="repairing", unit=" steps", disable=None) as bar:
        for epoch in range(done, config.epochs):
            means = []
            for part, ((split, loss), count) in enumerate(zip(parts, steps, strict=True)):
                torch.manual_seed(seeds.number("dropout", config.random_seed, epoch, part))
                order = batches(split, config.batch_size, augment=augment,
                                generator=seeds.generator("repair", config.random_seed, epoch, part, device=device))  # fmt: skip
                rates, weights = [config.repair_lr] * count, [1] * count
                total, seen = one_pass(model, order, rates, weights, loss, optimizer, config.precision, None, bar)
                means.append(total / seen)
            values = torch.stack(means).tolist() if means else [0.0]
            if not all(map(math.isfinite, values)):
                raise UserError(f"the loss is no number after round {epoch + 1}: lower --repair_lr, which is {config.repair_lr}")
            record.report("repair", model, epoch=epoch + 1, loss=round(values[-1], 6), lr=config.repair_lr)
            save_state(path, model, optimizer, epoch + 1)
    return model.train(training)


def main(config):
    run.defend(__name__, config, repair, needs_found=True)
