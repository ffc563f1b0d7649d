"""Search a recipe for small sets, and ask what batch norm's moving averages cost, on a GPU.

Trials train on the training images but every fifth, which measures them; the validation images are not looked at. A
trial is `rate,warmup,weight_decay,mixup,epochs` with --drop-path and --batch; the best of those before `best,epochs`
is trained again at that length. Each is a line of JSON in --out.

    python tests/tune_small.py trials --data-dir imagenette128 --out FILE --drop-path 0.2 0.004,0.3,0.2,0.2,60 best,150
    python tests/tune_small.py command --data-dir imagenette128 --out FILE --first-seed 0 --seeds 1
    python tests/tune_small.py cores --data-dir imagenette128 --out FILE
    python tests/tune_small.py norm --data-dir imagenette128 --out FILE --seeds 3
    python tests/tune_small.py rows FILE ...

trials   with our network, or with timm's efficientnet_b0 (--network timm); --final: all training images, judged by the
         validation images
command  `effnet-train` as a user would start it, timed from its start to its end
cores    the same for a computer without a GPU: two runs, of small images and then of larger ones, and `effnet-validate`
         at 128 pixels, timed together
norm     B0 with batch norm of 256 images, trained with statistics over all of them at once and through groups of
         --norm-batch: top-1 with moving averages, with averages taken anew over training images, and with statistics
         of the judged images themselves
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench_claims import ARMS, Recipe, Trainer, case_of  # noqa: E402
from learner import Learner  # noqa: E402
from small_runs import Peer, Trial, without_held_back  # noqa: E402

from effnet_repro.config import override  # noqa: E402
from effnet_repro.data import open_data  # noqa: E402
from effnet_repro.results import origin, write_rows  # noqa: E402
from effnet_repro.runs import read_case  # noqa: E402

CASE = "B0-G16-LN_PN-Half_16IPU_2x8"
CORES = (  # Of `effnet-train`, one run after the other; the second begins with the weights of the first
    {"image-size": 64, "epochs": 29, "max-steps": 696},  # 12 epochs, at a rate that stays high
    {"image-size": 96, "epochs": 17, "warmup-epochs": 1},
)
KEY = (
    "network",
    "kind",
    "seed",
    "epochs",
    "rate",
    "warmup",
    "weight_decay",
    "drop_path",
    "mixup",
    "batch",
    "clip",
)


class Ours:
    "Our network of budget `small`, compiled once"

    def __init__(self, args, data):
        self.args, self.data, self.pace = args, data, 0.0
        case = override(case_of(ARMS["small"], args, data.train_count), mixup_alpha=0.1)
        case = override(case, drop_path_rate=args.drop_path, global_batch_size=args.batch)
        self.learner = Learner(case, data.num_classes, args.batch, clip=args.clip)
        self.learner.judge(self.learner.learn(self.learner.begin(0), data, 1, 0, rate=1e-4), data)

    def train(self, rate, warmup, decay, mixup, epochs, seed):
        steps = self.args.steps or round(epochs * (self.data.train_count // self.args.batch))
        how = dict(rate=rate, warmup=warmup, weight_decay=decay, mixup_alpha=mixup)
        began = time.perf_counter()
        arrays = self.learner.learn(self.learner.begin(seed), self.data, steps, seed, **how)
        seconds = time.perf_counter() - began
        judged = self.learner.judge(arrays, self.data)
        return dict(
            top1=judged.top1, judged_loss=judged.loss, loss=self.learner.loss, seconds=seconds
        )


class Timm:
    "timm's efficientnet_b0; its cycle always rises for 0.3 of the run"

    def __init__(self, args, data):
        more = dict(classes=data.num_classes, image_size=128)
        self.args, self.data, self.peer = args, data, Peer(Namespace(**{**vars(args), **more}))
        self.peer.prepare(data)

    def train(self, rate, warmup, decay, mixup, epochs, seed):
        trial = Trial(rate, decay, self.args.drop_path, mixup)
        return self.peer.train(self.data, trial, seed, epochs)


def trials(args, write):
    data = open_data(args.data_dir, verbose=False)
    data = data if args.final else without_held_back(data)
    network = {"ours": Ours, "timm": Timm}[args.network](args, data)
    found, pace = [], 0.0
    for words in args.what:
        first, *rest = words.split(",")
        if first == "best" and not found:
            continue
        numbers = max(found)[1][:-1] if first == "best" else (float(first), *map(float, rest[:-1]))
        numbers = (*numbers, int(rest[-1]))
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            if time.time() + pace * numbers[-1] > args.deadline:
                break
            row = network.train(*numbers, seed)
            pace = row["seconds"] / numbers[-1]
            found.append((row["top1"], numbers))
            names = ("rate", "warmup", "weight_decay", "mixup", "epochs")
            more = dict(network=args.network, seed=seed, batch=args.batch, drop_path=args.drop_path)
            more.update(kind="final" if args.final else "trial", clip=args.clip)
            write({**more, **dict(zip(names, numbers)), **row, "images": data.train_count})


def command(args, write):
    "Runs of `effnet-train` with nothing given but the data and the size; `--pause` ends one that goes on later"
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        with tempfile.TemporaryDirectory() as temporary:
            folder = (args.runs or Path(temporary)) / str(seed)
            words = [sys.executable, "-m", "effnet_repro.cli", "train", CASE, "--budget", "small"]
            words += ["--run-dir", str(folder), "--seed", str(seed), "--validate-every", "50"]
            words += ["--image-size", str(args.quick or 128), "--no-progress"]
            words += ["--data-dir", args.data_dir] if args.data_dir else []
            words += ["--max-steps", "2", "--micro-batch-size", "8"] if args.quick else []
            if not timed(words, folder, args):
                return
            write(row_of_run(folder, seed))


def cores(args, write):
    "Small images first, then larger ones: what two CPU cores have time for"
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        with tempfile.TemporaryDirectory() as temporary:
            row = on_cores(args.runs or Path(temporary), seed, args)
        write({**row, "network": "ours", "kind": "cores", "seed": seed})


def on_cores(runs, seed, args):
    "The runs of a seed, one after the other, and what the last one's weights reach"
    began, start = time.time(), []
    program = [sys.executable, "-m", "effnet_repro.cli"]
    how = dict(check=True, env={**os.environ, "KERAS_BACKEND": "tensorflow"})  # faster on cores
    data = ["--data-dir", args.data_dir] if args.data_dir else []
    quick = {"image-size": args.quick, "max-steps": 2} if args.quick else {}
    for i, fields in enumerate(CORES):
        folder = runs / f"{seed}-{i}"
        words = ["train", CASE, "--budget", "small", "--seed", str(seed), *start, *data]
        words += [word for n, v in {**fields, **quick}.items() for word in (f"--{n}", str(v))]
        words += ["--run-dir", str(folder), "--no-validation", "--no-progress"]
        subprocess.run([*program, *words], **how)
        start = ["--init-path", str(folder)]
    words = ["validate", str(folder), "--weights", "last", "--json", *data]
    words += ["--image-size", str(args.quick or 128)]
    said = subprocess.run([*program, *words], **how, stdout=subprocess.PIPE, text=True).stdout
    (found,) = json.loads(said)
    seconds = time.time() - began
    case = read_case(folder)
    row = dict(top1=found["top1"], judged_loss=found["loss"], seconds=seconds, parts=len(CORES))
    return {**row, "epochs": case.epochs, "batch": case.global_batch_size}


def timed(words, folder, args):
    "Start or go on with a run, and say whether it ended well; its seconds are kept beside it"
    clock, began = folder.with_name(f"{folder.name}-seconds"), time.time()
    run = subprocess.Popen(words)
    left = min(args.pause, args.deadline - began, 1e6)
    try:
        status = run.wait(max(1.0, left))
    except subprocess.TimeoutExpired:
        run.terminate()  # saves, and ends
        status = run.wait(30) or 1
    with open(clock, "a") as file:
        file.write(f"{time.time() - began}\n")
    return status == 0


def row_of_run(folder, seed):
    "What a run that has ended says of itself"
    case = read_case(folder)
    with open(folder / "validation.csv", newline="", encoding="utf-8") as lines:
        found = {row["weights"]: row for row in csv.DictReader(lines)}
    seconds = folder.with_name(f"{folder.name}-seconds").read_text().split()
    row = dict(network="ours", kind="command", seed=seed, epochs=case.epochs)
    row.update(batch=case.global_batch_size, drop_path=case.drop_path_rate)
    row.update(rate=case.learning_rate, warmup=case.warmup_epochs / case.epochs)
    row.update(weight_decay=case.weight_decay, mixup=case.mixup_alpha)
    row.update(top1=float(found["last"]["top1"]), judged_loss=float(found["last"]["loss"]))
    row["top1_average"] = float(found["average"]["top1"]) if "average" in found else None
    return {**row, "seconds": sum(map(float, seconds)), "parts": len(seconds)}


def rows(args, write):
    "Write what is known into results/"
    found = [json.loads(line) for file in args.what for line in open(file)]
    judged = [row for row in found if "moving" in row]
    for row in judged:
        row["variance_ratio"] = float(np.median(list(row.pop("deviation").values())))
        for name in ("right", "image_size", "top_epochs", "arm"):
            row.pop(name, None)
        row.setdefault("clip", 0)
    trained = [
        {**dict.fromkeys(KEY), "kind": "trial", **row} for row in found if "moving" not in row
    ]
    key = ("norm_batch", "clip", "epochs", "seed", "images")
    for name, some, by in (("recipe.csv", trained, KEY), ("norm_judged.csv", judged, key)):
        if some:
            write_rows(args.results / name, some, by)


def still(ops, norm_batch=None):
    "An `Rng` that drops nothing and hears batch norm's statistics"
    from effnet_repro.ops import Rng

    class Still(Rng):
        def mask(self, segment, kind, rate, shape):
            return ops.jnp.ones(shape, "float32")

    return Still(ops, norm_batch=norm_batch)


def forward(spec):
    "Two compiled passes with batch norm's own statistics: what they are, and what the network guesses with them"
    import jax

    from effnet_repro.kernels.ops import jax_ops
    from effnet_repro.mbconv import BATCH_NORM_MOMENTUM
    from effnet_repro.network import run

    ops = jax_ops()
    start = lambda images: ops.cast(images, "bfloat16")

    def statistics(weights, images):  # through moving averages of zero
        rng = still(ops)
        weights = {n: 0 * v if "moving" in n else v for n, v in weights.items()}
        run(ops, spec, weights, start(images), rng)
        return {n: v / (1 - BATCH_NORM_MOMENTUM) for n, v in rng.statistics.items()}

    guess = lambda weights, images: run(ops, spec, weights, start(images), still(ops))
    return jax.jit(statistics), jax.jit(guess)


def judge_norm(trainer, data, arrays, seed):
    "Top-1 with moving averages, with averages taken anew, and with the statistics of the judged images"
    learner, size = trainer.learner, trainer.case.image_size
    statistics, guess = trainer.forward
    case, found = override(trainer.case, epochs=1, warmup_epochs=0), []
    for (batch,), _ in zip(learner._stream(case, data, seed), range(24)):
        found.append({n: np.asarray(v) for n, v in statistics(arrays, batch["images"]).items()})
    anew = {n: np.mean([one[n] for one in found], 0) for n in found[0]}
    right = [
        np.asarray(guess(arrays, images)).argmax(1)[mask > 0] == labels[mask > 0]
        for images, labels, mask in learner.images(data, size)
    ]
    top1 = lambda weights: learner.judge(weights, data).top1
    ratio = lambda n, v: float(np.median(np.sqrt(v / np.maximum(arrays[n], 1e-9))))
    return dict(
        moving=top1(arrays),
        anew=top1({**arrays, **anew}),
        own=float(np.concatenate(right).mean()),
        deviation={n: ratio(n, v) for n, v in anew.items() if "variance" in n},
    )


def norm(args, write):
    "Three ways to judge networks with batch norm, trained in two ways"
    data = open_data(args.data_dir, verbose=False)
    data = data if args.final else without_held_back(data)
    ways = [None] * (not args.groups_only) + [args.norm_batch] * (args.norm_batch > 0)
    for norm_batch in ways:
        trainer = Trainer(f"G{args.group_size}-BN", args, data)
        if norm_batch or args.clip:
            how = dict(norm_batch=norm_batch, clip=args.clip)
            trainer.learner = Learner(trainer.case, data.num_classes, trainer.batch, **how)
        trainer.forward = forward(trainer.learner.spec)
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            if time.time() + 1.2 * trainer.pace * trainer.steps(data, args.epochs) > args.deadline:
                break
            arrays, row = trainer.train(data, Recipe(0.004, 0.3, 0.05), seed, args.epochs)
            row.update(judge_norm(trainer, data, arrays, seed))
            row.update(norm_batch=norm_batch or 0, clip=args.clip or 0)
            write(row)


def parse(words):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("trials", "command", "cores", "norm", "rows"))
    parser.add_argument("what", nargs="*", help="trials, or best,EPOCHS; rows: files")
    parser.add_argument("--data-dir")
    parser.add_argument("--out", help="a line of JSON for each training")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--network", choices=("ours", "timm"), default="ours")
    parser.add_argument("--drop-path", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--clip", type=float)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--norm-batch", type=int, default=256, help="0: all at once only")
    parser.add_argument("--groups-only", action="store_true", help="norm: not all at once")
    parser.add_argument("--epochs", type=int, default=20, help="norm: of a training")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--runs", type=Path, help="command: where runs stay")
    parser.add_argument("--pause", type=float, default=1e9, help="command: seconds")
    parser.add_argument(
        "--final", action="store_true", help="all training images, judged by the validation images"
    )
    parser.add_argument("--limit", type=float, default=1e9, help="seconds")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_intermixed_args(words)
    args.deadline = time.time() + args.limit
    args.quick, args.steps = (32, 2) if args.quick else (0, 0)
    args.batch, args.norm_batch = (
        (16, args.norm_batch and 16) if args.quick else (args.batch, args.norm_batch)
    )
    return args


def main(words=None):
    words = sys.argv[1:] if words is None else list(words)
    args = parse(words)
    from effnet_repro.training import device_name

    if args.task in ("trials", "norm"):
        from effnet_repro.training import configure
        from effnet_repro.training.compiled import keep_compiled

        configure()
        keep_compiled()
    if args.task == "norm":
        args.batch = 16 if args.quick else None

    def write(row):
        about = origin(device_name(), ["python", "tests/tune_small.py", *words], row["seed"], 1)
        with open(args.out, "a") as file:
            file.write(json.dumps({**about, **row}) + "\n")
        print(
            json.dumps({k: v for k, v in row.items() if k not in ("right", "deviation")}),
            flush=True,
        )

    tasks = dict(trials=trials, command=command, cores=cores, norm=norm, rows=rows)
    tasks[args.task](args, write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
