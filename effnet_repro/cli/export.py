"""`effnet-export`: a trained network as a file that another program runs."""

import contextlib
from pathlib import Path

from effnet_repro.cli.kit import UsageError, choice, program, read_lines, user_path, whole_number
from effnet_repro.cli.options import BACKENDS, classifier_arguments, set_backend

_FORMATS = ("onnx", "saved_model", "litert", "stablehlo", "keras")


def _export_arguments(parser):
    classifier_arguments(parser)
    parser.add_argument(
        "target", type=user_path, metavar="OUT", help="file to write; for saved_model a folder"
    )
    parser.add_argument(
        "--format",
        type=choice("format", _FORMATS),
        metavar="NAME",
        help=f"{', '.join(_FORMATS)}; default: see OUT's ending",
    )
    parser.add_argument(
        "--batch-size",
        type=whole_number,
        metavar="N",
        help="images at a time, where the other program needs to know; default: any number",
    )
    parser.add_argument(
        "--license", default="other", metavar="NAME", help="of the weights, for MODEL_CARD.md"
    )
    parser.add_argument(
        "--backend",
        type=choice("backend", BACKENDS),
        metavar="NAME",
        help="of Keras, for --format keras: tensorflow or jax",
    )
    parser.add_argument(
        "--int8",
        type=user_path,
        metavar="DIR",
        help="quantize an ONNX file; images of this data set give the ranges and check it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def _tell(args, done):
    "Print what was written, and how near it is to the network"
    spec, how = done.subject.spec, done.agreement
    n = args.batch_size or "any number"
    print(
        f"{args.source} -> {args.target}: {spec.name}, {spec.num_classes} classes, {done.format}, images of "
        f"{done.subject.image_size} px, {n} at a time"
    )
    images = f"{how.random} images of noise and {how.real} photographs"
    print(f"  agrees with the network in {done.runtime}: within {how.difference:.1e} on {images}")
    if done.kept:
        k = done.kept
        print(
            f"  int8: the same first class in {k.same:.1%} of {k.images} validation images; top-1 {k.top1:.1%}, "
            f"in float32 {k.float_top1:.1%}"
        )
    print(f"  card: {done.card}")
    for note in done.subject.notes:
        print(f"  {note}")


@program(
    "export",
    _export_arguments,
    """
    effnet-export runs/b1 b1.onnx
    effnet-export runs/b1 b1.int8.onnx --int8 photographs
    effnet-export runs/b1 b1.tflite --batch-size 1
    effnet-export runs/b1 b1 --format saved_model --weights last
    effnet-export imagenet.safetensors b0.stablehlo --class-names labels.txt
    """,
)
def export_command(args):
    "Write a trained network as a file of another program, which opens and checks it."
    options = {"image_size": args.image_size, "batch": args.batch_size, "arch": args.arch}
    if args.class_names:
        options["class_names"] = read_lines(args.class_names)
    set_backend(args)
    from effnet_repro.export import check_sizes, export, export_format
    from effnet_repro.runs.environment import suppress_stderr

    try:
        check_sizes(args.image_size, args.batch_size)
        export_format(Path(args.target), args.format, bool(args.int8))
    except ValueError as error:
        text = str(error).replace("pass the format", "give --format")
        raise UsageError(text.replace("`batch`", "--batch-size")) from None
    with contextlib.nullcontext() if args.debug else suppress_stderr():
        done = export(
            args.source,
            args.target,
            args.format,
            overwrite=args.overwrite,
            license=args.license,
            int8=args.int8,
            weights=args.weights,
            **options,
        )
    _tell(args, done)
