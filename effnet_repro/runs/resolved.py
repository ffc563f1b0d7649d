"""What a run will do, worked out once: a command shows it, and `train` or `finetune` does just that."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional, Sequence, Tuple, Union

from effnet_repro.checkpoint import load_metadata
from effnet_repro.config import (
    Case,
    budget_overrides,
    case_from_dict,
    differing_fields,
    get_case,
    resolve,
    say_earlier,
)
from effnet_repro.data import DataSet
from effnet_repro.finetuning import finetune_budget, finetune_case, finetune_size
from effnet_repro.paths import local_path
from effnet_repro.runs.resume import has_begun, settle_case, stored_budget
from effnet_repro.small_sets import explain_small


@dataclass(frozen=True)
class Resolved:
    """A run before it begins: its case, where it is written, and what the case was made from."""

    case: Case  # What will be trained, on one device
    start: Case  # A published case or one's own; for a fine-tuning that of the trained weights
    budget: str  # Name of the budget, never "auto"
    run_dir: Path  # Where everything is written
    settled: Tuple[str, ...]  # Fields that the run in this folder, or the runtime, decided
    notes: dict  # What config.json says of the run beside its case
    init: Optional[Path] = None  # Of a fine-tuning: the run folder or checkpoint to begin from
    named: Tuple[str, ...] = ()  # Fields that the user named
    begun: bool = False  # Whether there is a run in this folder to go on with
    why: str = ""  # A line on what the number of images decided
    data: Optional[DataSet] = field(default=None, repr=False, compare=False)  # Where it was opened


def may_change_micro_batch(
    case: Case,  # Laid out for one process
    named: Sequence[str],  # Fields that the user named
) -> bool:
    """Return whether the micro-batch of a case changes only rounding, and nobody asked for one."""
    asked = {"micro_batch_size", "gradient_accumulation"} & set(named)
    return not asked and case.norm != "BN" and case.mix_group_size != 0


def _named(overrides):
    return tuple(name for name, value in overrides.items() if value is not None)


def settle_fields(
    case: Case, run_dir, overrides: dict, device_loop: int = 1
) -> Tuple[Case, Tuple[str, ...]]:
    """Return the case with what its own run decides, and the names of these fields.

    `device_loop` is what the runtime gives a new run: one step at a time off IPUs.
    """
    whole = settle_case(run_dir, case, device_loop, _named(overrides))
    return whole, tuple(differing_fields(case, whole))


def starting_case(case: Union[str, Case], config_path=None) -> Case:
    """Return the case that a call names or gives. ValueError for anything else."""
    if not isinstance(case, (str, Case)):
        raise ValueError(f"`case` must be a name or a `Case`. Received: case={case!r}.")
    return get_case(case, config_path) if isinstance(case, str) else case


def training_folder(case: Case, run_dir=None) -> Path:
    """Return where the run of a case is written: `run_dir`, or runs/<name of the case>."""
    return Path("runs") / case.name if run_dir is None else local_path(run_dir, "run_dir")


def choose_budget(
    budget: str,  # "case", "small", "demo", "smoke" or "auto"
    run_dir: Path,  # Of the run
    data_given: bool = False,  # Whether the user pointed at a data set
    config_path=None,  # As in `resolve_training`
    data: Optional[DataSet] = None,  # To train on
) -> str:
    """Return the name of the budget of a run: "auto" is what the run began with, else what suits the data."""
    began_with = stored_budget(run_dir) if budget == "auto" else None
    # A run of an earlier version keeps the rule that it began with.
    images = None if data is None or began_with == "" else data.train_count
    return budget_overrides(began_with or budget, data_given, config_path, images)[0]


def resolve_training(
    case: Union[str, Case],  # A published name or a case
    run_dir=None,  # Where everything is written; None = runs/<name of the case>
    budget: str = "auto",  # "case", "small", "demo", "smoke" or "auto": see `budget_overrides`
    data_given: bool = False,  # Whether the user pointed at a data set
    config_path=None,  # File of cases and budgets in the form of config.yml; None = the published
    data: Optional[DataSet] = None,  # To train on: `auto` and `small` look at its number of images
    **overrides,  # Fields of the case; None means what the case says
) -> Resolved:
    """Work out what `train` does with these arguments. ValueError where they contradict each other."""
    start = starting_case(case, config_path)
    run_dir, images = training_folder(start, run_dir), None if data is None else data.train_count
    scratch = data if overrides.get("variable_filter") is None else None
    name = choose_budget(budget, run_dir, data_given, config_path, scratch)
    changed, published = resolve(start, name, data_given, config_path, images, **overrides)
    settled, fields = settle_fields(changed, run_dir, overrides)
    why = explain_small(images, settled, budget == "auto") if name == "small" else ""
    plain = lambda value: list(value) if isinstance(value, tuple) else value
    notes = {"kind": "train", "budget": name}
    notes["published"] = {n: plain(value) for n, value in published.items()}
    own = dict(named=_named(overrides), begun=has_begun(run_dir), why=why, data=data)
    return Resolved(settled, start, name, run_dir, fields, notes, **own)


def refuse_more(run_dir, overrides: dict):
    """Refuse what would change a resolved run, which knows its folder and its fields. Raises ValueError."""
    more = [n for n, v in {"run_dir": run_dir, **overrides}.items() if v is not None]
    if more:
        raise ValueError(
            f"A `Resolved` run is complete. Received: {', '.join(more)}. Leave it out."
        )


def trained_case(init) -> Case:
    """Return the case of a run folder or checkpoint, and say which values stand for fields that it lacks."""
    stored = load_metadata(init)["case"]
    trained = case_from_dict(stored)
    say_earlier(init, stored)
    return trained


def folder_of(init: Path) -> Path:
    """Return the run folder that a run folder, its `checkpoints` or a file in there belongs to."""
    folder = init if init.is_dir() else init.parent
    return folder.parent if folder.name == "checkpoints" else folder


def resolve_finetuning(
    init,  # A run folder or a checkpoint to begin from
    run_dir=None,  # Where everything is written; None = <run folder of init>/finetune-<image size>
    *,
    image_size: Optional[int] = None,  # Side to fine-tune at; None = see `finetune_size`
    variable_filter: Sequence[str] = ("Top",),  # e.g. ("Top", "block7", "block6")
    protocol: str = "published",  # or "clean"
    budget: str = "auto",  # "case", "demo", "smoke" or "auto": the batch sizes of these
    data_given: bool = False,  # Whether the user pointed at a data set
    **overrides,  # Fields of the case, e.g. epochs=1, global_batch_size=64
) -> Resolved:
    """Work out what `finetune` does with these arguments. ValueError where they contradict each other."""
    trained = trained_case(init)
    parts = (variable_filter,) if isinstance(variable_filter, str) else variable_filter
    size = image_size or finetune_size(trained)
    name, batches = finetune_budget(budget, data_given)
    own = {**batches, **{n: value for n, value in overrides.items() if value is not None}}
    case = finetune_case(trained, size, protocol, parts, **own)
    run_dir = (
        local_path(run_dir, "run_dir")
        if run_dir is not None
        else folder_of(local_path(init, "init")) / f"finetune-{size}"
    )
    case, fields = settle_fields(case, run_dir, own)
    notes = {"kind": "finetune", "protocol": protocol, "trained_at": trained.image_size}
    own = dict(named=_named(overrides), begun=has_begun(run_dir))
    return Resolved(case, trained, name, run_dir, fields, notes, local_path(init, "init"), **own)
