"""The machine that a benchmark runs on."""

import os
import platform
from pathlib import Path


def cpu_model():
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(n.split(":")[1].strip() for n in lines if n.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def num_cores():
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
