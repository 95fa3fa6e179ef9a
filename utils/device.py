"""What a run computes on: the device, the precision, and what they are called."""
import math
import os
import platform
import re
import warnings
from pathlib import Path

import torch

from datasets.data import one_line
from utils.config_files import ConfigError, check_device


def choose_device(device):
    """The torch device of `--device`: auto is CUDA if there, else the CPU. A CUDA device becomes the current one.

    Raises:
        ConfigError: no such device, or a GPU that is not there or cannot be used.
    """
    check_device(str(device))
    count = torch.cuda.device_count()
    with warnings.catch_warnings(action="ignore"):
        usable = torch.cuda.is_available()
    if count and not usable and device != "cpu":
        raise ConfigError(f"--device: {device} finds a GPU, but CUDA does not start; its driver may be too old for "
                          f"torch {torch.__version__}; cpu always works")
    if device == "auto":
        device = "cuda" if count else "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        if (device.index or 0) >= count:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            why = "" if visible is None else f", because CUDA_VISIBLE_DEVICES is {visible!r}"
            raise ConfigError(f"--device: {device} is not there: torch sees {count} CUDA devices{why}; cpu always "
                              "works")
        device = torch.device("cuda", device.index or 0)
        with warnings.catch_warnings(action="ignore"):
            _try_gpu(device)
        torch.backends.cudnn.deterministic = True  # else a resumed run need not be the same one
    return device


def _try_gpu(device):
    """Make a GPU the current one, on which streams and graphs are made, and compute something on it.

    Raises:
        ConfigError: it is too old for this torch, busy, full or broken.
    """
    try:
        torch.cuda.set_device(device)
        major, minor = torch.cuda.get_device_capability(device)
        kernels = [re.fullmatch(r"sm_(\d+)(\d)\w?", arch) for arch in torch.cuda.get_arch_list()]
        least = min(((int(found[1]), int(found[2])) for found in kernels if found), default=(0, 0))
        if (major, minor) < least:
            raise ConfigError(f"--device: {device} has compute capability {major}.{minor}, and this torch "
                              f"{torch.__version__} computes from {least[0]}.{least[1]} on; install a torch of an "
                              "older CUDA, or take cpu")
        torch.ones(2, device=device).sum().item()
    except RuntimeError as e:
        why = "its memory is full" if out_of_memory(e) else one_line(e, 100)
        raise ConfigError(f"--device: {device} cannot be used ({why}); see who uses it with nvidia-smi, or take "
                          "another one or cpu") from e


def free_gpu_memory(device):
    """Bytes that are free on a GPU, with those that torch keeps for later; infinitely many on a CPU."""
    if device.type != "cuda":
        return math.inf
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def out_of_memory(e):
    """Whether an exception says, in torch's or a library's words, that memory ran out on whichever device."""
    words = ("can't allocate memory", "unable to find an engine", "ALLOC_FAILED", "out of memory")
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or any(word in str(e) for word in words)


def choose_precision(precision, device):
    """The precision of the backbone, fp32, bf16 or fp16: auto is bf16 on GPUs and CPUs that compute in it, else fp32.

    Raises:
        ConfigError: fp16 on a CPU, which has no use for it.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("--precision: fp16 needs a CUDA device; on a CPU take fp32 or bf16")
    if precision == "auto":
        # Emulated, bfloat16 is slower than float32.
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16", False) else "fp32"
    return precision


def default_threads(model):
    """CPU threads that a run computes on where nobody says how many: OMP_NUM_THREADS, else by cores and network.

    A step of conv is too short to be shared by more than four.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if wanted.isdecimal() and int(wanted):
        return int(wanted)
    return min(count_cores(), 4 if model == "conv" else 16)


def count_cores():
    """CPU cores that this process may use: by its affinity, and by its container's share of the machine's time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or no limit: "max"
        return cores


def describe_hardware(device):
    """What a run on `device` computes on, in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{cpu}, {torch.get_num_threads()} threads{gpu}"
