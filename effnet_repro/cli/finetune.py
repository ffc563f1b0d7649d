"""`effnet-finetune`: train the last layers of a trained network a little more."""

from effnet_repro.cli.fields import field_arguments, given_fields
from effnet_repro.cli.ipus import finetune_on_ipus, ipu_arguments, print_poprun, runs_on_ipus
from effnet_repro.cli.kit import UsageError, choice, program
from effnet_repro.cli.options import (
    checked_source,
    data_dir_of,
    finish_run,
    machine_arguments,
    run_arguments,
    run_options,
    source_arguments,
    start_keras,
)
from effnet_repro.cli.resolve import LAYOUT_FIELDS, batch_fields, plan_of, show_plan
from effnet_repro.config import CHOICES, NETWORK_FIELDS
from effnet_repro.runs import finetune_budget, resolve_finetuning


def _finetune_arguments(parser):
    source_arguments(parser)
    parser.add_argument("--init-path", "--init", metavar="PATH", help="the same, as published")
    parser.add_argument(
        "--protocol",
        type=choice("protocol", ("published", "clean")),
        default="published",
        metavar="NAME",
        help="published; or clean: gradient descent, no warm-up, no mixing",
    )
    run_arguments(parser)
    machine_arguments(parser, CHOICES["precision"])
    ipu_arguments(parser)
    field_arguments(parser, leave_out=NETWORK_FIELDS)


def _plan_finetuning(args, source, trained):
    "Work out what a command line will fine-tune"
    given, data_given = given_fields(args), data_dir_of(args) is not None
    try:
        batches = finetune_budget(args.budget, data_given)[1]
        m, g = (batches.get(k) for k in ("micro_batch_size", "global_batch_size"))
        layout = batch_fields(given, m or trained.micro_batch_size, g or 512, 1)
        own = {k: v for k, v in given.items() if k not in LAYOUT_FIELDS}
        how = dict(protocol=args.protocol, budget=args.budget, data_given=data_given)
        resolved = resolve_finetuning(source, args.run_dir, **how, **layout, **own)
    except ValueError as e:
        raise UsageError(str(e)) from None
    return plan_of(resolved, lambda n: "flag" if n in given else "fine-tuning")


@program(
    "finetune",
    _finetune_arguments,
    """
    effnet-finetune runs/B0-G16-LN_PN-Half_16IPU_2x8
    effnet-finetune runs/b1 --image-size 240 --variable-filter Top block7 --protocol clean
    effnet-finetune runs/b1/checkpoints/average.safetensors --data-dir /data/imagenet --run-dir runs/b1-240
    """,
)
def finetune_command(args):
    "Train the last layers of a trained network a little more, at another resolution."
    options = run_options(args)
    source, trained = checked_source(args, init_path=args.init_path)
    if args.print_poprun:
        return print_poprun(args, "finetune", trained, source)
    if runs_on_ipus(args):
        return finetune_on_ipus(args, source, trained)
    start_keras(args)
    plan = _plan_finetuning(args, source, trained)
    show_plan(plan)
    if args.dry_run:
        return 0
    from effnet_repro.training import finetune

    run = finetune(plan.resolved, data_dir_of(args), **options)
    return finish_run(run, args)
