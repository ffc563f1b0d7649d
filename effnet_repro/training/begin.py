"""Train a case, or fine-tune a trained network, for its own classes or for others: what a user calls."""

from dataclasses import dataclass, replace
from typing import Optional, Sequence, Union

from effnet_repro.config import Case
from effnet_repro.data import say_found
from effnet_repro.distributed import ALONE, Processes, join_others, told
from effnet_repro.messages import say
from effnet_repro.runs import (
    Options,
    Reading,
    Resolved,
    Run,
    Task,
    begin_from,
    execute,
    refuse_more,
    resolve_finetuning,
    resolve_training,
    starting_case,
    training_folder,
)
from effnet_repro.scaling import mod32_warning
from effnet_repro.training.compiled import keep_compiled
from effnet_repro.training.device import configure
from effnet_repro.training.micro_batch import settle_run
from effnet_repro.training.runtime import KerasRuntime
from effnet_repro.transfer import Transfer, describe_head, new_head_for, read_body, resolve_transfer


def _join(backend, distributed):
    "The processes that train together, with Keras and what it keeps of compiled programs set up for this one"
    configure(backend)
    processes = join_others() if distributed else ALONE
    keep_compiled()
    return processes


@dataclass(frozen=True)
class _Call:
    "What a user chose besides case and weights"

    processes: Processes
    options: Options
    precision: str
    reading: Reading

    def opened(self, *runs):
        "The data, with the share for validation that was asked for, or that the first of these runs began with"
        return self.reading.open(*runs, lead=self.processes.lead)

    def execute(self, plan, data, arrays, notes):
        "Train the plan's case from these arrays, None = fresh ones"
        case, options = settle_run(plan, self.precision).case, self.options
        validates = options.validate_every is not None
        runtime = KerasRuntime(case, options.seed, self.precision, validates, self.processes)
        return execute(Task(case, data, plan.run_dir, arrays, options, notes), runtime)


def train(
    case: Union[str, Case, Resolved],  # A published name, a case, or what `resolve_training` gave
    data_dir=None,  # Folder of images; None = the built-in sample set
    run_dir=None,  # Where everything is written; None = runs/<name of the case>
    *,
    budget: str = "auto",  # "case", "small", "demo", "smoke" or "auto": see `budget_overrides`
    seed: int = 0,  # Of weights, order, crops, mixing and masks
    precision: str = "auto",  # Type to compute in: "float32", "bfloat16", "float16"
    backend: Optional[str] = None,  # "tensorflow" or "jax"; refused when Keras runs on the other
    data_format: Optional[str] = None,  # "tfrecord", "folder" or "cifar"; None = see the files
    on_corrupt: str = "refuse",  # or "skip": leave damaged images out, see `open_data`
    decoder: str = "auto",  # or "simplejpeg", "pillow", "tensorflow", "nvimagecodec"
    validation_split: Optional[float] = None,  # Share that validates, of class folders without such
    validate_every: Optional[
        int
    ] = 1,  # Epochs between validations; 0 = only at the end, None = never
    init=None,  # Run folder or checkpoint to begin from; None = fresh weights
    weights: str = "auto",  # Of `init`: "last", "average", "auto" = the average after a long run
    keep: int = 2,  # Checkpoints to keep, >= 1; the average needs none of them
    progress: bool = True,  # Whether to draw a progress bar
    config_path=None,  # File of cases and budgets in the form of config.yml; None = the published
    distributed: bool = False,  # Whether other processes take part: see `53_processes`
    checkpoint_every: Optional[float] = None,  # Minutes; None = at the end of each epoch only
    **overrides,  # Fields of the case, e.g. epochs=3, image_size=64; None means what the case says
) -> Run:
    "Train a `case`, or go on with it when `run_dir` holds a checkpoint"
    processes = _join(backend, distributed)
    options = Options(seed, validate_every, keep, progress, checkpoint_every)
    reading = Reading(data_dir, data_format, decoder, validation_split, on_corrupt)
    call, given = _Call(processes, options, precision, reading), data_dir is not None
    same = dict(case=str(case), budget=budget, init=init is None, data_given=given, **overrides)
    with told(processes, same):
        if isinstance(case, Resolved):
            refuse_more(run_dir, overrides)
            plan = case
            data = plan.data or call.opened(plan.run_dir)
        else:
            start = starting_case(case, config_path)
            run_dir = training_folder(start, run_dir)
            data = call.opened(run_dir)
            how = (start, run_dir, budget, given, config_path, data)
            made = lambda: replace(resolve_training(*how, **overrides), data=None)
            plan = processes.lead(made)
            if plan.why:
                say(plan.why)
        say_found(data)
        arrays, notes = None, plan.notes
        if init is not None:
            arrays, data, source, _ = begin_from(init, weights, data, plan.case, processes.lead)
            notes = {**notes, "init": str(source)}
        return call.execute(plan, data, arrays, notes)


def finetune(
    init,  # A run folder or checkpoint, or what `resolve_finetuning` gave; with `new_head` any weights
    data_dir=None,  # Folder of images; None = the built-in sample set
    run_dir=None,  # Where everything is written; None = <run folder of init>/finetune-<image size>
    *,
    new_head: bool = False,  # Whether the classifier begins anew, for the classes of the data
    arch: Optional[str] = None,  # With `new_head`: timm's name of a PyTorch file that has none
    image_size: Optional[int] = None,  # Pixels; None = `finetune_size`, with `new_head` as trained
    variable_filter: Optional[
        Sequence[str]
    ] = None,  # e.g. ("Top", "block7"); None = ("Top",), with `new_head` the whole network
    protocol: Optional[str] = None,  # None = "published", with `new_head` "transfer"; or "clean"
    weights: str = "auto",  # "last", "average", "auto" = the average after a long run
    budget: str = "auto",  # "case", "demo", "smoke" or "auto": the batch sizes of these
    seed: int = 0,
    precision: str = "auto",
    backend: Optional[str] = None,
    data_format: Optional[str] = None,
    on_corrupt: str = "refuse",
    decoder: str = "auto",
    validation_split: Optional[float] = None,  # None = that of the run in `run_dir`, or of `init`
    validate_every: Optional[int] = 1,
    keep: int = 2,
    progress: bool = True,
    distributed: bool = False,  # Whether other processes take part: see `53_processes`
    checkpoint_every: Optional[float] = None,  # Minutes; None = at the end of each epoch only
    **overrides,  # Fields of the case, e.g. epochs=1, global_batch_size=64
) -> Run:
    "Train the last layers of a trained network a little more: at another resolution, or for other classes"
    processes = _join(backend, distributed)
    if arch and not new_head:
        raise ValueError("`arch` is for files of PyTorch. They need new_head=True.")
    options = Options(seed, validate_every, keep, progress, checkpoint_every)
    reading = Reading(data_dir, data_format, decoder, validation_split, on_corrupt)
    call, data = _Call(processes, options, precision, reading), None
    how = dict(image_size=image_size, budget=budget, protocol=protocol, **overrides)
    how["variable_filter"] = variable_filter or (None if new_head else ("Top",))
    given = dict(new_head=new_head, data_given=data_dir is not None)
    with told(processes, {**given, **how}):
        if isinstance(init, Resolved):
            refuse_more(run_dir, overrides)
            plan = init
        elif new_head:
            data = call.opened(run_dir)
            body = lambda: read_body(init, weights, arch)
            made = lambda: resolve_transfer(body(), init, data, run_dir, **how)
            plan = processes.lead(lambda: replace(made(), data=None))
        else:
            how.update(protocol=protocol or "published", data_given=given["data_given"])
            plan = processes.lead(lambda: resolve_finetuning(init, run_dir, **how))
        transfers = isinstance(plan, Transfer)
        runs = (plan.run_dir,) if transfers else (plan.run_dir, plan.init)
        data = data or plan.data or call.opened(*runs)
        say_found(data)
        begin = _with_new_head if transfers else _with_old_head
        source, arrays, data = begin(plan, weights, data, seed, processes.lead)
        warning = mod32_warning(plan.start.image_size, plan.case.image_size)
        parts, size = ", ".join(plan.case.variable_filter), plan.case.image_size
        say(f"fine-tuning {parts} at {size} px from {source.name}")
        if warning:
            say(f"warning: {warning}")
        return call.execute(plan, data, arrays, {**plan.notes, "init": str(source)})


def _with_old_head(plan, weights, data, seed, lead):
    "Weights of a run for its own classes: (file, arrays, the data in the network's order)"
    arrays, data, source, _ = begin_from(plan.init, weights, data, plan.start, lead)
    return source, arrays, data


def _with_new_head(plan, weights, data, seed, lead):
    "Weights of any file, with a classifier for the classes of the data: (file, arrays, data)"
    start = new_head_for(plan.body, data.class_names, seed)
    for note in plan.body.notes:
        say(note)
    say(describe_head(start, data.class_names))
    return plan.init, start.arrays, data
