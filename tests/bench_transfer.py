"""Measure what a trained network is worth for other classes: transfer against training from scratch.

A network learns all classes of a data set but the last three (imagenette128: seven). The others are learned from 10,
50 and 250 images a class, by several seeds, which choose the images, the new classifier and all chance. Starts:

- scratch: fresh weights, --scratch times as many training steps, the best of three learning rates
- Top: the body at rest, a new classifier (three rates)
- last: blocks 6 and 7 learn, too, at a part of the classifier's rate (three parts)
- whole: all blocks learn, at a part of that rate (six pairs of part and rate)

Half of the validation images of the three classes choose among rates, the other half is reported. With the most
images only the chosen rates run. Rows go to results/transfer.csv as they come: mean top-1, half of its 95 % interval
over seeds, and the same of the gain over scratch, seed by seed.

All rates and seeds of a network learn at once: one compiled training step (`TrainingModel.train_step`), mapped over
the networks, with the plain operations of JAX.

    python tests/bench_transfer.py --data-dir imagenette128 [--bodies LN_PN BN] [--seeds 5] [--limit 330]

--quick  networks of four blocks on the built-in sample set, two seeds, a few steps: whether it runs
"""

import argparse
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["KERAS_BACKEND"] = "jax"
os.environ["EFFNET_KERNELS"] = "0"  # kernels are of one network, not of several at once
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from effnet_repro.config import for_one_device, get_case, override  # noqa: E402
from effnet_repro.data import open_data  # noqa: E402
from effnet_repro.data.decode import decode_image, read_encoded  # noqa: E402
from effnet_repro.data.device import Cuts, lay_out  # noqa: E402
from effnet_repro.data.order import BatchOrder  # noqa: E402
from effnet_repro.data.transforms import (  # noqa: E402
    ASPECTS,
    draw_crops,
    draw_flips,
    validation_image,  # noqa: E402
)
from effnet_repro.network import initial_weights, run, segments  # noqa: E402
from effnet_repro.recipe import learning_rate, trained_segments  # noqa: E402
from effnet_repro.results import origin, write_rows  # noqa: E402
from effnet_repro.scaling import ModelSpec  # noqa: E402
from effnet_repro.transfer import transfer_length  # noqa: E402

KEY = ("case", "images_a_class", "start", "rate_exponent", "body_rate")
BODIES = {  # What people have: this project's weights, and those of keras.applications and timm
    "LN_PN": "B0-G16-LN_PN-Half_16IPU_2x8",
    "BN": dict(norm="BN", group_size=1, expand_ratio=6, norm_groups=1, name="B0-G1-BN"),
}
NEW_CLASSES, LAST, BATCH, OLD_BATCH = 3, ("Top", "block6", "block7"), 16, 128
# 97.5 % point of Student's t by degrees of freedom; 1.96 beyond.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
SMALL = ("r1_k3_s2_e1_i32_o16", "r2_k3_s2_i16_o24", "r1_k5_s2_i24_o40", "r1_k3_s1_i40_o48")
# What a small set needs, whichever weights a run begins from.
RECIPE = dict(
    optimizer="adamw",
    lr_schedule="cosine",
    drop_path_rate=0.0,
    mixup_alpha=0.0,
    cutmix_lambda=0.0,
    crop_area_min=0.35,
    image_resize="modern",
    device_loop=1,
    weight_decay=0.05,
)
OLD_EXPONENT = -16.0  # A rate of 2**-9 at a batch of 128


class Arm(NamedTuple):
    "One way to learn the new classes"

    start: str  # scratch, Top, last, whole
    exponent: float  # Of the rate: 2**exponent x batch
    body_rate: float  # Of the body that learns, over that of the classifier

    @property
    def parts(self):
        return {"Top": ("Top",), "last": LAST}.get(self.start, ("Top", "block"))


MIDDLE = -12.5  # 2**-8.5 at a batch of 16
SCRATCH = [Arm("scratch", e, 1.0) for e in (-15.5, -14.5, -13.5)]
GRID = [Arm("Top", e, 0.0) for e in (MIDDLE - 2, MIDDLE, MIDDLE + 2)]
GRID += [Arm("last", MIDDLE, r) for r in (0.1, 0.3, 1.0)]
GRID += [Arm("whole", MIDDLE, r) for r in (0.03, 0.1, 0.3)]
GRID += [Arm("whole", MIDDLE - 2, r) for r in (0.1, 1.0)] + [Arm("whole", MIDDLE + 2, 0.03)]


def mean_interval(values):
    "Mean and half of the 95 % interval of a few numbers"
    values = np.asarray(values, "float64")
    t = STUDENT[len(values) - 2] if len(values) - 2 < len(STUDENT) else 1.96
    return float(values.mean()), float(t * values.std(ddof=1) / math.sqrt(len(values)))


class Images:
    "The images of a data set: those to train on, on the device, and squares to measure on"

    def __init__(self, data, size):
        self.data, self.size = data, size
        with ThreadPoolExecutor() as pool:
            decoded = lambda split: list(
                pool.map(lambda i: self._pixels(split, i), self._all(split))
            )
            self.train = lay_out(decoded("train"))
            square = lambda image: validation_image(image, size, "modern")
            self.squares = np.stack(list(pool.map(square, decoded("validation"))))

    def _all(self, split):
        return range(len(self.data.splits[split].label))

    def _pixels(self, split, i):
        return decode_image(read_encoded(self.data, split, i)[0], False)

    def of_classes(self, split, classes, count=None, seed=0):
        "Numbers of images of some classes, of each so many, chosen by the seed"
        labels = self.data.splits[split].label
        draw = lambda c: np.random.default_rng([seed, c]).permutation(np.flatnonzero(labels == c))
        return np.concatenate([np.sort(draw(c)[:count]) for c in classes])

    def batches(self, numbers, classes, steps, batch, seed):
        "What each training step cuts out, with a first axis of steps, and its labels (steps, batch)"
        order = BatchOrder(len(numbers), seed, batch)
        taken = [order.take(update, 0, batch) for update in range(steps)]
        which, places = (np.concatenate(part) for part in zip(*taken))
        which, none = numbers[which], [np.zeros((0, 4))] * len(which)
        sizes = self.train.sizes[which]
        how = dict(area_min=RECIPE["crop_area_min"], aspects=ASPECTS["modern"])
        parts = draw_crops(sizes, none, seed, places, **how).astype("int32")
        scale, corner = (parts[:, 2:] / self.size).astype("float32"), np.zeros((len(which), 2))
        flips = draw_flips(seed, places)
        cuts = Cuts(self.train.begin[which], sizes[:, 1], parts, scale, corner, flips, None)
        fold = lambda v: v.reshape(steps, batch, *v.shape[1:])
        cuts = {n: fold(np.asarray(v)) for n, v in cuts._asdict().items() if v is not None}
        cuts.update(corner=cuts["corner"].astype("float32"), zero=np.zeros(steps, "int32"))
        labels = self.data.splits["train"].label[which]
        return cuts, fold(np.searchsorted(classes, labels).astype("int32"))


class Learner:
    "Networks of one kind that learn at once, each with its own weights, images and rates"

    def __init__(self, case, classes, parts, count, batch):
        from effnet_repro.efficientnet import build_model
        from effnet_repro.training import Program, TrainingModel, choose_precision

        self.case = for_one_device(case, batch, batch)
        self.spec = ModelSpec.from_case(self.case, num_classes=classes)
        trained = trained_segments([s.name for s in segments(self.spec)], parts)
        program = Program(self.case, self.spec, trained, choose_precision("auto"), 0)
        network = build_model(self.spec, image_size=case.image_size, dtype="float32")
        self.model, self.count, self.batch = TrainingModel(network, program), count, batch
        self._names()

    def _names(self):
        from effnet_repro.efficientnet import weights_by_name

        names = {id(v): n for n, v in weights_by_name(self.model.network).items()}
        named = lambda variables: [names.get(id(v)) for v in variables]
        self.trained = named(self.model.trainable_variables)
        self.others = named(self.model.non_trainable_variables)
        self.segment_of = {p.name: s.name for s in segments(self.spec) for p in s.params}

    def state(self, arrays):
        "The state of networks with these weights, a dictionary each"
        import jax

        model = self.model
        stack = lambda variables, names: [
            np.stack([np.asarray(a.get(n, v.value)) for a in arrays])
            for v, n in zip(variables, names)
        ]
        begun = [np.asarray(v.value) for v in model.optimizer.variables]
        slots = [np.broadcast_to(v, (self.count, *v.shape)) for v in begun]
        own = stack(model.trainable_variables, self.trained)
        others = stack(model.non_trainable_variables, self.others)
        return jax.device_put((own, others, slots, []))

    def rates(self, arms):
        "Of each network, the share of its way that each trained array goes"

        def share(arm, name):
            segment = self.segment_of[name]
            if segment == "Top" or arm.start == "scratch":
                return 1.0
            return arm.body_rate if segment.startswith(arm.parts) else 0.0

        return np.array([[share(arm, n) for n in self.trained] for arm in arms], "float32")

    def one_step(self, state, rates, batch, pixels):
        "A training step of one network: the number of images that were right, and its new state"
        logs, (trained, *rest) = self.model.train_step(state, ({**batch, "pixels": pixels},))
        way = zip(range(len(trained)), state[0], trained)
        return logs["accuracy"], ([old + rates[i] * (new - old) for i, old, new in way], *rest)

    def compile(self, pixels):
        "Compile the step; takes a while, and may be done in a thread"
        import jax

        shape = lambda v: jax.ShapeDtypeStruct(np.shape(v), v.dtype)
        weights = self.state([{}] * self.count)
        cuts = {n: v[:, 0] for n, v in self._example().items()}
        whole = dict(cuts=cuts, labels=np.zeros((self.count, self.batch), "int32"))
        whole.update(update=np.zeros(self.count, "int32"))
        whole.update(learning_rate=np.zeros(self.count, "float32"))
        rates = np.zeros((self.count, len(self.trained)), "float32")
        mapped = jax.vmap(self.one_step, in_axes=(0, 0, 0, None))
        args = jax.tree.map(shape, (weights, rates, whole, pixels))
        self.step = jax.jit(mapped, donate_argnums=0).lower(*args).compile()
        return self

    def _example(self):
        n, b = self.count, self.batch
        kinds = dict(begin=((), "int32"), width=((), "int32"), parts=((4,), "int32"))
        kinds.update(scale=((2,), "float32"), corner=((2,), "float32"), flips=((), "bool"))
        found = {name: np.zeros((n, 1, b, *shape), kind) for name, (shape, kind) in kinds.items()}
        return {**found, "zero": np.zeros((n, 1), "int32")}

    def learn(self, state, arms, data, steps, images, seeds):
        "Train all networks; `data` are (cuts, labels) of each, `images` their number: the state after it"
        pixels, per_epoch = data["pixels"], max(1, images // self.batch)
        about = lambda arm: override(
            self.case,
            base_learning_rate_exponent=arm.exponent,
            epochs=steps / per_epoch,
            warmup_epochs=steps / per_epoch / 20,
        )
        each = [about(arm) for arm in arms]
        rate = [[learning_rate(c, t, per_epoch) for t in range(steps)] for c in each]
        rate, rates, begin = np.array(rate, "float32"), self.rates(arms), time.perf_counter()
        for t in range(steps):
            batch = dict(cuts={n: v[:, t] for n, v in data["cuts"].items()})
            batch.update(labels=data["labels"][:, t], learning_rate=rate[:, t])
            batch["update"] = (t + 10_000 * np.asarray(seeds)).astype("int32")
            right, state = self.step(state, rates, batch, pixels)
        right = np.asarray(right)
        ms = 1000 * (time.perf_counter() - begin) / steps
        print(f"  {steps} steps of {len(arms)} networks, {ms:.1f} ms each", flush=True)
        return state

    def arrays(self, state):
        "Full name -> arrays of all networks, with a first axis of networks"
        named = [*zip(self.trained, state[0]), *zip(self.others, state[1])]
        return {n: v for n, v in named if n is not None}


class Judge:
    "Says which images the networks of a learner get right"

    def __init__(self, learner, batch=128):
        self.learner, self.batch = learner, batch

    def compile(self):
        "Compile the forward pass; takes a while, and may be done in a thread"
        import jax

        from effnet_repro.efficientnet import current_ops, weights_by_name

        ops, learner, size = current_ops(), self.learner, self.learner.case.image_size
        precision = learner.model.program.precision
        seen = lambda weights, images: ops.jnp.argmax(
            run(ops, learner.spec, weights, ops.cast(images, precision)), -1
        )
        shape = lambda v: jax.ShapeDtypeStruct((learner.count, *v.shape), "float32")
        arrays = {n: shape(v) for n, v in weights_by_name(learner.model.network).items()}
        images = jax.ShapeDtypeStruct((self.batch, size, size, 3), "uint8")
        mapped = jax.jit(jax.vmap(seen, in_axes=(0, None)))
        self.mapped = mapped.lower(arrays, images).compile()
        return self

    def right(self, arrays, squares, labels):
        "(networks, images) bool"
        batch = self.batch
        filled = np.concatenate([squares, squares[: -len(squares) % batch]])
        parts = [self.mapped(arrays, filled[i : i + batch]) for i in range(0, len(filled), batch)]
        return np.concatenate([np.asarray(p) for p in parts], 1)[:, : len(labels)] == labels


class Bench:
    "The networks of one body, old and new"

    def __init__(self, args, images, norm, compiling):
        self.args, self.images, self.begin = args, images, time.perf_counter()
        case = get_case(BODIES["LN_PN"])
        own = BODIES[norm] if isinstance(BODIES[norm], dict) else {}
        small = dict(net_stages=SMALL, top_filters=128) if args.quick else {}
        self.case = override(case, image_size=args.image_size, **RECIPE, **own, **small)
        labels = range(images.data.num_classes)
        self.old, self.new = labels[:-NEW_CLASSES], labels[-NEW_CLASSES:]
        self.networks = 3 * args.seeds
        old = Learner(self.case, len(self.old), ("Top", "block"), 1, args.old_batch)
        begun = lambda learner: compiling.submit(learner.compile, images.train.pixels)
        self.learners = {"old": begun(old)}
        judges = [Judge(old)]
        kinds = [("whole", ("Top", "block"))]
        kinds += [("Top", ("Top",)), ("last", LAST)] if norm == "BN" else []
        for kind, parts in kinds:
            parts = [p for p in parts if p in ("Top", "block") or not args.quick] + ["block3"] * (
                args.quick and kind == "last"
            )
            learner = Learner(self.case, NEW_CLASSES, parts, self.networks, BATCH)
            self.learners[kind] = begun(learner)
            if kind == "whole":
                judges = [compiling.submit(j.compile) for j in (*judges, Judge(learner))]
        self.old_judge, self.judge = judges

    def learner(self, start):
        "The compiled learner of a start: a batch norm that rests needs a program of its own"
        return self.learners.get(start, self.learners["whole"]).result()

    def train_old(self):
        "Learn the old classes; keeps the weights, returns top-1"
        from effnet_repro.convert import Weights

        learner, images = self.learners["old"].result(), self.images
        numbers = images.of_classes("train", self.old)
        steps = round(self.args.old_epochs * (len(numbers) // learner.batch))
        cuts, labels = images.batches(numbers, list(self.old), steps, learner.batch, 0)
        data = {"cuts": {n: v[None] for n, v in cuts.items()}, "labels": labels[None]}
        data["pixels"] = images.train.pixels
        arm = Arm("scratch", OLD_EXPONENT, 1.0)
        state = learner.state([initial_weights(learner.spec, 0)])
        state = learner.learn(state, [arm], data, steps, len(numbers), [0])
        arrays = learner.arrays(state)
        which = images.of_classes("validation", self.old)
        labels = np.searchsorted(list(self.old), images.data.splits["validation"].label[which])
        top1 = self.old_judge.result().right(arrays, images.squares[which], labels).mean()
        names = tuple(images.data.class_names[c] for c in self.old)
        arrays = {n: np.asarray(v[0]) for n, v in arrays.items()}
        self.body = Weights(learner.spec, arrays, learner.case, names)
        self.old_top1 = float(top1)

    def scores(self, arms, count, steps):
        "Top-1 of each arm and seed on both halves of the validation images: (arms, seeds, 2)"
        from effnet_repro.transfer import new_head_for

        images, args, new = self.images, self.args, list(self.new)
        learner, seeds = self.learner(arms[0].start), range(args.seeds)
        names = [images.data.class_names[c] for c in new]
        fresh = lambda seed: initial_weights(learner.spec, seed + 1)
        kept = lambda seed: new_head_for(self.body, names, seed).arrays
        pairs = [(arm, seed) for arm in arms for seed in seeds]
        begun = {s: (fresh if arms[0].start == "scratch" else kept)(s) for s in seeds}
        state = learner.state([begun[s] for _, s in pairs])
        sets = [images.of_classes("train", new, count, seed) for seed in seeds]
        made = [images.batches(n, new, steps, learner.batch, s) for s, n in enumerate(sets)]
        spread = lambda values: np.stack([values[seed] for _, seed in pairs])
        cuts = {n: spread([one[0][n] for one in made]) for n in made[0][0]}
        data = dict(cuts=cuts, labels=spread([one[1] for one in made]), pixels=images.train.pixels)
        each = [seed for _, seed in pairs]
        state = learner.learn(state, [a for a, _ in pairs], data, steps, len(sets[0]), each)
        which = images.of_classes("validation", new)
        labels = np.searchsorted(new, images.data.splits["validation"].label[which])
        right = self.judge.result().right(learner.arrays(state), images.squares[which], labels)
        halves = np.stack([right[:, h::2].mean(1) for h in (0, 1)], 1)
        return halves.reshape(len(arms), len(seeds), 2)

    def measure(self, count, arms, found):
        "Add the scores of some arms, as many at a time as a learner has networks"
        images = NEW_CLASSES * count
        steps = transfer_length(images, BATCH, {})["epochs"] * max(1, images // BATCH)
        steps = self.args.steps or int(steps)
        for own in self._together(arms):
            for i in range(0, len(own), 3):
                some = (own[i : i + 3] * 3)[:3]  # filled up, so that one program serves all
                longer = self.args.scratch if some[0].start == "scratch" else 1
                for arm, scores in zip(some, self.scores(some, count, steps * longer)):
                    found[count, arm] = scores, steps * longer

    def _together(self, arms):
        "The arms, those together that one program serves and that take as many steps"
        groups = {}
        for arm in arms:
            kind = arm.start if arm.start == "scratch" else id(self.learner(arm.start))
            groups.setdefault(kind, []).append(arm)
        return groups.values()

    def chosen(self, found):
        "Of each start the arm that the first half of the validation images prefers over all counts so far"
        mean = lambda arm: np.mean([s[:, 0] for (_, a), (s, _) in found.items() if a == arm])
        arms = list(dict.fromkeys(arm for _, arm in found))
        return {arm.start: arm for arm in sorted(arms, key=mean)}


def rows_of(bench, count, found):
    "A row for each arm, with its gain over scratch at the rate that the first half prefers"
    here = {arm: value for (c, arm), value in found.items() if c == count}
    scratch = [arm for arm in here if arm.start == "scratch"]
    best = max(scratch, key=lambda arm: here[arm][0][:, 0].mean())
    picked = set(bench.chosen(found).values()) | {best}
    for arm, (scores, steps) in here.items():
        mean, half = mean_interval(scores[:, 1])
        gain = mean_interval(scores[:, 1] - here[best][0][:, 1])
        yield {
            "case": bench.case.name,
            "images_a_class": count,
            "start": arm.start,
            "rate_exponent": arm.exponent,
            "body_rate": arm.body_rate,
            "chosen": arm in picked and (arm.start != "scratch" or arm == best),
            "top1": round(mean, 5),
            "half_interval": round(half, 5),
            "gain": round(gain[0], 5),
            "gain_half_interval": round(gain[1], 5),
            "choosing_top1": round(float(scores[:, 0].mean()), 5),
            "each": " ".join(f"{v:.4f}" for v in scores[:, 1]),
            "steps": steps,
            "batch": BATCH,
            "optimizer": bench.case.optimizer,
            "image_size": bench.args.image_size,
            "old_epochs": bench.args.old_epochs,
            "old_top1": round(bench.old_top1, 5),
            "classes": f"{len(bench.old)} to {len(bench.new)}",
        }


def parse(words):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="default: the built-in sample set")
    parser.add_argument("--bodies", nargs="+", choices=list(BODIES), default=list(BODIES))
    parser.add_argument("--images", type=int, nargs="+", default=[10, 50, 250])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--old-epochs", type=float, default=40)
    parser.add_argument("--old-batch", type=int, default=OLD_BATCH)
    parser.add_argument("--steps", type=int, help="default: those of a transfer run")
    parser.add_argument("--scratch", type=int, default=3, help="times as many steps from scratch")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds; then it ends")
    parser.add_argument("--results", default=str(ROOT / "results"))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(words)
    if args.quick:
        args.images, args.seeds, args.image_size = [10, 20], 2, 32
        args.steps, args.old_epochs = args.steps or 2, 1
    if args.seeds < 2:
        parser.error("--seeds must be at least 2: an interval needs them")
    return args


def main(words=None):
    words = sys.argv[1:] if words is None else list(words)
    args, begin = parse(words), time.perf_counter()
    from effnet_repro.training import configure, device_name

    configure()
    spent = lambda: time.perf_counter() - begin
    images = Images(open_data(args.data_dir, verbose=False), args.image_size)
    print(f"{spent():.0f} s: images are there", flush=True)
    with ThreadPoolExecutor(4) as compiling:
        benches = [Bench(args, images, norm, compiling) for norm in args.bodies]
        print(f"{spent():.0f} s: networks are built", flush=True)
        for bench in benches:
            if spent() > args.limit:
                break
            bench.train_old()
            print(
                f"{spent():.0f} s: {bench.case.name}, old classes {bench.old_top1:.1%}", flush=True
            )
            found = {}
            for at, count in enumerate(args.images):
                if spent() > args.limit:
                    break
                last = at and at == len(args.images) - 1
                arms = (
                    [a for s, a in bench.chosen(found).items() if s != "scratch"] if last else GRID
                )
                bench.measure(count, [*arms, *SCRATCH], found)
                seeds, command = (
                    f"0 to {args.seeds - 1}",
                    ["python", "tests/bench_transfer.py", *words],
                )
                about = origin(device_name(), command, seeds, args.seeds)
                rows = list(rows_of(bench, count, found))
                write_rows(Path(args.results) / "transfer.csv", rows, KEY, about)
                for row in rows:
                    print(
                        {n: row[n] for n in (*KEY, "chosen", "top1", "gain", "half_interval")},
                        flush=True,
                    )
                print(f"{spent():.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
