"""The same commands on IPUs: `--device ipu` takes the runtime of `36_ipu` instead of Keras."""

import contextlib
import os
import shlex
from pathlib import Path

from effnet_repro.cli.fields import given_fields
from effnet_repro.cli.kit import UsageError, choice, whole_number
from effnet_repro.cli.options import check_start, data_dir_of, finish_run
from effnet_repro.cli.resolve import LAYOUT_FIELDS, batch_fields, plan_of, show_notes, show_plan
from effnet_repro.config import CHOICES
from effnet_repro.ipu import (
    Graphcore,
    choose_device,
    count_ipus,
    ipus_per_replica,
    poprun_command,
    resolve_finetuning,
    resolve_for_ipus,
    resolve_training,
)
from effnet_repro.runs import finetune_size, suppress_stderr
from effnet_repro.scaling import ModelSpec


def ipu_arguments(parser, trains=True):
    "Flags for IPUs; `trains` adds those of a training."
    group = parser.add_argument_group("IPUs")
    group.add_argument(
        "--device",
        type=choice("device", ("auto", "ipu", "keras")),
        default="auto",
        metavar="NAME",
        help="ipu; keras, on a CPU or GPU; auto: an IPU where there is one",
    )
    group.add_argument(
        "--ipus",
        type=whole_number,
        metavar="N",
        help="over all processes; default: poprun's, or 16",
    )
    group.add_argument(
        "--print-poprun", action="store_true", help="print the poprun line, and stop"
    )
    if trains:
        connect = group.add_mutually_exclusive_group()
        connect.add_argument(
            "--compile-only", action="store_true", help="needs no IPU; runs nothing"
        )
        connect.add_argument(
            "--on-demand", action="store_true", help="take IPUs only while it runs"
        )


def runs_on_ipus(args):
    """Return whether this command runs on IPUs.

    UsageError for flags of Keras; ImportError, which says what to install, where IPUs are asked for without
    Graphcore's TensorFlow.
    """
    planned = args.device == "ipu" and getattr(args, "dry_run", False)  # needs no SDK
    with contextlib.nullcontext() if args.debug else suppress_stderr():  # TensorFlow's first notes
        chosen = "ipu" if planned else choose_device(args.device)
    if chosen != "ipu" and (
        getattr(args, "compile_only", False) or getattr(args, "on_demand", False)
    ):
        raise UsageError("--compile-only and --on-demand are for IPUs. Add --device ipu.")
    if chosen == "ipu":
        _refuse_keras_flags(args)
    return chosen == "ipu"


def _refuse_keras_flags(args):
    "On IPUs there are no backends, and the precision is a case's: 16.32, not bfloat16"
    given = {"--backend": args.backend, "--precision": args.precision}
    for flag, value in given.items():
        if value not in (None, "auto", *CHOICES["precision"]):
            raise UsageError(f"{flag} {value} is for Keras. Leave it out with --device ipu.")
    if args.validation_split is not None:
        raise UsageError("--validation-split is for Keras. Leave it out with --device ipu.")
    if args.decoder not in ("auto", "tensorflow"):
        raise UsageError(f"On IPUs TensorFlow decodes. Leave out --decoder {args.decoder}.")


def _without(words, flags):
    "The words of a command line without some flags: name -> how many values each takes"
    kept, skip = [], 0
    for word in words:
        name, *value = word.split("=", 1)
        if skip:
            skip -= 1
        elif name in flags:
            skip = 0 if value else flags[name]
        else:
            kept.append(word)
    return kept


def print_poprun(args, command, case, source=None):
    """Print the poprun line that runs these words in several processes, and return the exit status."""
    gone = {"--print-poprun": 0, "--no-validation": 0, "--device": 1}
    if command == "train":
        gone["--config"] = 1
    else:
        names = {"validate": ["--run-dir"], "finetune": ["--init-path", "--init"]}[command]
        gone.update({flag: 1 for flag in ("--restore-path", *names)})
    words, first = _without(args.words, gone), args.case if command == "train" else args.source
    if first is not None:  # as it was written; paths were expanded since
        words.remove(next(w for w in words if first in (w, os.path.expanduser(w), str(Path(w)))))
    if data_dir_of(args) and not any(w.split("=")[0] == "--data-dir" for w in words):
        words += ["--data-dir", args.data_dir]  # it came from the environment
    rest = " ".join(map(shlex.quote, words))
    source = None if source is None else shlex.quote(str(source))
    print(poprun_command(case, command, rest, args.ipus or 16, source=source))
    return 0


def _ipu_options(args):
    "The arguments of `ipu.train` and `ipu.finetune` that are no fields of a case"
    connection = "PRE_COMPILE" if args.compile_only else "ON_DEMAND" if args.on_demand else "ALWAYS"
    names = ("seed", "data_format", "on_corrupt", "weights", "keep")
    how = {name: getattr(args, name) for name in names}
    return {**how, "validation": not args.no_validation, "connection": connection}


def _warn_of_memory(case):
    "Say so when a micro-batch exceeds the modeled memory of an IPU; only a machine knows for sure"
    from effnet_repro import planner

    if not case.pipeline_splits:
        return
    prediction = planner.predict(ModelSpec.from_case(case), planner.Plan.from_case(case))
    if not prediction.fits:
        print(f"warning: {planner.memory_warning(prediction)}", flush=True)


def ipu_case(args, start):
    "The case that effnet-train runs on IPUs; how many; and the fields behind it"
    given, data_given = given_fields(args), data_dir_of(args) is not None
    asked, stages = given.get("num_replicas"), given.get("num_stages", start.num_stages)
    each = ipus_per_replica(max(1, stages))
    ipus = args.ipus or (asked * each if asked else 16)
    if asked and asked * each != ipus:
        raise UsageError(f"{asked} replicas of {each} IPUs are not --ipus {ipus}. Leave one out.")
    batches = batch_fields(given, start.micro_batch_size, start.global_batch_size, ipus // each)
    given = {k: v for k, v in given.items() if k not in ("gradient_accumulation", "num_replicas")}
    given.update(batches)
    if stages == 1:
        given.setdefault("pipeline_splits", ())
    try:
        return resolve_for_ipus(start, ipus, args.budget, data_given, **given), ipus, given
    except ValueError as e:
        raise UsageError(str(e)) from None


def train_on_ipus(args, start, run_dir):
    """Do `effnet-train` with Graphcore's runtime, and return its exit status."""
    case, ipus, given = ipu_case(args, start)
    if not args.dry_run:
        ipus = count_ipus(Graphcore(), ipus_per_replica(case.num_stages), ipus)
    data_dir = data_dir_of(args)
    resolved = resolve_training(start, run_dir, ipus, args.budget, data_dir is not None, **given)
    own, layout = given_fields(args), {n: f"{ipus} IPUs" for n in LAYOUT_FIELDS}
    reason = lambda n: "flag" if n in own else layout.get(n, f"budget {resolved.budget}")
    notes = check_start(args, resolved, args.init_path) if args.dry_run else ()
    show_plan(plan_of(resolved, reason))
    show_notes(notes)
    _warn_of_memory(resolved.case)
    if args.dry_run:
        return 0
    from effnet_repro.ipu import train

    run = train(resolved, data_dir, init=args.init_path, **_ipu_options(args))
    return 0 if args.compile_only else finish_run(run, args)


def finetune_on_ipus(args, source, trained):
    """Do `effnet-finetune` with Graphcore's runtime, and return its exit status.

    UsageError where flags contradict each other.
    """
    given = given_fields(args)
    parts = given.pop("variable_filter", ("Top",))
    size = given.pop("image_size", None) or finetune_size(trained)
    micro = given.pop("micro_batch_size", None)
    ipus = args.ipus or 16
    if not args.dry_run:
        ipus = count_ipus(Graphcore(), 1, args.ipus)
    how = dict(image_size=size, variable_filter=parts, protocol=args.protocol)
    try:
        resolved = resolve_finetuning(
            source, args.run_dir, ipus, micro_batch_size=micro, **how, **given
        )
    except ValueError as e:
        raise UsageError(str(e)) from None
    notes = check_start(args, resolved, resolved.init) if args.dry_run else ()
    show_plan(plan_of(resolved, lambda n: "flag" if n in given else "fine-tuning"))
    show_notes(notes)
    if args.dry_run:
        return 0
    from effnet_repro.ipu import finetune

    run = finetune(resolved, data_dir_of(args), **_ipu_options(args))
    return 0 if args.compile_only else finish_run(run, args)
