"""Speed and memory on this CPU, beside keras.applications: `make bench`, a program and not a test.

Each network runs in a process of its own, as it ships: ours with the threads that `configure` sets, the peer with
TensorFlow's defaults. All processes stay up and take turns, the order reversed every other round, so that what
else the machine does hits all of them alike. A row holds the median, least and greatest round, in wall time and in
CPU time (which a busy machine changes less), and the machine's load. Nothing is compared with a limit here.
"""

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from bench_machine import cpu_model, num_cores

STARTED = time.perf_counter()
CALL = datetime.datetime.now(datetime.timezone.utc).isoformat()[:16]
ROOT = Path(__file__).resolve().parents[1]
PEER = "keras.applications.EfficientNetB0"
SPEED = (
    ("training", PEER, 224),
    ("training", PEER, 160),
    ("training", "B0-G1-GN-Native", 224),
    ("training", "B0-G16-LN_PN-Half", 160),
    ("inference", PEER, 224),
    ("inference", PEER, 160),
    ("inference", "B0-G1-GN-Native", 224),
    ("inference", "B0-G16-LN_PN-Half", 160),
)
SEED = 0  # of images and weights, in every process
ARMS = ("G1-GN-Native", "G16-LN_PN-Native", "G16-LN_PN-Half")
PART_NAMES = ("speed", "operations", "sizes", "reader", "timm", "grouped", "micro")
STEP, MICRO = 128, (32, 64, 128)  # images of a training step, and at a time
GROUPED = ("tf.nn.conv2d", "keras.ops.conv")  # ways to a group convolution under TensorFlow
OPERATIONS = (("Conv2D", "convolutions"), ("MatMul", "matrix products"), ("", "other operations"))


# ---- the processes that are measured


def _images(size, batch):
    rng = np.random.default_rng(SEED)
    images = rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    return images, rng.integers(0, 10, batch).astype("int32")


def _case(name, batch, micro=None):
    from effnet_repro.config import for_one_device, load_cases

    case = next(c for n, c in load_cases().items() if n.startswith(f"{name}_"))
    return for_one_device(case, micro_batch_size=micro or batch, global_batch_size=batch)


def _our_training(name, images, labels, micro=None):
    from effnet_repro.augment import draw_mixing
    from effnet_repro.efficientnet import build_model
    from effnet_repro.network import segments
    from effnet_repro.scaling import ModelSpec
    from effnet_repro.training import Program, TrainingModel, configure

    configure()

    case = _case(name, len(images), micro)
    spec = ModelSpec.from_case(case)
    trained = tuple(s.name for s in segments(spec))
    network = build_model(spec, image_size=images.shape[1], dtype="float32")
    model = TrainingModel(network, Program(case, spec, trained, "float32", 0))
    mixing = dict(
        mixup_alpha=case.mixup_alpha, cutmix_lambda=case.cutmix_lambda, seed=SEED, update=0
    )
    groups, group_size = case.mix_groups
    batch = draw_mixing(**mixing, groups=groups, group_size=group_size)
    batch.update(update=np.int32(0), learning_rate=np.float32(1e-4), images=images, labels=labels)
    return model, batch


def _peer(size):
    import keras

    keras.utils.set_random_seed(SEED)
    return keras.applications.EfficientNetB0(weights=None, input_shape=(size, size, 3))


def _peer_training(images, labels):
    import keras

    model = _peer(images.shape[1])
    optimizer = keras.optimizers.RMSprop(1e-4)
    model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=False)
    return model, (images.astype("float32"), labels)


def training(name, size, batch, micro=None):
    """A function that makes k steps through `model.fit` and gives the seconds of each but the first."""
    images, labels = _images(size, batch)
    make = _peer_training if name == PEER else lambda *data: _our_training(name, *data, micro)
    model, example = make(images, labels)
    import keras
    import tensorflow as tf

    class Clock(keras.callbacks.Callback):
        def on_train_batch_end(self, _, logs=None):
            float(logs["loss"])  # the step is done
            self.times.append((time.perf_counter(), time.process_time()))

    clock, stream = Clock(), tf.data.Dataset.from_tensors(example).repeat()

    def run(k):
        clock.times = []
        how = dict(epochs=1, verbose=0, shuffle=False, callbacks=[clock])
        model.fit(stream, steps_per_epoch=k + 1, **how)
        return np.diff(clock.times, axis=0)

    return run


def _folded(name, size):
    from effnet_repro.efficientnet import build_model, get_weights
    from effnet_repro.scaling import ModelSpec
    from effnet_repro.training import configure, predictor

    configure()

    spec = ModelSpec.from_case(_case(name, 16))
    return predictor(spec, get_weights(build_model(spec, image_size=size, dtype="float32")))


def _timed(call, k):
    times = []
    for _ in range(k + 1):
        call()
        times.append((time.perf_counter(), time.process_time()))
    return np.diff(times, axis=0)


def inference(name, size, batch):
    """A function that classifies k batches, images and logits as NumPy arrays; ours with the proxy folded."""
    images, _ = _images(size, batch)
    predict = _peer(size).predict_on_batch if name == PEER else _folded(name, size)
    return lambda k: _timed(lambda: predict(images), k)


def operations(name, size, batch):
    """A function that gives milliseconds of each kind of operation in a pass over a whole batch, from k passes."""
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    from effnet_repro.training import evaluation

    evaluation.core_count = lambda: 1  # ours with the batch in one piece
    run = inference(name, size, batch)

    def profile(k):
        with tempfile.TemporaryDirectory() as folder:
            tf.profiler.experimental.start(folder)
            wall = run(k)[:, 0].mean()  # of k passes after a first one that is profiled, too
            tf.profiler.experimental.stop()
            space = xplane_pb2.XSpace()
            space.ParseFromString(next(Path(folder).rglob("*.xplane.pb")).read_bytes())
        ms = dict.fromkeys([*(kind for _, kind in OPERATIONS), "XLA's loops"], 0.0)
        for plane in (p for p in space.planes if "CPU" in p.name):
            names = {k: v.name for k, v in plane.event_metadata.items()}
            for event in (e for line in plane.lines for e in line.events):
                _, _, op = names[event.metadata_id].partition(":")  # "name:Type"; "::" is a method
                if names[event.metadata_id].startswith("CpuExecutable::Execute"):
                    ms["XLA's loops"] += event.duration_ps / 1e9 / (k + 1)
                elif op and not op.startswith((":", " ")):
                    kind = next(kind for part, kind in OPERATIONS if part in op)
                    ms[kind] += event.duration_ps / 1e9 / (k + 1)
        return {**ms, "between operations": 1e3 * wall - sum(ms.values()), "all": 1e3 * wall}

    return profile


def timm(name, size, batch):
    """timm's EfficientNet-B0 in PyTorch: training or inference, as `name` says."""
    import timm as zoo
    import torch

    torch.manual_seed(SEED)
    model = zoo.create_model("efficientnet_b0").to(memory_format=torch.channels_last)
    images, labels = (torch.from_numpy(a) for a in _images(size, batch))
    x = images.permute(0, 3, 1, 2).float().contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.RMSprop(model.parameters(), 1e-4)

    def update():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.train()(x), labels.long()).backward()
        optimizer.step()

    def classify():
        with torch.no_grad():
            model.eval()(x).numpy()

    return lambda k: _timed(update if name == "training" else classify, k)


def grouped(name, size, batch):
    """A function that makes k passes over one group convolution, its gradient included, in a way of `GROUPED`."""
    import keras
    import tensorflow as tf

    rng = np.random.default_rng(SEED)
    x = tf.constant(rng.standard_normal((batch, size, size, 448)), tf.float32)
    kernel = tf.constant(rng.standard_normal((5, 5, 16, 448)) / 20, tf.float32)
    own = lambda x, k: tf.nn.conv2d(x, k, 1, "SAME")
    conv = own if name == GROUPED[0] else lambda x, k: keras.ops.conv(x, k, 1, "same")

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            tape.watch((x, kernel))
            y = tf.reduce_sum(conv(x, kernel) ** 2)
        return tape.gradient(y, (x, kernel))

    return lambda k: _timed(lambda: [g.numpy() for g in step()], k)


def work(kind, name, size, batch):
    """Answer each number of steps on a line of standard input with what they took."""
    kinds = {f.__name__: f for f in (training, inference, operations, timm, grouped)}
    kinds["step"] = lambda name, size, micro: training(name, size, STEP, micro)
    run = kinds[kind](name, size, batch)
    run(1)
    first = {"first_s": time.perf_counter() - STARTED, "first_cpu_s": time.process_time()}
    modules = (sys.modules.get(m) for m in ("tensorflow", "torch", "timm"))
    first["versions"] = {m.__name__: m.__version__ for m in modules if m}
    print(json.dumps(first), flush=True)
    for line in sys.stdin:
        if kind == "operations":
            print(json.dumps(run(int(line))), flush=True)
            continue
        wall, cpu = run(int(line)).T
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB
        answer = {"wall_s": statistics.median(wall), "cpu_s": float(np.mean(cpu))}
        print(json.dumps({**answer, "peak_gib": peak}), flush=True)


class Worker:
    """One such process."""

    def __init__(self, kind, name, size, batch, python=sys.executable, **env):
        self.label = dict(kind=kind, network=name, image_size=size, micro_batch=batch)
        words = [python, __file__, "--worker", kind, name, size, batch]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3", **env}
        pipe = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.process = subprocess.Popen([str(w) for w in words], env=env, text=True, **pipe)
        self.first, self.rounds = self._read(), []
        self.versions = self.first.pop("versions")

    def _read(self):
        lines = iter(self.process.stdout.readline, "")
        line = next((n for n in lines if n.startswith("{")), None)  # libraries print, too
        if line is None:
            raise RuntimeError(f"{self.label} ended:\n{self.process.stderr.read()[-2000:]}")
        return json.loads(line)

    def measure(self, updates):
        self.process.stdin.write(f"{updates}\n")
        self.process.stdin.flush()
        self.rounds.append(self._read())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# ---- rows


def circumstances(n, versions=None):
    """Where, with what, by which command and how often a row was measured."""
    from effnet_repro.results import origin

    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else ""
    python = lambda before, w: "$PYTHON_WITH_TIMM" if before == "--torch-python" else w
    words = ["python", "tests/bench_cpu.py", *map(python, sys.argv, sys.argv[1:])]
    about = origin(f"{cpu_model()}, {num_cores()} cores", words, SEED, n, versions)
    return {"load": load, "call": CALL, "python": about["versions"]["python"], **about}


def spread(values, unit):
    stats = {"median": statistics.median, "min": min, "max": max}
    return {f"{unit}_{k}": round(f(values), 4) for k, f in stats.items()}


def write(folder, name, rows, key):
    """Put rows into a file, in place of older ones of the same key."""
    from effnet_repro.results import write_rows

    write_rows(Path(folder) / name, rows, key)
    for row in rows:
        shown = {k: v for k, v in row.items() if k not in ("versions", "command")}
        print(json.dumps(shown), flush=True)


def speed_rows(workers, peers):
    """Speed of each, and its ratio to the peer's in the same round."""
    rows = []
    for worker in workers:
        wall, cpu = ([r[k] for r in worker.rounds] for k in ("wall_s", "cpu_s"))
        peer = peers[worker.label["kind"]].rounds
        batch, row = worker.label.get("images", worker.label["micro_batch"]), dict(worker.label)
        row.update(spread([batch / s for s in wall], "images_per_s"))
        row.update(spread([batch / s for s in cpu], "images_per_cpu_s"))
        row.update(spread([p["wall_s"] / s for p, s in zip(peer, wall)], "ratio"))
        row.update(spread([p["cpu_s"] / s for p, s in zip(peer, cpu)], "cpu_ratio"))
        rows.append({**row, "rounds": len(wall), **circumstances(len(wall), worker.versions)})
    return rows


def memory_rows(workers):
    """Peak memory of each process and the time from its start to its first step."""
    return [
        {
            **w.label,
            "peak_gib": round(w.rounds[-1]["peak_gib"], 3),
            **{f"to_{k}": round(v, 1) for k, v in w.first.items()},
            **circumstances(1, w.versions),
        }
        for w in workers
    ]


def take_turns(workers, rounds, updates):
    for i in range(rounds):
        for worker in workers if i % 2 == 0 else workers[::-1]:
            worker.measure(updates)
    for worker in workers:
        worker.close()


LABEL = ("kind", "network", "image_size", "micro_batch")


def bench_speed(a):
    """Whole updates and whole classifications beside the peer's."""
    batch = 2 if a.quick else 16
    arms = [(*arm[:2], 64) for arm in SPEED[-1:]] if a.quick else SPEED
    for kind in dict.fromkeys(arm[0] for arm in arms):
        workers = [Worker(*arm, batch) for arm in arms if arm[0] == kind]
        take_turns(workers, a.rounds, a.updates)
        write(a.results, "cpu_speed.csv", speed_rows(workers, {kind: workers[0]}), LABEL)
        write(a.results, "cpu_memory.csv", memory_rows(workers), LABEL)


def bench_operations(a):
    """Where a forward pass spends its time, and what a second core does for each kind of operation."""
    cores = num_cores()
    for _, name, size in (arm for arm in SPEED if arm[0] == "inference"):
        arm = ("operations", name, size, 16)
        env = dict(TF_NUM_INTEROP_THREADS="1")  # one operation at a time: their times add up
        pair = [Worker(*arm, TF_NUM_INTRAOP_THREADS=str(n), **env) for n in (1, cores)]
        take_turns(pair, a.rounds, a.updates)
        rows, together = [], circumstances(a.rounds)
        for kind in pair[0].rounds[0]:
            one, all_ = (statistics.median(r[kind] for r in w.rounds) for w in pair)
            row = {"operation": kind, "network": name, "image_size": size, "micro_batch": 16}
            row.update(ms_one_thread=round(one, 2), ms_all_threads=round(all_, 2), threads=cores)
            rows.append({**row, "rounds": a.rounds, **together})
        write(a.results, "cpu_operations.csv", rows, ("operation", *LABEL[1:]))


def bench_sizes(a):
    """Time and memory of a training image against multiply-adds and activations."""
    from effnet_repro.scaling import ModelSpec, count

    for size in [0] if a.quick else a.sizes:
        for arm in ARMS[-1:] if a.quick else ARMS:
            name, batch = f"B{size}-{arm}", 2
            case = _case(name, batch)
            side = 64 if a.quick else case.image_size
            worker = Worker("training", name, side, batch)
            take_turns([worker], 1 if a.quick else 3, 1)
            (row,), cost = memory_rows([worker]), count(ModelSpec.from_case(case), side)
            row.update(macs=cost.macs, activations=cost.activations, params=cost.params)
            for k in ("wall_s", "cpu_s"):
                row.update(spread([r[k] / batch for r in worker.rounds], f"{k}_per_image"))
            row.update(rounds=len(worker.rounds), n=len(worker.rounds))
            write(a.results, "cpu_sizes.csv", [row], LABEL)


def bench_reader(a):
    """Images that the reader alone gives, per core."""
    from effnet_repro.data import open_data, training_batches

    folders = {}
    for folder in a.data or [None]:
        if folder is not None and not Path(folder).is_dir():
            print(f"reader: skipped, there is no folder {folder}", flush=True)
            continue
        folders["built-in sample set" if folder is None else Path(folder).name] = folder
    for name, folder in folders.items():
        data, seconds, batch = open_data(folder), [], 16
        for size in (64,) if a.quick else (160, 224):
            for _ in range(1 if a.quick else a.rounds):
                stream = iter(training_batches(data, size, batch))
                next(stream)
                wall, cpu, n = time.perf_counter(), time.process_time(), 2 if a.quick else 16
                for _ in range(n):
                    next(stream)
                took = time.process_time() - cpu
                seconds.append((n * batch / (time.perf_counter() - wall), n * batch / took))
            row = {"data": name, "image_size": size, "images": data.train_count}
            row.update(spread([s[0] for s in seconds], "images_per_s"))
            row.update(spread([s[1] for s in seconds], "images_per_cpu_s"))
            row.update(rounds=len(seconds), **circumstances(len(seconds)))
            write(a.results, "reader_speed.csv", [row], ("data", "image_size"))
            seconds = []


def bench_timm(a):
    """timm beside the peer, where a Python with PyTorch is there."""
    check = [a.torch_python, "-c", "import timm, torch"]
    if a.quick or subprocess.run(check, capture_output=True).returncode:
        print(f"timm: skipped, {a.torch_python} has no timm", flush=True)
        return
    for kind in ("training", "inference"):
        peer = Worker(kind, PEER, 224, 16)
        other = Worker("timm", kind, 224, 16, a.torch_python)
        take_turns([peer, other], a.rounds, a.updates)
        other.label.update(kind=kind, network="timm efficientnet_b0 (PyTorch, eager)")
        rows = speed_rows([peer, other], {kind: peer})
        write(a.results, "cpu_speed.csv", rows[1:], LABEL)


def bench_grouped(a):
    """A group convolution and its gradient: TensorFlow's operation, and Keras' way, which compiles with XLA."""
    size, batch = (8, 1) if a.quick else (14, 8)
    workers = [Worker("grouped", name, size, batch) for name in GROUPED]
    take_turns(workers, a.rounds, 1)
    rows = []
    for w in workers:
        row = dict(
            way=w.label["network"], channels=448, kernel_size=5, image_size=size, batch=batch
        )
        row.update(spread([1e3 * r["wall_s"] for r in w.rounds], "ms"), rounds=len(w.rounds))
        rows.append({**row, **circumstances(len(w.rounds), w.versions)})
    write(a.results, "cpu_grouped.csv", rows, ("way", "channels", "kernel_size", "image_size"))


def bench_micro(a):
    """A training step of so many images, more or fewer of them at a time."""
    for size in (64, 96, 128):
        workers = [Worker("step", "B0-G16-LN_PN-Native", size, m) for m in MICRO]
        for worker in workers:
            worker.label["images"] = STEP
        take_turns(workers, a.rounds, a.updates)
        rows = speed_rows(workers, {"step": workers[0]})
        for row, worker in zip(rows, workers):
            row["peak_gib"] = round(worker.rounds[-1]["peak_gib"], 3)
        write(a.results, "cpu_micro_batch.csv", rows, LABEL)


MEASURE = [bench_speed, bench_operations, bench_sizes, bench_reader, bench_timm, bench_grouped]
PARTS = dict(zip(PART_NAMES, [*MEASURE, bench_micro]))


def main(words=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all when none is named")
    p.add_argument("--rounds", type=int, default=7, help="turns of each network (7)")
    p.add_argument("--updates", type=int, default=3, help="timed updates in a turn (3)")
    p.add_argument("--sizes", nargs="*", type=int, default=range(6), help="of B0 to B5 (0 to 5)")
    p.add_argument("--data", nargs="*", help="data folders for the reader; default: the sample set")
    p.add_argument("--results", default=str(ROOT / "results"), help="where the CSV files are")
    p.add_argument("--torch-python", default=sys.executable, help="a Python that has timm")
    p.add_argument("--quick", action="store_true", help="tiny networks: does it run?")
    a = p.parse_args(words)
    if unknown := set(a.parts) - set(PARTS):
        p.error(f"no part called {', '.join(sorted(unknown))}. Parts: {', '.join(PARTS)}")
    if a.quick:
        a.rounds, a.updates = 1, 1
    Path(a.results).mkdir(parents=True, exist_ok=True)
    for name in a.parts or PARTS:
        if a.quick and name in ("operations", "micro"):
            print(f"{name}: skipped, it takes minutes", flush=True)
        else:
            PARTS[name](a)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        kind, name, *numbers = sys.argv[2:]
        work(kind, name, *(int(n) for n in numbers))
    else:
        sys.path.insert(0, str(ROOT))
        main()
