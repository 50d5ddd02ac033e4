"""What test_distributed.py has torchrun start: `python -m tests.distributed_training FOLDER` trains
in every way there is and keeps what came out.

Without torchrun the same trainings happen in one process.
"""

import json
import sys
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn

from antidote_bench.utils import distributed, train
from antidote_bench.utils.data import loader
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.data.memmap import MemmapImages
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.launch import leave
from tests.test_train import SPEC, Double, model, options, split, weights


class Stopped(Exception):
    pass


def plain():
    """A network without batch normalisation."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 49, 4),
    )


def trained(network, data, workers, **how):
    """(weights, mean losses) after four epochs."""
    losses = []
    config = options(lr=0.1)
    train.fit(
        network,
        data,
        config,
        augment=loader.augmentation(SPEC),
        workers=workers,
        on_epoch=lambda model, epoch, loss, lr: losses.append(loss),
        **how,
    )
    return weights(network), torch.tensor(losses)


def interrupted(data, workers, folder):
    """The same training, cut off after its second epoch in all processes and taken up by other
    networks."""

    def stop():
        steps.append(1)
        if len(steps) > 2 * 3 + 1:
            raise Stopped

    steps = []
    try:
        trained(
            plain(),
            data,
            workers,
            checkpoint=folder / f"{workers.size}.safetensors",
            after_step=stop,
        )
    except Stopped:
        network = plain()
        torch.nn.init.ones_(network[0].weight)
        return trained(network, data, workers, checkpoint=folder / f"{workers.size}.safetensors")


def refused(workers):
    """What is said where the processes do not see the same, and where a batch has fewer images than
    there are processes."""
    said = []
    for what in (
        lambda: distributed.require_same(workers.rank, "something else", workers),
        lambda: trained(plain(), split(1), workers),
    ):
        try:
            what()
        except ConfigError as error:
            said.append(str(error))
    return said


def equal(tensor, workers):
    """Whether all processes hold the very same numbers."""
    if workers.size == 1:
        return True
    all_of_them = [torch.empty_like(tensor) for _ in range(workers.size)]
    dist.all_gather(all_of_them, tensor)
    return all(torch.equal(one, tensor) for one in all_of_them)


def main(folder):
    # batches of 16, 16, and 16 or 13
    workers, even, uneven = (distributed.from_environment(), split(48), split(45))
    with distributed.process_group(workers, torch.device("cpu")):
        runs = {
            "float32": trained(plain(), even, workers),
            "float64": trained(Double(plain()), even, workers),
            "uneven": trained(Double(plain()), uneven, workers),
            "stored": trained(
                plain(), Split(MemmapImages(even.images, "cpu"), even.labels, even.truth), workers
            ),
            "interrupted": interrupted(even, workers, folder),
            "norm": trained(network := model(), uneven, workers),
        }
        kinds = sorted({type(module).__name__ for module in network.modules()})
        facts = {
            "equal": {name: equal(run[0], workers) for name, run in runs.items()},
            "kinds": kinds,
            "refused": refused(workers),
        }
    if workers.rank == 0:
        kept = {
            f"{name} {what}": tensor
            for name, run in runs.items()
            for what, tensor in zip(("weights", "losses"), run, strict=True)
        }
        safetensors.torch.save_file(kept, folder / f"of_{workers.size}.safetensors")
        (folder / f"of_{workers.size}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
