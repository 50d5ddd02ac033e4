"""Which device a run computes on, in which precision, and how much memory it took."""

import ctypes
import dataclasses
import platform
import sys
from pathlib import Path

import psutil
import torch

from antidote_bench.utils import distributed
from antidote_bench.utils.errors import ConfigError

try:
    import resource
except ImportError:  # Windows has none
    resource = None


def setup(config, workers=distributed.SINGLE):
    """(config with the precision resolved, torch.device).

    Each of several `workers` gets a GPU of its own. Raises ConfigError (exit 2) where the device is
    not there.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if workers.size > 1 and name.startswith("cuda"):
        name = _own_gpu(name, workers)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"device {name!r} is not available here; --device takes cpu, cuda, cuda:1 ... or auto"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"device {name!r} is not supported; --device takes cpu, cuda, cuda:1 ... or auto"
        )
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if computes_bf16(device) else "fp32"
    keep_memory()
    return dataclasses.replace(config, precision=precision), device


def _own_gpu(name, workers):
    """The GPU of this process, of `workers.local_size` on this machine."""
    count = torch.cuda.device_count()
    if name != "cuda":
        raise ConfigError(
            "under torchrun every process has a GPU of its own: --device takes cuda, cpu or auto "
            f"there, not {name!r}"
        )
    if 0 < count < workers.local_size:
        raise ConfigError(
            f"torchrun has started {workers.local_size} processes, but GPUs here: {count}; "
            f"start it with --nproc_per_node {count}, or --device cpu"
        )
    return f"cuda:{workers.local_rank}"


def computes_bf16(device):
    """Whether the device multiplies bfloat16 in hardware, and faster than float32.

    Intel's CPUs do so with AMX. With AVX-512 alone an epoch took 1.3 times as long as in float32
    (docs/speed.md).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    amx, avx512 = (
        getattr(torch.cpu, name, bool)()
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    return amx or (avx512 and not is_intel())


def is_intel():
    """Whether the CPU is one of Intel's."""
    try:
        vendor = Path("/proc/cpuinfo").read_text()
    except OSError:  # Windows and macOS have none
        vendor = platform.processor()
    return "GenuineIntel" in vendor


def free_memory(device):
    """Bytes that are free on the device, or for programs on this machine.

    On a GPU what torch holds back for later tensors counts as free.
    """
    device = torch.device(device)
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return psutil.virtual_memory().available


def exact():
    """The context in which convolutions compute in full float32 on a GPU too, without TF32."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def keep_memory():
    """Have glibc keep freed memory instead of returning it to the kernel at every step.

    On two CPU cores float32 training of resnet9 becomes 1.5 times as fast, forward passes 1.25
    times.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt:
            mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def name_and_peak(device):
    """(the device in words, the peak memory of this process so far in MiB).

    It is the GPU's memory on a GPU, and resident memory otherwise.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
        return torch.cuda.get_device_name(device), round(peak)
    return f"cpu, {torch.get_num_threads()} threads", round(_peak_resident() / 2**20)


def _peak_resident():
    """The most resident memory that this process has had so far, in bytes."""
    if resource:
        unit = 1 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss)
