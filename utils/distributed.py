"""Distributed training: several processes, started by torchrun, train one model together.

Each computes its part of every batch.
"""

import contextlib
import copy
import inspect
import os
import signal
import sys
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from antidote_bench.utils.errors import ConfigError, UserError

# the first process may make a trigger, and train a clean model for it, while the others wait
PATIENCE = timedelta(days=1)


class Workers(NamedTuple):
    """Which process this is of how many: in all, and on this machine."""

    rank: int
    size: int
    local_rank: int = 0
    local_size: int = 1


SINGLE = Workers(0, 1)


def from_environment():
    """This process's place as torchrun has put it into the environment; SINGLE without
    torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return SINGLE
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
    return Workers(*(int(os.environ[name]) for name in names))


@contextlib.contextmanager
def process_group(workers, device):
    """The processes can communicate inside; all but the first print nothing.

    Tensors go from GPU to GPU, or from CPU to CPU. Raises UserError (exit 1) in the first process
    when another one has ended.
    """
    if workers.size == 1:
        yield
        return
    # Python's handlers are not called while a process waits for another
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        with _silent() if workers.rank else contextlib.nullcontext():
            yield
            broadcast(None, workers)  # the others leave when the first one does
    except RuntimeError as error:
        if not _lost(error):
            raise
        # torchrun's SIGTERM would come before the sentence
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if workers.rank:
            sys.exit(1)  # whoever ended has said why, and the first process says what follows
        raise UserError(
            "another process of this training has ended; the same command resumes after the last "
            "finished epoch"
        ) from error
    finally:
        with contextlib.suppress(RuntimeError):  # or it would hide why the processes part
            dist.destroy_process_group()


@contextlib.contextmanager
def _silent():
    with open(os.devnull, "w") as null:
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            yield


def _lost(error):
    """Whether an error means that another process does not answer any more."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def broadcast(value, workers):
    """The first process's `value`, for which the others wait."""
    if workers.size == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, 0)
    return held[0]


@contextlib.contextmanager
def first_process_first(workers):
    """The first process runs the block before the others, which then find the files it wrote."""
    if workers.rank:
        broadcast(None, workers)
    yield
    if not workers.rank:
        broadcast(None, workers)


def require_same(value, what, workers):
    """Raise ConfigError (exit 2) unless `value` is the same in all processes.

    `what` says for the message what another value means, and the remedy.
    """
    if workers.size == 1:
        return
    values = [None] * workers.size
    dist.all_gather_object(values, value)
    if other := [rank for rank in range(workers.size) if values[rank] != values[0]]:
        raise ConfigError(f"process {other[0]} of {workers.size} has {what}")


def require_full_batches(sizes, workers):
    """Raise ConfigError (exit 2) where a batch of `sizes` images leaves a process without any."""
    if min(sizes, default=workers.size) < workers.size:
        raise ConfigError(
            f"a batch of {min(sizes)} images cannot be shared by {workers.size} processes: "
            "raise --batch_size or start fewer with torchrun's --nproc_per_node"
        )


def batch_slice(workers):
    """The slice of every batch that this process computes; None where it computes all."""
    return slice(workers.rank, None, workers.size) if workers.size > 1 else None


def loss_weight(count, workers):
    """The weight of this process's mean loss in a batch of `count` images.

    With it the mean over the processes is the mean over the batch.
    """
    return len(range(workers.rank, count, workers.size)) * workers.size / count


def data_parallel(model):
    """A network with the tensors of `model` that averages the gradients of all processes.

    On GPUs its batch normalisation takes the statistics of whole batches; torch has no such layer
    for CPUs. Raises ConfigError (exit 2) where a batch norm is one of another library, whose own
    part torch would leave out.
    """
    tensors = [*model.parameters(), *model.buffers()]
    # the caller's model keeps its own layers
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    if tensors[0].is_cuda:
        _require_plain_norms(model)
        twin = nn.SyncBatchNorm.convert_sync_batchnorm(twin)
    # the option has another name in newer versions of torch
    new, old = "forward_sync_buffers", "broadcast_buffers"
    name = new if new in inspect.signature(DistributedDataParallel).parameters else old
    return DistributedDataParallel(twin, **{name: False})


def _require_plain_norms(model):
    plain = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
    for module in model.modules():
        if isinstance(module, plain) and type(module) not in plain:
            raise ConfigError(
                f"several GPUs cannot share the batch norms of this --model, which are of the kind "
                f"{type(module).__name__}: start it without torchrun"
            )


def average_norms(model, workers):
    """Give the batch normalisation of all processes the mean of their running statistics."""
    if workers.size == 1:
        return
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            dist.all_reduce(buffer)
            buffer /= workers.size


def mean(total, count, workers):
    """The mean of `count` values whose sum is `total`, or of those of all processes."""
    if workers.size > 1:
        both = torch.stack([total.double(), torch.full_like(total, count, dtype=torch.float64)])
        dist.all_reduce(both)
        total, count = both.tolist()
    return float(total) / max(count, 1)
