"""What a run computes on: the device, the precision, and what they are called."""
import platform
import warnings
from pathlib import Path

import torch

from utils.config_files import ConfigError


def choose_device(device):
    """The torch device of `--device`: auto is CUDA if there, else the CPU. A CUDA device becomes the current one.

    Raises:
        ConfigError: a CUDA device that is not there, or cannot be used.
    """
    count = torch.cuda.device_count()
    with warnings.catch_warnings(action="ignore"):
        usable = torch.cuda.is_available()
    if count and not usable and device != "cpu":
        raise ConfigError(f"--device: {device} finds a GPU, but CUDA does not start; its driver may be too old for "
                          f"torch {torch.__version__}; cpu always works")  # fmt: skip
    if device == "auto":
        device = "cuda" if count else "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        if (device.index or 0) >= count:
            raise ConfigError(f"--device: {device} is not there: torch sees {count} CUDA devices; cpu always works")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)  # streams and graphs are made on the current one
    return device


def choose_precision(precision, device):
    """The precision of the backbone, fp32, bf16 or fp16: auto is bf16 on GPUs and CPUs that multiply it, else fp32.

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


def describe_hardware(device):
    """What a run on `device` computes on, in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{cpu}, {torch.get_num_threads()} threads{gpu}"
