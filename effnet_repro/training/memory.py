"""The memory that a training step needs, and the memory that there is."""

import contextlib
import os
from pathlib import Path
from typing import Optional

from effnet_repro.config import Case
from effnet_repro.scaling import count

#: Bytes that a training step keeps of each number that the layers write, in 16 bits. Ours: 3.5 to 4.05 were measured.
KEPT_BYTES = 4.1


def needed_bytes(
    case: Case,  # Network and image size
    images: int,  # At a time
    precision: str = "bfloat16",  # Type to compute in; float32 takes twice the memory
) -> float:  # Bytes at the peak of a training step
    """Model the memory of a training step on a GPU: weights, slots, gradients, images and activations."""
    cost, wide = count(case, case.image_size), 2 if precision == "float32" else 1
    state = 4 * (3 + 2) * cost.params
    each = KEPT_BYTES * wide * cost.activations + 8 * case.image_size**2
    return state + each * images


def needed_gib(
    case: Case,  # Network and image size
    images: int,  # At a time
) -> float:  # GiB
    """Model the memory of a run on a CPU with TensorFlow. Ours: a fit to `results/cpu_memory.csv`."""
    cost = count(case, case.image_size)
    return 1.14 + (12.6 * cost.params + 2.51 * cost.activations * images) * 4 / 2**30


def found_gib() -> Optional[float]:  # GiB
    """Return the memory that this process may use, by the machine and its control group; None where nothing tells."""
    found = []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or no limit
            found.append(int(Path(path).read_text()))
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not on Windows
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(found) / 2**30 if found else None
