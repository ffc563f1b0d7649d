"""Measure what a trained network is worth for other classes: transfer against training from scratch.

A network learns all classes of a data set but the last three (imagenette128: seven) with the recipe of budget `small`.
The others are learned from 10, 50 and 250 images a class, each with several seeds, which choose the images, the new
classifier, order and crops:

- scratch: fresh weights, the recipe of budget `small`, three times as many training steps
- Top: the body at rest, a new classifier
- last: the last stage of blocks learns, too
- whole: all blocks learn; with the rates that did best here it is what `effnet-finetune --new-head` does

Batch and length of the last three are those of protocol `transfer`. Every start chooses its rate, and `last` and
`whole` that of the body, in a small grid on images that are not measured: 250 training images a class that nothing
trains on, with draws of their own. What is measured are all validation images of the three classes.

Each training is a line of JSON in `--lines`, and a program that is started again goes on after the last of them, so
several processes share the work and a time limit cuts it anywhere. `--merge` sums the lines up in results/transfer.csv:
mean top-1, half of its 95 % interval over seeds, and both of the gain over scratch, seed by seed.

    python tests/bench_transfer.py --data-dir imagenette128 [--body BN] [--starts scratch Top] [--lines FOLDER]
    python tests/bench_transfer.py --merge FOLDER

--small  a network of four blocks instead of B0
--quick  the same on the built-in sample set, two seeds, a few steps: whether it runs
"""

import argparse
import fcntl
import itertools
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from learner import FOUR_BLOCKS, Learner  # noqa: E402

from effnet_repro import checkpoint  # noqa: E402
from effnet_repro.config import get_case, override, resolve  # noqa: E402
from effnet_repro.data import open_data  # noqa: E402
from effnet_repro.data.places import select  # noqa: E402
from effnet_repro.finetuning import PROTOCOLS  # noqa: E402
from effnet_repro.intervals import Difference  # noqa: E402
from effnet_repro.results import origin, write_rows  # noqa: E402
from effnet_repro.small_sets import small_batch  # noqa: E402
from effnet_repro.transfer import new_head_for, transfer_length  # noqa: E402

KEY = ("case", "image_size", "images_a_class", "start", "measured_on", "rate_exponent", "body_rate")
STARTS = ("scratch", "Top", "last", "whole")
BODIES = {  # What people have: this project's weights, and those of keras.applications and timm
    "LN_PN": {"name": "B0-G16-LN_PN"},
    "BN": dict(norm="BN", group_size=1, expand_ratio=6, norm_groups=1, name="B0-G1-BN"),
}
NEW_CLASSES, HELD_BACK, TRIAL_SEEDS = 3, 250, (100, 101)
LONGER = 3  # Training steps from scratch over those of a transfer


def grid(start):
    "(exponent of the rate, rate of the body over it) that a start chooses from"
    if start in ("scratch", "Top"):
        first = -15.5 if start == "scratch" else -13.5
        return [(first + i, 1.0 if start == "scratch" else 0.0) for i in range(3)]
    return list(itertools.product((-13.5, -12.5), (0.1, 0.3, 1.0)))


def mean_interval(values):
    "Mean and half of the 95 % interval of a few numbers"
    from scipy.stats import sem

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan
    low, high = Difference(mean, sem(values), len(values) - 1).interval()
    return mean, float(high - low) / 2


def part_of(data, labels, train, validation):
    """The data set with these classes only.

    `train` and `validation` are the numbers of its images: (split they come from, numbers).
    """
    labels = list(labels)
    new = np.full(data.num_classes, -1)
    new[labels] = range(len(labels))

    def taken(split, rows):
        some = select(data.splits[split], rows)
        return some._replace(label=new[some.label].astype("int32"))

    splits = {"train": taken(*train), "validation": taken(*validation)}
    names = tuple(data.class_names[label] for label in labels)
    counts = dict(train_count=len(train[1]), validation_count=len(validation[1]))
    return replace(data, splits=splits, class_names=names, num_classes=len(labels), **counts)


class Bench:
    "The old network, and those that learn the new classes"

    def __init__(self, args):
        self.args, self.begin = args, time.perf_counter()
        self.data = open_data(args.data_dir, verbose=False)
        case = get_case("B0-G16-LN_PN-Half_16IPU_2x8")
        own = dict(BODIES[args.body])
        if args.small:
            own.update(FOUR_BLOCKS, name=own["name"].replace("B0", "four blocks"))
        self.case = override(case, image_size=args.image_size, **own)
        labels = range(self.data.num_classes)
        self.old, self.new = labels[:-NEW_CLASSES], labels[-NEW_CLASSES:]
        self.learners, self.seconds, self.known = {}, {}, None
        self._set_apart()
        self.folder = Path(args.lines)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / f"{args.body}-{'-'.join(args.starts)}.jsonl"
        self.lines = [json.loads(line) for path in self._files() for line in path.open()]
        self.body_file = self.folder / f"{args.body}.safetensors"

    def _files(self):
        return sorted(self.folder.glob("*.jsonl"))

    def say(self, *text):
        print(f"{time.perf_counter() - self.begin:.0f} s:", *text, file=sys.stderr, flush=True)

    def numbers(self, split, labels):
        "Numbers of the images of these classes"
        return np.flatnonzero(np.isin(self.data.splits[split].label, list(labels)))

    def draw(self, count, seed):
        "The new classes with so many training images each"
        drawn = []
        for label, left in self.left.items():
            drawn.append(np.random.default_rng([seed, label]).permutation(left)[:count])
            if len(drawn[-1]) < count:
                raise SystemExit(f"{self.data.class_names[label]} has not {count} images to draw")
        return self._new(np.concatenate(drawn), self.measured)

    def _new(self, train, validation):
        return part_of(self.data, self.new, ("train", train), validation)

    def _set_apart(self):
        "Choose the images that rates are chosen on, and list those that are measured"
        held, self.left = [], {}
        for label in self.new:
            own = np.random.default_rng([7, label]).permutation(self.numbers("train", [label]))
            kept = min(HELD_BACK, len(own) // 3)
            held.append(own[:kept])
            self.left[label] = own[kept:]
        held = np.concatenate(held)
        self.measured = ("validation", self.numbers("validation", self.new))
        self.judged = {
            "held back": self._new(held, ("train", held)),
            "validation": self._new(held, self.measured),
        }

    def recipe(self, images, batch, epochs):
        "The case of budget `small`"
        how = dict(epochs=epochs, global_batch_size=batch, micro_batch_size=batch, device_loop=1)
        return resolve(self.case, "small", images=images, **how)[0]

    def train_body(self):
        "Learn the old classes, once for all processes that share the folder; keeps the weights and their top-1"
        with (self.folder / f"{self.args.body}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self.body_file.exists():
                self._learn_old()

    def _learn_old(self):
        args = self.args
        parts = [(split, self.numbers(split, self.old)) for split in ("train", "validation")]
        data = part_of(self.data, self.old, *parts)
        batch = min(args.old_batch, data.train_count)
        case = self.recipe(data.train_count, batch, args.old_epochs)
        learner = Learner(case, len(self.old), batch)
        steps = max(1, round(args.old_epochs * (data.train_count // batch)))
        arrays = learner.learn(learner.begin(0), data, steps, 0)
        top1 = learner.judge(arrays, data).top1
        self.say(f"old classes: top-1 {top1:.1%} after {steps} training steps")
        about = {"old_top1": round(top1, 5), "old_epochs": args.old_epochs}
        checkpoint.save(self.body_file, arrays, {**about, "class_names": list(data.class_names)})

    def body(self):
        "The weights for the old classes, as a reader of files returns them, and what is known of them"
        from effnet_repro.convert import Weights
        from effnet_repro.scaling import ModelSpec

        if self.known is None:
            self.train_body()
            arrays, about = checkpoint.load(self.body_file)
            about = {name: about[name] for name in ("class_names", "old_top1", "old_epochs")}
            spec = ModelSpec.from_case(self.case, num_classes=len(self.old))
            weights = Weights(spec, arrays, self.case, tuple(about.pop("class_names")))
            self.known = weights, about
        return self.known

    def learner(self, start):
        "The network of a start, compiled at its first call"
        if start not in self.learners:
            batch, last = self.args.batch, f"block{3 if self.args.small else 7}"
            if start == "scratch":
                case = self.recipe(NEW_CLASSES * max(self.args.images), batch, None)
            else:
                fields = {**PROTOCOLS["transfer"], "lr_schedule": "cosine", "mix_group_size": None}
                case = override(self.case, device_loop=1, **fields)
            parts = {"Top": ("Top",), "last": ("Top", last)}.get(start, ("Top", "block"))
            learner = Learner(case, NEW_CLASSES, batch, parts, slows=start in ("last", "whole"))
            self.learners[start] = learner
            data = self.draw(min(self.args.images), 0)
            learner.judge(learner.learn(learner.begin(0), data, 2, 0), data)
            self.say(start, "is compiled")
        return self.learners[start]

    def steps(self, start, count):
        images, batch = NEW_CLASSES * count, self.args.batch
        usual = transfer_length(images, batch, {})["epochs"] * (images // batch)
        return int(self.args.steps or usual * (LONGER if start == "scratch" else 1))

    def run(self, start, count, seed, measured_on, exponent, body_rate):
        "One training, unless its line is there; False where the time left is too short"
        key = dict(body=self.args.body, start=start, images_a_class=count, draw=seed)
        key.update(measured_on=measured_on, rate_exponent=exponent, body_rate=body_rate)
        if any(all(line[k] == v for k, v in key.items()) for line in self.lines):
            return True
        steps, learner = self.steps(start, count), self.learner(start)
        known, about = self.body() if start != "scratch" else (None, {})
        passed = time.perf_counter() - self.begin
        if passed + self.seconds.get(start, 0) * steps + 5 > self.args.seconds:
            return False
        began, data = time.perf_counter(), self.draw(count, seed)
        if start == "scratch":
            arrays = learner.begin(seed + 1)
        else:
            arrays = new_head_for(known, data.class_names, seed).arrays
        numbers = {"body_rate": body_rate} if learner.slows else {}
        numbers.update(base_learning_rate_exponent=exponent)
        arrays = learner.learn(arrays, data, steps, seed, **numbers)
        top1 = learner.judge(arrays, self.judged[measured_on]).top1
        took = time.perf_counter() - began
        self.seconds[start] = took / steps
        self._note({**key, "top1": round(top1, 5), "steps": steps, "took": round(took, 2), **about})
        return True

    def _note(self, found):
        "Append a line"
        from effnet_repro.training import device_name

        args, classes = self.args, f"{len(self.old)} to {len(self.new)}"
        own = dict(case=self.case.name, image_size=args.image_size, batch=args.batch)
        about = origin(device_name(), ["python", "tests/bench_transfer.py", *args.words], 0, 1)
        line = {**own, **found, "classes": classes, "about": about}
        self.lines.append(line)
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.say(*(found[k] for k in ("start", "images_a_class", "draw", "measured_on")), found)

    def choose(self, start):
        "Try the grid, and return the rates that are best on held-back images; None without time for that"
        for count in sorted(self.args.images)[:2]:
            for seed, rates in itertools.product(self.args.trial_seeds, grid(start)):
                if not self.run(start, count, seed, "held back", *rates):
                    return None
        own = dict(body=self.args.body, start=start, measured_on="held back")
        return best_rates([x for x in self.lines if all(x[k] == v for k, v in own.items())])

    def measure(self):
        "Every start of this process; five seeds for each number of images, then the next five"
        args, chosen = self.args, {}
        for start in args.starts:
            self.learner(start)
        for start in args.starts:
            chosen[start] = self.choose(start)
            self.say(start, "chose", chosen[start])
        order = itertools.product(range(-(-args.seeds // 5)), args.images, range(5), args.starts)
        for five, count, i, start in order:
            if chosen[start] is None or 5 * five + i >= args.seeds:
                continue
            if not self.run(start, count, 5 * five + i, "validation", *chosen[start]):
                return


def best_rates(lines):
    "The rates of highest mean top-1 in the lines of one start: (exponent, body rate)"
    found = {}
    for line in lines:
        found.setdefault((line["rate_exponent"], line["body_rate"]), []).append(line["top1"])
    return max(found, key=lambda rates: np.mean(found[rates]))


def rows_of(lines):
    "A row and what `results.origin` says of it, for each start, number of images and rates in lines of JSON"
    groups, scratch = {}, {}
    for line in lines:
        groups.setdefault(tuple(line[k] for k in KEY), []).append(line)
        if line["start"] == "scratch" and line["measured_on"] == "validation":
            where = tuple(line[k] for k in KEY[:3])
            scratch.setdefault(where, {})[line["draw"]] = line["top1"]
    for key, some in groups.items():
        some = sorted(some, key=lambda line: line["draw"])
        values = [line["top1"] for line in some]
        mean, half = mean_interval(values)
        row = {**dict(zip(KEY, key)), "top1": round(mean, 5), "half_interval": _short(half)}
        beside = scratch.get(key[:3], {}) if row["measured_on"] == "validation" else {}
        both = [line for line in some if line["draw"] in beside and row["start"] != "scratch"]
        gain = half = math.nan
        if both:
            gain, half = mean_interval([x["top1"] - beside[x["draw"]] for x in both])
        row.update(gain=_short(gain), gain_half_interval=_short(half), gain_n=len(both) or "")
        row["each"] = " ".join(f"{v:.4f}" for v in values)
        for name in ("steps", "batch", "old_epochs", "old_top1", "classes"):
            row[name] = some[0].get(name, "")
        draws = [line["draw"] for line in some]
        seed = f"{draws[0]} to {draws[-1]}" if len(draws) > 1 else draws[0]
        yield row, {**some[-1]["about"], "seed": seed, "n": len(some)}


def _short(value):
    return "" if math.isnan(value) else round(value, 5)


def merge(folder, results):
    "Write the rows of the lines in a folder"
    lines = [json.loads(x) for path in sorted(Path(folder).rglob("*.jsonl")) for x in path.open()]
    for row, about in rows_of(lines):
        write_rows(Path(results) / "transfer.csv", [row], KEY, about)
    return len(lines)


def parse(words):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="default: the built-in sample set")
    parser.add_argument("--body", choices=list(BODIES), default="LN_PN")
    parser.add_argument("--starts", nargs="*", choices=STARTS, default=list(STARTS))
    parser.add_argument("--images", type=int, nargs="+", default=[10, 50, 250])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--old-epochs", type=float, default=60)
    parser.add_argument("--old-batch", type=int, default=128)
    parser.add_argument("--steps", type=int, help="default: those of a transfer run")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no training later")
    parser.add_argument("--lines", help="folder of bodies and lines; default: a new one")
    parser.add_argument("--merge", metavar="FOLDER", help="sum up the lines there, train nothing")
    parser.add_argument("--results", default=str(ROOT / "results"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(words)
    args.trial_seeds = TRIAL_SEEDS
    if args.quick:
        args.small, args.images, args.seeds, args.image_size = True, [10], 2, 32
        args.steps, args.old_epochs, args.trial_seeds = 2, 0.1, TRIAL_SEEDS[:1]
    if args.seeds < 2:
        parser.error("--seeds must be at least 2: an interval needs them")
    args.batch = small_batch(NEW_CLASSES * min(args.images))
    args.words = words
    return args


def main(words=None):
    words = sys.argv[1:] if words is None else list(words)
    args = parse(words)
    with tempfile.TemporaryDirectory() as folder:
        if not args.merge:
            from effnet_repro.training import configure
            from effnet_repro.training.compiled import keep_compiled

            own = args.lines is None
            args.lines = args.lines or folder
            configure()
            keep_compiled()
            bench = Bench(args)
            bench.measure() if args.starts else bench.train_body()
            args.merge = folder if own else None
        if args.merge:
            print(f"{merge(args.merge, args.results)} trainings: {args.results}/transfer.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
