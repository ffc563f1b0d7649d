"""`effnet-validate`: measure the checkpoints of a run, or a file of weights."""

import contextlib
import io
import sys
from pathlib import Path

from effnet_repro.averaging import check_average
from effnet_repro.checkpoint import load_metadata, newest_file
from effnet_repro.classes import match_classes
from effnet_repro.cli.fields import check_given
from effnet_repro.cli.ipus import ipu_arguments, print_poprun, runs_on_ipus
from effnet_repro.cli.kit import (
    format_arguments,
    print_rows,
    program,
    user_path,
    whole_number,
)
from effnet_repro.cli.options import (
    checked_source,
    data_dir_of,
    machine_arguments,
    precision_of,
    source_arguments,
    start_keras,
    weights_argument,
)
from effnet_repro.cli.resolve import open_data_of
from effnet_repro.runs import read_rows, refuse_unmeasurable, score_row


def _validate_arguments(parser):
    source_arguments(parser)
    parser.add_argument("--run-dir", type=user_path, metavar="DIR", help="the same as SOURCE")
    parser.add_argument(
        "--image-size", type=whole_number, metavar="N", help="pixels; default: as trained"
    )
    again = "all (new ones only), or measured again: both (last and average), last, average"
    weights_argument(parser, ("all", "both", "last", "average"), f"of a run folder: {again}")
    parser.add_argument(
        "--micro-batch-size",
        "--batch-size",
        type=whole_number,
        metavar="N",
        help="images at a time; default: 64, or 8 on each IPU",
    )
    machine_arguments(parser)
    ipu_arguments(parser, trains=False)
    format_arguments(parser)


#: Columns of validation.csv that are numbers.
SHARES, COUNTS = ("top1", "top5", "loss"), ("pictures", "image_size", "update")


def validation_rows(run_dir):
    "The rows of a run's validation.csv, numbers as numbers."
    kinds = {**dict.fromkeys(SHARES, float), **dict.fromkeys(COUNTS, int)}
    number = lambda name, text: kinds[name](text) if name in kinds and text else text
    rows, wrong = read_rows(Path(run_dir) / "validation.csv")
    for message in wrong:
        print(f"left out: {message}", file=sys.stderr)
    return [{n: number(n, t) for n, t in row.items()} for row in rows]


def _checked_data(args, source):
    "The data that a command line names, for these weights; what does not fit is refused before Keras is imported"
    data, metadata = open_data_of(args, source), load_metadata(source)
    refuse_unmeasurable(metadata["num_classes"], data)
    if args.weights == "average" and Path(source).is_dir():
        check_average(newest_file(source))
    with contextlib.redirect_stdout(io.StringIO()):  # the validation itself says it
        match_classes(source, metadata, data)
    return data


def _measured(args, source, trained):
    "What validation scores, by name of the weights; on IPUs or with Keras, as the command line asks"
    on_ipus = runs_on_ipus(args)
    print(f"{trained.name}, trained at {trained.image_size} px", flush=True)
    how = {"weights": args.weights, "image_size": args.image_size, "on_corrupt": args.on_corrupt}
    how["data_format"] = args.data_format
    if args.micro_batch_size is not None:  # else the runtimes know
        how["batch"] = args.micro_batch_size
    if on_ipus:
        from effnet_repro.ipu import validate

        how.update(ipus=args.ipus, weights="both" if args.weights == "all" else args.weights)
        return validate(source, data_dir_of(args), **how)
    data = _checked_data(args, source)
    start_keras(args)
    from effnet_repro.training import validate

    how.update(precision=precision_of(args), backend=args.backend)
    how.update(decoder=args.decoder, validation_split=args.validation_split)
    return validate(source, data, **how)


def _after_stored(source, rows):
    "The rows of a run's validation.csv, and behind them those of `rows` that are not among them"
    if not source.is_dir():
        return rows
    stored = validation_rows(source.parent if source.name == "checkpoints" else source)
    brief = lambda row: (row["weights"], row["pictures"], round(row["top1"], 4))
    there = {brief(row) for row in stored}
    blank = dict.fromkeys(stored[0] if stored else (), "")
    return stored + [{**blank, **row} for row in rows if brief(row) not in there]


@program(
    "validate",
    _validate_arguments,
    """
    effnet-validate runs/B0-G16-LN_PN-Half_16IPU_2x8
    effnet-validate runs/b1/checkpoints/average.safetensors --data-dir /data/imagenet --image-size 240
    effnet-validate runs/b1 --weights both --json
    """,
)
def validate_command(args):
    "Measure a checkpoint, or every checkpoint of a run, on all validation images."
    check_given(micro_batch_size=args.micro_batch_size, image_size=args.image_size)
    source, trained = checked_source(args, run_dir=args.run_dir)
    if args.print_poprun:
        return print_poprun(args, "validate", trained, source)
    aside = contextlib.redirect_stdout(sys.stderr)  # what is printed on the way is no table
    with aside if args.json or args.csv else contextlib.nullcontext():
        scores = _measured(args, source, trained)
    rows = _after_stored(Path(source), [score_row(name, s) for name, s in scores.items()])
    short = lambda name, value: f"{value:.4f}" if name in SHARES and value != "" else value
    print_rows(rows, args, lambda row: {n: short(n, v) for n, v in row.items()})
