"""Tensors in files without pickle: checkpoints of a training, and any dict of tensors."""

from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from antidote_bench.utils import files
from antidote_bench.utils.errors import RefusedError
from antidote_bench.utils.optimizers import states


def save(path, model, optimizer, epoch, memory=None):
    """Save everything that the next epoch starts from; `memory` is a module with buffers, or
    None."""
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    memory = memory or nn.Module()
    tensors |= {f"loss/{name}": tensor for name, tensor in memory.state_dict().items()}
    for number, (_, state) in enumerate(states(optimizer)):
        tensors |= {
            f"optimizer/{number}/{name}": value
            for name, value in state.items()
            if torch.is_tensor(value)
        }
    files.write(path, to_bytes(tensors, {"epoch": str(epoch)}))


def load(path, model, optimizer, memory=None):
    """Load what `save` has written; the number of finished epochs, 0 where there is no file."""
    if not Path(path).is_file():
        return 0
    try:
        with safetensors.safe_open(path, "pt") as file:
            epoch = int(file.metadata()["epoch"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError, KeyError, TypeError) as error:
        raise RefusedError(
            f"the checkpoint {path} is damaged: delete the folder {Path(path).parent} to start "
            "again"
        ) from error
    _load_optimizer(optimizer, tensors)
    for part, module in (("model/", model), ("loss/", memory or nn.Module())):
        module.load_state_dict(
            {
                name.removeprefix(part): tensor
                for name, tensor in tensors.items()
                if name.startswith(part)
            }
        )
    return epoch


def _load_optimizer(optimizer, tensors):
    known = states(optimizer)
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        if part != "optimizer":
            continue
        number, _, key = rest.partition("/")
        parameter, state = known[int(number)]
        if tensor.shape == parameter.shape:
            # the fused step reads memory as it lies: channels last, like the weights
            tensor = torch.empty_like(parameter).copy_(tensor)
        state[key] = tensor.to(parameter.device)


def to_bytes(tensors, metadata=None):
    """A dict of tensors as the bytes of a safetensors file."""
    return safetensors.torch.save(on_cpu(tensors), metadata)


def on_cpu(tensors):
    """A dict of tensors as safetensors wants it: on the CPU and contiguous."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def from_bytes(content, path):
    """The tensors of a safetensors file that was read from `path`; RefusedError (exit 4) for any
    other content."""
    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise RefusedError(f"{path} is refused: it is not a safetensors file") from error


def read_tensors(path):
    """The tensors of a safetensors file; RefusedError (exit 4) for any other file, a pickle say."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise RefusedError(f"{path} is refused: it cannot be read") from error
    return from_bytes(content, path)
