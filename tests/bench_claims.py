"""Test the paper's claims about accuracy on ten classes of ImageNet, with several seeds an arm, on GPUs.

An arm is a network and a size to train it at. All arms have one recipe (`Recipe`): the budget `small`, a training step
of 256 images, and the rate, warm-up and weight decay that `tune` finds with batch norm and group size 16 and with group
norm and group size 1, on every fifth training image; the other arms are not looked at for it. The validation images
measure each trained network once. Each training is a line of JSON in --state, so that a call continues the one before.

    python tests/bench_claims.py tune --arm G16-BN --data-dir imagenette128 --state STATE --limit 500
    python tests/bench_claims.py run --data-dir imagenette128 --state STATE --limit 500
    python tests/bench_claims.py rows --state STATE

tune  trials of one arm, on the images split off; then some seeds of the best trial of both arms, which say how much
      chance there is
run   the next arm that no other process has, seed after seed; several processes share the arms out
rows  writes results/claims.csv and results/claims_depth.csv

--quick  a few steps of a network of four blocks: whether it runs
"""

import argparse
import base64
import fcntl
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("KERAS_BACKEND", "jax")

from learner import FOUR_BLOCKS, Learner  # noqa: E402
from small_runs import without_held_back  # noqa: E402

from effnet_repro.config import get_case, override, resolve  # noqa: E402
from effnet_repro.data import open_data  # noqa: E402
from effnet_repro.finetuning import finetune_case  # noqa: E402
from effnet_repro.results import origin, write_rows  # noqa: E402
from effnet_repro.scaling import count  # noqa: E402

NATIVE, HALF = (
    128,
    96,
)  # Sides of an image, pixels: of a width as 224 and 160, to the next multiple of 32
LENGTH, BATCH = 20, 256  # Epochs, and images of a training step
START = 45  # Seconds that an arm needs before its first step
TOP_EPOCHS = 2  # Of the fine-tuning
KEY = ("arm", "image_size", "test_size", "epochs", "top_epochs", "seed")


@dataclass(frozen=True)
class Recipe:
    "What is tuned"

    rate: float  # Highest of the run
    warmup: float  # Share of the run in which it rises
    weight_decay: float  # Times the rate


def recipes(*rows):
    "Recipes of rows of numbers"
    return tuple(Recipe(*row) for row in rows)


@dataclass(frozen=True)
class Arm:
    "A network, how large its images are in training, and how many of them batch norm sees"

    norm: str
    group_size: int = 16
    image_size: int = NATIVE
    norm_batch: int = None  # None = all of a training step
    batch: int = BATCH
    epochs: int = LENGTH
    model_size: int = 0

    @property
    def halved(self):  # Whether it is tested and fine-tuned at the native size, too
        return self.image_size == HALF

    @property
    def rows(self):  # Of a seed: three for each length
        longer = self.model_size == 0 and self.epochs == LENGTH
        return 1 if not self.halved else 6 if longer else 3

    @property
    def fields(self):  # Of the case
        depthwise = self.group_size == 1
        return dict(
            name=f"B{self.model_size}-G{self.group_size}-{self.norm}",
            model_size=self.model_size,
            norm=self.norm,
            norm_groups=4 if self.norm == "GN" else 1,
            group_size=self.group_size,
            expand_ratio=6 if depthwise else 4,
        )


ARMS = {
    "G1-GN": Arm("GN", 1),
    "G16-GN": Arm("GN"),
    "G16-LN_PN": Arm("LN_PN"),
    "G16-LN": Arm("LN"),
    "G16-BN": Arm("BN"),
    "G16-LN_PN half": Arm("LN_PN", image_size=HALF),
    "G1-BN": Arm("BN", 1),
    "G16-BN of 32": Arm("BN", norm_batch=32),
    "G16-BN of 8": Arm("BN", norm_batch=8),
    "G16-BN of 2": Arm("BN", norm_batch=2),
    "small": Arm("LN_PN", batch=128, epochs=60),
    "45 minutes": Arm("LN_PN", image_size=HALF, batch=128, epochs=26),  # of two CPU cores
}
for size in (2, 4):  # the larger networks, in two contrasts
    ARMS[f"B{size} G16-LN_PN"] = Arm("LN_PN", model_size=size)
    ARMS[f"B{size} G16-GN"] = Arm("GN", model_size=size)
    ARMS[f"B{size} G16-LN_PN half"] = Arm("LN_PN", image_size=HALF, model_size=size)
TUNED = ("G16-BN", "G1-GN")
DEPTH = ("G16-BN", "G16-GN", "G16-LN", "G16-LN_PN")  # Arms whose channels are looked at
TRIALS = recipes(
    (0.004, 0.3, 0.05),
    (0.002, 0.3, 0.05),
    (0.008, 0.3, 0.05),
    (0.004, 0.1, 0.05),
    (0.004, 0.3, 0.2),
    (0.002, 0.05, 0.05),
    (0.001, 0.1, 0.05),
    (0.008, 0.3, 0.2),
    (0.002, 0.1, 0.2),
    (0.016, 0.3, 0.05),
)
SMALL_TRIALS = recipes(
    (0.002, 0.05, 0.05),
    (0.002, 0.3, 0.05),
    (0.001, 0.3, 0.05),
    (0.001, 0.05, 0.05),
    (0.004, 0.3, 0.05),
    (0.0005, 0.3, 0.05),
    (0.002, 0.3, 0.2),
    (0.001, 0.3, 0.2),
    (0.001, 0.15, 0.1),
    (0.0005, 0.05, 0.2),
)


def case_of(arm, args, images):
    "The case of an arm: budget `small`, with everything that is no argument of the compiled step"
    case = override(get_case("B0-G16-LN_PN-Half_16IPU_2x8"), **arm.fields)
    if args.quick:
        case = override(case, **FOUR_BLOCKS)
    size = args.quick or arm.image_size
    own = dict(image_size=size, global_batch_size=args.batch or arm.batch, drop_path_rate=0.1)
    own.update(mixup_alpha=0.1, weight_decay=0.05)
    return resolve(case, "small", images=images, **own)[0]


class Trainer:
    "One arm, compiled once"

    def __init__(self, name, args, data):
        self.name, self.arm, self.args, self.data = name, ARMS[name], args, data
        self.case = case_of(self.arm, args, data.train_count)
        self.batch, self.pace = self.case.global_batch_size, 0.0
        how = dict(
            norm_batch=args.quick and min(2, self.arm.norm_batch or 2) or self.arm.norm_batch
        )
        self.learner = Learner(self.case, data.num_classes, self.batch, **how)
        self.top = None
        begun = time.perf_counter()  # compile, and decode the images
        arrays = self.learner.learn(self.learner.begin(0), data, 1, 0, rate=0.001)
        self.learner.judge(arrays, data)
        print(f"{name}: compiled in {time.perf_counter() - begun:.0f} s", flush=True)

    def steps(self, data, epochs):
        return min(round(epochs * (data.train_count // self.batch)), self.args.steps or 10**9)

    def train(self, data, recipe, seed, epochs):
        "Weights, and what a row says of how they were made"
        began, steps = time.perf_counter(), self.steps(data, epochs)
        numbers = asdict(recipe)
        arrays = self.learner.learn(self.learner.begin(seed), data, steps, seed, **numbers)
        seconds = time.perf_counter() - began
        self.pace = seconds / steps
        row = dict(arm=self.name, norm=self.arm.norm, group_size=self.arm.group_size, seed=seed)
        row.update(image_size=self.case.image_size, norm_batch=self.arm.norm_batch or self.batch)
        row.update(batch=self.batch, epochs=epochs, steps=steps, images=data.train_count, **numbers)
        row.update(top_epochs=0, train_loss=self.learner.loss, seconds=round(seconds, 2))
        return arrays, row

    def judge(self, arrays, data, row, test_size):
        "The row of weights at one size"
        test_size = self.args.quick or test_size
        judged = self.learner.judge(arrays, data, test_size)
        right = base64.b64encode(np.packbits(judged.right)).decode()
        row = dict(row, test_size=test_size, top1=judged.top1, loss=judged.loss, right=right)
        return dict(row, judged=len(judged.right))

    def finetune(self, arrays, data, row):
        "Two epochs of `Top` at the native size; protocol `clean`"
        if self.top is None:
            size = self.args.quick or NATIVE
            case = finetune_case(self.case, size, "clean", global_batch_size=self.batch)
            case = override(case, device_loop=1)
            how = dict(parts=("Top",))
            self.top = Learner(case, data.num_classes, self.batch, **how)
        steps = self.steps(data, TOP_EPOCHS)
        arrays = self.top.learn(arrays, data, steps, row["seed"], warmup=0.0)
        return arrays, dict(row, top_epochs=TOP_EPOCHS)


class State:
    "What is known so far: a file of lines for each arm, and a lock"

    def __init__(self, folder):
        self.folder = Path(folder)
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)

    def read(self, name):
        path = self.folder / f"{name}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def add(self, name, row, args):
        row = {**origin(device(), args.command, row["seed"], 1), **row}
        with open(self.folder / f"{name}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        short = ("arm", "seed", "rate", "warmup", "weight_decay", "epochs", "top_epochs")
        short += ("test_size", "top1", "loss", "seconds")
        print(json.dumps({k: row[k] for k in short if k in row}), flush=True)

    def take(self, name):
        "The lock of an arm, or None where another process has it"
        file = open(self.folder / "locks" / name, "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return None
        return file


def device():
    from effnet_repro.training import device_name

    return device_name()


def mean_of(trials, arms):
    "Recipe -> mean top-1 over arms of seed 0, of those that all arms have tried"
    found = [{recipe_of(r): r["top1"] for r in trials[a] if r["seed"] == 0} for a in arms]
    both = [r for r in found[0] if all(r in f for f in found)] if found else []
    return {r: float(np.mean([f[r] for f in found])) for r in both}


def recipe_of(row):
    return Recipe(row["rate"], row["warmup"], row["weight_decay"])


def chosen(state, arms=TUNED, default=TRIALS[0]):
    "The recipe with the highest mean over the tuned arms: the rule that needs nobody"
    tried = {a: [r for r in state.read(f"tune {a}") if r["epochs"] == LENGTH] for a in arms}
    means = mean_of(tried, arms)
    return max(means, key=means.get) if means else default


def tune(args):
    "Trials of an arm, then seeds of the best"
    state, data = State(args.state), without_held_back(open_data(args.data_dir, verbose=False))
    small = args.arm == "small"
    arms, trials = (("small",), SMALL_TRIALS) if small else (TUNED, TRIALS)
    trainer = Trainer(args.arm, args, data)

    def one(recipe, seed, epochs):
        if time.time() + 1.1 * trainer.pace * trainer.steps(data, epochs) > args.deadline:
            return
        done = [(recipe_of(r), r["seed"], r["epochs"]) for r in state.read(f"tune {args.arm}")]
        if (recipe, seed, epochs) not in done:
            arrays, row = trainer.train(data, recipe, seed, epochs)
            row = trainer.judge(arrays, data, row, trainer.case.image_size)
            state.add(f"tune {args.arm}", row, args)

    for recipe in trials[: args.trials]:
        one(recipe, 0, LENGTH)
    if small:  # the better ones again, as long as the run will be
        tried = [r for r in state.read("tune small") if r["epochs"] == LENGTH]
        tried = sorted(tried, key=lambda r: -r["top1"])[:3]
        for row in tried:
            one(recipe_of(row), 0, trainer.arm.epochs)
        return 0
    while time.time() < args.deadline - args.wait:  # for the other arm
        tried = {a: len({recipe_of(r) for r in state.read(f"tune {a}")}) for a in arms}
        if all(n >= len(trials[: args.trials]) for n in tried.values()):
            break
        time.sleep(0.5)
    for seed in range(1, 1 + args.pilot):
        one(chosen(state), seed, LENGTH)
    return 0


def small_recipe(state):
    "The recipe of budget `small`: the best at its own length, else the best at the trials'"
    tried = state.read("tune small")
    long = [r for r in tried if r["epochs"] == ARMS["small"].epochs]
    best = max(long or tried, key=lambda r: r["top1"], default=None)
    return recipe_of(best) if best else SMALL_TRIALS[1]


def longer(case):
    "Epochs at half resolution with the multiply-adds of LENGTH at the native one"
    macs = [count(case, size).macs for size in (NATIVE, HALF)]
    return round(LENGTH * macs[0] / macs[1])


def rows_of_seed(trainer, data, recipe, seed):
    "All rows of one seed of an arm, as they come"
    name, native = trainer.name, NATIVE
    lengths = (trainer.arm.epochs, *((longer(trainer.case),) if trainer.arm.rows == 6 else ()))
    for epochs in lengths:
        arrays, row = trainer.train(data, recipe, seed, epochs)
        yield trainer.judge(arrays, data, row, native)
        if trainer.arm.halved:
            yield trainer.judge(arrays, data, row, HALF)
            tuned, more = trainer.finetune(arrays, data, row)
            yield trainer.judge(tuned, data, more, native)
        if seed == 0 and name in DEPTH:
            yield {**row, "depth": depth(trainer, arrays, data)}


def depth(trainer, arrays, data):
    """Each activated norm's channels, over some validation images: a list of dictionaries.

    `share`: how much of the power of what a norm makes, before scale and bias, is in the means of channels; `means`
    and `stds`: of each channel, there. `after`: the same share of what the activation and the proxy make of it.
    """
    import jax

    from effnet_repro.network import run
    from effnet_repro.norms import EPSILON, group_statistics, normalise
    from effnet_repro.ops import get_ops

    found, plain = [], normalise.dispatch(object)

    class Watching(type(get_ops("jax"))):
        "Operations that remember what norms make"

    @normalise.register(Watching)
    def _(
        ops, x, gamma=None, beta=None, norm_groups=1, statistics=None, activation=None, proxy=None
    ):
        y = plain(ops, x, gamma, beta, norm_groups, statistics, activation, proxy)
        if activation:
            mean, variance = statistics or group_statistics(ops, x, norm_groups)
            found.append(
                [channels(ops, (x - mean) * ops.rsqrt(variance + EPSILON)), channels(ops, y)]
            )
        return y

    def channels(ops, x):
        mean = ops.mean(x, (0, 1, 2))
        return mean, ops.sqrt(ops.mean(ops.square(x - mean), (0, 1, 2)))

    def watched(weights, images):
        run(Watching(), trainer.learner.spec, weights, images)
        return tuple(found)

    images = next(iter(trainer.learner.images(data, trainer.case.image_size)))[0]
    images = np.asarray(images, "float32")[:256]
    share = lambda m, s: float((m**2).sum() / (m**2 + s**2).sum())
    rows = []
    for before, after in jax.jit(watched)(arrays, images):
        (m, s), (n, t) = (tuple(np.asarray(v, "float64") for v in one) for one in (before, after))
        quantiles = lambda v: [round(float(q), 4) for q in np.quantile(v, (0.1, 0.5, 0.9))]
        row = dict(share=share(m, s), after=share(n, t), means=quantiles(m), stds=quantiles(s))
        rows.append(dict(row, channels=len(m)))
    return rows


def work(args):
    "Take one arm after the other, and train the seeds that are missing"
    state, data = State(args.state), open_data(args.data_dir, verbose=False)
    began, names = {}, args.arms or list(ARMS)
    while time.time() < args.deadline - START:
        open_ones = [n for n in names if began.get(n, 0) == 0 and missing(state, n, args)]
        lock = name = None
        for name in open_ones:
            lock = state.take(name)
            if lock:
                break
        if lock is None:
            return 0
        began[name] = 1
        recipe = small_recipe(state) if name == "small" else chosen(state)
        trainer = Trainer(name, args, data)
        guess = 0.0
        for seed in missing(state, name, args):
            if time.time() + 1.1 * guess > args.deadline:
                break
            start = time.time()
            for row in rows_of_seed(trainer, data, recipe, seed):
                state.add(name, row, args)
            guess = time.time() - start
        lock.close()
    return 0


def missing(state, name, args):
    "Seeds of an arm that are not whole yet"
    rows = [r for r in state.read(name) if "depth" not in r]
    seeds = [r["seed"] for r in rows]
    return [s for s in range(args.seeds) if seeds.count(s) < ARMS[name].rows]


def warm(args):
    "Compile an arm's programs, for the cache"
    data = open_data(args.data_dir, verbose=False)
    for name in args.arms or list(ARMS):
        if time.time() > args.deadline:
            break
        trainer = Trainer(name, args, data)
        if trainer.arm.halved:
            args.steps = 1
            begun = trainer.learner.begin(0)
            tuned, _ = trainer.finetune(begun, data, {"seed": 0})
            trainer.learner.judge(tuned, data, args.quick or NATIVE)
    return 0


def rows(args):
    "Write what is known into results/"
    state, folder = State(args.state), Path(args.results)
    names = ("arm", "seed", "image_size", "epochs")
    for name in (*ARMS, *(f"tune {a}" for a in (*TUNED, "small"))):
        found = state.read(name)
        for row in found:
            row["kind"] = "tune" if name.startswith("tune ") else "claim"
            row["versions"] = dict(row["versions"])
        plain = [r for r in found if "depth" not in r]
        more = ("kind", "rate", "warmup", "weight_decay")
        if plain:
            write_rows(folder / "claims.csv", plain, (*KEY, *more))
        for row in (r for r in found if "depth" in r):
            layers = [{**{k: v for k, v in row.items() if k != "depth"}} for _ in row["depth"]]
            for i, (layer, seen) in enumerate(zip(layers, row["depth"])):
                spread = {
                    f"{what}_{q}": value
                    for what in ("means", "stds")
                    for q, value in zip((10, 50, 90), seen.pop(what))
                }
                layer.update(norm_index=i, **seen, **spread)
            write_rows(folder / "claims_depth.csv", layers, (*names, "norm_index"))
    return 0


def parse(words):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("tune", "run", "warm", "rows"))
    parser.add_argument("--data-dir", help="default: the built-in sample set")
    parser.add_argument("--state", required=True, help="folder that later calls continue")
    parser.add_argument("--arm", help="tune: which", choices=(*TUNED, "small"))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="run, warm: only these")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds")
    parser.add_argument("--trials", type=int, default=len(TRIALS))
    parser.add_argument("--pilot", type=int, default=5, help="tune: seeds of the best trial")
    parser.add_argument("--wait", type=float, default=90, help="tune: seconds kept for these seeds")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--results", default=str(ROOT / "results"))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(words)
    args.command = ["python", "tests/bench_claims.py", *words]
    args.deadline = time.time() + args.limit
    args.quick, args.steps, args.batch = (32, 2, 16) if args.quick else (0, 0, 0)
    return args


def main(words=None):
    args = parse(sys.argv[1:] if words is None else list(words))
    if args.what != "rows":
        from effnet_repro.training import configure
        from effnet_repro.training.compiled import keep_compiled

        configure()
        keep_compiled()
    return {"tune": tune, "run": work, "warm": warm, "rows": rows}[args.what](args)


if __name__ == "__main__":
    sys.exit(main())
