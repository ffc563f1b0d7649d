"""Measure what a user gets on a GPU: `effnet-train` on files from disk, from the command to its last line.

Beside it, in the same call, the bare step of the same network at the same micro-batch: forward, backward and optimizer
on one random batch that stays on the device. Each run is a process of its own, one after the other. Rows go to
results/gpu_use.csv as they come. Without a GPU: a message.

    python tests/bench_use.py --resident FOLDER --images FOLDER [--case NAME] [--records 20000]

--resident  a data set that fits on the device; it is decoded once and stays there
--images    a small set of original photographs (TFRecords); its records are repeated until they no longer fit
"""

import argparse
import csv
import datetime
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import bench_gpu  # noqa: E402

CASE = "B0-G16-LN_PN-Half_16IPU_2x8"
COMMAND = "import sys; from effnet_repro.cli import train_command; sys.exit(train_command())"
KEY = ("run", "case", "image_size")


def repeat_records(source, target, records):
    "Write the TFRecords of `source` again and again into `target`, until `records` are there"
    from effnet_repro.data import scan_tfrecord

    files = sorted(Path(source).glob("train-*"))
    once = sum(len(scan_tfrecord(f)) for f in files)
    times = -(-records // once)
    target.mkdir(parents=True)
    for part in range(16):
        copies = times // 16 + (part < times % 16)
        with (target / f"train-{part:05d}-of-00016").open("wb") as out:
            for _ in range(copies):
                for file in files:
                    out.write(file.read_bytes())
    for name in ("info.json", *(f.name for f in Path(source).glob("validation-*"))):
        shutil.copy(Path(source) / name, target / name)
    return once * times


def run_command(words, run_dir):
    "Run `effnet-train` with these words; returns seconds from start to end, and the rows of metrics.csv"
    env = {**os.environ, "KERAS_BACKEND": "jax", "CUDA_VISIBLE_DEVICES": "0"}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{env.get('PYTHONPATH', '')}"
    command = [sys.executable, "-c", COMMAND, *words, "--run-dir", str(run_dir), "--no-progress"]
    begin = time.perf_counter()
    with open(os.environ.get("BENCH_LOG", os.devnull), "a") as log:
        done = subprocess.run(command, env=env, stdout=log, stderr=log, cwd=str(run_dir.parent))
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise RuntimeError(f"effnet-train ended with status {done.returncode}: {words}")
    with (run_dir / "metrics.csv").open(newline="") as file:
        return seconds, list(csv.DictReader(file))


def rates(rows, images):
    "Images a second inside the epochs after the first, and over them with what lies between"
    inside = [float(r["images_per_s"]) for r in rows[1:]] or [float(rows[0]["images_per_s"])]
    found = bench_gpu.spread(inside, "images_per_s")
    first, last = rows[0], rows[-1]
    took = float(last["seconds"]) - float(first["seconds"])
    steps = int(last["update"]) - int(first["update"])
    whole = round(steps * images / took, 1) if took > 0 else ""
    return {**found, "whole_epochs_images_per_s": whole, "first_epoch_s": first["seconds"]}


def bare_step(name, size, batch, log):
    "Images a second of the bare step, five readings"
    settings = dict(model=name, size=size, batch=batch, mode="train")
    settings["env"] = {"CUDA_VISIBLE_DEVICES": "0"}
    row = (name, "ours", settings, 1)
    ((_, process, about),) = bench_gpu.together([row], time.time() + 300, log)
    ready = bench_gpu.ask(process)
    seconds = [bench_gpu.ask(process) for _ in range(5)]
    process.kill()
    process.wait()
    return {**bench_gpu.spread([batch / t for t in seconds], "images_per_s"), **about, **ready}


def runs(a, work):
    "(name, words of the command, images of an update) of what is measured"
    from effnet_repro.config import get_case

    batch = get_case(a.case).global_batch_size
    resident = [a.case, "--budget", "case", "--data-dir", str(a.resident)]
    large = ["--micro-batch-size", str(a.micro_batch_size)]
    made = work / "photographs"
    from_files = [a.case, "--budget", "case", "--data-dir", str(made), "--validate-every", "0"]
    few = ["--max-steps", str(a.steps)]
    return [
        ("resident set, defaults", [*resident, "--epochs", str(a.epochs)], batch),
        ("resident set, large micro-batch", [*resident, *large, "--epochs", str(a.epochs)], batch),
        ("original photographs from JPEG files", [*from_files, *large, *few], batch),
    ]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--resident", type=Path, required=True, help="a set that fits on the device")
    p.add_argument("--images", type=Path, required=True, help="original photographs, TFRecords")
    p.add_argument("--case", default=CASE)
    p.add_argument("--micro-batch-size", type=int, default=384)
    p.add_argument("--epochs", type=int, default=12, help="of the resident set")
    p.add_argument("--steps", type=int, default=52, help="training steps on the photographs")
    p.add_argument("--records", type=int, default=20000, help="photographs at least")
    p.add_argument("--results", type=Path, default=ROOT / "results")
    a = p.parse_args()
    found = bench_gpu.gpus()
    if not found:
        print("bench-use: there is no GPU here (nvidia-smi does not answer): nothing to measure")
        return
    a.resident, a.images = a.resident.resolve(), a.images.resolve()
    measure(a, found[0])


if __name__ == "__main__":
    main()
