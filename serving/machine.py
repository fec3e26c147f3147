"""What kind of machine this is, as far as speed and the last bits of a prediction go."""

from __future__ import annotations

import functools
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path


def cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine_kind() -> str:
    """Name the kind of this machine: GPUs, processor, cores, and the torch that computes on it.

    Does not import torch: GPUs are named where a model has done so already.
    """
    torch = sys.modules.get("torch")
    cards = torch.cuda.device_count() if torch else 0
    card = f"{cards} x {torch.cuda.get_device_name(0)}, " if torch and cards else ""
    return f"{card}{_processor()}, {cores()} cores, torch {version('torch')}"


@functools.cache
def _processor(path: Path = Path("/proc/cpuinfo")) -> str:
    """Name the processor; family and model tell apart what clouds call by one name."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    # The first processor's lines: later ones do not replace them.
    told: dict[str, str] = {}
    for name, value in (line.split(":", 1) for line in lines if ":" in line):
        told.setdefault(name.strip(), value.strip())
    if "model name" not in told:
        return platform.processor() or platform.machine()
    return f"{told['model name']} {told.get('cpu family', '')}.{told.get('model', '')}"
