"""Speed of exported files in ONNX Runtime on this CPU, beside keras.applications' and timm's B0 in files of their own.

    python tests/bench_onnx.py                        speed: results/onnx_cpu.csv
    python tests/bench_onnx.py --data imagenette128   accuracy in int8: results/onnx_int8.csv

All files stay open and take turns, the order reversed every other round. A row holds the median round in wall time and
in processor time, and the medians of both over those of keras.applications in the same round; a busy machine changes
the latter of processor time least. Weights are random, which changes no time. Threads do not spin while they wait, so
processor time is work. A peer is left out where what writes its file is missing: tf2onnx for Keras, torch and timm for
timm.

Accuracy is that of a run, `--run`; without one, a small network is trained for a few epochs first: what int8 costs
shows in any network that has learned something.

--quick   small networks, one round: whether it runs
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from bench_machine import cpu_model, num_cores

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from effnet_repro.config import get_case, override  # noqa: E402
from effnet_repro.convert import case_for  # noqa: E402
from effnet_repro.export import int8, onnx_file  # noqa: E402
from effnet_repro.export.agreement import in_batches  # noqa: E402
from effnet_repro.export.subject import Subject, read_subject  # noqa: E402
from effnet_repro.network import initial_weights  # noqa: E402
from effnet_repro.results import origin, write_rows  # noqa: E402
from effnet_repro.scaling import ModelSpec, count  # noqa: E402

KERAS, TIMM = "keras.applications.EfficientNetB0", "timm.efficientnet_b0"
OURS = (("B0-G1-BN", 224), ("B0-G16-LN_PN", 160), ("B0-G16-LN_PN", 224), ("B0-G1-GN", 224))
INT8 = (("B0-G1-BN", 224), ("B0-G16-LN_PN", 160))
BATCHES = (1, 32)
STAGES = (
    "r1_k3_s2_e1_i32_o16",
    "r2_k3_s2_i16_o24",
    "r1_k5_s2_i24_o40",
    "r1_k5_s1_i40_o64",
)
SEED = 0


def random_subject(name, size):
    "A network of ours with random weights"
    spec = replace(ModelSpec.from_name(name), image_size=size)
    names = tuple(map(str, range(spec.num_classes)))
    case = replace(case_for(spec), image_size=size)
    return Subject(Path(name), spec, initial_weights(spec, SEED), case, names, size)


def write_keras(path, size):
    "keras.applications' B0 as tf2onnx writes it; what Keras' own export writes with it lacks two constants"
    import keras
    import tensorflow as tf
    import tf2onnx
    from tensorflow.python.framework import convert_to_constants as constants

    shape = (size, size, 3)
    model = keras.applications.EfficientNetB0(
        weights=None, input_shape=shape, classifier_activation=None
    )
    call = tf.function(lambda images: model(images, training=False))
    call = call.get_concrete_function(tf.TensorSpec((None, *shape), "float32"))
    frozen = constants.convert_variables_to_constants_v2(call)
    names = [[t.name for t in tensors] for tensors in (frozen.inputs, frozen.outputs)]
    graph = frozen.graph.as_graph_def()
    tf2onnx.convert.from_graph_def(graph, None, *names, output_path=str(path))


def write_timm(path, size):
    "timm's B0 as PyTorch writes it"
    import timm
    import torch

    model = timm.create_model("efficientnet_b0").eval()
    images = torch.zeros(2, 3, size, size)
    batch = {0: torch.export.Dim("N")}
    torch.onnx.export(model, (images,), str(path), dynamo=True, dynamic_shapes=(batch,))


PEERS = ((KERAS, write_keras, ("tf2onnx", "keras")), (TIMM, write_timm, ("torch", "timm")))


def files(folder, quick):
    "(name, image size, precision, path) of every file that is timed"
    size = lambda s: 64 if quick else s
    for name, side in OURS:
        path = folder / f"{name}-{side}.onnx"
        onnx_file.write(random_subject(name, size(side)), path)
        yield name, size(side), "float32", path
    for name, side in INT8:
        path = folder / f"{name}-{side}.int8.onnx"
        subject = random_subject(name, size(side))
        shape = (8, size(side), size(side), 3)
        images = np.random.default_rng(SEED).integers(0, 256, shape, dtype=np.uint8)
        int8.quantize(subject, folder / f"{name}-{side}.onnx", path, images)
        yield name, size(side), "int8", path
    for name, _, needs in PEERS:
        if all(map(find_spec, needs)):
            path = folder / f"{name}.onnx"
            words = [sys.executable, __file__, "--peer", name, "--out", str(path)]
            subprocess.run([*words, *["--quick"] * quick], check=True, stdout=subprocess.DEVNULL)
            yield name, size(224), "float32", path
        else:
            print(f"{name} is left out: it needs {' and '.join(needs)}", file=sys.stderr)


class Timed:
    "A file in ONNX Runtime, with images for it"

    def __init__(self, name, size, precision, path, threads):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = ["CPUExecutionProvider"]
        self.session = ort.InferenceSession(str(path), options, providers=providers)
        self.name, self.size, self.precision, self.path = name, size, precision, path
        given = self.session.get_inputs()[0]
        self.input, self.is_bytes = given.name, given.type == "tensor(uint8)"
        self.channels_first = given.shape[1] == 3

    def images(self, batch):
        images = np.random.default_rng(SEED).integers(0, 256, (batch, self.size, self.size, 3))
        images = images.astype("uint8" if self.is_bytes else "float32")
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2)) if self.channels_first else images

    def __call__(self, batch, repeats):
        "Milliseconds an image: in wall time, and of the processor"
        feed = {self.input: self.images(batch)}
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            self.session.run(None, feed)
        n = repeats * batch / 1e3
        return (time.perf_counter() - wall) / n, (time.process_time() - cpu) / n


def speed(rounds, threads, quick=False):
    "Rows of results/onnx_cpu.csv, and how many rounds each sums up"
    with tempfile.TemporaryDirectory() as folder:
        timed = [Timed(*about, threads) for about in files(Path(folder), quick)]
        taken = {(i, b): [] for i in range(len(timed)) for b in BATCHES}
        for number in range(rounds + 1):
            order = range(len(timed)) if number % 2 else reversed(range(len(timed)))
            for i in order:
                for b in BATCHES:
                    found = timed[i](b, 1 if quick or b > 1 else 8)
                    if number:  # the first round warms up
                        taken[i, b].append(found)
    base = next((i for i, t in enumerate(timed) if t.name == KERAS), None)
    for (i, b), pairs in taken.items():
        row = {"name": timed[i].name, "image_size": timed[i].size, "precision": timed[i].precision}
        row.update(batch=b, threads=threads)
        row["ms_an_image"] = round(statistics.median(wall for wall, _ in pairs), 3)
        row["cpu_ms_an_image"] = round(statistics.median(cpu for _, cpu in pairs), 3)
        row["images_per_s"] = round(1e3 / row["ms_an_image"], 1)
        for which, column in ((0, "times_keras_b0"), (1, "cpu_times_keras_b0")):
            peers = [] if base is None else taken[base, b]
            ratios = [mine[which] / peer[which] for mine, peer in zip(pairs, peers)]
            row[column] = round(statistics.median(ratios), 3) if ratios else ""
        row["load"] = round(os.getloadavg()[0], 1)  # 1 for each process that would compute
        yield row


def short_run(data, folder):
    "A small network after three epochs; a minute or two"
    from effnet_repro.training import configure, train

    configure()
    fields = dict(net_stages=STAGES, top_filters=256, image_size=64, image_resize="modern")
    case = override(get_case("B0-G16-LN_PN-Half_16IPU_2x8"), **fields)
    train(case, data, folder, budget="small", epochs=3, progress=False)
    return folder


def accuracy(run, data):
    "The rows of results/onnx_int8.csv: all validation images, in float32 and in int8"
    subject = read_subject(run, weights="auto")
    data = int8.open_data(data, verbose=False)
    images, _ = int8.some_images(data, "train", int8.CALIBRATION, subject)
    every = len(data.splits["validation"].label)
    checked, labels = int8.some_images(data, "validation", every, subject)
    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder) / "a.onnx", Path(folder) / "b.onnx"
        onnx_file.write(subject, plain)
        int8.quantize(subject, plain, small, images)
        found = [in_batches(onnx_file.opened(p), checked, None) for p in (plain, small)]
        megabytes = [round(p.stat().st_size / 1e6, 2) for p in (plain, small)]
    kept = int8.kept(*found, labels)
    about = {
        "case": subject.case.name,
        "image_size": subject.image_size,
        "data": Path(data.root).name,
    }
    about.update(parameters=count(subject.spec).params, epochs=subject.case.epochs)
    about["images"] = kept.images
    for precision, top1, size in zip(("float32", "int8"), (kept.float_top1, kept.top1), megabytes):
        same = 1.0 if precision == "float32" else round(kept.same, 4)
        yield {**about, "precision": precision, "top1": round(top1, 4), "same": same, "MB": size}


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--run", help="a run folder whose accuracy in int8 is measured")
    parser.add_argument("--data", help="the data set it was trained on")
    parser.add_argument("--out", default=str(ROOT / "results"), help="folder of the CSV files")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peer", help="write a peer's file to OUT: in a process of its own")
    args = parser.parse_args(words)
    if args.peer:
        write = next(write for name, write, _ in PEERS if name == args.peer)
        write(args.out, 64 if args.quick else 224)
        return 0
    given = sys.argv[1:] if words is None else words
    packages = ("onnx", "onnxruntime", "tf2onnx", "torch", "timm")
    versions = {p: version(p) for p in packages if find_spec(p)}
    device = f"{cpu_model()}, {args.threads} threads"
    about = lambda n: origin(device, ["python", "tests/bench_onnx.py", *given], SEED, n, versions)
    if args.data:
        out, key = Path(args.out) / "onnx_int8.csv", ("case", "parameters", "data", "precision")
        with tempfile.TemporaryDirectory() as folder:
            run = args.run or short_run(args.data, Path(folder) / "run")
            rows = list(accuracy(run, args.data))
        write_rows(out, rows, key, about(1))
    else:
        rounds = 1 if args.quick else args.rounds
        rows, out = list(speed(rounds, args.threads, args.quick)), Path(args.out) / "onnx_cpu.csv"
        key = ("name", "image_size", "precision", "batch", "threads")
        write_rows(out, rows, key, about(rounds))
    for row in rows:
        print(row)
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
