"""`effnet-convert`: weights of other programs in and out."""

import contextlib
import importlib
import os
from pathlib import Path

from effnet_repro.cli.fields import check_given, config_arguments, named_case
from effnet_repro.cli.kit import (
    UsageError,
    choice,
    program,
    read_lines,
    real_number,
    user_path,
    whole_number,
)
from effnet_repro.cli.options import start_keras
from effnet_repro.convert import FORMATS, check_name, convert, format_of, target_format
from effnet_repro.runs import suppress_stderr


def _convert_arguments(parser):
    parser.add_argument(
        "source", type=user_path, metavar="SOURCE", help="run folder, file, or TensorFlow prefix"
    )
    parser.add_argument(
        "target", type=user_path, metavar="TARGET", help="file to write, or TensorFlow prefix"
    )
    form = choice("format", FORMATS)
    formats = ", ".join(FORMATS)
    parser.add_argument(
        "--from", dest="source_format", type=form, metavar="FORMAT", help=f"one of {formats}"
    )
    parser.add_argument("--to", type=form, metavar="FORMAT", help="likewise; default: see TARGET")
    parser.add_argument(
        "--case", "--config", metavar="CASE", help="what SOURCE must hold; default: see its shapes"
    )
    parser.add_argument(
        "--weights",
        type=choice("weights", ("auto", "last", "average")),
        metavar="NAME",
        help="of a run folder: last, average, or auto, the average of a long run",
    )
    parser.add_argument(
        "--image-size", type=whole_number, metavar="N", help="pixels; default: the case's"
    )
    parser.add_argument(
        "--num-classes",
        type=whole_number,
        metavar="N",
        help="of a new classifier, if SOURCE has none",
    )
    parser.add_argument(
        "--class-names", type=user_path, metavar="FILE", help="a name a line, by label"
    )
    parser.add_argument("--arch", metavar="NAME", help="timm's, e.g. tf_efficientnet_b0")
    for flag, what in (("--input-mean", "mean"), ("--input-std", "deviation")):
        of = f"{what} of 0..1 pixels that a PyTorch file was trained with"
        parser.add_argument(flag, type=real_number, nargs=3, metavar=("R", "G", "B"), help=of)
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET if it exists")
    config_arguments(parser)


_CONVERT_OPTIONS = "weights image_size num_classes arch input_mean input_std".split()


def _names_in(path):
    "The class names of a file, a name a line"
    names = read_lines(path)
    if not names or not all(name.strip() for name in names):
        raise UsageError(f"{path} has an empty line: it needs a class name in each.")
    return names


def _convert_options(args):
    "The flags of effnet-convert that were given, as `read` takes them"
    given = {n: getattr(args, n) for n in _CONVERT_OPTIONS if getattr(args, n) is not None}
    check_given(image_size=args.image_size)
    if given.get("num_classes", 1) < 1:
        raise UsageError("--num-classes must be at least 1.")
    if args.class_names:
        given["class_names"] = _names_in(args.class_names)
    named = any(word.split("=")[0] == "--config-path" for word in args.words)
    if named and not args.case:
        raise UsageError("--config-path names the file of a case: pass --case, too.")
    if args.case:
        given["case"] = named_case(args.case, args.config_path)
    return given


@program(
    "convert",
    _convert_arguments,
    """
    effnet-convert ckpt/model.ckpt-109200 b0.safetensors --case B0-G16-LN_PN-Half_16IPU_2x8
    effnet-convert tf_efficientnet_b0.safetensors imagenet.safetensors
    effnet-convert efficientnetb0.h5 imagenet.safetensors --class-names labels.txt
    effnet-convert runs/b1 b1.safetensors --to torch
    effnet-convert runs/b1 published.ckpt --weights average
    """,
)
def convert_command(args):
    "Turn weights of TensorFlow 1, Keras or PyTorch into ours, or ours into theirs."
    options = _convert_options(args)
    if not args.debug:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    source_format = args.source_format or format_of(args.source)
    try:
        to = args.to or target_format(Path(args.target), source_format)
    except ValueError as error:
        raise UsageError(str(error)) from None
    check_name(Path(args.target), to, args.overwrite)
    if "keras" in (source_format, to):
        args.backend = None  # the environment's, or the first installed
        start_keras(args)
    elif "tf1" in (source_format, to):
        quiet = contextlib.nullcontext() if args.debug else suppress_stderr()
        with quiet, contextlib.suppress(ImportError):  # which the conversion says better
            importlib.import_module("tensorflow")  # with its first notes
    there = dict(to=to, source_format=source_format, overwrite=args.overwrite)
    done = convert(args.source, args.target, **there, **options)
    print(f"{args.source} -> {args.target}: {done.describe()}")
    for note in done.notes:
        print(f"  {note}")
