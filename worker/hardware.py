"""What this machine trains with: the device, the threads, and the coarse class that is said to the coordinator."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Final, Literal

from protocol.errors import DeviceUnavailable
from protocol.limits import MAX_TEXT_CHARACTERS

DeviceChoice = Literal["auto", "cpu", "cuda"]

_NVIDIA_DRIVER: Final = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""Device files of NVIDIA's driver on Linux and under WSL: without one, torch need not even be asked."""
_CPU_INFO: Final = Path("/proc/cpuinfo")
_INSTRUCTION_SETS: Final = ("avx512f", "avx2", "asimd")


def resolve_device(choice: DeviceChoice) -> str:
    """Return "cpu" or "cuda".

    Raises:
        DeviceUnavailable: "cuda" was asked for, and torch finds no such device.
    """
    if choice == "cpu" or (choice == "auto" and not any(path.exists() for path in _NVIDIA_DRIVER)):
        return "cpu"  # without importing torch, which takes seconds
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if choice == "auto":
        return "cpu"
    raise DeviceUnavailable(
        "--device cuda was asked for, but torch finds no CUDA device here; --device cpu works everywhere."
    )


def resolve_threads(asked: int | None) -> int:
    """Return how many CPU threads to train with: what was asked for, else all that this process may use."""
    if asked is not None:
        return asked
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_class(device: str, threads: int) -> str:
    """Return a coarse description of what computes here, such as "cpu-x86_64-avx2-torch2.13-t1".

    It routes replicas and feeds calibration; it never names the machine.
    """
    torch_version = ".".join(importlib.metadata.version("torch").split(".")[:2])
    if device == "cuda":
        import torch

        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
        described = f"cuda-{name}-torch{torch_version}-cuda{torch.version.cuda}"
    else:
        described = f"cpu-{platform.machine().lower()}-{_instruction_set()}-torch{torch_version}-t{threads}"
    return described[:MAX_TEXT_CHARACTERS]


def _instruction_set() -> str:
    try:
        words = set(_CPU_INFO.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return "generic"
    return next((name.removesuffix("f") for name in _INSTRUCTION_SETS if name in words), "generic")
