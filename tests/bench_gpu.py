"""Measure training and inference on a GPU beside the networks that one would pick instead.

Every contender is a process of its own. Some compile side by side; then they are measured: those of wave 1 take turns,
one round each, so that the machine's state is the same for all, the others one after the other. Results go to files in
results/ as they come. Without a GPU: a message.

    python tests/bench_gpu.py [PART ...] [--waves 1,2,3] [--only REGEX] [--data FOLDER ...]

speed    gpu_speed.csv: waves 1 = the targets and their peers (timm compiled, and keras.applications at the native size
         and at ours), 2 and 3 = the other arms of B0 and B4, 4 = other peers, 5 = plain operations
batches  gpu_batches.csv: several batch sizes: waves 1 = training B0 and peers, 2 = B4, 3 = inference of both,
         4 = training the other sizes at one batch size, 5 = timm's compile modes
reader   gpu_reader.csv: images a second from disk, and from the device's memory
devices  gpu_devices.csv, gpu_devices_loss.csv: the training runtime on one and on two GPUs of this machine
kernels  gpu_kernels.csv, gpu_convs.csv: the kernels alone, by bench_kernels.py
profile  gpu_profile.csv, gpu_compile.csv: where a step's time goes, and compiling's, by bench_profile.py
use      gpu_use.csv: the command `effnet-train` on --data RESIDENT [PHOTOGRAPHS], by bench_use.py
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from gpu_contenders import ANSWER, SEED, batches, contenders, worker

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from effnet_repro.kernels.ops import XLA_FLAGS as FLAGS  # noqa: E402
from effnet_repro.results import origin, write_rows  # noqa: E402

REPLICAS = (("B0-G16-LN_PN-Half", 160, 384), ("B4-G16-LN_PN-Half", 252, 128))  # side, micro-batch
GLOBAL_BATCH = 768
PARTS = ("speed", "batches", "reader", "devices", "kernels", "profile", "use")


# ---- the processes


def gpus():
    "Names of the GPUs"
    ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def versions():
    found = {}
    for package in ("jax", "torch", "timm", "keras"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def start(kind, settings, log):
    env = {
        **os.environ,
        "XLA_FLAGS": FLAGS,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        "TORCHINDUCTOR_COMPILE_THREADS": "8",
        **settings.get("env", {}),
    }
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{env.get('PYTHONPATH', '')}"
    command = [sys.executable, __file__, "--worker", kind, json.dumps(settings)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    return subprocess.Popen(command, env=env, cwd=str(ROOT), **pipes)


def answer(process, key=None):
    "The next line of JSON that a worker prints (with `key` in it), or None when it has ended"
    for line in process.stdout:
        if line.startswith(ANSWER):
            value = json.loads(line[len(ANSWER) :])
            if key is None or (isinstance(value, dict) and key in value):
                return value
    return None


def ask(process):
    "Let a worker do its next thing; None when it has ended"
    try:
        process.stdin.write("go\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    return answer(process)


def together(rows, deadline, log, key="compile_s"):
    "Start a worker for each row, and wait until each has printed `key`: [(row, process, answer)]"
    running, ready = [(row, start(row[1], row[2], log)) for row in rows], {}
    wait = lambda i, p: ready.update({i: answer(p, key)})
    threads = [
        threading.Thread(target=wait, args=(i, p), daemon=True) for i, (_, p) in enumerate(running)
    ]
    for t in threads:
        t.start()
    at_work = lambda t, one: t.is_alive() and one[1].poll() is None
    while time.time() < deadline and any(map(at_work, threads, running)):
        time.sleep(0.2)
    for t, (_, process) in zip(threads, running):  # children of one that failed keep its pipe open
        t.join(1 if process.poll() is not None else 0)
    found = []
    for i, (row, process) in enumerate(running):
        if ready.get(i):
            found.append((row, process, ready[i]))
        else:
            print(f"left out: {row[0]}, {row[2].get('mode', '')} (not compiled in time, or failed)")
            process.kill()
    names = [f"{r[0]} {r[2].get('mode', '')}: {a[key]}" for r, _, a in found]
    print(f"{key}:", "; ".join(names), flush=True)
    return found


def in_turns(rows, deadline, rounds, log, write):
    "Compile side by side, then measure a round of each, again and again"
    running, times = together(rows, deadline, log), {}
    for i, one in enumerate(running):
        if _settled(*one):
            times[i] = []
    for _ in range(rounds):
        for i in list(times):
            value = ask(running[i][1])
            if value is None:
                print(f"failed: {running[i][0][0]}", flush=True)
                times.pop(i)
            else:
                times[i].append(value)
    for i, seconds in times.items():
        write(running[i][0], running[i][2], seconds)
    for _, process, _ in running:
        process.kill()


def _settled(row, process, about):
    alone = ask(process)
    about.update(alone or {})
    if alone is None:
        print(f"failed: {row[0]}", flush=True)
    return alone is not None


def one_by_one(rows, deadline, rounds, log, write):
    "Compile side by side, then measure one after the other: only one needs memory"
    for row, process, about in together(rows, deadline, log):
        seconds = [ask(process) for _ in range(rounds)] if _settled(row, process, about) else [None]
        if None not in seconds:
            write(row, about, seconds)
        process.kill()
        process.wait()


class Table:
    "A CSV file that gets every row as it comes; rows of other runs stay unless they are the same"

    def __init__(self, path, keys, about):
        self.path, self.keys, self.about = Path(path), keys, about

    def add(self, row):
        write_rows(self.path, [{**row, "n": row.get("rounds", 1)}], self.keys, self.about)


def spread(values, name):
    "Median, lowest and highest of a list"
    return {
        name: round(median(values), 1),
        "lowest": round(min(values), 1),
        "highest": round(max(values), 1),
        "rounds": len(values),
    }


# ---- the parts


def bench_speed(a, about, log, rows=None, file="gpu_speed.csv", more_keys=()):
    keys = ("name", "mode", "image_size", *more_keys)
    table, begin = Table(a.folder / file, keys, about), time.time()

    def write(row, ready, seconds):
        name, _, s, wave = row
        speed = spread([s["batch"] / t for t in seconds], "images_per_s")
        first = dict(name=name, mode=s["mode"], image_size=s["size"], batch=s["batch"])
        more = dict(steps=ready["steps"], compile_s=ready["compile_s"])
        more.update(peak_gib=round(ready["peak_gib"], 2), wave=wave, call=a.call)
        more["largest_micro_batch"] = ready.get("largest_micro_batch", "")
        table.add({**first, **speed, **more})
        print(
            f"{name:45} {s['mode']:6} {s['size']:4} px {speed['images_per_s']:10,.0f} images/s "
            f"({speed['lowest']:,.0f} to {speed['highest']:,.0f})",
            flush=True,
        )

    waves = {int(w) for w in a.waves.split(",")}
    fits = lambda r: (
        r[3] in waves
        and re.search(a.only, f"{r[0]}, {r[2]['mode']}, {r[2]['batch']}", re.IGNORECASE)
    )
    chosen = sorted(
        filter(fits, rows or contenders()), key=lambda r: (r[2]["mode"] == "infer", r[3])
    )
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    for _, _, settings, _ in chosen:
        settings["env"] = {"CUDA_VISIBLE_DEVICES": gpu, **settings.get("env", {})}
    first = [r for r in chosen if r[3] == 1 and not more_keys]
    others = [r for r in chosen if r not in first]  # by batch sizes: not all fit at once
    some = [others[i : i + a.at_once] for i in range(0, len(others), a.at_once)]
    begins = (one_by_one if a.apart else in_turns, a.rounds, first)
    for how, rounds, rows in (
        begins,
        *((one_by_one, a.rounds if more_keys else 3, r) for r in some),
    ):
        if rows and time.time() - begin < a.seconds:
            how(rows, time.time() + a.compile_seconds, rounds, log, write)


def bench_batches(a, about, log):
    bench_speed(a, about, log, batches(), "gpu_batches.csv", ("batch",))


def bench_reader(a, about, log):
    os.environ.update(KERAS_BACKEND="jax", XLA_PYTHON_CLIENT_PREALLOCATE="false")
    from effnet_repro import data as pages
    from effnet_repro.data import device

    def by_tensorflow(*request):
        return pages.tensorflow_arrays(pages.training_batches, *request)

    fits = pages.fits_device
    keys = ("reader", "data", "image_size")
    table = Table(a.folder / "gpu_reader.csv", keys, {**about, "cores": os.cpu_count()})
    ways = (
        ("resized on the host", pages.numpy_batches, fits, 256),
        ("resized on the host by TensorFlow", by_tensorflow, fits, 2048),
        ("resized on the device", pages.device_batches, lambda dataset: False, 1024),
        ("kept on the device", pages.device_batches, fits, 4096),
    )
    if find_spec("tensorflow") is None:
        print("reader: without TensorFlow; with it: pip install tensorflow-cpu", flush=True)
        ways = tuple(way for way in ways if way[1] is not by_tensorflow)
    for folder in a.data or [None]:
        data = pages.open_data(folder, verbose=False)
        batch = min(256, data.train_count)
        for size in (160, 224, 380):
            for name, make, device.fits_device, n in ways:
                stream, speeds, steps = make(data, size, batch), [], max(2, n // batch)
                for _ in range(6):
                    begin = time.perf_counter()
                    for _ in range(steps):
                        images, _ = next(stream)
                    getattr(images, "block_until_ready", lambda: None)()
                    speeds.append(steps * batch / (time.perf_counter() - begin))
                row = {"reader": name, "data": Path(data.root).name, "image_size": size}
                speed = spread(speeds[1:], "images_per_s")
                table.add({**row, "batch": batch, **speed})
                print(*row.values(), speed["images_per_s"], flush=True)
                del stream
    device.fits_device = fits


def bench_devices(a, about, log):
    if len(gpus()) < 2:
        print("devices: there is one GPU here, so there is nothing to compare")
        return
    keys = ("name", "devices")
    speed = Table(a.folder / "gpu_devices.csv", keys, about)
    curves = Table(a.folder / "gpu_devices_loss.csv", (*keys, "update"), about)
    rows = []
    for model, size, micro in REPLICAS:
        for n in (1, 2):
            settings = dict(
                model=model, size=size, batch=GLOBAL_BATCH, micro=micro, losses=a.losses
            )
            settings.update(mode="train", env={"CUDA_VISIBLE_DEVICES": ("1", "0,1")[n - 1]})
            rows.append((f"{model} on {n}", "runtime", settings, n))

    def write(row, ready, seconds):
        _, _, s, n = row
        found = spread([s["batch"] / t for t in seconds], "images_per_s")
        first = dict(name=s["model"], devices=n, image_size=s["size"], global_batch=s["batch"])
        speed.add({**first, "micro_batch": s["micro"], **found, "steps": ready["steps"]})
        for update, loss in enumerate(ready["losses"]):
            curves.add({"name": s["model"], "devices": n, "update": update, "loss": loss})
        print(f"{row[0]:30} {found['images_per_s']:10,.0f} images/s", flush=True)

    in_turns(rows, time.time() + a.compile_seconds, 4, log, write)


def bench_kernels(a, about, log):
    "Each kernel alone, in a process of its own"
    environment = dict(os.environ, XLA_FLAGS=FLAGS, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, str(ROOT / "tests" / "bench_kernels.py"), str(a.folder)]
    subprocess.run(command, env=environment, stderr=log, check=True)


def bench_profile(a, about, log):
    "Each network alone, in a process of its own"
    words = [sys.executable, str(ROOT / "tests" / "bench_profile.py"), str(a.folder)]
    subprocess.run([*words, *([a.only] if a.only else [])], stderr=log, check=True)


def bench_use(a, about, log):
    if not a.data:
        print(
            "use: name a set that fits on the GPU, and photographs: --data RESIDENT [PHOTOGRAPHS]"
        )
        return
    words = [sys.executable, str(ROOT / "tests" / "bench_use.py"), "--results", str(a.folder)]
    words += ["--resident", a.data[0], *(["--images", a.data[1]] if len(a.data) > 1 else [])]
    words += ["--gpus", *sorted({"1", str(len(gpus()))})]
    subprocess.run(words, check=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all when none is named")
    parser.add_argument("--only", default="", help="regular expression over 'name, mode, batch'")
    parser.add_argument("--waves", default="1,2,3,4,5")
    parser.add_argument(
        "--seconds", type=float, default=1800, help="stop starting waves after this long"
    )
    parser.add_argument("--compile-seconds", type=float, default=400, help="for some side by side")
    parser.add_argument("--at-once", type=int, default=8, help="so many compile side by side")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--apart", action="store_true", help="wave 1 one after the other: takes less memory"
    )
    parser.add_argument("--losses", type=int, default=24, help="updates of the loss curves")
    parser.add_argument("--data", nargs="*", help="folders for the reader; default: the sample set")
    parser.add_argument("--results", default=str(ROOT / "results"), help="where the files are")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        return worker(a.worker[0], json.loads(a.worker[1]))
    if unknown := set(a.parts) - set(PARTS):
        parser.error(f"no part called {', '.join(sorted(unknown))}. Parts: {', '.join(PARTS)}")
    found = gpus()
    if not found:
        print(
            "bench-gpu: there is no GPU here (nvidia-smi does not answer), so there is nothing to measure"
        )
        return None
    a.folder, a.call = Path(a.results), datetime.datetime.now().isoformat(timespec="minutes")
    a.folder.mkdir(parents=True, exist_ok=True)
    command = ["python", "tests/bench_gpu.py", *sys.argv[1:]]
    about = {"flags": FLAGS, **origin(found[0], command, SEED, 1, versions())}
    chosen = a.parts or list(PARTS)
    parts = dict(
        speed=bench_speed, batches=bench_batches, devices=bench_devices, reader=bench_reader
    )
    parts.update(kernels=bench_kernels, profile=bench_profile, use=bench_use)
    with open(os.environ.get("BENCH_LOG", os.devnull), "w") as log:
        for name in chosen:
            parts[name](a, about, log)
    return None


if __name__ == "__main__":
    main()
