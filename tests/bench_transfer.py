"""Measure what a trained network is worth for other classes: transfer against training from scratch.

A network learns all classes of a data set but the last three (imagenette128: seven). The others are learned from 10,
50 and 250 images a class, each with several seeds, which choose the images, the new classifier, order and crops:

- scratch: fresh weights, the rate of budget `small`, --scratch times as many training steps
- Top: the body at rest, a new classifier
- last: the last stage of blocks learns, too, at a tenth of the classifier's rate
- whole: all blocks learn, at a tenth of that rate

Batch, length and rate of the last three are those of protocol `transfer`; nothing was chosen on the images measured,
which are all validation images of the three classes. Rows go to results/transfer.csv as they come: mean top-1, half of
its 95 % interval over seeds, and both of the gain over scratch, seed by seed.

A start is one network, compiled once: see `learner.py`.

    python tests/bench_transfer.py --data-dir imagenette128 [--body BN] [--seeds 5] [--starts scratch Top]

--small  a network of four blocks instead of B0
--quick  the same on the built-in sample set, two seeds, a few steps: whether it runs
"""

import argparse
import contextlib
import io
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from learner import Learner  # noqa: E402

from effnet_repro.config import get_case, override  # noqa: E402
from effnet_repro.data import open_data  # noqa: E402
from effnet_repro.data.decode import read_encoded  # noqa: E402
from effnet_repro.finetuning import PROTOCOLS  # noqa: E402
from effnet_repro.results import origin, write_rows  # noqa: E402
from effnet_repro.small_sets import RATE_BATCH, RATE_EXPONENT, small_batch  # noqa: E402
from effnet_repro.transfer import new_head_for, transfer_length  # noqa: E402

KEY = ("case", "image_size", "images_a_class", "start")
BODIES = {  # What people have: this project's weights, and those of keras.applications and timm
    "LN_PN": {"name": "B0-G16-LN_PN"},
    "BN": dict(norm="BN", group_size=1, expand_ratio=6, norm_groups=1, name="B0-G1-BN"),
}
SMALL = dict(
    net_stages=("r1_k3_s2_e1_i32_o16", "r2_k3_s2_i16_o24", "r1_k5_s2_i24_o40"), top_filters=128
)
NEW_CLASSES = 3
# 97.5 % point of Student's t by degrees of freedom; 1.96 beyond.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def mean_interval(values):
    "Mean and half of the 95 % interval of a few numbers"
    values = np.asarray(values, "float64")
    t = STUDENT[len(values) - 2] if len(values) - 2 < len(STUDENT) else 1.96
    return float(values.mean()), float(t * values.std(ddof=1) / math.sqrt(len(values)))


def write_folder(data, folder, classes, images_a_class=None, seed=0):
    "Class folders with the images of some classes; of the training images only so many, chosen by the seed"
    for split in ("train", "validation"):
        labels = data.splits[split].label
        for label in classes:
            own = np.flatnonzero(labels == label)
            if split == "train" and images_a_class:
                own = np.random.default_rng([seed, label]).permutation(own)[:images_a_class]
            place = folder / split / data.class_names[label].replace("/", "_")
            place.mkdir(parents=True)
            for i in own:
                (place / f"{i:06d}.jpg").write_bytes(read_encoded(data, split, i)[0])
    return open_data(folder, verbose=False)


class Bench:
    "The old network, and those that learn the new classes"

    def __init__(self, args, work):
        self.args, self.work = args, work
        self.data = open_data(args.data_dir, verbose=False)
        case = get_case("B0-G16-LN_PN-Half_16IPU_2x8")
        own = dict(BODIES[args.body])
        if args.small:
            own.update(SMALL, name=own["name"].replace("B0", "four blocks"))
        recipe = {**PROTOCOLS["transfer"], "cutmix_lambda": 0.0, "device_loop": 1}
        recipe.update(lr_schedule="cosine", mix_group_size=None)
        self.case = override(case, image_size=args.image_size, **recipe, **own)
        labels = range(self.data.num_classes)
        self.old, self.new = labels[:-NEW_CLASSES], labels[-NEW_CLASSES:]
        self.learners = {}

    def parts(self, start):
        last = f"block{3 if self.args.small else 7}"
        return {"Top": ("Top",), "last": ("Top", last)}.get(start, ("Top", "block"))

    def learner(self, start):
        kind = start if start in ("Top", "last") else "all"
        if kind not in self.learners:
            how = dict(parts=self.parts(start), slows=start != "Top")
            self.learners[kind] = Learner(self.case, NEW_CLASSES, self.args.batch, **how)
        return self.learners[kind]

    def train_old(self):
        "Learn the old classes; keeps the weights and their top-1"
        from effnet_repro.convert import Weights

        data = write_folder(self.data, self.work / "old", self.old)
        learner = Learner(self.case, len(self.old), self.args.old_batch)
        steps = round(self.args.old_epochs * (data.train_count // self.args.old_batch))
        fields = dict(base_learning_rate_exponent=scratch_exponent(self.args.old_batch))
        arrays = learner.learn(learner.begin(0), data, steps, 0, **fields)
        self.old_top1 = learner.judge(arrays, data).top1
        self.body = Weights(learner.spec, arrays, learner.case, data.class_names)

    def scores(self, count, seed):
        "Start -> (top-1, training steps)"
        place = self.work / f"new-{count}-{seed}"
        data, batch, found = (
            write_folder(self.data, place, self.new, count, seed),
            self.args.batch,
            {},
        )
        length = transfer_length(data.train_count, batch, {})
        usual = self.args.steps or int(length["epochs"] * (data.train_count // batch))
        for start in self.args.starts:
            learner, steps = self.learner(start), usual
            fields = dict(base_learning_rate_exponent=length["base_learning_rate_exponent"])
            if start == "scratch":
                steps *= self.args.scratch
                fields.update(base_learning_rate_exponent=scratch_exponent(batch))
                begun = learner.begin(seed + 1)
            else:
                begun = new_head_for(self.body, data.class_names, seed).arrays
                fields.update({} if start == "Top" else {"body_rate": self.args.body_rate})
            arrays = learner.learn(begun, data, steps, seed, **fields)
            found[start] = learner.judge(arrays, data).top1, steps
        return found


def scratch_exponent(batch):
    "The rate of budget `small`"
    return RATE_EXPONENT - math.log2(batch / RATE_BATCH) / 2


def rows_of(bench, count, found):
    "A row for each start, with its gain over scratch where that was measured"
    args = bench.args
    for start, (_, steps) in found[0].items():
        values = [scores[start][0] for scores in found]
        mean, half = mean_interval(values)
        gain = half_gain = ""
        if "scratch" in found[0] and start != "scratch":
            gains = np.subtract(values, [scores["scratch"][0] for scores in found])
            gain, half_gain = (round(v, 5) for v in mean_interval(gains))
        yield {
            "case": bench.case.name,
            "image_size": args.image_size,
            "images_a_class": count,
            "start": start,
            "top1": round(mean, 5),
            "half_interval": round(half, 5),
            "gain": gain,
            "gain_half_interval": half_gain,
            "each": " ".join(f"{v:.4f}" for v in values),
            "body_rate": {"Top": 0.0, "scratch": 1.0}.get(start, args.body_rate),
            "steps": steps,
            "batch": args.batch,
            "old_epochs": args.old_epochs,
            "old_top1": round(bench.old_top1, 5),
            "classes": f"{len(bench.old)} to {len(bench.new)}",
        }


def parse(words):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="default: the built-in sample set")
    parser.add_argument("--body", choices=list(BODIES), default="LN_PN")
    starts = ["scratch", "Top", "last", "whole"]
    parser.add_argument("--starts", nargs="+", choices=starts, default=starts)
    parser.add_argument("--images", type=int, nargs="+", default=[10, 50, 250])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--body-rate", type=float, default=0.1)
    parser.add_argument("--old-epochs", type=float, default=40)
    parser.add_argument("--old-batch", type=int, default=128)
    parser.add_argument("--steps", type=int, help="default: those of a transfer run")
    parser.add_argument("--scratch", type=int, default=3, help="times as many steps from scratch")
    parser.add_argument("--results", default=str(ROOT / "results"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(words)
    if args.quick:
        args.small, args.images, args.seeds, args.image_size = True, [10], 2, 32
        args.steps, args.old_epochs = 2, 0.1
    if args.seeds < 2:
        parser.error("--seeds must be at least 2: an interval needs them")
    args.batch = small_batch(NEW_CLASSES * min(args.images))
    return args


def main(words=None):
    words = sys.argv[1:] if words is None else list(words)
    args, begin = parse(words), time.perf_counter()
    from effnet_repro.training import configure, device_name

    configure()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        say = lambda *text: print(
            f"{time.perf_counter() - begin:.0f} s:", *text, file=sys.__stdout__, flush=True
        )
        bench = Bench(args, Path(folder))
        bench.train_old()
        say(f"old classes: top-1 {bench.old_top1:.1%}")
        for count in args.images:
            found = []
            for seed in range(args.seeds):
                found.append(bench.scores(count, seed))
                say(count, seed, found[-1])
            command = ["python", "tests/bench_transfer.py", *words]
            about = origin(device_name(), command, f"0 to {args.seeds - 1}", args.seeds)
            path = Path(args.results) / "transfer.csv"
            write_rows(path, list(rows_of(bench, count, found)), KEY, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
