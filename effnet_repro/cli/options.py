"""Flags of a run that are not fields of a case, what they mean, and how a run ends.

`--precision` takes both kinds of value: `bfloat16` is what this machine computes in, `16.32` is what the case
says for an IPU.
"""

import contextlib
import importlib.util
import os
import shlex
import sys
from pathlib import Path

from effnet_repro.checkpoint import load_metadata
from effnet_repro.cli.fields import config_arguments, named_case
from effnet_repro.cli.kit import UsageError, choice, real_number, user_path, whole_number
from effnet_repro.cli.processes import distributed_arguments, join_by_flags
from effnet_repro.cli.streams import flush_or_leave, tell
from effnet_repro.config import unknown_name
from effnet_repro.data.decoders import DECODERS
from effnet_repro.data.files import first_image
from effnet_repro.distributed import has_joined, here, is_child
from effnet_repro.ipu import has_graphcore_wheel
from effnet_repro.messages import say
from effnet_repro.outside import read_json
from effnet_repro.runs import Options, Reading, check_run, notes_on, read_case, suppress_stderr

BACKENDS = ("tensorflow", "jax")


_PRECISIONS = ("auto", "float32", "bfloat16", "float16")

BUDGETS = ("auto", "case", "small", "demo", "smoke")


def data_arguments(parser, decodes=True):
    "Flags that name the data, and with `decodes` what makes pixels of it."
    parser.add_argument(
        "--data-dir",
        type=user_path,
        metavar="DIR",
        default=os.environ.get("DATA_DIR") or None,
        help="TFRecords, class folders or CIFAR; default: $DATA_DIR, or the built-in sample set, "
        "which `sample` names, too",
    )
    parser.add_argument(
        "--data-format",
        type=choice("data format", ("tfrecord", "folder", "cifar", "raw")),
        metavar="FORMAT",
        help="tfrecord, folder, cifar or raw; default: as the files look",
    )
    parser.add_argument(
        "--on-corrupt",
        choices=("refuse", "skip"),
        default="refuse",
        help="what to do about damaged images: stop at the first one, or decode all before the "
        "run and leave them out; default: refuse",
    )
    if decodes:
        _split_argument(parser)
        _decoder_argument(parser)


def _split_argument(parser):
    parser.add_argument(
        "--validation-split",
        type=real_number,
        metavar="SHARE",
        help="of class folders without validation images: the share that validates, chosen by a hash of each "
        "name; default: 0.2 for a folder of class folders, and what its run began with",
    )


def _decoder_argument(parser):
    parser.add_argument(
        "--decoder",
        type=choice("decoder", DECODERS),
        default="auto",
        metavar="NAME",
        help="what decodes JPEGs: simplejpeg, pillow, tensorflow, or nvimagecodec on a GPU under JAX; auto "
        "(default) is the fastest that is installed",
    )


def machine_arguments(parser, more=()):
    "Flags for what computes; `more` are further precisions."
    parser.add_argument(
        "--backend",
        type=choice("backend", BACKENDS),
        metavar="NAME",
        help="tensorflow or jax; default: $KERAS_BACKEND, or the first that is installed",
    )
    legal = (*_PRECISIONS, *more)
    parser.add_argument(
        "--precision",
        type=choice("precision", legal),
        metavar="TYPE",
        help=f"type to compute in: {', '.join(legal)}",
    )


def weights_argument(parser, names, help):
    "The flag for which weights of a run folder are meant; the first name is the default."
    kind = choice("weights", names)
    parser.add_argument("--weights", type=kind, default=names[0], metavar="NAME", help=help)


def classifier_arguments(parser):
    "Flags that name a trained network, of this project or another, and how it is read."
    parser.add_argument(
        "source",
        type=user_path,
        metavar="RUN_OR_FILE",
        help="run folder, checkpoint, or a file of keras.applications, timm or torchvision",
    )
    of_run = "of a run folder: last, average, auto (the average of a long run)"
    weights_argument(parser, ("auto", "last", "average"), of_run)
    parser.add_argument(
        "--image-size", type=whole_number, metavar="N", help="pixels; default: as trained"
    )
    parser.add_argument(
        "--class-names",
        type=user_path,
        metavar="FILE",
        help="a name a line, by label; default: the file's own",
    )
    parser.add_argument("--arch", metavar="NAME", help="timm's, e.g. tf_efficientnet_b0")


def run_arguments(parser):
    "Flags of a run that are not fields of a case."
    parser.add_argument(
        "--run-dir", type=user_path, metavar="DIR", help="where everything is written"
    )
    parser.add_argument(
        "--budget",
        type=choice("budget", BUDGETS),
        default="auto",
        metavar="NAME",
        help="case: as published; small: a recipe for fewer than 50,000 training images; demo: minutes on "
        "the sample set; smoke: two training steps; auto: demo without a data set, else small or case",
    )
    parser.add_argument(
        "--seed", type=whole_number, default=0, help="of weights, order, crops and masks"
    )
    every = parser.add_mutually_exclusive_group()
    every.add_argument(
        "--validate-every",
        type=whole_number,
        metavar="N",
        default=1,
        help="epochs; 0 = only at the end",
    )
    every.add_argument(
        "--no-validation", action="store_true", help="never; effnet-validate does it afterwards"
    )
    parser.add_argument(
        "--keep", type=whole_number, metavar="N", default=2, help="checkpoints to keep"
    )
    parser.add_argument(
        "--checkpoint-every",
        type=real_number,
        metavar="MINUTES",
        help="save within an epoch, too; default: at its end only",
    )
    begun_from = "which of the run to begin from: last, average, auto (the average of a long run)"
    weights_argument(parser, ("auto", "last", "average"), begun_from)
    distributed_arguments(parser)
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")


def data_dir_of(args):
    """Return the folder of data that the flags name, None for the built-in set."""
    return None if args.data_dir == "sample" else args.data_dir


def one_of(args, what, **flags):
    """Return the value of several spellings of one thing, None where none is given.

    UsageError where they differ.
    """
    given = {k: v for k, v in flags.items() if v is not None}
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{k}={v}" for k, v in given.items())
        raise UsageError(f"More than one {what}: {listed}. Keep one.")
    return next(iter(given.values()), None)


def source_arguments(parser):
    "Flags that name trained weights and data."
    parser.add_argument(
        "source", nargs="?", type=user_path, metavar="SOURCE", help="run folder or checkpoint file"
    )
    parser.add_argument(
        "--restore-path", type=user_path, metavar="PATH", help="the same, as published"
    )
    parser.add_argument(
        "--config", metavar="CASE", help="the case that SOURCE must hold; may be left out"
    )
    config_arguments(parser)
    data_arguments(parser)


def named_source(args, **more):
    """Return where the weights are, as the command line names it once; UsageError where it does not."""
    source = one_of(args, "source", SOURCE=args.source, restore_path=args.restore_path, **more)
    if source is None:
        raise UsageError("Which run folder or checkpoint?")
    return source


def checked_source(args, **more):
    """Return where the weights are and their case.

    UsageError where none is named or `--config` is another; OSError or ValueError where the file cannot be read.
    """
    source = named_source(args, **more)
    expected = named_case(args.config, args.config_path) if args.config else None
    load_metadata(source)
    try:
        return source, read_case(source, expected)
    except ValueError as e:
        raise UsageError(str(e).replace("`case`", "--config")) from None


def precision_of(args):
    "The precision of this machine; a case's, such as 16.32, means auto."
    return args.precision if args.precision in _PRECISIONS else "auto"


def run_options(args):
    """Return the keyword arguments of `train` and `finetune` that are no fields.

    UsageError for a number out of range.
    """
    if args.checkpoint_every is not None and args.checkpoint_every <= 0:
        raise UsageError("--checkpoint-every must be minutes above 0.")
    share = args.validation_split
    if share is not None and not 0 < share < 1:
        raise UsageError(f"--validation-split must be in (0, 1). Received: {share}.")
    if getattr(args, "ipus", None) is not None and not 1 <= args.ipus < 2**31:
        raise UsageError(f"--ipus must be at least 1. Received: {args.ipus}.")
    options_of(args)
    return {
        "seed": args.seed,
        "precision": precision_of(args),
        "backend": args.backend,
        "data_format": args.data_format,
        "on_corrupt": args.on_corrupt,
        "decoder": args.decoder,
        "validation_split": args.validation_split,
        "validate_every": None if args.no_validation else args.validate_every,
        "weights": args.weights,
        "keep": args.keep,
        "checkpoint_every": args.checkpoint_every,
        "distributed": args.distributed,
        "progress": not args.no_progress and sys.stderr.isatty(),
    }


def options_of(args) -> Options:
    """Return how a command's run is done. UsageError for a number out of range."""
    if args.keep < 1:
        raise UsageError(
            "--keep must be at least 1: the newest checkpoint is what a run goes on from."
        )
    if args.validate_every < 0 or args.seed < 0:
        raise UsageError("--validate-every and --seed must be at least 0.")
    every = None if args.no_validation else args.validate_every
    try:
        return Options(args.seed, every, args.keep)
    except ValueError as e:
        raise UsageError(str(e)) from None


def reading_of(args) -> Reading:
    """Return where a command's images are, and how they are read."""
    where = data_dir_of(args), args.data_format, args.decoder, args.validation_split
    return Reading(*where, args.on_corrupt)


def check_start(args, plan, init=None):
    """Check all that a run needs, for `--dry-run`, and return notes on it; see `runs.preflight`.

    `init` is what it begins from. ValueError or OSError, as the run itself would raise.
    """
    data = check_run(plan, reading_of(args), options_of(args), init, args.weights)
    if args.decoder == "nvimagecodec" or args.precision == "float16":
        start_keras(args)
        from effnet_repro.training.decoding import decoder_here
        from effnet_repro.training.device import choose_precision

        choose_precision(precision_of(args))
        decoder_here(data)
    return notes_on(plan.case, data)


@contextlib.contextmanager
def _hidden(*names):
    """Let imports of these modules fail, unless they are there already.

    Keras imports them where it finds them, for what no command uses: half of the seconds that it takes to import.
    """
    gone = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(gone))
    try:
        yield
    finally:
        for name in gone:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)


def _installed(package):
    return importlib.util.find_spec(package) is not None


def chosen_backend(args) -> str:
    """Return the name of the backend for `start_keras`: the flag's, the environment's, or the first installed."""
    chosen = args.backend or os.environ.get("KERAS_BACKEND")
    chosen = chosen or next((b for b in BACKENDS if _installed(b)), BACKENDS[0])
    if chosen not in BACKENDS:
        raise UsageError(str(unknown_name("backend", chosen, BACKENDS, "KERAS_BACKEND")))
    return chosen


def set_backend(args) -> None:
    """Name Keras' backend in the environment, before Keras is imported, and let TensorFlow write errors only."""
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = chosen_backend(args)
    if not args.debug:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def start_keras(args):
    """Choose Keras' backend before Keras is imported, and set what the device reads at its first use.

    TensorFlow writes two notes on stderr before it looks at its own log level. They would stand above the one line
    that an error leaves, so the first use of the device is kept quiet; `--debug` shows everything.
    """
    has, chosen = _installed, chosen_backend(args)
    missing = [package for package in ("keras", chosen) if not has(package)]
    if missing:
        raise ImportError(
            f"{' and '.join(missing)} not found. In the project's folder, run: pip install -e "
            + ("'.[keras,jax]'" if chosen == "jax" else "'.[keras]'")
            + (
                ", in a virtual environment of their own: this one has Graphcore's TensorFlow, which they "
                "would replace. On IPUs use --device ipu"
                if has_graphcore_wheel()
                else ""
            )
        )
    set_backend(args)
    dies = (
        chosen == "jax" and "XLA_FLAGS" in os.environ
    )  # XLA says what is wrong with them, and exits
    quiet = contextlib.nullcontext if args.debug or dies else suppress_stderr
    with quiet(), _hidden("sklearn", "pandas", "matplotlib", "matplotlib.pyplot"):
        from effnet_repro.training import configure, device_name
    configure()
    if getattr(args, "distributed", False) and is_child() and not has_joined():
        join_by_flags(args)
    with quiet():
        device_name()


def _about(run):
    "What config.json says of a run; nothing where somebody removed it"
    with contextlib.suppress(OSError, ValueError):
        return read_json(Path(run.run_dir) / "config.json")
    return {}


def finish_run(run, args):
    """Print the commands that come next on the same data; return the exit status, 130 for a stopped run.

    After a training these are a fine-tuning, a validation and, where the data are files of images, a prediction; after
    a fine-tuning the last two.
    """
    flush_or_leave()  # what happens to the output does not change how a run ended
    if here().index:  # the first process says it
        return 0 if run.finished else 130
    if not run.finished:
        tell(f"stopped; the same command goes on in {run.run_dir}")
        return 130
    damaged = None if args.on_corrupt == "refuse" else args.on_corrupt
    flags = {
        "--data-dir": args.data_dir,
        "--data-format": args.data_format,
        "--on-corrupt": damaged,
        "--decoder": None if args.decoder == "auto" else args.decoder,
    }
    given = [word for flag, value in flags.items() if value for word in (flag, str(value))]
    words = shlex.join([str(run.run_dir), *given])
    about = _about(run)
    said = [f"effnet-finetune {words}"] if about.get("kind", "train") == "train" else []
    said.append(f"effnet-validate {words}")
    folder = about.get("data", {}).get("format") == "folder"
    files = folder and not has_graphcore_wheel()  # there without Keras
    image = first_image(args.data_dir) if files else None
    if image is not None:
        said.append(f"effnet-predict {shlex.join([str(run.run_dir), image])}")
    say("\n  ".join([f"written to {run.run_dir}; next:", *said]))
    flush_or_leave()
    return 0
