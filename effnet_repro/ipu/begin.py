"""Train a case on IPUs, or fine-tune a trained network there: what a user calls."""

from typing import Optional, Sequence, Union

from effnet_repro.classes import match_run
from effnet_repro.config import Case, get_case
from effnet_repro.data import open_data
from effnet_repro.ipu.layout import ipus_per_replica
from effnet_repro.ipu.poprun import count_ipus
from effnet_repro.ipu.resolved import resolve_finetuning, resolve_training
from effnet_repro.ipu.runtime import IPURuntime
from effnet_repro.ipu.sdk import Graphcore
from effnet_repro.messages import say
from effnet_repro.runs import Options, Resolved, Run, Task, begin_from, execute, refuse_more


def train(
    case: Union[str, Case, Resolved],  # A published name, a case, or what `resolve_training` gave
    data_dir=None,  # Folder of images; None = the built-in sample set
    run_dir=None,  # Where everything is written; None = runs/<name of the case>
    *,
    ipus: Optional[int] = None,  # IPUs over all processes; None = poprun's, or 16
    budget: str = "auto",  # "case", "demo", "smoke" or "auto": see `config.budget_overrides`
    seed: int = 0,  # Of weights, order, crops, mixing and masks
    data_format: Optional[str] = None,  # "tfrecord", "folder" or "cifar"; None = see the files
    init=None,  # Run folder or checkpoint to begin from; None = fresh weights
    weights: str = "auto",  # Of `init`: "last", "average", "auto" = the average after a long run
    validation: bool = True,  # Validate at the end; under poprun a process of its own does that
    keep: int = 2,  # Checkpoints to keep, >= 1
    on_corrupt: str = "refuse",  # or "skip": leave damaged images out, see `open_data`
    connection: str = "ALWAYS",  # or "ON_DEMAND", or "PRE_COMPILE": compile and stop
    **overrides,  # Fields of the case; None means what the case says
) -> Run:
    """Train a `case` on IPUs, or go on with it when `run_dir` holds a checkpoint.

    The case keeps its published layout on as many IPUs as there are. Raises ImportError without Graphcore's TensorFlow,
    and ValueError where case, data or weights do not fit each other.
    """
    graphcore, data = Graphcore(), open_data(data_dir, data_format, on_corrupt=on_corrupt)
    if isinstance(case, Resolved):
        refuse_more(run_dir, overrides)
        plan = _checked(graphcore, case)
    else:
        start = get_case(case) if isinstance(case, str) else case
        stages = overrides.get("num_stages") or start.num_stages
        ipus = count_ipus(graphcore, ipus_per_replica(stages), ipus)
        given = data_dir is not None
        plan = resolve_training(start, run_dir, ipus, budget, given, **overrides)
    notes, arrays = plan.notes, None
    if init is not None:
        arrays, data, source, _ = begin_from(init, weights, data, plan.case)
        notes = {**notes, "init": str(source)}
    options = _options(graphcore, seed, keep, validation)
    return _run(graphcore, Task(plan.case, data, plan.run_dir, arrays, options, notes), connection)


def finetune(
    init,  # A run folder or a checkpoint to begin from, or what `resolve_finetuning` gave
    data_dir=None,  # Folder of images; None = the built-in sample set
    run_dir=None,  # None = <run folder of init>/finetune-<image size>
    *,
    ipus: Optional[int] = None,  # IPUs over all processes, each a replica
    image_size: Optional[int] = None,  # Side to fine-tune at; None = see `runs.finetune_size`
    variable_filter: Sequence[str] = ("Top",),  # e.g. ("Top", "block7", "block6")
    protocol: str = "published",  # or "clean"
    weights: str = "auto",  # "last", "average", "auto" = the average after a long run
    seed: int = 0,
    data_format: Optional[str] = None,
    validation: bool = True,
    keep: int = 2,
    on_corrupt: str = "refuse",
    connection: str = "ALWAYS",
    micro_batch_size: Optional[int] = None,  # Images of an IPU at a time
    **overrides,  # Fields of the case, e.g. epochs=1, global_batch_size=64
) -> Run:
    """Train the last layers of a trained network a little more, on single IPUs: see `finetune_layout`.

    Raises ImportError without Graphcore's TensorFlow, and ValueError where weights and data do not fit each other.
    """
    graphcore, data = Graphcore(), open_data(data_dir, data_format, on_corrupt=on_corrupt)
    if isinstance(init, Resolved):
        refuse_more(run_dir, overrides)
        plan = _checked(graphcore, init)
    else:
        how = dict(image_size=image_size, variable_filter=variable_filter, protocol=protocol)
        how.update(micro_batch_size=micro_batch_size, **overrides)
        plan = resolve_finetuning(init, run_dir, count_ipus(graphcore, 1, ipus), **how)
    arrays, data, source, _ = begin_from(plan.init, weights, data, plan.start)
    options = _options(graphcore, seed, keep, validation)
    notes = {**plan.notes, "init": str(source)}
    return _run(graphcore, Task(plan.case, data, plan.run_dir, arrays, options, notes), connection)


def _checked(graphcore, plan):
    "A resolved run, if it was laid out for the IPUs that poprun gives"
    each = ipus_per_replica(plan.case.num_stages)
    laid_out = plan.case.num_replicas * each
    there = count_ipus(graphcore, each, laid_out)
    if there != laid_out:
        raise ValueError(
            f"The run was laid out for {laid_out} IPUs. Received: {there} from poprun. Use --ipus {there}."
        )
    return plan


def _options(graphcore, seed, keep, validation):
    "How a run on IPUs is done: between two epochs the machine is not given to a validation"
    at_the_end = validation and graphcore.popdist is None
    return Options(seed, 0 if at_the_end else None, keep)


def _run(graphcore, task, connection):
    "Run a task, or compile its program and stop"
    runtime = IPURuntime(graphcore, task, connection)
    if connection != "PRE_COMPILE":
        return execute(task, runtime)
    runtime.begin(match_run(task.run_dir, task.data), 0, task.weights)
    runtime.build().run(0.0)
    say(f"{task.case.name}: compiled; nothing was run")
    return Run(task.run_dir, task.case, 0, False, None, None, {})
