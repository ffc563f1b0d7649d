"""`effnet-finetune`: train the last layers of a trained network a little more, for its own classes or for others."""

from effnet_repro.cli.fields import field_arguments, given_fields
from effnet_repro.cli.ipus import finetune_on_ipus, ipu_arguments, print_poprun, runs_on_ipus
from effnet_repro.cli.kit import UsageError, choice, program, user_path
from effnet_repro.cli.options import (
    check_start,
    checked_source,
    data_dir_of,
    finish_run,
    machine_arguments,
    named_source,
    precision_of,
    run_arguments,
    run_options,
    source_arguments,
    start_keras,
)
from effnet_repro.cli.processes import check_distributed, launch, lead_plan
from effnet_repro.cli.resolve import (
    LAYOUT_FIELDS,
    batch_fields,
    checked_early,
    open_data_of,
    plan_of,
    settled_on_device,
    show_notes,
    show_plan,
)
from effnet_repro.config import CHOICES, NETWORK_FIELDS
from effnet_repro.convert import format_of
from effnet_repro.distributed import here, is_child
from effnet_repro.runs import PROTOCOLS, finetune_budget, resolve_finetuning
from effnet_repro.transfer import read_body, resolve_transfer, transfer_batches


def _finetune_arguments(parser):
    source_arguments(parser)
    parser.add_argument(
        "--init-path", "--init", type=user_path, metavar="PATH", help="the same, as published"
    )
    parser.add_argument(
        "--new-head",
        action="store_true",
        help="other classes: the classifier begins anew, for those in --data-dir. SOURCE may be a file of "
        "keras.applications, timm or torchvision, too. The whole network trains, its body at --body-rate 0.3 of "
        "the classifier's rate; --variable-filter Top trains the end alone, which is faster",
    )
    parser.add_argument(
        "--arch", metavar="NAME", help="with --new-head: timm's name, e.g. tf_efficientnet_b0"
    )
    parser.add_argument(
        "--protocol",
        type=choice("protocol", PROTOCOLS),
        metavar="NAME",
        help="published (default); clean: gradient descent, no warm-up, no mixing; transfer (default with "
        "--new-head): 20 epochs with momentum and random crops",
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
        whole = g or min(512, trained.global_batch_size)
        layout = batch_fields(given, m or trained.micro_batch_size, whole, 1)
        own = {k: v for k, v in given.items() if k not in LAYOUT_FIELDS}
        how = dict(protocol=args.protocol or "published", budget=args.budget, data_given=data_given)
        resolved = resolve_finetuning(source, args.run_dir, **how, **layout, **own)
    except ValueError as e:
        raise UsageError(str(e)) from None
    return plan_of(resolved, lambda n: "flag" if n in given else "fine-tuning")


def _plan_transfer(args):
    "Work out what a command line with --new-head will train; reads the weights"
    if args.print_poprun or args.device == "ipu":
        raise UsageError("--new-head trains with Keras. Leave out --print-poprun and --device ipu.")
    source, given = named_source(args, init_path=args.init_path), given_fields(args)
    kind = format_of(source)  # what is no network is refused before Keras takes its seconds
    if args.config and kind == "ours":
        checked_source(args, init_path=args.init_path)
    data = open_data_of(args, args.run_dir)
    if kind == "keras":  # which Keras reads
        start_keras(args)
    body = read_body(source, args.weights, args.arch)
    try:
        batches = transfer_batches(data.train_count, given)
        m, g = batches.get("micro_batch_size", 1), batches.get("global_batch_size", 1)
        own = {k: v for k, v in given.items() if k not in LAYOUT_FIELDS}
        own.update(batch_fields(given, m, g, 1), protocol=args.protocol, budget=args.budget)
        resolved = resolve_transfer(body, source, data, args.run_dir, **own)
    except ValueError as e:
        raise UsageError(str(e)) from None
    return plan_of(resolved, lambda n: "flag" if n in given else "new classifier")


@program(
    "finetune",
    _finetune_arguments,
    """
    effnet-finetune runs/B0-G16-LN_PN-Half_16IPU_2x8
    effnet-finetune runs/b1 --image-size 240 --variable-filter Top block7 --protocol clean
    effnet-finetune runs/b1 --data-dir my-photographs --new-head
    effnet-finetune efficientnetb0.h5 --data-dir my-photographs --new-head --variable-filter Top block7
    effnet-finetune runs/b1/checkpoints/average.safetensors --data-dir /data/imagenet --run-dir runs/b1-240
    """,
)
def finetune_command(args):
    "Train the last layers of a trained network a little more: at another resolution, or for other classes."
    options = run_options(args)
    if check_distributed(args) and not args.dry_run:
        if not is_child():
            return launch(args, "finetune")
        start_keras(args)
    lead = here().lead
    if args.new_head:
        plan = lead_plan(lambda: _plan_transfer(args))
    else:
        if args.arch:
            raise UsageError("--arch is for files of PyTorch. They need --new-head.")
        source, trained = lead(lambda: checked_source(args, init_path=args.init_path))
        if args.print_poprun:
            return print_poprun(args, "finetune", trained, source)
        if runs_on_ipus(args):
            check_distributed(args, on_ipus=True)
            args.protocol = args.protocol or "published"
            return finetune_on_ipus(args, source, trained)
        plan = lead_plan(lambda: _plan_finetuning(args, source, trained))
        plan = checked_early(args, plan, plan.resolved.init)
    start_keras(args)
    plan = settled_on_device(plan, precision_of(args))
    init = None if args.new_head else plan.resolved.init
    notes = check_start(args, plan.resolved, init) if args.dry_run else ()
    show_plan(plan)
    show_notes(notes)
    if args.dry_run:
        return 0
    from effnet_repro.training import finetune

    run = finetune(plan.resolved, data_dir_of(args), **options)
    return finish_run(run, args)
