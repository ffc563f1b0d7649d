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
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from effnet_repro.results import origin, portable  # noqa: E402
from tests import bench_gpu  # noqa: E402

SEED = bench_gpu.SEED
CASE = "B0-G16-LN_PN-Half_16IPU_2x8"
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


def run_command(words, run_dir, log):
    "Run `effnet-train` with these words; returns seconds from start to end, and the rows of metrics.csv"
    env = {**os.environ, "KERAS_BACKEND": "jax", "CUDA_VISIBLE_DEVICES": "0"}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{env.get('PYTHONPATH', '')}"
    command = [
        sys.executable,
        "-m",
        "effnet_repro.cli",
        "train",
        *words,
        "--run-dir",
        str(run_dir),
        "--no-progress",
    ]
    begin = time.perf_counter()
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
    "(name, words of the command, how they are written down) of what is measured"
    resident = ["--data-dir", str(a.resident), "--epochs", str(a.epochs)]
    large = ["--micro-batch-size", str(a.micro_batch_size)]
    few = ["--max-steps", str(a.steps), "--validate-every", "0"]
    from_files = ["--data-dir", str(work / "photographs"), *large, *few]
    return [
        ("resident set, defaults", resident),
        ("resident set, large micro-batch", [*resident, *large]),
        ("photographs from JPEG files", from_files),
    ]


def measure(a, device):
    "Measure the bare step, then every run, and write a row of each"
    from effnet_repro.config import get_case

    case = get_case(a.case)
    command = ["python", "tests/bench_use.py", *sys.argv[1:]]
    about = {"flags": bench_gpu.FLAGS, **origin(device, command, SEED, 1, bench_gpu.versions())}
    about["call"] = datetime.datetime.now().isoformat(timespec="minutes")
    table = bench_gpu.Table(a.results / "gpu_use.csv", KEY, about)
    first = {"case": a.case, "image_size": case.image_size}

    def write(name, row):
        table.add({"run": name, **first, **row})
        print(f"{name:36} {row['images_per_s']:10,.0f} images/s", flush=True)

    with tempfile.TemporaryDirectory() as folder, open(
        os.environ.get("BENCH_LOG", os.devnull), "a"
    ) as log:
        work, network = Path(folder), a.case.rpartition("_16IPU")[0]
        if re.search(a.only, "bare step"):
            bare = bare_step(network, case.image_size, a.micro_batch_size, log)
            write("bare step", {"micro_batch_size": a.micro_batch_size, **bare})
        records = repeat_records(a.images, work / "photographs", a.records)
        print(f"{records:,} records", flush=True)
        chosen = [(name, words) for name, words in runs(a, work) if re.search(a.only, name)]
        for i, (name, words) in enumerate(chosen):
            words = [a.case, "--budget", "case", "--seed", str(SEED), *words]
            seconds, rows = run_command(words, work / f"run{i}", log)
            config = json.loads((work / f"run{i}" / "config.json").read_text())["case"]
            found = rates(rows, config["global_batch_size"])
            whole = {"command_s": round(seconds, 1), "ran": portable(["effnet-train", *words])}
            whole["jpeg_decoder"] = "simplejpeg" if find_spec("simplejpeg") else "Pillow"
            write(name, {"micro_batch_size": config["micro_batch_size"], **found, **whole})


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--resident", type=Path, required=True, help="a set that fits on the device")
    p.add_argument("--images", type=Path, required=True, help="original photographs, TFRecords")
    p.add_argument("--case", default=CASE)
    p.add_argument("--micro-batch-size", type=int, default=384)
    p.add_argument("--epochs", type=int, default=12, help="of the resident set")
    p.add_argument("--steps", type=int, default=52, help="training steps on the photographs")
    p.add_argument("--only", default="", help="regular expression over the names of the runs")
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
