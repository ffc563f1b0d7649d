"""Memory of a run before it begins, modeled from counts; and its time, measured over its first steps."""

import contextlib
import os
import time
from pathlib import Path

import keras

from effnet_repro.config import Case
from effnet_repro.data import DataSet
from effnet_repro.messages import say
from effnet_repro.recipe import steps_per_epoch, total_updates
from effnet_repro.scaling import count
from effnet_repro.training.device import choose_precision, device_name, has_jax_gpu
from effnet_repro.training.memory import found_gib, needed_bytes, needed_gib


def memory_warning(case):
    "Say that a micro-batch may need more memory than a CPU has, and which would fit; None if it fits"
    found, needed = found_gib(), needed_gib(case, case.micro_batch_size)
    if found is None or needed <= found or not device_name().startswith("CPU"):
        return None
    fits = lambda n: not case.global_batch_size % n and needed_gib(case, n) <= found
    most = max(filter(fits, range(1, case.micro_batch_size)), default=None)
    hint = f"micro_batch_size={most} would fit" if most else "not even one image would fit"
    return (
        f"{case.micro_batch_size} images of {case.image_size} pixels at a time need about {needed:.1f} "
        f"GiB of memory, and there are {found:.1f}: the system may end the run without a word. {hint}."
    )


def estimate(
    case: Case,  # Laid out for one device
    data: DataSet,  # Images
    share: float = 0.1,  # Of a matrix product's speed that the network reaches. Ours: measured on two cores
) -> dict:  # seconds_per_update, updates, hours, memory_gib: modeled, not measured
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
    """Print how many steps are to come and what memory they take; how long, `CostWatch` says once it is measured."""
    gpu = has_jax_gpu()
    bytes_of = lambda: needed_bytes(case, case.micro_batch_size, choose_precision())
    gib = bytes_of() / 2**30 if gpu else needed_gib(case, case.micro_batch_size)
    steps = total_updates(case, steps_per_epoch(case, data.train_count))
    say(
        f"estimate: {min(steps, case.max_steps or steps):,} training steps of {case.global_batch_size} images, "
        f"about {gib:.1f} GiB of memory; the time is measured over the first steps"
    )
    if warning := memory_warning(case):
        say(f"warning: {warning}")


def process_age() -> float:
    """Return the seconds since this process began; since this module was imported, where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.perf_counter() - _IMPORTED


_IMPORTED = time.perf_counter()


class CostWatch:
    """Tells what a run takes from the time of its own steps, and once more when an epoch's end has been seen.

    - `first`, `last`: training steps done already, and done in the end.
    - `per_epoch`: training steps of an epoch.
    - `say`: prints a line. `clock`: seconds of a clock. `age`: seconds since the process began.

    Call `step` whenever a step was started. The first steps compile and are left out; what passes between the last step
    of an epoch and the first of the next is validation, checkpoints and the like, and is counted apart.
    """

    warm, enough, seconds = (
        3,
        20,
        10.0,
    )  # steps left out; steps, or seconds of several, that are enough

    def __init__(self, first, last, per_epoch, say=say, clock=time.perf_counter, age=process_age):
        self.now, self.last, self.per_epoch = first, last, per_epoch
        self.say = say
        self.clock, self.age, self.before = clock, age, None
        self.began, self.seen, self.steps, self.ends, self.told = first, 0, [], [], None

    def step(self):
        """Count a step."""
        time_now, ended = self.clock(), self.now > self.began and self.now % self.per_epoch == 0
        if self.before is not None:
            if ended:
                self.ends.append(time_now - self.before)
            elif self.seen >= self.warm:
                self.steps.append(time_now - self.before)
        self.before, self.now, self.seen = time_now, self.now + 1, self.seen + 1
        if len(self.ends) == 1 and ended and self.steps:
            self._tell(again=True)
        elif self.told is None and self._is_enough():
            self._tell()

    def _is_enough(self):
        n = len(self.steps)
        return n >= self.enough or (n >= 2 and sum(self.steps) >= self.seconds)

    def _tell(self, again=False):
        each = sorted(self.steps)[len(self.steps) // 2]
        end = sum(self.ends) / len(self.ends) - each if self.ends else 0.0
        ends = -(-self.last // self.per_epoch) - self.now // self.per_epoch
        whole = self.age() + each * (self.last - self.now) + max(end, 0.0) * ends
        if again and self.told is not None and 1 / 1.2 < whole / self.told < 1.2:
            return
        with_ends = ", with validation and checkpoints" if self.ends else ", without validation"
        self.say(
            f"estimate (measured): {span(whole)} in all, of which {span(self.age())} have passed; "
            f"{each:.2g} s a training step{with_ends}"
        )
        self.told = whole


def span(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    for size, unit in ((72 * 3600, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / {'days': 86400, 'hours': 3600, 'minutes': 60}[unit]:,.1f} {unit}"
    return f"{seconds:.0f} seconds"
