"""Trainings of one small set in one process, our network or timm's: the step is compiled once for all of them.

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

from effnet_repro.config import get_case, override, resolve  # noqa: E402
from effnet_repro.data import open_data  # noqa: E402
from effnet_repro.data.layouts import make_split  # noqa: E402

SMALL = ("r1_k3_s2_e1_i32_o16", "r2_k3_s2_i16_o24", "r1_k5_s2_i24_o40")
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


def some_of(split, chosen):
    "The images of a split that are chosen, (n,) bool"
    rows = (split.file[chosen], split.offset[chosen], split.length[chosen], split.label[chosen])
    return make_split(split.files, *rows)


def without_held_back(data):
    "The training images but every fifth, which validates: the 2,500 validation images are not looked at"
    split = data.splits["train"]
    held = np.arange(data.train_count) % HELD_BACK == 0
    splits = {"train": some_of(split, ~held), "validation": some_of(split, held)}
    counts = dict(train_count=int((~held).sum()), validation_count=int(held.sum()))
    return replace(data, splits=splits, **counts)


class Ours:
    "Our network, through the training step of `training.step`; the numbers of a trial are arguments of it"

    def __init__(self, args):
        import jax

        from effnet_repro.efficientnet import build_model, weights_by_name
        from effnet_repro.scaling import ModelSpec
        from effnet_repro.training import Program, TrainingModel, configure
        from effnet_repro.training import step as steps
        from effnet_repro.training.compiled import keep_compiled
        from effnet_repro.training.evaluation import Evaluator

        configure()
        keep_compiled()
        self.args, self.jax, self.compiled, self.kept = args, jax, None, {}
        case = override(get_case(args.case), image_size=args.image_size)
        if args.quick:
            case = override(case, model_size="cifar", net_stages=SMALL, top_filters=128)
        own = dict(global_batch_size=args.batch, micro_batch_size=args.batch, drop_path_rate=0.5)
        self.case = resolve(case, "small", images=10_000, mixup_alpha=0.1, **own)[0]
        spec = ModelSpec.from_case(self.case, num_classes=args.classes)
        self.precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        network = build_model(spec, image_size=args.image_size, dtype="float32", seed=0)
        names = tuple(layer.segment.name for layer in network.layers[1:])
        self.model = TrainingModel(network, Program(self.case, spec, names, self.precision, 0))
        self.places = {id(v): n for n, v in weights_by_name(network).items()}
        self.spec, self.steps = spec, steps
        self.evaluator = Evaluator(spec, self.precision)
        self.device = jax.devices()[0].device_kind

    def prepare(self, data):
        "Compile everything"
        thread = self.evaluator.prepare(self.args.image_size, data)
        self.train(data, TRIALS[0], 0, 1, steps=1)
        thread.join() if thread else None

    def _step(self, state, batch, numbers):
        context = self.steps.TrainContext

        class Scaled(context):
            "Masks of the seed and the stochastic depth that are arguments"

            def mask(self, segment, kind, rate, shape):
                factor = numbers["drop_path"] / 0.5 if kind == "drop_path" else 1.0
                return super().mask(segment, kind, rate * factor, shape)

        self.steps.TrainContext = lambda ops, seed, *more, **how: Scaled(
            ops, numbers["seed"], *more, **how
        )
        self.model.optimizer.weight_decay = numbers["weight_decay"]
        try:
            return self.model.train_step(state, (batch,))
        finally:
            self.steps.TrainContext = context

    def _images(self, stream):
        "Training steps with images; those of a resident set are cut by a program of their own, for any number of them"
        from effnet_repro.data.device import cutter

        for (batch,) in stream:
            if "cuts" in batch:
                pixels, cuts = batch.pop("pixels"), batch.pop("cuts")
                batch["images"] = cutter("modern")(pixels, cuts, self.args.image_size)
            yield batch

    def _first(self, seed):
        "State of a run before its first step"
        from effnet_repro.network import initial_weights

        put, drawn = self.jax.numpy.asarray, initial_weights(self.spec, seed)
        of = lambda variables: [put(drawn[self.places[id(v)]]) for v in variables]
        known = lambda v: id(v) in self.places
        others = self.model.non_trainable_variables
        rest = [put(drawn[self.places[id(v)]]) if known(v) else put(v.value) + 0 for v in others]
        slots = [self.jax.numpy.zeros_like(v.value) for v in self.model.optimizer.variables]
        return of(self.model.trainable_variables), rest, slots, []

    def train(self, data, trial, seed, epochs, steps=None):
        "Train and measure; returns top-1 of the last and the averaged weights, and seconds of the steps"
        from effnet_repro.small_sets import average_decay
        from effnet_repro.training import updates

        args, jax = self.args, self.jax
        exponent = math.log2(trial.learning_rate / args.batch)
        own = dict(mixup_alpha=trial.mixup or 1e-3, crop_area_min=trial.crop_area_min)
        own.update(epochs=epochs, warmup_epochs=epochs / 20, base_learning_rate_exponent=exponent)
        case = override(self.case, label_smoothing=SMOOTHING, **own)
        numbers = dict(seed=seed, weight_decay=trial.weight_decay, drop_path=trial.drop_path)
        numbers = {n: np.float32(v) if n != "seed" else np.int32(v) for n, v in numbers.items()}
        state, per_epoch = self._first(seed), data.train_count // args.batch
        average, decay = None, average_decay(epochs)
        mix = lambda a, w: jax.tree.map(lambda x, y: decay * x + (1 - decay) * y, a, w)
        mix = jax.jit(mix)
        if self.compiled is None:
            self.compiled = jax.jit(self._step, donate_argnums=0)
        per_epoch = min(per_epoch, 2) if args.quick else per_epoch
        stream = self._images(updates(case, data, seed))
        began = None
        for i in range(steps or int(epochs) * per_epoch):
            batch = next(stream)
            logs, state = self.compiled(state, batch, numbers)
            if began is None:  # the first step compiles, or waits for the decoded images
                jax.block_until_ready(logs)
                began = time.perf_counter()
            if (i + 1) % per_epoch == 0:
                copy = jax.tree.map(lambda w: w + 0.0, state[0])
                average = copy if average is None else mix(average, copy)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - began
        found = {"seconds": seconds, "loss": float(logs["loss"])}
        for name, weights in (("top1", state[0]), ("top1_average", average or state[0])):
            found[name] = self._measure(data, weights, state[1])
        return found

    def _measure(self, data, trained, rest):
        pairs = zip(
            (*self.model.trainable_variables, *self.model.non_trainable_variables),
            (*trained, *rest),
        )
        arrays = {self.places[id(v)]: np.asarray(x) for v, x in pairs if id(v) in self.places}
        how = dict(image_resize="modern")
        return self.evaluator.evaluate(arrays, data, self.args.image_size, **how).top1


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


def main(words=None):
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
    args = parser.parse_args(words)
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
