"""What a run on IPUs will do, worked out once: a command shows it, and `ipu.train` or `ipu.finetune` does just that."""

from typing import Optional, Sequence, Union

from effnet_repro.config import Case, budget_overrides
from effnet_repro.finetuning import finetune_case, finetune_size
from effnet_repro.ipu.layout import DEVICE_LOOP, finetune_layout, resolve_for_ipus
from effnet_repro.paths import local_path
from effnet_repro.runs import (
    Resolved,
    folder_of,
    settle_fields,
    starting_case,
    trained_case,
    training_folder,
)


def _same_rate(case):
    "The case, if all of it learns at one rate: the programs for IPUs have one"
    if case.body_rate != 1:
        raise ValueError(
            f"On IPUs the whole network learns at one rate. Received: body_rate={case.body_rate}. Leave it out, or "
            "train with Keras."
        )
    return case


def resolve_training(
    case: Union[str, Case],  # A published name or a case
    run_dir=None,  # Where everything is written; None = runs/<name of the case>
    ipus: int = 16,  # IPUs over all processes
    budget: str = "auto",  # "case", "demo", "smoke" or "auto": see `budget_overrides`
    data_given: bool = False,  # Whether the user pointed at a data set
    **overrides,  # Fields of the case; None means what the case says
) -> Resolved:
    """Work out what `ipu.train` does with these arguments. ValueError where they contradict each other."""
    start = starting_case(case)
    name = budget_overrides(budget, data_given)[0]
    whole = _same_rate(resolve_for_ipus(start, ipus, budget, data_given, **overrides))
    run_dir = training_folder(start, run_dir)
    settled, fields = settle_fields(whole, run_dir, overrides, DEVICE_LOOP)
    return Resolved(settled, start, name, run_dir, fields, {"kind": "train"})


def resolve_finetuning(
    init,  # A run folder or a checkpoint to begin from
    run_dir=None,  # Where everything is written; None = <run folder of init>/finetune-<image size>
    ipus: int = 16,  # IPUs over all processes, each a replica
    *,
    image_size: Optional[int] = None,  # Side to fine-tune at; None = see `finetune_size`
    variable_filter: Sequence[str] = ("Top",),  # e.g. ("Top", "block7", "block6")
    protocol: str = "published",  # or "clean"
    micro_batch_size: Optional[int] = None,  # Images of an IPU at a time; None = the most that fits
    **overrides,  # Fields of the case, e.g. epochs=1, global_batch_size=64
) -> Resolved:
    """Work out what `ipu.finetune` does with these arguments. ValueError where they contradict each other."""
    trained = trained_case(init)
    parts = (variable_filter,) if isinstance(variable_filter, str) else variable_filter
    size = image_size or finetune_size(trained)
    own = {n: value for n, value in overrides.items() if value is not None}
    case = _same_rate(finetune_case(trained, size, protocol, parts, **own))
    case = finetune_layout(case, ipus, micro_batch_size)
    default = folder_of(local_path(init, "init")) / f"finetune-{size}"
    run_dir = default if run_dir is None else local_path(run_dir, "run_dir")
    settled, fields = settle_fields(case, run_dir, own, DEVICE_LOOP)
    notes = {"kind": "finetune", "protocol": protocol}
    return Resolved(settled, trained, "case", run_dir, fields, notes, local_path(init, "init"))
