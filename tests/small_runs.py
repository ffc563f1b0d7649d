"""Trainings of one small set in one process, our network or timm's: a step is compiled once for many of them.

`bench_small.py` starts this file once for each network. It trains every trial of the search on the training images but
1,500, measures on those, and then trains with the best trial's numbers on all training images, with one seed after
another, and measures on the validation images. Each training is a line of JSON in `--out`. A lock keeps the GPU for
one training at a time, while the other process decodes or compiles.
"""

import argparse
import contextlib
import fcntl
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from learner import FOUR_BLOCKS, Learner  # noqa: E402

from effnet_repro.averaging import WeightAverage  # noqa: E402
from effnet_repro.config import get_case, override, resolve  # noqa: E402
from effnet_repro.data import open_data  # noqa: E402
from effnet_repro.data.places import select  # noqa: E402
from effnet_repro.small_sets import average_decay  # noqa: E402

SMOOTHING = 0.1
HELD_BACK = 5  # Every fifth training image measures the trials: 1,500 of 7,500


@dataclass(frozen=True)
class Trial:
    "Numbers of a recipe; both networks try the same ones"

    learning_rate: float  # Highest of the run
    weight_decay: float  # Times the learning rate
    drop_path: float  # Stochastic depth of the last block
    mixup: float  # Of the Beta distribution, 0 = off
    crop_area_min: float = 0.25


TRIALS = (
    Trial(2**-9, 0.05, 0.1, 0.1),
    Trial(2**-8, 0.05, 0.1, 0.1),
    Trial(2**-7, 0.05, 0.1, 0.1),
    Trial(2**-8, 0.2, 0.1, 0.1),
    Trial(2**-7, 0.2, 0.2, 0.2),
    Trial(2**-8, 0.1, 0.0, 0.0, 0.35),
    Trial(2**-9, 0.2, 0.0, 0.2),
    Trial(2**-7, 0.1, 0.0, 0.0),
)


def without_held_back(data):
    "The training images but every fifth, which validates: the 2,500 validation images are not looked at"
    split = data.splits["train"]
    held = np.arange(data.train_count) % HELD_BACK == 0
    parts = {"train": ~held, "validation": held}
    splits = {name: select(split, np.flatnonzero(part)) for name, part in parts.items()}
    counts = dict(train_count=int((~held).sum()), validation_count=int(held.sum()))
    return replace(data, splits=splits, **counts)


class Ours:
    "Our network; each stochastic depth has a program of its own, whose arguments are the other numbers of a trial"

    def __init__(self, args):
        from effnet_repro.training import configure, device_name
        from effnet_repro.training.compiled import keep_compiled

        configure()
        keep_compiled()
        self.args, self.learners = args, {}
        case = override(get_case(args.case), image_size=args.image_size)
        if args.quick:
            case = override(case, model_size="cifar", **FOUR_BLOCKS)
        own = dict(global_batch_size=args.batch, micro_batch_size=args.batch, mixup_alpha=0.1)
        self.case = resolve(case, "small", images=10_000, label_smoothing=SMOOTHING, **own)[0]
        self.device = device_name()

    def prepare(self, data):
        "Compile everything"
        self.train(data, TRIALS[0], 0, 1, steps=1)

    def _learner(self, drop_path):
        if drop_path not in self.learners:
            case = override(self.case, drop_path_rate=drop_path)
            self.learners[drop_path] = Learner(case, self.args.classes, self.args.batch)
        return self.learners[drop_path]

    def train(self, data, trial, seed, epochs, steps=None):
        "Train and measure; returns top-1 of the last and the averaged weights, and seconds of the steps"
        learner, average = self._learner(trial.drop_path), WeightAverage(average_decay(epochs))
        per_epoch = data.train_count // self.args.batch
        per_epoch = min(per_epoch, 2) if self.args.quick else per_epoch
        recipe = dict(mixup_alpha=trial.mixup or 1e-3, crop_area_min=trial.crop_area_min)
        recipe.update(rate=trial.learning_rate, weight_decay=trial.weight_decay)
        last = learner.learn(
            learner.begin(seed),
            data,
            steps or int(epochs) * per_epoch,
            seed,
            each=(per_epoch, average.update),
            **recipe,
        )
        found = {"seconds": learner.seconds, "loss": learner.loss}
        found["top1"] = learner.judge(last, data).top1
        if average.count:
            found["top1_average"] = learner.judge(average.arrays(), data).top1
        return found


class Peer:
    "timm's efficientnet_b0 with AdamW and one cycle, as a CUDA graph; images are cut on the GPU, too"

    def __init__(self, args):
        import timm
        import torch

        self.args, self.torch, self.timm = args, torch, timm
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.pixels, self.images = {}, {}
        self.device = torch.cuda.get_device_name(0)
        self.net = self._fresh(0).cuda().to(memory_format=torch.channels_last)
        drops = [m for m in self.net.modules() if getattr(m, "drop_prob", None)]
        self.drops = [(m, m.drop_prob / max(d.drop_prob for d in drops)) for m in drops]

    def prepare(self, data):
        "Decode, and let cuDNN choose its kernels; a graph is captured for each training"
        self.train(data, TRIALS[0], 0, 1, steps=2)

    def _fresh(self, seed):
        self.torch.manual_seed(seed)
        how = dict(num_classes=self.args.classes, drop_rate=0.2, drop_path_rate=0.1)
        return self.timm.create_model("efficientnet_b0", **how)

    def _resident(self, data):
        "Training images (n, 3, S, S) and labels, validation images and labels, all on the GPU"
        from effnet_repro.data import validation_arrays
        from effnet_repro.data.decode import decode_for, read_encoded

        key = id(data)
        if key not in self.images:
            torch, size = self.torch, self.args.image_size
            read = lambda i: decode_for(data, read_encoded(data, "train", i, raw=True)[0], "modern")
            train = np.stack([read(i) for i in range(data.train_count)])
            parts = list(validation_arrays(data, size, 500, image_resize="modern"))
            keep = np.concatenate([mask > 0 for _, _, mask in parts])
            check, truth = (np.concatenate([p[k] for p in parts])[keep] for k in (0, 1))
            put = lambda a: torch.from_numpy(np.ascontiguousarray(a)).cuda()
            labels = put(data.splits["train"].label.astype("int64"))
            images = put(train).permute(0, 3, 1, 2)
            self.images[key] = (
                images,
                labels,
                put(check).permute(0, 3, 1, 2),
                put(truth.astype("int64")),
            )
        return self.images[key]

    def _draw(self, n, trial):
        "Grids of crops and flips, and shares of mixup, for n images"
        torch = self.torch
        u = lambda *shape: torch.rand(*shape, device="cuda")
        area = trial.crop_area_min + (1 - trial.crop_area_min) * u(n)
        ratio = torch.exp((2 * u(n) - 1) * math.log(4 / 3))
        w, h = ((area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1))
        x, y = u(n) * (1 - w), u(n) * (1 - h)
        flip = torch.where(u(n) < 0.5, -1.0, 1.0)
        share = torch.ones(n, device="cuda")
        if trial.mixup:
            share = torch.distributions.Beta(trial.mixup, trial.mixup).sample((n,)).cuda()
            share = torch.maximum(share, 1 - share)
        # grid_sample's affine matrix: scale and middle of the crop, in [-1, 1]
        return torch.stack([w * flip, 2 * x + w - 1, h, 2 * y + h - 1, share], 1)

    def _forward(self, images, labels, box):
        torch, size = self.torch, self.args.image_size
        zero = torch.zeros_like(box[:, 0])
        theta = torch.stack([box[:, 0], zero, box[:, 1], zero, box[:, 2], box[:, 3]], 1)
        shape = (len(images), 3, size, size)
        grid = torch.nn.functional.affine_grid(theta.view(-1, 2, 3), shape, align_corners=False)
        x = torch.nn.functional.grid_sample(images.float(), grid, align_corners=False)
        share = box[:, 4].view(-1, 1)
        soft = torch.nn.functional.one_hot(labels, self.args.classes).float()
        soft = share * soft + (1 - share) * soft.roll(1, 0)
        share = share.view(-1, 1, 1, 1)
        x = share * x + (1 - share) * x.roll(1, 0)
        return self._normal(x), soft

    def _normal(self, x):
        return ((x - 118.0) / 58.0).contiguous(memory_format=self.torch.channels_last)

    def _graph(self, net, optimizer, static):
        "Capture a training step; the weights are put back afterwards"
        torch = self.torch
        loss_of = torch.nn.CrossEntropyLoss(label_smoothing=SMOOTHING)

        def step():
            optimizer.zero_grad(set_to_none=False)
            x, soft = self._forward(
                static["pixels"][static["index"]], static["labels"][static["index"]], static["box"]
            )
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                loss = loss_of(net(x).float(), soft)
            loss.backward()
            optimizer.step()
            return loss

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()
        return graph, loss

    def train(self, data, trial, seed, epochs, steps=None):
        "Train and measure, as `Ours.train` does"
        torch, args, net = self.torch, self.args, self.net
        pixels, labels, check, truth = self._resident(data)
        fresh = {n: v.cuda() for n, v in self._fresh(seed).state_dict().items()}
        for module, share in self.drops:
            module.drop_prob = share * trial.drop_path
        net.train()
        decays = [p for p in net.parameters() if p.ndim > 1]
        others = [p for p in net.parameters() if p.ndim <= 1]
        groups = [
            dict(params=decays, weight_decay=trial.weight_decay),
            dict(params=others, weight_decay=0.0),
        ]
        first = torch.zeros((), device="cuda")
        optimizer = torch.optim.AdamW(groups, lr=first, capturable=True, foreach=True)
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros((), device="cuda")  # the captured step reads these
        b = args.batch
        static = dict(pixels=pixels, labels=labels)
        static.update(
            index=torch.zeros(b, dtype=torch.long, device="cuda"),
            box=torch.zeros(b, 5, device="cuda"),
        )
        static["box"].copy_(self._draw(b, trial))
        graph, loss = self._graph(net, optimizer, static)
        with torch.no_grad():
            for name, value in net.state_dict().items():
                value.copy_(fresh[name])
            for state in optimizer.state.values():
                for value in state.values():
                    value.zero_()
        per_epoch = len(labels) // b
        total = int(epochs) * per_epoch
        dummy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        cycle = torch.optim.lr_scheduler.OneCycleLR(dummy, trial.learning_rate, total_steps=total)
        rates = []
        for _ in range(total):
            rates.append(dummy.param_groups[0]["lr"])
            dummy.step()
            cycle.step() if len(rates) < total else None
        rates = torch.tensor(rates, device="cuda")
        torch.manual_seed(seed)
        torch.cuda.synchronize()
        began, i = time.perf_counter(), 0
        for _ in range(int(epochs)):
            order = torch.randperm(len(labels), device="cuda")
            boxes = self._draw(per_epoch * b, trial)
            for k in range(steps or per_epoch):
                static["index"].copy_(order[k * b : (k + 1) * b])
                static["box"].copy_(boxes[k * b : (k + 1) * b])
                for group in optimizer.param_groups:
                    group["lr"].copy_(rates[i])
                graph.replay()
                i += 1
        torch.cuda.synchronize()
        found = {"seconds": time.perf_counter() - began, "loss": float(loss)}
        net.eval()
        right = 0
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            for k in range(0, len(truth), 500):
                guess = net(self._normal(check[k : k + 500].float())).argmax(1)
                right += int((guess == truth[k : k + 500]).sum())
        del graph
        return {**found, "top1": right / len(truth)}


@contextlib.contextmanager
def gpu_alone(path):
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    time.sleep(0.2)  # whoever waits goes first


def lengths(args, best, pace, images):
    "Epochs of the last trainings; timm's are as many as ours, and then as many as take the time of ours"
    if args.network == "ours":
        found = args.epochs or 10 * int(args.seconds / len(args.seeds) / (pace * images) / 10)
        found = args.epochs or min(max(found, 60), 120)
        Path(f"{args.out}.best").write_text(json.dumps({**vars(best), "epochs": found}))
        yield found
        return
    while not Path(f"{args.ours}.best").exists() and time.time() < args.deadline:
        time.sleep(0.2)
    yield json.loads(Path(f"{args.ours}.best").read_text())["epochs"]
    rows = [json.loads(line) for line in Path(args.ours).read_text().splitlines()]
    ours = [row["seconds"] for row in rows if row["kind"] == "final"]
    if ours:
        yield max(1, round(min(ours) / (pace * images)))


def parsed(words):
    "The command line"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=("ours", "timm"), required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--out", required=True, help="lines of JSON")
    parser.add_argument("--lock", required=True)
    parser.add_argument("--case", default="B0-G16-LN_PN-Half_16IPU_2x8")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--trials", type=int, default=len(TRIALS))
    parser.add_argument("--trial-epochs", type=int, default=20)
    parser.add_argument("--epochs", type=int, help="default: what --seconds allow, of ours")
    parser.add_argument(
        "--seconds", type=float, default=110, help="of all trainings of ours at the end"
    )
    parser.add_argument("--ours", help="timm: file of our rows, to be as long as ours, and as fast")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the last trainings")
    parser.add_argument("--best", type=json.loads, help="a trial as JSON: no search")
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds since the epoch")
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args(words)


def main(words=None):
    args = parsed(words)
    data = open_data(args.data_dir, verbose=False)
    args.classes = data.num_classes
    worker = {"ours": Ours, "timm": Peer}[args.network](args)
    out = open(args.out, "a", buffering=1)

    def one(kind, some, trial, seed, epochs, guess):
        if time.time() + guess > args.deadline:
            print(f"{args.network}: no time for {kind} with seed {seed}", flush=True)
            return None
        with gpu_alone(args.lock):
            found = worker.train(some, trial, seed, epochs)
        row = dict(network=args.network, kind=kind, seed=seed, epochs=epochs, batch=args.batch)
        row.update(images=some.train_count, device=worker.device, **vars(trial), **found)
        out.write(json.dumps(row) + "\n")
        print(
            json.dumps(
                {k: row[k] for k in ("network", "kind", "seed", "epochs", "top1", "seconds")}
            ),
            flush=True,
        )
        return row

    best, pace = args.best and Trial(**args.best), 0.0
    if best is None:
        search = without_held_back(data)
        worker.prepare(search)
        found = [
            one("search", search, t, 0, args.trial_epochs, pace) for t in TRIALS[: args.trials]
        ]
        found = [row for row in found if row]
        best = max(found, key=lambda row: row["top1"])
        pace = min(row["seconds"] / row["images"] / row["epochs"] for row in found)
        best = Trial(**{n: best[n] for n in Trial.__dataclass_fields__})
        search.kept.clear()
    for epochs in lengths(args, best, pace, data.train_count):
        for seed in args.seeds:
            one("final", data, best, seed, epochs, pace * data.train_count * epochs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
