"""`effnet-train`: train a case, or go on with an interrupted run."""

from effnet_repro.checkpoint import load_metadata
from effnet_repro.cli.fields import config_arguments, field_arguments
from effnet_repro.cli.ipus import ipu_arguments, ipu_case, print_poprun, runs_on_ipus, train_on_ipus
from effnet_repro.cli.kit import program, user_path
from effnet_repro.cli.options import (
    check_start,
    chosen_backend,
    data_arguments,
    data_dir_of,
    finish_run,
    machine_arguments,
    one_of,
    precision_of,
    run_arguments,
    run_options,
    start_keras,
)
from effnet_repro.cli.processes import check_distributed, launch, lead_plan
from effnet_repro.cli.resolve import (
    checked_early,
    micro_batch_note,
    named_start,
    plan_training,
    settled_on_device,
    show_notes,
    show_plan,
)
from effnet_repro.config import CHOICES, case_from_dict
from effnet_repro.distributed import here, is_child
from effnet_repro.scaling import mod32_warning


def _train_arguments(parser):
    parser.add_argument("case", nargs="?", metavar="CASE", help="a name from effnet-cases")
    parser.add_argument("--config", metavar="CASE", help="the same, as published")
    config_arguments(parser)
    data_arguments(parser)
    run_arguments(parser)
    machine_arguments(parser, CHOICES["precision"])
    parser.add_argument(
        "--restore-path",
        type=user_path,
        metavar="DIR",
        help="run folder to go on in; it must exist",
    )
    parser.add_argument(
        "--init-path",
        "--init",
        type=user_path,
        metavar="PATH",
        help="run folder or checkpoint whose weights to begin with",
    )
    ipu_arguments(parser)
    field_arguments(parser)


@program(
    "train",
    _train_arguments,
    """
    effnet-train B0-G16-LN_PN-Half_16IPU_2x8
    effnet-train B0-G16-LN_PN-Half_16IPU_2x8 --dry-run
    effnet-train B1-G16-LN_PN-Half_16IPU_4x4 --data-dir /data/imagenet --run-dir runs/b1 --micro-batch-size 64
    effnet-train B0-G16-LN_PN-Half_16IPU_2x8 --data-dir /data/imagenet --distributed
    effnet-train --config-path config.yml --config B0-G1-GN-Native_16IPU_2x8 --no-validation
    """,
)
def train_command(args):
    "Train a case; the same command again goes on with an interrupted run."
    start, options = named_start(args), run_options(args)
    run_dir = one_of(args, "run folder", run_dir=args.run_dir, restore_path=args.restore_path)
    if args.print_poprun:
        case, args.ipus, _ = ipu_case(args, start)
        return print_poprun(args, "train", case)
    if runs_on_ipus(args):
        check_distributed(args, on_ipus=True)
        return train_on_ipus(args, start, run_dir)
    if check_distributed(args) and not args.dry_run:
        if not is_child():
            return launch(args, "train")
        start_keras(args)
    plan = lead_plan(lambda: plan_training(args, run_dir))
    plan = checked_early(args, plan, args.init_path)
    notes = check_start(args, plan.resolved, args.init_path) if args.dry_run else ()
    if args.restore_path:
        here().lead(lambda: load_metadata(args.restore_path))
    warning = _size_warning(args, plan.case)
    if not args.dry_run or chosen_backend(args) == "jax":  # which may compute on a GPU
        start_keras(args)
        plan = settled_on_device(plan, precision_of(args))
    else:
        notes = (*notes, *micro_batch_note(plan))
    print(f"{plan.case.name}, {plan.resolved.why or f'budget {plan.budget}'}")
    show_plan(plan)
    show_notes(notes)
    if warning:
        print(warning, flush=True)
    if args.dry_run:
        return 0
    from effnet_repro.training import train

    run = train(plan.resolved, data_dir_of(args), init=args.init_path, **options)
    return finish_run(run, args)


def _size_warning(args, case):
    "What to say of the image size of a run that begins from other weights"
    if not args.init_path:
        return ""
    trained = case_from_dict(here().lead(lambda: load_metadata(args.init_path))["case"])
    warning = mod32_warning(trained.image_size, case.image_size)
    return f"warning: {warning}" if warning else ""
