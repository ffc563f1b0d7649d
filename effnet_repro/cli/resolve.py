"""What will run: the case, then the budget, then the flags.

The rule for batches, in order: a `--global-batch-size` stands; else `--gradient-accumulation` makes the
product, with what is not given taken from the case (or the budget, which has one replica); else the global
batch of the case or budget is kept, whatever the other two say. Stages change no arithmetic at all.
"""

import contextlib
import io
from dataclasses import replace
from typing import Callable, Dict, NamedTuple, Optional

from effnet_repro.case_rules import check_layout
from effnet_repro.cli.fields import check_given, given_fields, named_case
from effnet_repro.cli.kit import UsageError, format_table
from effnet_repro.cli.options import data_dir_of, one_of, options_of, reading_of
from effnet_repro.config import (
    FIELDS,
    Case,
    case_to_dict,
    differing_fields,
    override,
    resolve,
)
from effnet_repro.data import DataSet
from effnet_repro.runs import (
    Resolved,
    check_run,
    choose_budget,
    may_change_micro_batch,
    resolve_training,
    training_folder,
)

LAYOUT_FIELDS = ("micro_batch_size", "global_batch_size", "gradient_accumulation", "num_replicas")
LAYOUT_FIELDS += ("num_stages", "pipeline_splits")


def batch_fields(given, micro, whole, replicas):
    """Return micro-batch and global batch, in images, as fields of a case.

    They follow the flags, and `micro`, `whole` and `replicas` where those say nothing.

    UsageError where they contradict each other.
    """
    k = given.get("gradient_accumulation")
    m, r, g = (given.get(f) for f in ("micro_batch_size", "num_replicas", "global_batch_size"))
    check_given(**{n: v for n, v in given.items() if n in LAYOUT_FIELDS})
    if k is None:
        if r is not None and (g or whole) % ((m or 1) * r):
            raise UsageError(
                f"{r} replicas of micro-batches of {m or 1} do not divide the global batch {g or whole}. "
                "Give --gradient-accumulation to change it."
            )
        return {n: v for n, v in (("micro_batch_size", m), ("global_batch_size", g)) if v}
    if g is None:
        return {
            "micro_batch_size": m or micro,
            "global_batch_size": (m or micro) * k * (r or replicas),
        }
    m = m or g // (k * (r or 1))
    if m < 1 or (m * k * r != g if r else g % (m * k)):
        raise UsageError(
            f"micro-batch {m} x accumulation {k} x replicas {r or 'any'} is not the global batch {g}. "
            "Leave one of them out."
        )
    return {"micro_batch_size": m, "global_batch_size": g}


class CommandPlan(NamedTuple):
    "What a command line comes to"

    case: Case  # What will run, on one device
    start: Case  # What it was made from
    budget: str  # Name of the budget
    reasons: Dict[str, str]  # Field that differs -> why
    resolved: Optional[Resolved] = None  # What `train` or `finetune` is given


def plan_of(resolved: Resolved, reason: Callable[[str], str]) -> CommandPlan:
    """Return what a command shows of a run: the run's own case, and why each field differs from its start."""
    reasons = {n: reason(n) for n in differing_fields(resolved.start, resolved.case)}
    reasons.update({n: "the run's own, or the device's" for n in resolved.settled})
    return CommandPlan(resolved.case, resolved.start, resolved.budget, reasons, resolved)


def _reason(name, given, batches, budget):
    if name in ("num_replicas", "num_stages", "pipeline_splits"):
        asked = given.get(name)
        note = (
            f"; {asked} asked: arithmetic of the batch only"
            if name == "num_replicas" and asked
            else ""
        )
        return f"one device{note}"
    if name == "gradient_accumulation":
        return "keeps the global batch"
    if name == "mix_group_size" and name not in given:
        return "the case's micro-batch, or a divisor"
    return "flag" if name in given else "product of the flags" if name in batches else budget


def named_start(args) -> Case:
    """Return the case that a command line names; UsageError where it names none, two, or an unknown one."""
    name = one_of(args, "case", CASE=args.case, config=args.config)
    if name is None:
        raise UsageError("Which case? effnet-cases lists them.")
    return named_case(name, args.config_path)


def open_data_of(args, *places) -> DataSet:
    """Return the data that a command line names. Of the runs in `places`, the first decides which images validate."""
    return reading_of(args).open(*places)


def plan_training(
    args,  # Parsed flags of effnet-train or effnet-doctor
    run_dir=None,  # Where the run is written; None = runs/<name of the case>
) -> CommandPlan:
    """Work out what a command line will train.

    UsageError where the case is unknown or flags contradict each other.
    """
    start, given = named_start(args), given_fields(args)
    data_given = data_dir_of(args) is not None
    where = dict(data_given=data_given, config_path=args.config_path)
    whole = "variable_filter" not in given  # a part of a network is no training from scratch
    counts = args.budget == "small" or (args.budget == "auto" and data_given and whole)
    folder = training_folder(start, run_dir)
    where["data"] = open_data_of(args, folder) if counts else None
    images = where["data"].train_count if counts else None
    try:
        budget = choose_budget(args.budget, folder, **where)
        base = resolve(start, budget, data_given, args.config_path, images)[0]
        replicas = start.num_replicas if budget == "case" else 1
        batches = batch_fields(given, base.micro_batch_size, base.global_batch_size, replicas)
        own = {k: v for k, v in given.items() if k not in LAYOUT_FIELDS}
        resolved = resolve_training(start, run_dir, args.budget, **where, **own, **batches)
        _check_layout(start, given)
    except ValueError as e:
        raise UsageError(str(e)) from None
    return plan_of(resolved, lambda n: _reason(n, given, batches, f"budget {budget}"))


def settled_on_device(plan: CommandPlan, precision: str) -> CommandPlan:
    """Return the plan with what the devices here decide, such as a GPU's micro-batch. Keras has been started."""
    from effnet_repro.training import settle_run

    resolved = settle_run(plan.resolved, precision)
    return plan if resolved is plan.resolved else plan_of(resolved, plan.reasons.get)


def micro_batch_note(plan: CommandPlan) -> tuple:
    """Return what to say of the micro-batch before Keras has been started; empty where it is settled."""
    case, run = plan.case, plan.resolved
    free = not run.begun and may_change_micro_batch(case, run.named)
    if case.gradient_accumulation == 1 or not free:
        return ()
    return (
        f"TensorFlow on a CPU takes more than {case.micro_batch_size} images at a time where memory allows "
        "(--micro-batch-size)",
    )


def checked_early(args, plan: CommandPlan, init=None) -> CommandPlan:
    """Check what a run needs before Keras takes its seconds, and return the plan with its data.

    `init` is what it begins from. Of several processes each checks for itself, later. The run says again what is said
    here, and finds damaged images when it reads them. ValueError or OSError, as the run would raise.
    """
    if args.distributed and not args.dry_run:
        return plan
    data = plan.resolved.data or open_data_of(args, plan.resolved.run_dir, init)
    resolved = replace(plan.resolved, data=data)
    with contextlib.redirect_stdout(io.StringIO()):
        check_run(resolved, reading_of(args), options_of(args), init, args.weights, tries=False)
    return plan._replace(resolved=resolved)


def _check_layout(case, given):
    "Stages and splits have no effect on one device, but must fit each other"
    splits, stages = given.get("pipeline_splits"), given.get("num_stages")
    if splits is not None:
        new = override(case, num_stages=stages or case.num_stages, pipeline_splits=splits)
        check_layout(new)


def show_notes(notes):
    """Print a line for each setting that may not be meant."""
    for note in notes:
        print(f"note: {note}", flush=True)


def show_plan(plan):
    """Print the resolved case field by field, the differing ones with the reason; IPU fields only where they differ."""
    ipu = {n for n, f in FIELDS.items() if f.group == FIELDS["pipeline_schedule"].group}
    rows = []
    for field, value in case_to_dict(plan.case).items():
        if field in ipu and field not in plan.reasons:
            continue
        form = lambda v: (
            "-"
            if v is None
            else " ".join(map(str, v)) or "-"
            if isinstance(v, (list, tuple))
            else str(v)
        )
        differs = field in plan.reasons
        rows.append({"field": field, "this run": form(value)})
        rows[-1]["the case says"] = form(getattr(plan.start, field)) if differs else None
        rows[-1]["because"] = plan.reasons.get(field)
    rate = f"{plan.case.learning_rate:g}"
    rows.append(
        {"field": "learning_rate", "this run": rate, "the case says": None, "because": None}
    )
    if plan.case.learning_rate != plan.start.learning_rate:
        rows[-1]["the case says"] = f"{plan.start.learning_rate:g}"
        rows[-1]["because"] = "2**exponent x global batch"
    print(format_table(rows), flush=True)
