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
from effnet_repro.runs import read_rows, refuse_unmeasurable


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
    quiet = (
        contextlib.redirect_stdout(sys.stderr)
        if args.json or args.csv
        else contextlib.nullcontext()
    )
    with quiet:
        on_ipus, data = runs_on_ipus(args), data_dir_of(args)
        print(f"{trained.name}, trained at {trained.image_size} px", flush=True)
        if on_ipus:
            from effnet_repro.ipu import validate
        else:
            data = _checked_data(args, source)
            start_keras(args)
            from effnet_repro.training import validate

        how = {
            "precision": precision_of(args),
            "backend": args.backend,
            "data_format": args.data_format,
            "on_corrupt": args.on_corrupt,
            "decoder": args.decoder,
            "validation_split": args.validation_split,
        }
        how.update(weights=args.weights, image_size=args.image_size, batch=args.micro_batch_size)
        if on_ipus:
            how = {
                k: v
                for k, v in how.items()
                if k not in ("precision", "backend", "decoder", "validation_split")
            }
            how.update(ipus=args.ipus, weights="both" if args.weights == "all" else args.weights)
        if how["batch"] is None:  # the runtimes know
            del how["batch"]
        scores = validate(source, data, **how)
    source = Path(source)
    names = ("top1", "top5", "loss", "pictures", "image_size")
    rows = [{"weights": n, **{k: getattr(s, k) for k in names}} for n, s in scores.items()]
    if source.is_dir():
        stored = validation_rows(source.parent if source.name == "checkpoints" else source)
        brief = lambda row: (row["weights"], row["pictures"], round(row["top1"], 4))
        there = {brief(row) for row in stored}
        blank = dict.fromkeys(stored[0] if stored else (), "")
        rows = stored + [{**blank, **row} for row in rows if brief(row) not in there]
    short = lambda name, value: f"{value:.4f}" if name in SHARES and value != "" else value
    brief = lambda row: {n: short(n, v) for n, v in row.items()}
    print_rows(rows, args, brief)
