"""Train a case, or fine-tune a trained network: what a user calls."""

from pathlib import Path
from typing import Optional, Sequence, Union

from effnet_repro.averaging import load_weights
from effnet_repro.classes import match_classes
from effnet_repro.config import Case, case_from_dict, resolve, say_earlier
from effnet_repro.data import open_data
from effnet_repro.finetuning import finetune_budget, finetune_case, finetune_size
from effnet_repro.network import drop_statistics
from effnet_repro.runs import Options, Run, Task, check_init, execute, settle_case
from effnet_repro.scaling import mod32_warning
from effnet_repro.training.device import configure
from effnet_repro.training.runtime import KerasRuntime


def train(
    case: Union[str, Case],  # A published name or a case
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
    if not isinstance(case, (str, Case)):
        raise ValueError(f"`case` must be a name or a `Case`. Received: case={case!r}.")
    data = open_data(data_dir, data_format, on_corrupt=on_corrupt, decoder=decoder)
    resolved, published = resolve(case, budget, data_dir is not None, config_path, **overrides)
    notes = {
        "kind": "train",
        "budget": budget,
        "published": {k: _listed(v) for k, v in published.items()},
    }
    run_dir = Path(run_dir) if run_dir else Path("runs") / resolved.name
    resolved = settle_case(run_dir, resolved, 1, _named(overrides))
    arrays = None
    if init is not None:
        arrays, metadata, source = load_weights(init, weights)
        arrays = drop_statistics(arrays, print)
        data = match_classes(source, metadata, data)
        check_init(source, metadata, data, resolved)
        notes["init"] = str(source)
    options = Options(seed, validate_every, keep, progress)
    task = Task(resolved, data, run_dir, arrays, options, notes)
    return execute(task, KerasRuntime(resolved, seed, precision))


def _named(overrides):
    return [name for name, value in overrides.items() if value is not None]


def _listed(value):
    return list(value) if isinstance(value, tuple) else value


def finetune(
    init,  # A run folder or a checkpoint to begin from
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
    arrays, metadata, source = load_weights(init, weights)
    arrays = drop_statistics(arrays, print)
    trained = case_from_dict(metadata["case"])
    say_earlier(source, metadata["case"])
    variable_filter = (variable_filter,) if isinstance(variable_filter, str) else variable_filter
    image_size = image_size or finetune_size(trained)
    batches = finetune_budget(budget, data_dir is not None)[1]
    overrides = {**batches, **{k: v for k, v in overrides.items() if v is not None}}
    case = finetune_case(trained, image_size, protocol, variable_filter, **overrides)
    data = open_data(data_dir, data_format, on_corrupt=on_corrupt, decoder=decoder)
    warning = mod32_warning(trained.image_size, image_size)
    print(
        f"fine-tuning {', '.join(variable_filter)} at {image_size} px from {source.name}"
        + ("" if not warning else f"\nwarning: {warning}")
    )
    data = match_classes(source, metadata, data)
    check_init(source, metadata, data, trained)
    folder = source.parent.parent if source.parent.name == "checkpoints" else source.parent
    run_dir = Path(run_dir) if run_dir else folder / f"finetune-{image_size}"
    case = settle_case(run_dir, case, 1, _named(overrides))
    notes = {
        "kind": "finetune",
        "init": str(source),
        "protocol": protocol,
        "trained_at": trained.image_size,
    }
    options = Options(seed, validate_every, keep, progress)
    return execute(
        Task(case, data, run_dir, arrays, options, notes), KerasRuntime(case, seed, precision)
    )
