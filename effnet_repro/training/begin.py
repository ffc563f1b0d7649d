"""Train a case, or fine-tune a trained network: what a user calls."""

from typing import Optional, Sequence, Union

from effnet_repro.config import Case
from effnet_repro.data import open_data
from effnet_repro.messages import say
from effnet_repro.runs import (
    Options,
    Resolved,
    Run,
    Task,
    begin_from,
    execute,
    refuse_more,
    resolve_finetuning,
    resolve_training,
)
from effnet_repro.scaling import mod32_warning
from effnet_repro.training.device import configure
from effnet_repro.training.runtime import KerasRuntime


def train(
    case: Union[str, Case, Resolved],  # A published name, a case, or what `resolve_training` gave
    data_dir=None,  # Folder of pictures; None = the built-in sample set
    run_dir=None,  # Where everything is written; None = runs/<name of the case>
    *,
    budget: str = "auto",  # "case", "demo", "smoke" or "auto": see `budget_overrides`
    seed: int = 0,  # Of weights, order, crops, mixing and masks
    precision: str = "auto",  # Type to compute in: "float32", "bfloat16", "float16"
    backend: Optional[str] = None,  # "tensorflow" or "jax"; refused when Keras runs on the other
    data_format: Optional[str] = None,  # "tfrecord", "folder" or "cifar"; None = see the files
    on_corrupt: str = "refuse",  # or "skip": leave damaged pictures out, see `open_data`
    decoder: str = "auto",  # or "simplejpeg", "pillow", "tensorflow", "nvimagecodec"
    validate_every: Optional[
        int
    ] = 1,  # Epochs between validations; 0 = only at the end, None = never
    init=None,  # Run folder or checkpoint to begin from; None = fresh weights
    weights: str = "auto",  # Of `init`: "last", "average", "auto" = the average after a long run
    keep: int = 2,  # Checkpoints to keep, >= 1; the average needs none of them
    progress: bool = True,  # Whether to draw a progress bar
    config_path=None,  # File of cases and budgets in the form of config.yml; None = the published
    **overrides,  # Fields of the case, e.g. epochs=3, image_size=64; None means what the case says
) -> Run:
    "Train a `case`, or go on with it when `run_dir` holds a checkpoint"
    configure(backend)
    if isinstance(case, Resolved):
        refuse_more(run_dir, overrides)
        plan = case
    else:
        given = data_dir is not None
        plan = resolve_training(case, run_dir, budget, given, config_path, **overrides)
    data, arrays, notes = _data(data_dir, data_format, on_corrupt, decoder), None, plan.notes
    if init is not None:
        arrays, data, source, _ = begin_from(init, weights, data, plan.case)
        notes = {**notes, "init": str(source)}
    options = Options(seed, validate_every, keep, progress)
    task = Task(plan.case, data, plan.run_dir, arrays, options, notes)
    return execute(task, KerasRuntime(plan.case, seed, precision))


def _data(data_dir, data_format, on_corrupt, decoder):
    return open_data(data_dir, data_format, on_corrupt=on_corrupt, decoder=decoder)


def finetune(
    init,  # A run folder or a checkpoint to begin from, or what `resolve_finetuning` gave
    data_dir=None,  # Folder of pictures; None = the built-in sample set
    run_dir=None,  # Where everything is written; None = <run folder of init>/finetune-<image size>
    *,
    image_size: Optional[int] = None,  # Side to fine-tune at; None = see `finetune_size`
    variable_filter: Sequence[str] = ("Top",),  # e.g. ("Top", "block7", "block6")
    protocol: str = "published",  # or "clean"
    weights: str = "auto",  # "last", "average", "auto" = the average after a long run
    budget: str = "auto",  # "case", "demo", "smoke" or "auto": the batch sizes of these
    seed: int = 0,
    precision: str = "auto",
    backend: Optional[str] = None,
    data_format: Optional[str] = None,
    on_corrupt: str = "refuse",
    decoder: str = "auto",
    validate_every: Optional[int] = 1,
    keep: int = 2,
    progress: bool = True,
    **overrides,  # Fields of the case, e.g. epochs=1, global_batch_size=64
) -> Run:
    "Train the last layers of a trained network a little more, at another resolution"
    configure(backend)
    if isinstance(init, Resolved):
        refuse_more(run_dir, overrides)
        plan = init
    else:
        how = dict(image_size=image_size, variable_filter=variable_filter, protocol=protocol)
        how.update(budget=budget, data_given=data_dir is not None)
        plan = resolve_finetuning(init, run_dir, **how, **overrides)
    case, data = plan.case, _data(data_dir, data_format, on_corrupt, decoder)
    arrays, data, source, _ = begin_from(plan.init, weights, data, plan.start)
    warning = mod32_warning(plan.start.image_size, case.image_size)
    say(
        f"fine-tuning {', '.join(case.variable_filter)} at {case.image_size} px from {source.name}"
        + ("" if not warning else f"\nwarning: {warning}")
    )
    options = Options(seed, validate_every, keep, progress)
    task = Task(case, data, plan.run_dir, arrays, options, {**plan.notes, "init": str(source)})
    return execute(task, KerasRuntime(case, seed, precision))
