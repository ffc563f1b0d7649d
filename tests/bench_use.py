"""Measure what a user gets on GPUs: `effnet-train` on files from disk, from the command to its last line.

Beside it, in the same call, the bare step of the same network at the same micro-batch: forward, backward and optimizer
on one random batch that stays on the device. First each run is started for one training step: the first start with an
empty cache, the second with a full one, then all the others side by side, so that all is compiled. Then they are
measured one after the other, each a process of its own. Rows go to results/gpu_use.csv as they come. Without a GPU: a
message.

    python tests/bench_use.py --resident FOLDER [--images FOLDER] [--case NAME] [--only REGEX] [--gpus 1 4]

--resident  a data set that fits on the device, its records repeated; it is decoded once and stays there
--images    a small set of original photographs (TFRecords); its records are repeated until they no longer fit
--gpus      of one process; more than one are compared with one, at the same global batch
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from effnet_repro.config import get_case  # noqa: E402
from effnet_repro.results import origin, portable  # noqa: E402
from tests import bench_gpu  # noqa: E402

SEED = bench_gpu.SEED
CASE = "B0-G16-LN_PN-Half_16IPU_2x8"
KEY = ("run", "case", "image_size", "global_batch_size", "gpus")
SMALL = ("--global-batch-size", "32", "--image-size", "96")


class Measured(NamedTuple):
    "A command to measure"

    name: str
    case: str
    words: tuple  # Behind the case
    gpus: int = 1
    bare: tuple = ()  # Image size and batch of the bare step beside it; () = those of the run
    command: str = "train"


def repeat_records(source, target, train, validation):
    "Write the TFRecords of `source` again and again into `target`, until the splits have so many"
    from effnet_repro.data import scan_tfrecord

    target.mkdir(parents=True)
    for split, records in (("train", train), ("validation", validation)):
        files = sorted(Path(source).glob(f"{split}-*"))
        once = sum(len(scan_tfrecord(f)) for f in files)
        data = [f.read_bytes() for f in files]
        times = -(-records // once)
        for part in range(16):
            with (target / f"{split}-{part:05d}-of-00016").open("wb") as out:
                for _ in range(times // 16 + (part < times % 16)):
                    out.writelines(data)
    shutil.copy(Path(source) / "info.json", target / "info.json")


def run_command(one, run_dir, log, *more):
    "Run a command; returns its seconds, what it said, and the rows of metrics.csv"
    devices = ",".join(str(i) for i in range(one.gpus))
    env = {**os.environ, "KERAS_BACKEND": "jax", "CUDA_VISIBLE_DEVICES": devices}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{env.get('PYTHONPATH', '')}"
    words = [sys.executable, "-m", "effnet_repro.cli", one.command, one.case]
    words += ["--budget", "case", "--seed", str(SEED), *one.words, *more]
    words += ["--run-dir", str(run_dir), "--no-progress"]
    begin = time.perf_counter()
    done = subprocess.run(words, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
    seconds = time.perf_counter() - begin
    log.write(done.stdout)
    log.flush()
    if done.returncode:
        raise RuntimeError(f"effnet-{one.command} ended with status {done.returncode}: {one}")
    with (run_dir / "metrics.csv").open(newline="") as file:
        return seconds, done.stdout, list(csv.DictReader(file))


def rates(rows, images):
    "Images a second inside the epochs after the first, and over them with what lies between"
    inside = [float(r["images_per_s"]) for r in rows[1:]] or [float(rows[0]["images_per_s"])]
    found = bench_gpu.spread(inside, "images_per_s")
    first, last = rows[0], rows[-1]
    took = float(last["seconds"]) - float(first["seconds"])
    steps = int(last["update"]) - int(first["update"])
    whole = round(steps * images / took, 1) if took > 0 else ""
    return {**found, "steps": steps or len(rows), "whole_epochs_images_per_s": whole}


def estimated(said):
    "Seconds of the last estimate that a run printed; None where there is none"
    found = re.findall(r"estimate \(measured\): ([\d.,]+) (\w+) in all", said)
    sizes = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}
    return float(found[-1][0].replace(",", "")) * sizes[found[-1][1]] if found else None


def bare_steps(wanted, log, wait):
    "Images a second of bare steps, compiled side by side, measured after `wait`: {(network, size, batch): row}"
    rows = []
    for network, size, batch in wanted:
        settings = dict(model=network, size=size, batch=batch, mode="train")
        settings["env"] = {"CUDA_VISIBLE_DEVICES": "0"}
        rows.append((network, "ours", settings, 1))
    found = {}
    ready_ones = bench_gpu.together(rows, time.time() + 300, log)
    wait()
    for row, process, about in ready_ones:
        ready, batch = bench_gpu.ask(process), row[2]["batch"]
        seconds = [bench_gpu.ask(process) for _ in range(5)]
        process.kill()
        process.wait()
        speed = bench_gpu.spread([batch / t for t in seconds], "images_per_s")
        about = {k: v for k, v in about.items() if k != "largest_micro_batch"}
        found[(row[0], row[2]["size"], batch)] = {**speed, **about, **ready}
    return found


def commands(a, work):
    "What is measured"
    resident = ("--data-dir", str(work / "resident"), "--epochs", str(a.epochs))
    few = ("--max-steps", str(a.steps), "--validate-every", "0")
    photographs = ("--data-dir", str(work / "photographs"), *few)
    small = ("--data-dir", str(a.resident), "--epochs", "2", *SMALL)
    found = [
        Measured("resident set, defaults", a.case, resident),
        Measured("resident set, small batches", a.case, small, bare=(96, 32)),
    ]
    if a.images:
        found.append(Measured("photographs from JPEG files", a.case, photographs))
    for n in a.gpus if len(a.gpus) > 1 else ():
        for whole in a.global_batches:
            words = (*resident, "--global-batch-size", str(whole))
            if n > 1 or whole != 768:  # one GPU and 768: the defaults
                found.append(Measured(f"resident set, batch {whole}", a.case, words, gpus=n))
    return [one for one in found if re.search(a.only, one.name)]


def measure(a, device):
    "Measure starts, bare steps and runs, and write a row of each"
    command = ["python", "tests/bench_use.py", *sys.argv[1:]]
    about = {"flags": bench_gpu.FLAGS, **origin(device, command, SEED, 1, bench_gpu.versions())}
    about["call"] = datetime.datetime.now().isoformat(timespec="minutes")
    table = bench_gpu.Table(a.results / "gpu_use.csv", KEY, about)

    def write(name, case, row):
        table.add({"run": name, "case": case, **row})
        print(f"{name:36} {row.get('images_per_s') or row.get('command_s'):>12}", flush=True)

    with tempfile.TemporaryDirectory() as folder, open(
        os.environ.get("BENCH_LOG", os.devnull), "a"
    ) as log:
        work = Path(folder)
        os.environ.setdefault("EFFNET_REPRO_CACHE", str(work / "cache"))
        if a.images:
            repeat_records(a.images, work / "photographs", a.records, a.records)
        repeat_records(a.resident, work / "resident", a.resident_records, 2500)
        chosen = commands(a, work)
        bare = _starts(chosen, a.resident, work, log, write)
        for i, one in enumerate(chosen):
            case, found = _report(one, work / f"run{i}", log)
            key = _bare(one, case)
            if key in bare:
                share = found["images_per_s"] / (bare[key]["images_per_s"] * one.gpus)
                found["of_bare_step"] = round(share, 3)
            shown = {n: case[n] for n in ("image_size", "global_batch_size", "micro_batch_size")}
            write(one.name, one.case, {**shown, "gpus": one.gpus, **found})


def _bare(one, case):
    "The bare step beside a run: network, image size, batch"
    network = one.case.rpartition("_16IPU")[0]
    return (network, *(one.bare or (case["image_size"], case["micro_batch_size"])))


def _report(one, folder, log):
    "Run a command to its end: its case, and what it measured"
    seconds, said, rows = run_command(one, folder, log)
    case = json.loads((folder / "config.json").read_text())["case"]
    found = {"command_s": round(seconds, 1), **rates(rows, case["global_batch_size"])}
    if guess := estimated(said):
        found["estimate_of_command"] = round(guess / seconds, 2)
    if decoder := re.search(r"decoded by (\w+)", said):
        found["jpeg_decoder"] = decoder[1]
    found["ran"] = portable(["effnet-train", one.case, "--budget", "case", *one.words])
    return case, found


def _starts(chosen, resident, work, log, write):
    """One training step of each run: cold and warm of the first, then all the others side by side.

    Beside these the bare steps are compiled; they are measured when all is still. Returns their rows by `_bare`.
    """
    one_step = ("--max-steps", "1", "--no-validation")
    first = chosen[0]
    quick = first._replace(words=("--data-dir", str(resident), "--epochs", "1"))
    case = get_case(first.case)
    shown = dict(image_size=case.image_size, global_batch_size=case.global_batch_size)
    shown["gpus"] = first.gpus
    for name in ("start, cache empty", "start, cache full"):
        seconds = run_command(quick, work / name, log, *one_step)[0]
        write(name, first.case, {**shown, "command_s": round(seconds, 1), "steps": 1})
    ran = json.loads((work / "start, cache full" / "config.json").read_text())["case"]
    wanted = sorted({_bare(one, ran) for one in chosen if one.bare or one == first})
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # while they share GPUs
    go = lambda i: run_command(chosen[i], work / f"start{i}", log, *one_step)
    with ThreadPoolExecutor(len(chosen) + 1) as pool:
        bare = pool.submit(bare_steps, wanted, log, lambda: [f.result() for f in started])
        started = [pool.submit(go, i) for i in range(len(chosen))]
        found = bare.result()
    del os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"]
    for (_, size, batch), row in found.items():
        alone = dict(image_size=size, global_batch_size=batch, micro_batch_size=batch, gpus=1)
        write("bare step", first.case, {**alone, **row})
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--resident", type=Path, required=True, help="a set that fits on the device")
    p.add_argument("--images", type=Path, help="original photographs, TFRecords")
    p.add_argument("--case", default=CASE)
    p.add_argument("--epochs", type=int, default=4, help="of the resident set")
    p.add_argument(
        "--resident-records", type=int, default=75000, help="its records are repeated to so many"
    )
    p.add_argument("--steps", type=int, default=52, help="training steps on the photographs")
    p.add_argument("--only", default="", help="regular expression over the names of the runs")
    p.add_argument("--records", type=int, default=20000, help="photographs at least")
    p.add_argument("--gpus", type=int, nargs="+", default=[1], help="numbers of GPUs to compare")
    p.add_argument("--global-batches", type=int, nargs="+", default=[768, 3072])
    p.add_argument("--results", type=Path, default=ROOT / "results")
    a = p.parse_args()
    found = bench_gpu.gpus()
    if not found:
        print("bench-use: there is no GPU here (nvidia-smi does not answer): nothing to measure")
        return
    a.resident = a.resident.resolve()
    a.images = a.images and a.images.resolve()
    measure(a, found[0])


if __name__ == "__main__":
    main()
