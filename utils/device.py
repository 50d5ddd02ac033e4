"""Which device a run computes on, in which precision, and how much memory it took."""

import ctypes
import dataclasses
import resource
import sys

import psutil
import torch

from utils import crew
from utils.errors import ConfigError


def setup(config, workers=crew.ALONE):
    """(config with the precision resolved, torch.device); ConfigError where the device is not there.

    Of several `workers` each gets a GPU of its own.
    """
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if workers.size > 1 and name.startswith("cuda"):
        name = _own_gpu(name, workers)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {name!r} is not available here; --device takes cpu, cuda, cuda:1 ... or auto") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; --device takes cpu, cuda, cuda:1 ... or auto")
    precision = config.precision if config.precision != "auto" else "bf16" if computes_bf16(device) else "fp32"
    keep_memory()
    return dataclasses.replace(config, precision=precision), device


def _own_gpu(name, workers):
    """The GPU of this process, of `workers.local_size` on this machine."""
    count = torch.cuda.device_count()
    if name != "cuda":
        raise ConfigError(f"under torchrun every process has a GPU of its own: --device takes cuda, cpu or auto there, not {name!r}")
    if 0 < count < workers.local_size:
        raise ConfigError(f"torchrun has started {workers.local_size} processes, but GPUs here: {count}; "
                          f"start it with --nproc_per_node {count}, or --device cpu")  # fmt: skip
    return f"cuda:{workers.local_rank}"


def computes_bf16(device):
    """Whether the device multiplies bfloat16 in hardware; emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(test() for test in tests if test)


def free_memory(device):
    """Bytes that are free on the device, or for programs on this machine."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def exact():
    """The context in which convolutions compute in full float32 on a GPU too (the TF32 of cuDNN is off)."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def keep_memory():
    """Have glibc keep freed memory instead of returning it to the kernel and fetching it again at every step.

    On two CPU cores float32 training of resnet9 becomes half again as fast, forward passes a quarter.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt:
            mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def name_and_peak(device):
    """(the device in words, peak memory of this process so far in MiB: the GPU's on a GPU, resident otherwise)."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), round(torch.cuda.max_memory_allocated(device) / 2**20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"cpu, {torch.get_num_threads()} threads", round(peak / (2**20 if sys.platform == "darwin" else 2**10))
