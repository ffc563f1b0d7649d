"""`effnet-predict`: name what images show."""

import collections
import contextlib
import csv
import json
import os
import sys
import time

from effnet_repro.cli.fields import check_given
from effnet_repro.cli.kit import (
    UsageError,
    format_arguments,
    program,
    read_lines,
    user_path,
    whole_number,
)
from effnet_repro.cli.options import (
    classifier_arguments,
    machine_arguments,
    precision_of,
    start_keras,
)
from effnet_repro.convert import format_of
from effnet_repro.data.files import find_images
from effnet_repro.data.places import describe_left
from effnet_repro.messages import in_a_line

MOST_LIST = 2**28  # Bytes of a list of paths: millions of them


def _predict_arguments(parser):
    classifier_arguments(parser)
    parser.add_argument(
        "paths",
        nargs="+",
        type=user_path,
        metavar="PATH",
        help="image files, folders of them, or - for a list on standard input, a path a line",
    )
    parser.add_argument(
        "--top", type=whole_number, default=5, metavar="N", help="guesses for each image; default 5"
    )
    parser.add_argument(
        "--micro-batch-size",
        "--batch-size",
        type=whole_number,
        metavar="N",
        help="images at a time; default: what suits the device",
    )
    machine_arguments(parser)
    format_arguments(parser)


def _listed(paths):
    "The images that the command line names, and what is none in their folders; `-` is the paths on standard input"
    named = []
    for path in paths:
        named += _from_stdin() if path == "-" else [path]
    left = collections.Counter()
    return find_images(named, left), left


def _from_stdin():
    "Paths on standard input: a line each, or with a zero byte after each, as `find -print0` writes them"
    file = getattr(sys.stdin, "buffer", sys.stdin)
    data = file.read(MOST_LIST + 1)
    if len(data) > MOST_LIST:
        raise UsageError(f"The list on standard input is longer than {MOST_LIST:,} bytes.")
    text = os.fsdecode(data) if isinstance(data, bytes) else data
    return [p for p in (text.split("\0") if "\0" in text else text.splitlines()) if p]


def _printable(text):
    "Text with a mark in place of what is not UTF-8"
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class _Table:
    "A row for each guess; the widths are known before the first image is"

    def __init__(self, images, names, top):
        longest = lambda texts: max((len(in_a_line(t)) for t in texts), default=0)
        self.widths = max(5, longest(images)), max(5, longest(names))

    def begin(self):
        self._line("image", "class", "probability")

    def row(self, p):
        for rank, guess in enumerate(p.guesses):
            name = "" if rank else in_a_line(p.image)
            self._line(name, in_a_line(guess.name), f"{guess.probability:.4f}")

    def _line(self, image, name, probability):
        print(f"{image:<{self.widths[0]}}  {name:<{self.widths[1]}}  {probability:>11}")

    def end(self):
        pass


class _Csv:
    "A row for each guess, and one for each image without an answer"

    def begin(self):
        self.writer = csv.writer(sys.stdout, lineterminator="\n")
        self.writer.writerow(["image", "rank", "class", "label", "probability", "problem"])

    def row(self, p):
        image = _printable(p.image)
        for rank, guess in enumerate(p.guesses, 1):
            self.writer.writerow([image, rank, _printable(guess.name), *guess[1:], ""])
        if p.problem:
            self.writer.writerow([image, "", "", "", "", p.problem])

    def end(self):
        pass


class _Json:
    "One list, an object for each image"

    separator = ""

    def begin(self):
        print("[", end="")

    def row(self, p):
        guesses = [{"class": g.name, "label": g.label, "probability": g[2]} for g in p.guesses]
        said = {"problem": p.problem} if p.problem else {"guesses": guesses}
        print(f"{self.separator}\n{json.dumps({'image': p.image, **said})}", end="")
        self.separator = ","

    def end(self):
        print("\n]")


def _read_network(args, reading):
    "The weights that the command line names; Keras' own files need Keras"
    if format_of(args.source) == "keras":
        start_keras(args)
    from effnet_repro.predict import Reading, read_classifier

    return read_classifier(args.source, Reading(**reading))


def _all_unreadable(images, case):
    "A `Prediction` of each image that says what is wrong with it, or None as soon as one can be read"
    from effnet_repro.data.files import SquaresJob
    from effnet_repro.predict import Prediction

    job, found = SquaresJob(32, case.image_resize), []
    for image in images:
        (problem,) = job([image])[1]
        if not problem:
            return None
        found.append(Prediction(image, (), problem))
    return found


def _started(args, weights, reading):
    "A `Predictor`, which says its notes on stderr"
    from effnet_repro.predict import Predictor

    with contextlib.redirect_stdout(sys.stderr):
        how = {"image_size": args.image_size, "precision": precision_of(args)}
        network = Predictor(weights, backend=args.backend, **how, **reading)
        for note in network.notes:
            print(f"note: {note}")
    return network


@program(
    "predict",
    _predict_arguments,
    """
    effnet-predict runs/b1 photo.jpg
    effnet-predict runs/b1 photographs/ --top 1 --csv
    effnet-predict imagenet.safetensors - --json < list.txt
    """,
)
def predict_command(args):
    "Name what images show: the most likely classes of each, with their probabilities."
    if args.top < 1:
        raise UsageError("--top must be at least 1.")
    check_given(micro_batch_size=args.micro_batch_size, image_size=args.image_size)
    reading = {"weights": args.weights, "arch": args.arch}
    if args.class_names:
        reading["class_names"] = read_lines(args.class_names)
    images, left = _listed(args.paths)
    if not images:
        raise UsageError("No image is named.")
    # What is no network, and what is no image, is told before Keras takes its seconds.
    weights, network, names = _read_network(args, reading), None, ()
    if left:
        print(f"note: left out, {describe_left(left)}", file=sys.stderr)
    problems = _all_unreadable(images, weights.case)
    if problems is None:
        start_keras(args)
        network = _started(args, weights, reading)
        names = network.class_names
    begin = time.perf_counter()
    table = _Json() if args.json else _Csv() if args.csv else _Table(images, names, args.top)
    seen = problems or network(images, args.top, args.micro_batch_size)
    wrong = _print_all(table, seen)
    if network is not None:
        _say_speed(network, len(images), time.perf_counter() - begin)
    if wrong:
        rest = "" if wrong == len(images) else "; the others are above"
        print(
            f"effnet-predict: {wrong} of {len(images)} images could not be read{rest}.",
            file=sys.stderr,
        )
    return 1 if wrong else 0


def _print_all(table, predictions):
    "Print predictions as they come, and on stderr what could not be read; how many these are"
    wrong = 0
    table.begin()
    try:
        for prediction in predictions:
            table.row(prediction)
            sys.stdout.flush()
            if prediction.problem:
                wrong += 1
                name = in_a_line(prediction.image)
                print(f"{name}: {prediction.problem}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        table.end()  # what was printed stays readable
        raise
    table.end()
    sys.stdout.flush()
    return wrong


def _say_speed(network, count, seconds):
    speed = network.images_per_s
    fast = "" if speed != speed else f"; {speed:,.0f} images/s after the first batch"
    images = f"{count:,} image{'s' * (count != 1)}"
    print(f"{images} in {seconds:.1f} s{fast}", file=sys.stderr)
