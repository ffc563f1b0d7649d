"""A case on IPUs: its stages, its replicas, and the options that it sets, all of it plain data."""

from dataclasses import replace
from typing import Any, Dict, NamedTuple, Optional, Tuple, Union

from effnet_repro.config import Case, budget_overrides, get_case, override
from effnet_repro.divisors import mixing_group
from effnet_repro.network import segments
from effnet_repro.pipeline import check_accumulation, split_segments
from effnet_repro.recipe import trained_segments
from effnet_repro.scaling import ModelSpec

DEVICE_LOOP = 104  # Training steps of a device loop, published


def ipus_per_replica(
    num_stages: int,  # Stages of the pipeline, >= 1
) -> int:  # IPUs that one replica occupies
    """Return how many IPUs a replica occupies: its stages, rounded up to a power of two."""
    return 1 << (num_stages - 1).bit_length()


def check_optimizer(
    case: Case,  # To run on IPUs
) -> None:
    """Raise ValueError for an optimizer that the program for IPUs does not have."""
    if case.optimizer == "adamw":
        raise ValueError(
            f"On IPUs the optimizer is rmsprop or sgd. Received: optimizer='adamw' ({case.name}). "
            "Leave it out, or train on a CPU or GPU."
        )


def for_ipus(
    case: Case,  # A case in its published layout
    ipus: int = 16,  # IPUs to lay it out for, over all processes
) -> Case:  # The same experiment with as many replicas as fit, and its global batch
    """Lay a `case` out on a machine of `ipus` IPUs.

    Replicas and accumulation change, stages and global batch stay. Raises ValueError where the stages do not divide
    the IPUs, where the accumulation does not suit the schedule, or where mixing groups do not divide a micro-batch.
    """
    check_optimizer(case)
    each = ipus_per_replica(case.num_stages)
    if ipus % each or ipus < each:
        raise ValueError(
            f"The stages must divide the IPUs. Received: {case.num_stages} stages, which take {each} IPUs a "
            f"replica, on {ipus} IPUs ({case.name}). Use a multiple of {each} IPUs, or other pipeline_splits."
        )
    case = override(case, num_replicas=ipus // each)
    if case.micro_batch_size % case.mix_groups[1]:
        raise ValueError(
            "On IPUs a micro-batch is mixed by itself, so mix_group_size must divide it. Received: mix_group_size="
            f"{case.mix_group_size}, micro_batch_size={case.micro_batch_size} ({case.name}). Leave mix_group_size out."
        )
    check_accumulation(case.pipeline_schedule, case.num_stages, case.gradient_accumulation)
    return case


def resolve_for_ipus(
    case: Union[str, Case],  # A case or its published name
    ipus: int = 16,  # IPUs over all processes
    budget: str = "auto",  # See `config.budget_overrides`
    data_given: bool = False,  # Whether the user pointed at a data set
    **overrides,  # The user's own values; None means what the budget or the case says
) -> Case:
    """Return the case that runs on `ipus` IPUs: the published one, with the budget's changes and the user's own.

    The case keeps its batch, which belongs to its layout, so a budget changes everything else. Raises ValueError for
    an unknown name, and where `for_ipus` does.
    """
    case = get_case(case) if isinstance(case, str) else case
    name, changes = budget_overrides(budget, data_given)
    if name == "small":
        raise ValueError(
            "The budget small trains with AdamW, which the program for IPUs does not have. Received: budget='small' "
            f"({case.name}). Use the budget case, or train on a CPU or GPU."
        )
    batch = ("global_batch_size", "micro_batch_size")
    changes = {k: v for k, v in changes.items() if k not in batch}
    merged = {**changes, **{k: v for k, v in overrides.items() if v is not None}}
    published, case = case, override(case, **merged)
    if published.mix_group_size is None and "mix_group_size" not in merged:
        group = mixing_group(case.micro_batch_size, published.micro_batch_size)
        case = case if group == case.micro_batch_size else replace(case, mix_group_size=group)
    case = replace(case, **{k: v for k, v in merged.items() if v is None})
    return for_ipus(case, ipus)


def finetune_layout(
    case: Case,  # From `runs.finetune_case`: on one device
    ipus: int = 16,  # IPUs, each a replica
    micro_batch_size: Optional[int] = None,  # Images at a time; None = the most that divides
) -> Case:  # One IPU a replica
    """Lay a fine-tuning out over single IPUs: a replica each, the same global batch.

    Published: single IPUs, 16 replicas, a global batch of 512. Ours: the micro-batch is the largest divisor of a
    replica's images that the training's micro-batch allows. Raises ValueError where the IPUs do not divide the batch.
    """
    check_optimizer(case)
    if case.global_batch_size % ipus:
        raise ValueError(
            f"The global batch must be a multiple of the IPUs. Received: global_batch_size="
            f"{case.global_batch_size}, {ipus} IPUs. Use another global_batch_size."
        )
    own = case.global_batch_size // ipus
    most = min(case.micro_batch_size, own)
    micro = micro_batch_size or max(m for m in range(1, most + 1) if own % m == 0)
    share = tuple(sorted(case.available_memory_proportion)[:1])  # of several: the fullest stage's
    group = case.mix_group_size and mixing_group(micro, case.mix_groups[1])
    layout = dict(num_replicas=ipus, micro_batch_size=micro, mix_group_size=group)
    return override(case, **layout, available_memory_proportion=share)


def compute_dtype(
    case: Case,  # precision
) -> str:  # Type of activations
    """Return the type of activations, "float16" or "float32"."""
    return "float32" if case.precision == "32.32" else "float16"


def _convolution_options(case):
    options = {}
    if len(case.available_memory_proportion) == 1:
        options["availableMemoryProportion"] = str(case.available_memory_proportion[0])
    if case.enable_half_partials and case.precision != "32.32":
        options["partialsType"] = "half"
    if case.enable_conv_dithering:
        options["enableConvDithering"] = "true"
    return options


def machine_options(
    case: Case,  # In the layout to run
    ipus: Optional[int] = None,  # IPUs of this process; None = popdist chooses them
    connection: str = "ALWAYS",  # or "ON_DEMAND", or "PRE_COMPILE": compile without a device
) -> Dict[str, Any]:  # Dotted name of an `IPUConfig` field -> value; enumerations by name
    """Return the fields of Graphcore's `IPUConfig` that a `case` sets, as plain data: no SDK is needed to read them.

    Source: `ipu_utils.py`, `train.py` and `efficientnet.py` of the published code.
    """
    target = case.internal_exchange_optimisation_target
    convolutions = _convolution_options(case)
    matmuls = {k: v for k, v in convolutions.items() if k == "partialsType"}
    compilation = {"opt.internalExchangeOptimisationTarget": target}
    # "portable" lets the seed decide how 16-bit sums are rounded
    workers = "portable" if case.stochastic_rounding else "false"
    compilation["target.deterministicWorkers"] = workers
    options = {
        "allow_recompute": case.enable_recomputation,
        "compilation_poplar_options": compilation,
        "convolutions.poplar_options": convolutions,
        "matmuls.poplar_options": matmuls,
        "norms.use_stable_statistics": True,
        "floating_point_behaviour.esr": case.stochastic_rounding,
        "floating_point_behaviour.nanoo": True,
        "optimizations.maximum_cross_replica_sum_buffer_size": 10 * 1024**2,
        "optimizations.minimum_remote_tensor_size": 128,
        "scheduling.algorithm": "SHORTEST_PATH",
        "device_connection.type": connection,
    }
    if connection != "ALWAYS":
        options["device_connection.enable_remote_buffers"] = True
    if connection == "PRE_COMPILE":
        options["device_connection.version"] = "ipu2"
    if ipus is not None:
        options["auto_select_ipus"] = ipus
    return options


class StagePlan(NamedTuple):
    """How the stages of a program lie on a replica's IPUs."""

    splits: Tuple[str, ...]  # Segments that begin a stage
    device_mapping: Tuple[int, ...]  # IPU of each stage
    pipeline_schedule: str  # "Grouped", "Interleaved" or "Sequential"


def plan_stages(
    case: Case,  # In the layout to run
    spec: ModelSpec,  # Its network
) -> StagePlan:
    """Return where the stages of a `case` lie on a replica's IPUs.

    A single stage is cut in two all the same, because a pipeline has at least two stages; both run on one IPU in turn.
    Raises ValueError for splits that are no segments of the network, or that do not suit the schedule.
    """
    n = case.num_stages
    if n > 1:
        split_segments(spec, case.pipeline_splits, n)
        check_accumulation(case.pipeline_schedule, n, case.gradient_accumulation)
        return StagePlan(tuple(case.pipeline_splits), tuple(range(n)), case.pipeline_schedule)
    names = [s.name for s in segments(spec)]
    first = trained_segments(names, case.variable_filter)[0]  # a frozen part stands apart
    cut = first if first != names[0] else names[len(names) // 2]
    return StagePlan((cut,), (0, 0), "Sequential")


def pipeline_options(
    case: Case,  # In the layout to run
    plan: StagePlan,  # From `plan_stages`
    updates_per_run: int = 1,  # Weight updates of one program run; the learning rate holds for all
) -> Dict[str, Any]:  # Keyword arguments of `pipelining_ops.pipeline`, as plain data
    """Return the options of `pipelining_ops.pipeline` for a `case`, as plain data.

    Raises ValueError for a number of `available_memory_proportion` that is neither one nor two a stage.
    """
    options = dict(
        gradient_accumulation_count=case.gradient_accumulation,
        repeat_count=updates_per_run,
        device_mapping=list(plan.device_mapping),
        pipeline_schedule=plan.pipeline_schedule,
        offload_weight_update_variables=not case.disable_variable_offloading,
        accumulate_outfeed=True,
    )
    share = case.available_memory_proportion
    if len(share) > 1:
        if len(share) != 2 * len(plan.device_mapping):
            raise ValueError(
                f"`available_memory_proportion` has one value, or two a stage: convolutions and matrix "
                f"products. Received: {len(share)} values for {len(plan.device_mapping)} stages ({case.name})."
            )
        options["stage_memory"] = [share[i : i + 2] for i in range(0, len(share), 2)]
    return options
