"""The micro-batch of this machine: the largest that fits, among those that divide a training step over its devices.

What a training step needs is modeled (`memory.needed_bytes` for a GPU, checked against the peaks of
`results/gpu_speed.csv`; `memory.needed_gib` for a CPU). Neither the norms of the published cases nor what is drawn
depend on the micro-batch, so a larger one changes only the order of sums. Batch norm does depend on it, and so do runs
of earlier versions (`mix_group_size` 0): these keep theirs.
"""

from dataclasses import replace
from typing import Sequence

from effnet_repro.config import Case
from effnet_repro.data.device import memory_of_gpu
from effnet_repro.messages import say
from effnet_repro.runs import Resolved, may_change_micro_batch
from effnet_repro.scaling import ModelSpec, blocks
from effnet_repro.training.device import (
    choose_precision,
    has_jax_gpu,
    has_other_processes,
    is_tensorflow_cpu,
)
from effnet_repro.training.memory import found_gib, needed_bytes, needed_gib

#: Share of a GPU's memory that a step may take; a resident set has an eighth, and an allocator wastes some.
SHARE = 0.8
#: The same of a computer's own memory, where other programs run, too; and the most images at a time with which steps of
#: TensorFlow on a CPU were measured (`results/cpu_micro_batch.csv`)
CPU_SHARE, CPU_IMAGES = 0.25, 128


def most_images(case: Case) -> int:
    """Return how many images at a time the kernels can address: the largest activation has fewer than 2^31 numbers."""
    side, largest = case.image_size // 2, 0
    for block in blocks(ModelSpec.from_case(case)):
        largest = max(largest, side * side * block.expanded)
        side = -(-side // block.strides)
    return (2**31 - 1) // largest


def share_out(
    case: Case,  # Its global batch and mixing groups
    devices: int,  # There are
) -> int:  # Devices that take part
    """Return over how many devices a training step can be shared out, whole mixing groups to each."""
    parts = case.mix_groups[0] if case.mixes else case.global_batch_size
    return max(n for n in range(1, devices + 1) if parts % n == 0)


def largest_micro_batch(
    case: Case,  # Laid out for one process
    devices: int,  # GPUs of the process
    memory: float,  # Of each, bytes
    precision: str = "bfloat16",  # Type to compute in
) -> int:  # Images at a time on one device
    """Return the largest micro-batch that fits and divides; one of whole mixing groups, where there is one."""
    fits = lambda m: needed_bytes(case, m, precision) <= SHARE * memory and m <= most_images(case)
    return _largest_part(case, case.global_batch_size // share_out(case, devices), fits)


def largest_on_cpu(
    case: Case,  # Laid out for one process
    memory: float,  # Of the computer, GiB
) -> int:  # Images at a time
    """Return the largest micro-batch that leaves room for other programs; never a smaller one than the case's."""
    fits = lambda m: m <= CPU_IMAGES and needed_gib(case, m) <= CPU_SHARE * memory
    return max(_largest_part(case, case.global_batch_size, fits), case.micro_batch_size)


def _largest_part(case, images, fits):
    "The largest divisor of so many images that fits; one of whole mixing groups, where there is one"
    sizes = [m for m in range(1, images + 1) if images % m == 0 and fits(m)] or [1]
    return max([m for m in sizes if m % case.mix_groups[1] == 0] or sizes)


def settle_micro_batch(
    case: Case,  # Laid out for one process
    given: Sequence[str] = (),  # Fields that the user named
    precision: str = "auto",  # Type to compute in
) -> Case:
    """Give a case the micro-batch of the devices here, and say so; where one was asked for, do nothing."""
    if not may_change_micro_batch(case, given):
        return case
    m = _on_gpus(case, precision) if has_jax_gpu() else _on_cpu(case)
    if m == case.micro_batch_size:
        return case
    say(f"micro-batch: {m} images at a time, the largest that fits (--micro-batch-size)")
    return replace(case, micro_batch_size=m, gradient_accumulation=case.global_batch_size // m)


def _on_gpus(case, precision):
    "The micro-batch for the GPUs here; the case's, if they do not tell their memory"
    import jax

    devices = jax.devices() if has_other_processes() else jax.local_devices()
    count, memory = len(devices), memory_of_gpu()
    if memory is None:
        return case.micro_batch_size
    return largest_micro_batch(case, count, memory, choose_precision(precision))


def _on_cpu(case):
    "The micro-batch for TensorFlow on a CPU; elsewhere the case's"
    memory = found_gib() if is_tensorflow_cpu() else None
    return case.micro_batch_size if memory is None else largest_on_cpu(case, memory)


def divided_micro_batch(
    case: Case,  # Laid out for one process
    devices: int,  # Of all processes together
    given: Sequence[str] = (),  # Fields that the user named
) -> Case:
    """Give a case a smaller micro-batch where its micro-batches cannot be shared by `devices`, and say so.

    Where none does it, or one was asked for, the case stays, and `use_devices` refuses it.
    """
    if case.gradient_accumulation % devices == 0 or not may_change_micro_batch(case, given):
        return case
    if case.global_batch_size % devices:
        return case
    fits = lambda m: m <= case.micro_batch_size
    m = _largest_part(case, case.global_batch_size // devices, fits)
    say(f"micro-batch: {m} images at a time, so that {devices} devices share a training step")
    return replace(case, micro_batch_size=m, gradient_accumulation=case.global_batch_size // m)


def settle_run(
    run: Resolved,  # Before it begins
    precision: str = "auto",  # Type to compute in
) -> Resolved:
    """Give a new run the micro-batch of the devices here; a run that was begun, or was settled before, stays as it is.

    Where several processes train, its micro-batches must be shared by all their devices, even if it was begun.
    """
    case = run.case if run.begun else settle_micro_batch(run.case, run.named, precision)
    if has_other_processes():
        import jax

        case = divided_micro_batch(case, jax.device_count(), run.named)
    if case is run.case:
        return run
    settled = (*run.settled, "micro_batch_size", "gradient_accumulation")
    return replace(run, case=case, settled=settled)
