"""Tensors in files: checkpoints of a training and any dict of tensors, without pickle; and the
one place that reads files of torch.save."""

import io
import stat
import zipfile
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.torch_version import TorchVersion

from antidote_bench.utils import files
from antidote_bench.utils.errors import MissingError, RefusedError, is_out_of_memory
from antidote_bench.utils.optimizers import states
from antidote_bench.utils.text import cut

# before it, loading with weights_only=True could be made to run code
MENDED_TORCH = (2, 10)
LARGEST_PT = 2**33  # bytes of a .pt file, and of the tensors in it
# what a checkpoint that is damaged or of another network raises
UNFIT = (
    safetensors.SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError,
)  # fmt: skip
CONVERT = "or convert it to safetensors where you trust it"


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
        _load_optimizer(optimizer, tensors)
        for part, module in (("model/", model), ("loss/", memory or nn.Module())):
            module.load_state_dict(
                {
                    name.removeprefix(part): tensor
                    for name, tensor in tensors.items()
                    if name.startswith(part)
                }
            )
    except UNFIT as error:
        if is_out_of_memory(error):
            raise
        raise RefusedError(
            f"the checkpoint {path} is damaged: delete the folder {Path(path).parent} to start "
            "again"
        ) from error
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


def read_pt(path, allowed=(), largest=LARGEST_PT):
    """What torch.save has written to `path`; see `read_file` and `from_pt`."""
    return from_pt(read_file(path, largest), path, allowed, largest)


def read_file(path, largest=LARGEST_PT):
    """The bytes of a file of weights.

    Raises MissingError (exit 3) where there is no file, and RefusedError (exit 4) for a file that
    is no regular one, or larger than `largest` bytes.
    """
    path = Path(path)
    try:
        facts = path.stat()
    except (OSError, ValueError) as error:
        raise MissingError(f"there is no file {cut(path, 200)}") from error
    if not stat.S_ISREG(facts.st_mode):
        raise RefusedError(f"{path} is refused: it is no regular file")
    if facts.st_size > largest:
        raise RefusedError(f"{path} is refused: it is larger than {largest >> 20} MB")
    try:
        return path.read_bytes()
    except OSError as error:
        raise RefusedError(f"{path} is refused: it cannot be read ({error.strerror})") from error


def from_pt(content, path, allowed=(), largest=LARGEST_PT):
    """What torch.save has written, from the bytes of a file that was read from `path`: tensors on
    the CPU in plain containers.

    No code of the file runs: every class in it must be one that torch knows to be safe, or one of
    `allowed` (classes, functions, or pairs of one and the name it has in the file, as
    torch.serialization.safe_globals takes them). Sparse and quantised tensors are refused.

    Raises RefusedError (exit 4) for a file that was written by torch before 1.6, or expands to more
    than `largest` bytes, or holds something else; and for every file where torch itself is older
    than 2.10.
    """
    if TorchVersion(torch.__version__) < MENDED_TORCH:
        raise RefusedError(
            f"{path} is refused: torch {torch.__version__} does not read .pt files safely; install "
            f"torch 2.10 or newer, {CONVERT}"
        )
    try:
        file = io.BytesIO(content)
        with torch.serialization.safe_globals(list(allowed)):
            _check_pt(file, path, largest)
            held = torch.load(file, map_location="cpu", weights_only=True)
        _check_tensors(held, path, largest)
    except RefusedError:
        raise
    except Exception as error:  # a made-up file calls what torch allows with any arguments
        # torch's advice around the reason is to load the file unsafely
        text = str(error).partition("WeightsUnpickler error:")[2].partition("\n\nCheck the")[0]
        why = cut(text or error, 120) or type(error).__name__
        raise RefusedError(f"{path} is refused: it is no file of torch.save ({why})") from error
    return held


def to_pt(content):
    """Tensors, arrays and plain values as the bytes of a file of torch.save, for programs that read
    no other."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _check_pt(file, path, largest):
    """RefusedError where an open .pt file is no archive, expands to more than `largest` bytes, or
    names a class that is not allowed. The file is read from its beginning afterwards."""
    if not zipfile.is_zipfile(file):
        raise RefusedError(
            f"{path} is refused: it is no archive as torch.save writes it since torch 1.6; save it "
            f"again with a newer torch, {CONVERT}"
        )
    with zipfile.ZipFile(file) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > largest:
            raise RefusedError(f"{path} is refused: it expands to more than {largest >> 20} MB")
    file.seek(0)
    if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(file):
        names = ", ".join(cut(name, 80) for name in sorted(unsafe)[:3])
        raise RefusedError(
            f"{path} is refused: it holds {names}, and loading that could run code; save the "
            "weights alone, model.state_dict(), as safetensors"
        )
    file.seek(0)


def _check_tensors(content, path, largest):
    """RefusedError where the tensors of `content` are not plain, or fill more than `largest` bytes
    when they are copied."""
    size, left, seen = 0, [content], set()
    while left:
        part = left.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, dict):
            left += part.values()
        elif isinstance(part, list | tuple | set | frozenset):
            left += part
        elif torch.is_tensor(part):
            if part.layout != torch.strided or part.is_quantized or part.device.type != "cpu":
                raise RefusedError(f"{path} is refused: it holds a tensor that is not a plain one")
            size += part.numel() * part.element_size()
    if size > largest:
        raise RefusedError(f"{path} is refused: its tensors are larger than {largest >> 20} MB")
