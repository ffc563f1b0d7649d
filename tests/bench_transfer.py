"""Measure what a trained network is worth for other classes: transfer against training from scratch.

A network learns all classes of a data set but the last three (imagenette128: seven). The others are learned from 10,
50 and 250 images a class, each with several seeds, which choose the images and everything else: from scratch, with the
old body at rest ("Top"), and with the whole network trained ("whole"). All validation images of the three classes are
measured. Rows go to results/transfer.csv as they come: mean top-1, half of the 95 % interval over seeds, and the gain
over scratch, seed by seed.

    python tests/bench_transfer.py --data-dir imagenette128 [--case NAME] [--seeds 5] [--image-size 128]

--quick  a network of four blocks on the built-in sample set, two seeds, a few steps: whether it runs
"""

import argparse
import contextlib
import io
import math
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from effnet_repro.config import get_case, override  # noqa: E402
from effnet_repro.data import open_data  # noqa: E402
from effnet_repro.data.decode import read_encoded  # noqa: E402
from effnet_repro.results import origin, write_rows  # noqa: E402

KEY = ("case", "images_a_class", "start")
NEW_CLASSES = 3
# 97.5 % point of Student's t by degrees of freedom; 1.96 beyond.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
SMALL = ("r1_k3_s2_e1_i32_o16", "r2_k3_s2_i16_o24", "r1_k5_s2_i24_o40")
# What a small set needs, whichever weights a run begins from.
RECIPE = dict(
    global_batch_size=32,
    micro_batch_size=32,
    base_learning_rate_exponent=-12,
    warmup_epochs=1,
    lr_schedule="cosine",
    drop_path_rate=0.0,
    mixup_alpha=0.0,
    cutmix_lambda=0.0,
    crop_area_min=0.35,
    image_resize="modern",
)


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
    return folder


class Bench:
    "The old network, and runs on the new classes"

    def __init__(self, args, work):
        self.args, self.work = args, work
        self.data = open_data(args.data_dir, verbose=False)
        self.case = override(get_case(args.case), image_size=args.image_size)
        if args.quick:
            self.case = override(self.case, net_stages=SMALL, top_filters=128)
        labels = range(self.data.num_classes)
        self.old, self.new = labels[:-NEW_CLASSES], labels[-NEW_CLASSES:]

    def quiet(self, task, *words, **more):
        how = dict(progress=False, validate_every=0, keep=1, budget="case")
        how.update({"max_steps": 2} if self.args.quick else {}, image_size=self.args.image_size)
        with contextlib.redirect_stdout(io.StringIO()):
            return task(*words, **how, **more)

    def old_run(self):
        from effnet_repro.training import train

        folder = write_folder(self.data, self.work / "old", self.old)
        more = dict(RECIPE, epochs=self.args.old_epochs)
        return self.quiet(train, self.case, folder, self.work / "old-run", **more)

    def scores(self, folder, count, seed):
        "Top-1 of each start"
        from effnet_repro.training import finetune, train

        place = lambda start: self.work / f"{start}-{count}-{seed}"
        # Three steps an epoch at least, however few images there are.
        size = min(32, 2 ** int(math.log2(NEW_CLASSES * count // 3)))
        scratch = dict(RECIPE, global_batch_size=size, micro_batch_size=size)
        how = dict(seed=seed, epochs=self.args.scratch_epochs)
        runs = {"scratch": self.quiet(train, self.case, folder, place("scratch"), **scratch, **how)}
        for start, parts in (("Top", ("Top",)), ("whole", ("Top", "block"))):
            how = dict(seed=seed, new_head=True, variable_filter=parts, epochs=self.args.epochs)
            if start == "whole":  # a quarter of the rate of a classifier alone
                how.update(base_learning_rate_exponent=-13)
            source = self.work / "old-run"
            runs[start] = self.quiet(finetune, source, folder, place(start), **how)
        return {start: run.scores["last"].top1 for start, run in runs.items()}


def rows_of(bench, count, found, old_top1):
    "A row for each start, and for each gain over scratch"
    columns = {start: [scores[start] for scores in found] for start in found[0]}
    for start in ("Top", "whole"):
        gains = np.subtract(columns[start], columns["scratch"])
        columns[f"{start} less scratch"] = gains.tolist()
    for start, values in columns.items():
        mean, half = mean_interval(values)
        yield {
            "case": bench.case.name,
            "images_a_class": count,
            "start": start,
            "top1": round(mean, 5),
            "half_interval": round(half, 5),
            "each": " ".join(f"{v:.4f}" for v in values),
            "image_size": bench.args.image_size,
            "epochs": bench.args.scratch_epochs if start == "scratch" else bench.args.epochs,
            "old_top1": round(old_top1, 5),
            "classes": f"{len(bench.old)} to {len(bench.new)}",
        }


def parse(words):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="default: the built-in sample set")
    parser.add_argument("--case", default="B0-G16-LN_PN-Half_16IPU_2x8")
    parser.add_argument("--images", type=int, nargs="+", default=[10, 50, 250])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--old-epochs", type=float, default=60)
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--scratch-epochs", type=float, default=60)
    parser.add_argument("--results", default=str(ROOT / "results"))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(words)
    if args.quick:
        args.images, args.seeds, args.image_size = [10], 2, 32
    if args.seeds < 2:
        parser.error("--seeds must be at least 2: an interval needs them")
    return args


def main(words=None):
    words = sys.argv[1:] if words is None else list(words)
    args = parse(words)
    from effnet_repro.training import configure, device_name

    configure()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        old_top1 = bench.old_run().scores["last"].top1
        print(f"old classes: top-1 {old_top1:.1%}", flush=True)
        for count in args.images:
            found = []
            for seed in range(args.seeds):
                place = bench.work / f"data-{count}-{seed}"
                write_folder(bench.data, place, bench.new, count, seed)
                found.append(bench.scores(place, count, seed))
                print(count, seed, found[-1], flush=True)
            seeds = f"0 to {args.seeds - 1}"
            command = ["python", "tests/bench_transfer.py", *words]
            about = origin(device_name(), command, seeds, args.seeds)
            path = Path(args.results) / "transfer.csv"
            write_rows(path, list(rows_of(bench, count, found, old_top1)), KEY, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
