"""Time and memory of a run before it begins: modelled from counts, to a tenth for memory."""

import contextlib
import os
import time
from pathlib import Path

import keras

from effnet_repro.config import Case
from effnet_repro.data import DataSet
from effnet_repro.recipe import steps_per_epoch, total_updates
from effnet_repro.scaling import count
from effnet_repro.training.device import device_name


def needed_gib(case, pictures):
    "Memory of a run with so many pictures at a time. Ours: a fit to what was measured on a CPU"
    cost = count(case, case.image_size)
    return 1.14 + (12.6 * cost.params + 2.51 * cost.activations * pictures) * 4 / 2**30


def found_gib():
    "Memory that this process may use, by the machine and its control group; None where nothing tells"
    found = []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or no limit
            found.append(int(Path(path).read_text()))
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not on Windows
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(found) / 2**30 if found else None


def memory_warning(case):
    "Say that a micro-batch may need more memory than a CPU has, and which would fit; None if it fits"
    found, needed = found_gib(), needed_gib(case, case.micro_batch_size)
    if found is None or needed <= found or not device_name().startswith("CPU"):
        return None
    fits = lambda n: not case.global_batch_size % n and needed_gib(case, n) <= found
    most = max(filter(fits, range(1, case.micro_batch_size)), default=None)
    way_out = f"micro_batch_size={most} would fit" if most else "not even one picture would fit"
    return (
        f"{case.micro_batch_size} pictures of {case.image_size} pixels at a time need about {needed:.1f} "
        f"GiB of memory, and there are {found:.1f}: the system may end the run without a word. {way_out}."
    )


def estimate(
    case: Case,  # Laid out for one device
    data: DataSet,  # Pictures
    share: float = 0.1,  # Of a matrix product's speed that the network reaches. Ours: measured on two cores
) -> dict:  # seconds_per_update, updates, hours, memory_gib: modelled, not measured
    "Estimate what a run will cost on this device"
    a = keras.random.normal((1024, 1024))
    keras.ops.convert_to_numpy(keras.ops.matmul(a, a))
    begin, n = time.perf_counter(), 0
    while time.perf_counter() - begin < 0.2:
        keras.ops.convert_to_numpy(keras.ops.matmul(a, a))
        n += 1
    rate = n * 1024**3 / (time.perf_counter() - begin)  # multiply-adds a second
    cost = count(case, case.image_size)
    seconds = 3 * cost.macs * case.global_batch_size / (share * rate)
    updates = total_updates(case, steps_per_epoch(case, data.train_count))
    updates = min(updates, case.max_steps or updates)
    return {
        "seconds_per_update": seconds,
        "updates": updates,
        "hours": seconds * updates / 3600,
        "memory_gib": needed_gib(case, case.micro_batch_size),
    }


def say_estimate(case, data):
    """Tell what a run will cost: steps, seconds a step, hours, GiB of memory; and warn where memory is short."""
    e = estimate(case, data)
    hours = e["hours"]
    span = (
        f"{hours:,.1f} hours"
        if 1 <= hours < 72
        else f"{hours / 24:,.0f} days"
        if hours >= 72
        else ""
    )
    span = span or f"{max(hours * 60, 0.1):.1f} minutes"
    print(
        f"estimate (modelled): {e['updates']:,} updates of {case.global_batch_size} pictures, "
        f"{e['seconds_per_update']:.2g} s each, {span}; about {e['memory_gib']:.1f} GiB of memory",
        flush=True,
    )
    if warning := memory_warning(case):
        print(f"warning: {warning}", flush=True)
