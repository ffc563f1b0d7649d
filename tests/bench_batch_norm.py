"""Measure what batch norm costs where a batch is small, cut up, private or somebody else's; and what does not cost it.

A network of four blocks (`seeds_at_once.small_network`) learns a data set with batch norm (BN), with layer norm and
Proxy Norm (LN_PN) and with group norm (GN); all seeds at once. Questions:

- step: training steps of 1, 2, 4 and 32 images; the learning rate in proportion
- accumulation: 32 images a step, as micro-batches of 2, with BN of 1 and 8, too (of 32: see step)
- federated: one client, two and ten clients with unlike classes, ten alike; their weights are averaged each round
- privacy: gradients of single images, clipped and noised, at the budgets of results/privacy_budgets.csv
- cost: time and memory of a step with gradients of single images; cost_b0: the same of B0, as the library has it
- memory: of a training step of B0 with a feature pyramid, by images a step, as the compiler plans it
- shapes: a small segmentation network in Keras, at one and at eight images a step
- budgets: the noise that a privacy budget asks for (needs `pip install dp-accounting`); writes privacy_budgets.csv

Learning rates are chosen for each norm, on every fifth training image, by networks that train on the others (rows of
question `rate`). Rows go to results/batch_norm.csv as they come: the mean over seeds, half of its 95 % interval, each
seed's value and the mean curve over epochs. What the file has already is not measured again.

    python tests/bench_batch_norm.py step accumulation --data-dir imagenette128 [--norms LN_PN BN] [--seeds 8]

--limit  seconds: what has not ended by then is left out, and a later call measures it
--quick  a few images and steps: whether it runs
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np  # noqa: E402
from bench_transfer import mean_interval  # noqa: E402

from effnet_repro.messages import say  # noqa: E402
from effnet_repro.results import NO_SEED, origin, write_rows  # noqa: E402

KEY = ("question", "norm", "setting", "measure")
RATES, LARGE_RATES, PRIVATE_RATES = (0.01, 0.03, 0.1, 0.3), (0.05, 0.15, 0.5, 1.5), (0.5, 1.5, 5)
BATCH, LOT, DELTA, EPSILONS = 32, 1024, 1e-5, (2, 8)
TUNING_SEEDS = (100, 101)
CLIENTS = {"1": (1, True), "2": (2, False), "10": (10, False), "10-alike": (10, True)}


class TimeUp(Exception):
    "The limit has passed"


def schedule(steps, rate):
    "The rate of each step: a warm-up over a twentieth, then a half cosine to zero"
    now = np.arange(steps)
    warm = np.minimum(1, (now + 1) / max(1, steps // 20))
    return rate * warm * 0.5 * (1 + np.cos(np.pi * now / steps))


class Bench:
    "Images, the rows that exist, and the time that is left"

    def __init__(self, args, words):
        self.args, self.words, self.begun = args, words, time.perf_counter()
        self.path = Path(args.results) / "batch_norm.csv"
        self.seeds = list(range(args.seeds))

    @functools.cached_property
    def images(self):
        from seeds_at_once import read_images

        most = 160 if self.args.quick else self.args.most or 10**6
        return read_images(self.args.data_dir, self.args.image_size, most)

    @functools.cached_property
    def rows(self):
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def has(self, *key):
        "Whether the file has rows of question, norm and setting"
        return any(tuple(row[k] for k in KEY)[: len(key)] == key for row in self.rows)

    def check(self):
        if time.perf_counter() - self.begun > self.args.limit:
            raise TimeUp

    def write(self, key, measures, curve=(), seeds=None, **more):
        "A row for each measure: name -> values, one for each seed"
        from effnet_repro.training import device_name

        seeds, found = seeds or self.seeds, []
        for measure, values in measures.items():
            mean, half = mean_interval(values) if len(values) > 1 else (float(values[0]), 0.0)
            row = dict(zip(KEY, (*key, measure)), value=f"{mean:.6g}", half_interval=f"{half:.3g}")
            row.update(each=" ".join(f"{v:.5g}" for v in values))
            row.update(curve=" ".join(f"{v:.4g}" for v in curve))
            found.append({**row, **dict(rate="", batch="", epochs="", image_size=""), **more})
        command = ["python", "tests/bench_batch_norm.py", *self.words]
        drawn = f"{seeds[0]} to {seeds[-1]}" if seeds != [NO_SEED] else NO_SEED
        n = max(len(v) for v in measures.values())
        write_rows(self.path, found, KEY, origin(device_name(), command, drawn, n))
        self.rows.extend({k: str(v) for k, v in row.items()} for row in found)
        shown = {row["measure"]: row["value"] for row in found}
        say(f"{time.perf_counter() - self.begun:.0f} s: {' '.join(key)} {shown}")

    @functools.cache  # noqa: B019 (it is compiled once, and lives as long as the program)
    def learner(self, norm, seeds=None, held=False):
        from seeds_at_once import Seeds

        images = self.images.split_off() if held else self.images
        return Seeds(norm, images, seeds or self.seeds)

    # -------------------------------------------------------- trainings

    def train(self, learner, batch, micro, rate, epochs):
        "Returns trained weights and the top-1 after each epoch, (epochs, R); `rate`: a number or one for each row"
        weights = learner.weights()
        slots, curve = learner.slots(weights), []
        steps = learner.count // batch
        rates = schedule(steps * epochs, np.asarray(rate)[..., None]).T.reshape(epochs, steps, -1)
        for epoch in range(epochs):
            orders = learner.orders(epoch, batch, micro)
            weights, slots, _ = learner.epoch(weights, slots, orders, rates[epoch], epoch)
            curve.append(learner.top1(weights))
            self.check()
        return weights, np.stack(curve)

    def train_privately(self, learner, lot, rate, epochs, noise):
        "As `train`, with clipped and noised gradients of single images"
        weights = learner.weights()
        slots, curve, steps = learner.slots(weights), [], learner.count // lot
        rates = schedule(steps * epochs, np.asarray(rate)[..., None]).T.reshape(epochs, steps, -1)
        for epoch in range(epochs):
            drawn = learner.poisson(epoch, steps, lot)
            weights, slots = learner.private_epoch(
                weights, slots, drawn, rates[epoch], noise, lot, epoch
            )
            curve.append(learner.top1(weights))
            self.check()
        return weights, np.stack(curve)

    def rate(self, norm, name, rates, train):
        "The best of some rates on held-out training images; `train(learner, rates)` gives a curve"
        rates = [r for r in rates if not self.has("rate", norm, name, f"top-1 at {r:g}")]
        if rates:
            rows = [(r, s) for r in rates for s in TUNING_SEEDS]
            learner = self.learner(norm, tuple(s for _, s in rows), held=True)
            last = np.nan_to_num(train(learner, [r for r, _ in rows])[-1]).reshape(len(rates), -1)
            measures = {f"top-1 at {r:g}": v for r, v in zip(rates, last)}
            self.write(("rate", norm, name), measures, seeds=list(TUNING_SEEDS))
        own = [
            r for r in self.rows if (r["question"], r["norm"], r["setting"]) == ("rate", norm, name)
        ]
        return float(max(own, key=lambda r: float(r["value"]))["measure"].split()[-1])

    def step_rate(self, norm):
        epochs = self.args.tuning_epochs
        train = lambda learner, r: self.train(learner, BATCH, BATCH, r, epochs)[1]
        return self.rate(norm, f"{BATCH} images a step", RATES, train)

    def judge(self, learner, weights, curve):
        "Measures of a training: top-1 as trained, and with batch norm's statistics computed anew"
        found = {"top-1": curve[-1]}
        if learner.moving:
            found["top-1, statistics recomputed"] = learner.top1(learner.recompute(weights))
        return found

    def finish(self, key, learner, weights, curve, **more):
        more.update(image_size=self.args.image_size)
        self.write(key, self.judge(learner, weights, curve), curve.mean(1), **more)

    # -------------------------------------------------------- questions

    def step(self, norm):
        for batch in (32, 1, 2, 4):
            key = ("step", norm, f"{batch} images a step")
            if self.has(*key):
                continue
            rate, epochs = self.step_rate(norm) * batch / BATCH, self.args.epochs
            learner = self.learner(norm)
            done = self.train(learner, batch, batch, rate, epochs)
            self.finish(key, learner, *done, rate=rate, batch=batch, epochs=epochs)

    def accumulation(self, norm):
        for micro in (2, 1, 8) if norm == "BN" else (2,):
            key = ("accumulation", norm, f"micro-batches of {micro}")
            if self.has(*key):
                continue
            rate, epochs = self.step_rate(norm), self.args.epochs
            learner = self.learner(norm)
            done = self.train(learner, BATCH, micro, rate, epochs)
            self.finish(key, learner, *done, rate=rate, batch=BATCH, epochs=epochs)

    def federated(self, norm):
        scale = f", {self.args.most} images" if self.args.most else ""
        for clients, alike in (CLIENTS[name] for name in self.args.clients):
            kind = "" if clients == 1 else ", alike" if alike else ", unlike"
            key = ("federated", norm, f"{clients} client{'s' * (clients > 1)}{kind}{scale}")
            if not self.has(*key):
                rate, rounds = self.step_rate(norm), self.args.rounds
                learner = self.learner(norm)
                weights, curve, spread = average_clients(
                    self, learner, clients, alike, rate, rounds
                )
                measures = self.judge(learner, weights, curve)
                more = dict(rate=rate, batch=BATCH, epochs=rounds)
                more.update(image_size=self.args.image_size)
                self.write(key, {**measures, **spread}, curve.mean(1), **more)

    def privacy(self, norm):
        lot, epochs = min(LOT, len(self.images.train) // 4), self.args.private_epochs
        plain = lambda learner, r: self.train(learner, lot, lot, r, epochs)
        privately = lambda setting, learner, r: self.train_privately(
            learner, lot, r, epochs, self.noise(setting, lot, epochs)
        )
        tune = {
            "large steps": lambda learner, r: plain(learner, r)[1],
            "private": lambda learner, r: privately("epsilon 8", learner, r)[1],
        }
        for setting in ("not private", "epsilon 8", "epsilon 2", "clipped, no noise"):
            key, free = ("privacy", norm, setting), setting == "not private"
            if self.has(*key) or (norm == "BN" and not free):
                continue
            kind, rates = ("large steps", LARGE_RATES) if free else ("private", PRIVATE_RATES)
            rate, learner = self.rate(norm, kind, rates, tune[kind]), self.learner(norm)
            done = plain(learner, rate) if free else privately(setting, learner, rate)
            more = dict(rate=rate, batch=lot, epochs=epochs)
            self.finish(key, learner, *done, **more)

    def noise(self, setting, lot, epochs):
        "Standard deviation of the noise for a setting, from the accountant's file"
        if "epsilon" not in setting or self.args.quick:
            return float("epsilon" in setting)
        path, images = ROOT / "results" / "privacy_budgets.csv", len(self.images.train)
        wanted = {"epsilon": setting.split()[-1], "images": images, "lot": lot}
        wanted["steps"] = images // lot * epochs
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if all(row[k] == str(v) for k, v in wanted.items()):
                    return float(row["noise"])
        raise SystemExit(
            f"{path.name} has no row for {wanted}. Use: python tests/bench_batch_norm.py budgets "
            f"--images {images} --private-epochs {epochs}"
        )

    def cost(self, norm):
        import jax

        if self.has("cost", norm):
            return
        batch, steps = (8, 2) if self.args.quick else (256, 20)
        learner = self.learner(norm, (0,))
        ways = ["one gradient"] + (["gradients of single images"] if norm != "BN" else [])
        for way in ways:
            orders = np.stack([learner.orders(0, batch, batch)[0]] * steps)
            rates, key = np.zeros((steps, 1), "float32"), jax.random.PRNGKey(0)
            weights = learner.weights()
            given = [learner, weights, learner.slots(weights), learner.train]
            function = learner._epoch if way == "one gradient" else learner._private
            if way == "one gradient":
                more = (orders, rates, key)
            else:
                kept = np.ones(orders.shape, "float32")
                numbers = rates, np.float32(1), np.float32(batch)
                more = ((orders, kept), numbers, key)
            program = type(learner).__dict__[function.__name__].lower(*given, *more).compile()
            planned = program.memory_analysis().temp_size_in_bytes / 2**30
            times, state = [], given[1:3]
            for _ in range(7):
                begin = time.perf_counter()
                state = jax.block_until_ready(program(*state, learner.train, *more))[:2]
                times.append(1e3 * (time.perf_counter() - begin) / steps)
            self.write(("cost", norm, way), {"ms a step": times[2:]}, batch=batch, seeds=[NO_SEED])
            self.write(
                ("cost", norm, way), {"GiB planned": [planned]}, batch=batch, seeds=[NO_SEED]
            )

    def cost_b0(self, norm):
        side, batch = (32, 2) if self.args.quick else (128, 32)
        for way in ("one gradient", "gradients of single images")[: 1 if norm == "BN" else 2]:
            if not self.has("cost_b0", norm, way):
                from b0_steps import b0_step

                times, planned = b0_step(norm, batch, side, way != "one gradient", self.args.quick)
                about = dict(batch=batch, seeds=[NO_SEED], image_size=side)
                self.write(("cost_b0", norm, way), {"ms a step": times}, **about)
                self.write(("cost_b0", norm, way), {"GiB planned": [planned]}, **about)
                self.check()

    def memory(self, norm):
        side, sizes = (64, (1, 2)) if self.args.quick else (512, (1, 2, 8, 32))
        for images in sizes:
            key = ("memory", norm, f"{images} images")
            if not self.has(*key):
                from b0_steps import pyramid_memory

                planned = pyramid_memory(norm, images, side, self.args.quick)
                self.write(key, {"GiB planned": [planned]}, seeds=[NO_SEED], image_size=side)
                self.check()

    def shapes(self, norm):
        from shapes_keras import train_shapes

        for images in (8, 1):
            key = ("shapes", norm, f"{images} images a step")
            if not self.has(*key):
                most = 16 if self.args.quick else 2048
                found = [train_shapes(norm, images, seed, most, self.check) for seed in self.seeds]
                self.write(key, {"mean IoU": found}, batch=images, image_size=48)


def client_images(labels, clients, alike, seed):
    "Numbers of the images that each client has, (clients, images): of all classes, or of two shards of sorted ones"
    rng = np.random.default_rng([seed, clients, 13])
    order = rng.permutation(len(labels))
    if not alike:
        order = order[np.argsort(labels[order], kind="stable")]
    shards = order[: len(order) // (2 * clients) * 2 * clients].reshape(2 * clients, -1)
    return (
        rng.permutation(shards).reshape(clients, -1) if not alike else shards.reshape(clients, -1)
    )


def average_clients(bench, learner, clients, alike, rate, rounds):
    """Federated averaging: each round, every client trains an epoch on its images, and the weights are averaged.

    Returns the last average, top-1 of the average after each round (rounds, R), and how far the clients' statistics
    are apart: their standard deviation over clients, in standard deviations of what a client sees.
    """
    import jax.numpy as jnp

    labels, count = learner.images.train_labels, len(learner.seeds)
    own = [client_images(labels, clients, alike, s) for s in learner.seeds]  # R x (clients, images)
    weights, curve, spread = learner.weights(), [], {}
    for number, now in enumerate(schedule(rounds, rate)):
        batch = min(BATCH, own[0].shape[1])
        steps, rows = own[0].shape[1] // batch, []
        for seed, pools in zip(learner.seeds, own):
            rng = np.random.default_rng([seed, number, 19])
            rows += [
                rng.permutation(pool)[: steps * batch].reshape(steps, 1, batch) for pool in pools
            ]
        orders = np.stack(rows, 1).astype("int32")  # (steps, R * clients, 1, batch)
        local = {n: jnp.repeat(v, clients, 0) for n, v in weights.items()}
        rates = np.full(steps, now)
        local, _, _ = learner.epoch(local, learner.slots(local), orders, rates, number)
        apart = {n: v.reshape(count, clients, *v.shape[1:]) for n, v in local.items()}
        weights = {n: v.mean(1) for n, v in apart.items()}
        curve.append(learner.top1(weights))
        bench.check()
    if learner.moving and clients > 1:
        means = [n for n in learner.moving if n.endswith("moving_mean")]
        ratio = lambda n: apart[n].var(1) / weights[n.replace("_mean", "_variance")]
        values = np.sqrt(np.concatenate([np.asarray(ratio(n)) for n in means], 1).mean(1))
        spread["means apart, std"] = values
    return weights, np.stack(curve), spread


def write_budgets(args, words):
    "Ask dp-accounting for the noise of each budget; writes results/privacy_budgets.csv"
    try:
        import dp_accounting
        from dp_accounting.pld import PLDAccountant
    except ImportError:
        raise SystemExit(
            "The question budgets needs an accountant. Use: pip install dp-accounting"
        ) from None
    from importlib.metadata import version

    steps, share = args.images // LOT * args.private_epochs, LOT / args.images
    about = origin(
        "CPU", ["python", "tests/bench_batch_norm.py", *words], NO_SEED, 1,
        {"dp-accounting": version("dp-accounting")},
    )  # fmt: skip
    for epsilon in EPSILONS:
        event = lambda noise: dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(share, dp_accounting.GaussianDpEvent(noise)), steps
        )
        noise = dp_accounting.calibrate_dp_mechanism(PLDAccountant, event, epsilon, DELTA, tol=1e-3)
        row = dict(epsilon=epsilon, delta=DELTA, images=args.images, lot=LOT, steps=steps)
        path = Path(args.results) / "privacy_budgets.csv"
        write_rows(path, [{**row, "noise": round(noise, 4)}], tuple(row), about)
        say(f"epsilon {epsilon}: noise {noise:.3f}")


def parse(words):
    questions = (
        "step",
        "accumulation",
        "federated",
        "privacy",
        "cost",
        "cost_b0",
        "memory",
        "shapes",
    )
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="+", choices=(*questions, "budgets"))
    parser.add_argument("--data-dir", help="default: the built-in sample set")
    parser.add_argument(
        "--norms", nargs="+", choices=("LN_PN", "BN", "GN"), default=["LN_PN", "BN"]
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--tuning-epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20, help="of federated averaging")
    parser.add_argument("--clients", nargs="+", choices=CLIENTS, default=list(CLIENTS))
    parser.add_argument("--most", type=int, help="images to learn from and to judge on, at most")
    parser.add_argument("--private-epochs", type=int, default=30)
    parser.add_argument("--images", type=int, default=7500, help="of the budgets")
    parser.add_argument("--limit", type=float, default=math.inf)
    parser.add_argument("--results", default=str(ROOT / "results"))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(words)
    if args.quick:
        args.seeds, args.image_size, args.rounds = 2, 32, 1
        args.epochs = args.tuning_epochs = args.private_epochs = 1
    if args.seeds < 2:
        parser.error("--seeds must be at least 2: an interval needs them")
    return args


def main(words=None):
    words = sys.argv[1:] if words is None else list(words)
    args = parse(words)
    if args.questions == ["budgets"]:
        return write_budgets(args, words)
    from effnet_repro.training import configure
    from effnet_repro.training.compiled import keep_compiled

    configure()
    keep_compiled()
    bench = Bench(args, words)
    try:
        for question in args.questions:
            for norm in args.norms:
                getattr(bench, question)(norm)
    except TimeUp:
        say(f"{args.limit:.0f} s are over: the same command measures the rest.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
